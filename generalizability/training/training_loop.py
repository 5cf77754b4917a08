"""A run from its checkpoint, or from the start, to its last epoch or to a request to stop."""

import os
import shlex
import signal
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data.batches import Batches, make_batches
from data.image_sets import Halves
from distributed import Ranks
from recipes import RunConfig
from s3net_common.output_files import relative
from training.config import Flags
from training.engine import NonFiniteError, Progress, Trainer, average_buffers, evaluate
from training.optimization import make_trainer
from training.out_of_memory import out_of_memory_as_error
from training.reporting import TensorBoardLog, describe, diverged, epoch_line, large_loss_note, summarize
from training.run_folder import Run, load_progress, save_progress
from training.stopping import Stopped, StopSignal


def train(
    flags: Flags,
    run: Run,
    config: RunConfig,
    model: nn.Module,
    size: dict[str, int],
    data: Halves,
    ranks: Ranks,
    loader_workers: int,
) -> int:
    """Train to the last epoch, from the run's checkpoint or from the start. Return the exit code.

    `size` is from `s3net_networks.size.network_size`, `loader_workers` as of `make_batches`.
    """
    model.to(ranks.device, memory_format=torch.channels_last)
    batches = make_batches(config, data, ranks, loader_workers)
    steps = len(batches[0])
    trainer = make_trainer(model, config, steps, flags.get("compile", False), ranks, flags.get("graphs", False))
    trainer.stop_requested = stop = StopSignal()
    progress = load_progress(run, config, model, trainer, steps)
    trainer.checkpoint = partial(save_progress, run, config, model, trainer, progress)
    trainer.checkpoint_every = flags.get("checkpoint_every", 0)
    if config.init and progress.epoch == progress.step == 0:
        trainer.checkpoint()  # the file of --init is not needed again
    log = TensorBoardLog(run.folder, progress) if flags.get("tensorboard") and ranks.is_main else None
    if ranks.is_main:
        print(describe(run, config, size, trainer, progress), flush=True)

    advice = "let other programs free theirs, or use a smaller network or --image-size"
    try:
        with closing(batches[0]), closing(batches[1]), out_of_memory_as_error(advice):
            while progress.epoch < config.epochs:
                train_and_evaluate(trainer, batches, progress)
                if ranks.is_main:
                    row = progress.history[-1]
                    print(
                        epoch_line(row, config.epochs), *large_loss_note(row, len(config.classes)), sep="\n", flush=True
                    )
                if log:
                    log.write(progress.history[-1])
    except NonFiniteError as error:
        message = diverged(error, run, config)
        run.record_failure(message)
        if ranks.is_main:
            print(f"error: {message}", file=sys.stderr)
        return 1
    except Stopped:
        record_stop(flags, run, ranks)
        return 128 + (stop.number or signal.SIGTERM)
    if ranks.is_main:
        run.finish(summarize(config, size, progress, trainer))
        print_end(run, progress)
    return 0


def record_stop(flags: Flags, run: Run, ranks: Ranks) -> None:
    """Record that the run was stopped, and print the command that resumes it."""
    command = resume_command(flags, run.folder)
    ranks.on_main_rank(lambda: run.record_stop(command))  # a batch system may kill all ranks after the first end
    if ranks.is_main:
        print(f"stopped; resume with\n  {command}", flush=True)


def print_end(run: Run, progress: Progress) -> None:
    """Print the best and the last error of a finished run, and where its files are."""
    best, last = progress.best(), progress.history[-1]
    print(
        f"best error {best['val_error']:.2f}% at epoch {best['epoch']}, last {last['val_error']:.2f}%: "
        f"weights, curves and metrics are in {relative(run.folder)}",
        flush=True,
    )


def train_and_evaluate(trainer: Trainer, batches: Batches, progress: Progress) -> None:
    """Train the rest of an epoch and evaluate, with a checkpoint after either.

    Raises:
        NonFiniteError: a training loss or a weight is infinite or NaN. The validation loss may be anything.
        Stopped: a rank was asked to stop. The last checkpoint contains all finished steps.
    """
    training_batches, validation_batches = batches
    if progress.step < len(training_batches):
        trainer.train_epoch(training_batches, progress)
        trainer.checkpoint()
    model = trainer.evaluated_model
    average_buffers(trainer.plain_model, trainer.ranks)
    if model is not trainer.plain_model:
        average_buffers(model, trainer.ranks)
    started = time.perf_counter()
    validation = evaluate(model, validation_batches, trainer)
    progress.finish_epoch(trainer.training_metrics(progress), validation, time.perf_counter() - started)
    trainer.checkpoint()


def resume_command(flags: Flags, folder: Path) -> str:
    """Return the shell command that resumes this run from the same working directory.

    With several nodes, run it on each node.
    """
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    if "out" not in flags:
        words += ["--out", str(relative(folder))]
    program = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        program = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
        if (nodes := os.environ.get("GROUP_WORLD_SIZE", "1")) != "1":
            endpoint = f"{os.environ['MASTER_ADDR']}:29500"
            program += [f"--nnodes={nodes}", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}"]
    return shlex.join([*program, sys.argv[0], *words, "--resume"])
