"""Train S3-Net, or a network to compare it with, on images.

One process (a GPU if there is one, else the CPU):
    python train_s3net.py                                     # S3-Net k=12, depth=40 on CIFAR-100, as in the paper
    python train_s3net.py --dataset digits                    # two minutes on a laptop, nothing to download
    python train_s3net.py --dataset folder --data-dir my/images --image-size 64
    python train_s3net.py --resume                            # go on where a run was ended

Several GPUs of one node, the batch divided between them:
    torchrun --nproc_per_node=4 train_s3net.py

Several nodes (the same on each of them):
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_s3net.py

The error of saved weights:
    python train_s3net.py --eval-only --checkpoint runs/cifar100-s3net_cifar-s0/best.safetensors
"""

import os
import signal
import sys
import time
from contextlib import closing
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

from arguments import (
    DEFAULT_DATASET,
    NETWORK_FLAGS,
    ROOT,
    Args,
    Halves,
    check_flags,
    check_same_data,
    check_same_recipe,
    check_tools,
    default_folder,
    resolve_config,
    resume_command,
)
from baselines import create_network, list_networks
from command_line import run_script
from cpu_kernels import keep_freed_memory
from data import load_dataset
from engine import (
    Batches,
    NonFiniteLossError,
    Precision,
    StopSignal,
    Trainer,
    average_buffers,
    evaluate,
    make_batches,
    make_evaluation_batches,
    make_trainer,
    random_state,
    set_random_state,
)
from models import InputError, load_weights, read_metadata
from recipes import RECIPES, recipe_for
from reporting import TensorBoardLog, describe, diverged, epoch_line, facts_of, network_facts, relative, summarize
from runs import Progress, Run, RunConfig, json_line
from workers import Workers, start_workers


def main(args: Args, amp_given: bool) -> int:
    """Do what the command line says; returns the exit code.

    Raises:
        InputError: something that the user gave cannot be used.
    """
    if args.list_models:
        print("\n".join(list_networks()))
        return 0
    check_flags(args)
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    workers = start_workers(args.device)
    check_tools(args, workers)
    if args.eval_only:
        return evaluate_checkpoint(args, amp_given, workers)
    run = Run(args.out or default_folder(args))
    started = workers.from_main(lambda: open_run(args, amp_given, run))
    args.dataset = started.dataset if started else args.dataset or DEFAULT_DATASET
    if started:
        args.image_size, args.limit_train, args.limit_val = started.image_size, started.limit_train, started.limit_val
        args.hold_out = started.hold_out
    data = read_data(args, workers)
    config = started or resolve_config(args, amp_given, data, workers.device)
    facts = facts_of(config.model, config.num_classes, config.model_options, config.image_size)
    if started:
        check_same_data(data, started, run.folder)
        workers.from_main(run.hold)
    else:  # nothing is wrong with the configuration, so it may be written
        workers.from_main(lambda: run.create(config))
    try:
        return train(args, run, config, facts, data, workers)
    finally:
        run.release()


def open_run(args: Args, amp_given: bool, run: Run) -> RunConfig | None:
    """The configuration of the run that is to be resumed, or None where a new one is to be started.

    Raises:
        InputError: the folder cannot be written; or holds a run and neither --resume nor --overwrite is given; or a
            flag differs from what the run was started with.
    """
    run.check_writable()  # before the data are read, which may take a while
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun started all processes anew
    if not run.exists() or (args.overwrite and not restarted):
        return None
    if not args.resume and not restarted:
        raise InputError(
            f"{relative(run.folder)} already holds a run: pass --resume to go on with it, --overwrite to replace it, "
            "or another --out"
        )
    started = run.read_config()
    check_same_recipe(args, amp_given, started)
    return started


def read_data(args: Args, workers: Workers) -> Halves:
    """The images that the flags name. One process of each node reads first: it may have to download."""
    first_of_node = int(os.environ.get("LOCAL_RANK", 0)) == 0

    def read() -> Halves:
        return load_dataset(
            args.dataset,
            args.data_dir or ROOT / "data" / args.dataset,
            image_size=args.image_size or RECIPES[args.dataset].image_size,
            workers=max(1, reader_count(args)),
            skip_unreadable=args.skip_unreadable,
            download=args.download,
        )

    halves = workers.together(lambda: read() if first_of_node else None)
    halves = workers.together(lambda: halves or read())
    if workers.is_main and (skipped := sum(half.skipped for half in halves)):
        print(f"left out {skipped} unreadable images", flush=True)
    if args.hold_out is not None:
        halves = workers.together(lambda: halves[0].hold_out(args.hold_out))
    return tuple(half.subset(limit) for half, limit in zip(halves, (args.limit_train, args.limit_val), strict=True))


def reader_count(args: Args) -> int:
    """How many workers decode images for this process: by default its share of the processors that it may use."""
    if args.workers is not None:
        return args.workers
    # Slurm and containers give a process some of the machine's processors.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ---- Training -----------------------------------------------------------------------------------------------------


def train(args: Args, run: Run, config: RunConfig, facts: dict[str, int], data: Halves, workers: Workers) -> int:
    """Train from the run's checkpoint, or from the start, to the last epoch; returns the exit code.

    `facts` are those of `reporting.network_facts`.
    """
    torch.manual_seed(config.seed)
    model = create_network(config.model, config.num_classes, **config.model_options)
    model.to(workers.device, memory_format=torch.channels_last)
    batches, val_batches = make_batches(config, data, workers, reader_count(args))
    trainer = make_trainer(model, config, len(batches), args.compile, workers)
    trainer.stop_requested = stop = StopSignal()
    progress = load_progress(run, model, trainer)
    trainer.checkpoint = save = partial(save_progress, run, config, model, trainer, progress)
    trainer.checkpoint_every = args.checkpoint_every or 0
    log = TensorBoardLog(run.folder, progress) if args.tensorboard and workers.is_main else None
    if workers.is_main:
        print(describe(run, config, facts, trainer, progress), flush=True)

    with closing(batches), closing(val_batches):
        while progress.epoch < config.epochs:
            try:
                finished = run_epoch(model, trainer, (batches, val_batches), progress)
            except NonFiniteLossError as error:
                if workers.is_main:
                    print(diverged(error, run, config), file=sys.stderr)
                return 1
            save()
            if finished and workers.is_main:
                print(epoch_line(progress.history[-1], config.epochs), flush=True)
                if log:
                    log.write(progress.history[-1])
            if progress.epoch < config.epochs and trainer.should_stop():
                if workers.is_main:
                    print(f"stopped; go on with\n  {resume_command(args, run.folder)}", flush=True)
                return 128 + (stop.number or signal.SIGTERM)
    if workers.is_main:
        run.finish(summarize(config, facts, progress, trainer))
        best, last = progress.best(), progress.history[-1]
        print(
            f"best error {best['val_error']:.2f}% at epoch {best['epoch']}, last {last['val_error']:.2f}%: "
            f"weights, curves and metrics are in {relative(run.folder)}",
            flush=True,
        )
    return 0


def run_epoch(model: nn.Module, trainer: Trainer, halves: Batches, progress: Progress) -> bool:
    """Train one epoch, or what is left of it, and evaluate; False where it was stopped in between.

    Raises:
        NonFiniteLossError: in training; the validation loss may be anything.
    """
    batches, val_batches = halves
    if not trainer.train_epoch(batches, progress):
        return False
    average_buffers(model, trainer.workers)
    started = time.perf_counter()
    validation = evaluate(model, val_batches, trainer)
    progress.end_epoch(trainer.training_metrics(progress), validation, time.perf_counter() - started)
    return True


def load_progress(run: Run, model: nn.Module, trainer: Trainer) -> Progress:
    """Put everything back as the run's checkpoint has it; a fresh start where there is none."""
    workers = trainer.workers
    state = workers.from_main(run.read_checkpoint)
    if state is None:
        return Progress()
    try:
        model.load_state_dict(state["model"])
        trainer.load_state(state)
        progress = Progress(**state["progress"])
        same_processes = len(state["processes"]) == workers.world_size
        if same_processes:
            mine = state["processes"][workers.rank]
            set_random_state(mine["random"], workers.device)
            model.load_state_dict(mine["buffers"], strict=False)
            progress.losses, progress.errors = mine["losses"], mine["errors"]
        elif not workers.is_main:
            progress.losses, progress.errors = [], 0
        else:
            progress.losses = [loss for process in state["processes"] for loss in process["losses"]]
            progress.errors = sum(process["errors"] for process in state["processes"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            f"{run.folder / 'last.pt'} does not fit this run: start a new one with another --out"
        ) from error
    if workers.is_main and not same_processes:
        print(f"the run had {len(state['processes'])} processes, not {workers.world_size}: not exactly the same")
    workers.from_main(lambda: run.publish(state))
    return progress


def save_progress(run: Run, config: RunConfig, model: nn.Module, trainer: Trainer, progress: Progress) -> None:
    """Write the checkpoint, and what follows from it, from the main process."""
    workers = trainer.workers
    in_mid_epoch = workers.world_size > 1 and progress.step > 0  # else the buffers are the same in all processes
    buffers = {name: b.cpu() for name, b in model.named_buffers()} if in_mid_epoch else {}
    mine = {"random": random_state(workers.device), "buffers": buffers}
    mine |= {"losses": progress.losses, "errors": progress.errors}
    state = {
        "config": asdict(config),
        "progress": asdict(progress),
        "model": model.state_dict(),
        "processes": workers.gather(mine),
        **trainer.state(),
    }
    workers.from_main(lambda: run.save(state))


# ---- Evaluation only ----------------------------------------------------------------------------------------------


def evaluate_checkpoint(args: Args, amp_given: bool, workers: Workers) -> int:
    """Measure the error of a file of weights. What it says of itself holds where no flag says otherwise."""
    if args.checkpoint is None:
        raise InputError("--eval-only needs the weights: pass --checkpoint FILE")
    said = read_metadata(args.checkpoint)
    args.dataset = args.dataset or said.get("dataset", DEFAULT_DATASET)
    recipe = recipe_for(args.dataset)
    args.image_size = args.image_size or said.get("image_size", recipe.image_size)
    _, val = read_data(args, workers)
    num_classes = args.num_classes or said.get("num_classes", len(val.classes))
    if num_classes < len(val.classes):
        raise InputError(f"the weights are for {num_classes} classes and the data have {len(val.classes)}")
    flags = {key: getattr(args, key) for key in NETWORK_FLAGS if getattr(args, key) is not None}
    network = args.model or said.get("model", recipe.model)
    options = said.get("model_options", {}) if network == said.get("model") else {}
    model = create_network(network, num_classes, **(options | flags))
    load_weights(model, args.checkpoint)
    model.to(workers.device, memory_format=torch.channels_last)
    mean, std = said.get("mean", recipe.mean), said.get("std", recipe.std)
    precision = Precision(workers.device, args.amp if amp_given else Precision.pays(workers.device))
    facts = network_facts(model, args.image_size, workers.device)
    with closing(make_evaluation_batches(val, workers, mean, std, args.image_size, reader_count(args))) as batches:
        metrics = evaluate(model, batches, Trainer(model, None, None, precision, workers))
    if workers.is_main:
        print(
            f"{network} on {args.dataset}: error {metrics['val_error']:.2f}%, top-5 error "
            f"{metrics['val_top5_error']:.2f}%, loss {metrics['val_loss']:.4f} over {len(val):,} images"
        )
        print(json_line(metrics | {"images": len(val)} | facts))
    return 0


if __name__ == "__main__":
    run_script(lambda args: main(args, amp_given=not {"--amp", "--no-amp"}.isdisjoint(sys.argv)), Args, __doc__)
