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

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

from baselines import create_network, list_networks
from command_line import run_script
from cpu_kernels import keep_freed_memory
from data import DATASETS, EvaluationBatches, ImageSet, load_dataset
from engine import (
    EVAL_BATCH,
    SCHEDULES,
    NonFiniteLossError,
    Precision,
    StopSignal,
    Trainer,
    Workers,
    average_buffers,
    evaluate,
    make_batches,
    make_trainer,
    random_state,
    set_random_state,
    start_workers,
)
from models import CONNECTIONS, InputError, load_weights, nearest_names
from recipes import RECIPES
from reporting import TensorBoardLog, describe, diverged, epoch_line, network_facts, relative, summarize
from runs import Progress, Run, RunConfig, read_metadata

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_DATASET = "cifar100"


def flag(kind: type, shown: str, default: str) -> type:
    """The type of a flag that may be left out; --help shows `shown` for its value and says what it then is."""
    return Annotated[kind | None, tyro.conf.arg(metavar=shown, help_behavior_hint=f"(default: {default})")]


RECIPE, NETWORK = "the data set's recipe", "the network's own"


@dataclass
class Args:
    """Train S3-Net, or a network to compare it with, on images."""

    dataset: flag(str, f"{{{','.join(DATASETS)}}}", DEFAULT_DATASET) = None
    """Images to train on: scikit-learn's digits (embedded), CIFAR-100, or your own in class folders."""
    data_dir: flag(Path, "DIR", "data/<dataset>") = None
    """Where the images are: cifar-100-python/, or train/<class>/* and val/<class>/* (or test/<class>/*)."""
    model: flag(str, "NAME", RECIPE) = None
    """Network to train; --list-models names them."""
    growth_rate: flag(int, "INT", NETWORK) = None
    """Channels that each layer gives (k)."""
    depth: flag(int, "INT", NETWORK) = None
    """Layers of a CIFAR network in all; depth - 4 is divisible by 3."""
    drop_rate: flag(float, "FLOAT", NETWORK) = None
    """Dropout after each layer, 0 to below 1."""
    connections: flag(str, f"{{{','.join(CONNECTIONS)}}}", "sparse") = None
    """An S3-Net's connections: its own, or for an ablation no shortcuts, or every layer reading all before it."""
    num_classes: flag(int, "INT", "the data's") = None
    """Outputs of the network."""

    epochs: flag(int, "INT", RECIPE) = None
    """Passes over the training images."""
    batch_size: flag(int, "INT", RECIPE) = None
    """Images a step, over all processes together."""
    lr: flag(float, "FLOAT", RECIPE) = None
    """Learning rate of SGD: the peak one for onecycle, else the first."""
    momentum: flag(float, "FLOAT", RECIPE) = None
    """Momentum of SGD."""
    weight_decay: flag(float, "FLOAT", RECIPE) = None
    """L2 penalty."""
    schedule: flag(str, f"{{{','.join(SCHEDULES)}}}", RECIPE) = None
    """Course of the learning rate: a tenth after each milestone, up and down, or down a half cosine."""
    image_size: flag(int, "INT", RECIPE) = None
    """Height and width in pixels that the images of --dataset folder are brought to."""
    seed: flag(int, "INT", "0") = None
    """Decides the initial weights, the order of the images and their augmentation."""
    hold_out: flag(int, "N", "the data set's own validation images") = None
    """Validate on so many of the training images instead, and don't train on them: for choosing settings."""
    limit_train: flag(int, "N", "all") = None
    """Train on so many of the training images only."""
    limit_val: flag(int, "N", "all") = None
    """Evaluate on so many of the validation images only."""

    device: flag(str, "{cpu,cuda,cuda:N,mps}", "a GPU if there is one") = None
    """Where to compute. Under torchrun, cuda gives each process the GPU of its LOCAL_RANK."""
    amp: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: where it is faster)")] = True
    """Mixed precision: bfloat16, or float16 with a gradient scaler on CUDA devices that lack it."""
    compile: bool = False
    """Compile the network with torch.compile (on a CPU it needs a C++ compiler)."""
    workers: int = 0
    """Threads that decode image files; 0 for as many as there are processors."""
    skip_unreadable: bool = False
    """Leave out image files that cannot be read, and count them, instead of stopping."""

    out: flag(Path, "DIR", "runs/<dataset>-<model>-s<seed>") = None
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in --out (start it if there is none yet)."""
    overwrite: bool = False
    """Replace a run that is already in --out."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard events, into <out>/tensorboard."""

    eval_only: bool = False
    """Measure the error of --checkpoint and stop."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Weights for --eval-only: ours (.safetensors, .pt) or the ones that the paper's authors published."""
    list_models: bool = False
    """Print the networks' names and stop."""


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
    if started:
        check_same_data(data, started, run.folder)
        return train(args, run, started, data, workers)
    config = resolve_config(args, amp_given, data, workers.device)
    create_network(config.model, config.num_classes, **config.model_options)  # raises before anything is written
    workers.from_main(lambda: run.create(config))
    return train(args, run, config, data, workers)


# ---- From flags to a run ------------------------------------------------------------------------------------------

NETWORK_FLAGS = ("growth_rate", "depth", "drop_rate", "connections")
LOWEST = {
    **dict.fromkeys(("epochs", "batch_size", "num_classes", "hold_out", "limit_train", "limit_val"), 1),
    **dict.fromkeys(("momentum", "weight_decay", "seed", "workers"), 0),
    "image_size": 4,
}


def open_run(args: Args, amp_given: bool, run: Run) -> RunConfig | None:
    """The configuration of the run that is to be resumed, or None where a new one is to be started.

    Raises:
        InputError: the folder cannot be written; or holds a run and neither --resume nor --overwrite is given; or a
            flag differs from what the run was started with.
    """
    run.check_writable()  # before the data are read, which may take a while
    if not run.exists() or args.overwrite:
        return None
    if not args.resume:
        raise InputError(
            f"{relative(run.folder)} already holds a run: pass --resume to go on with it, --overwrite to replace it, "
            "or another --out"
        )
    started = run.read_config()
    check_same_recipe(args, amp_given, started)
    return started


def check_flags(args: Args) -> None:
    """Raises InputError for a name that there is not (with the nearest ones), or a number out of its range."""
    for what, name, known in (
        ("data set", args.dataset, DATASETS),
        ("network", args.model, list_networks()),
        ("schedule", args.schedule, SCHEDULES),
    ):
        if name is not None and name not in known:
            raise InputError(f"there is no {what} {name!r}: {nearest_names(name, known)}")
    for key, lowest in LOWEST.items():
        value = getattr(args, key)
        if value is not None and not lowest <= value < math.inf:
            raise InputError(f"--{key.replace('_', '-')} {value} is not possible: give a number of {lowest} or more")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise InputError(f"--lr {args.lr} is not possible: give a number above 0")


def check_tools(args: Args, workers: Workers) -> None:
    """Raises InputError where a flag needs something that is not installed."""
    if args.tensorboard and find_spec("tensorboard") is None:
        raise InputError("TensorBoard is not installed: pip install tensorboard, or leave out --tensorboard")
    if args.compile and workers.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
        raise InputError("--compile on a CPU needs a C++ compiler, and there is none: leave it out")


def default_folder(args: Args) -> Path:
    """`runs/<dataset>-<model>-s<seed>` beside this experiment's folder."""
    dataset = args.dataset or DEFAULT_DATASET
    return ROOT / "runs" / f"{dataset}-{args.model or RECIPES[dataset].model}-s{args.seed or 0}"


def resume_command(args: Args, folder: Path) -> str:
    """The command that goes on with this run, from the same working directory."""
    flags = [flag for flag in sys.argv[1:] if flag not in ("--resume", "--overwrite")]
    if args.out is None:
        flags += ["--out", str(relative(folder))]
    program = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        program = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    return shlex.join([*program, sys.argv[0], *flags, "--resume"])


def read_data(args: Args, workers: Workers) -> tuple[ImageSet, ImageSet]:
    """The images that the flags name. One process of each node reads first: it may have to download."""
    first_of_node = int(os.environ.get("LOCAL_RANK", 0)) == 0

    def read() -> tuple[ImageSet, ImageSet]:
        return load_dataset(
            args.dataset,
            args.data_dir or ROOT / "data" / args.dataset,
            args.image_size or RECIPES[args.dataset].image_size,
            args.workers,
            args.skip_unreadable,
        )

    halves = workers.together(lambda: read() if first_of_node else None)
    halves = workers.together(lambda: halves or read())
    if workers.is_main and (skipped := sum(half.skipped for half in halves)):
        print(f"left out {skipped} unreadable images", flush=True)
    if args.hold_out is not None:
        halves = workers.together(lambda: halves[0].hold_out(args.hold_out))
    return tuple(half.subset(limit) for half, limit in zip(halves, (args.limit_train, args.limit_val), strict=True))


def resolve_config(args: Args, amp_given: bool, data: tuple[ImageSet, ImageSet], device: torch.device) -> RunConfig:
    """Fill in what the flags leave open from the data set's recipe.

    Raises:
        InputError: a value is out of its range, or does not fit the data.
    """
    train, val = data
    recipe = asdict(RECIPES[args.dataset])
    given = {key: getattr(args, key) for key in recipe if getattr(args, key, None) is not None}
    config = RunConfig(
        dataset=args.dataset,
        **recipe | given,
        model_options={key: getattr(args, key) for key in NETWORK_FLAGS if getattr(args, key) is not None},
        num_classes=len(train.classes) if args.num_classes is None else args.num_classes,
        seed=args.seed or 0,
        amp=args.amp if amp_given else Precision.pays(device),
        limit_train=args.limit_train,
        limit_val=args.limit_val,
        hold_out=args.hold_out,
        train_images=len(train),
        val_images=len(val),
        classes=train.classes,
    )
    if config.num_classes < len(config.classes):
        raise InputError(
            f"--num-classes {config.num_classes} is too small: the data have {len(config.classes)} classes"
        )
    return RunConfig(**json.loads(json.dumps(asdict(config))))  # tuples become lists, as in config.json


def check_same_recipe(args: Args, amp_given: bool, started: RunConfig) -> None:
    """Raises InputError where a given flag differs from what the run was started with; the message names it."""
    before = asdict(started) | {key: started.model_options.get(key) for key in NETWORK_FLAGS}
    for key, value in before.items():
        asked = getattr(args, key, None) if key != "amp" or amp_given else None
        if asked is not None and asked != value:
            flag = "--" + key.replace("_", "-")
            default = "its default" if value is None else value
            raise InputError(
                f"{flag} {asked} changes the recipe of the run, which was started with {default}: "
                f"leave {flag} out to resume, or start a new run with another --out"
            )


def check_same_data(data: tuple[ImageSet, ImageSet], started: RunConfig, folder: Path) -> None:
    """Raises InputError where the data are not those that the run was started on."""
    now = (len(data[0]), len(data[1]), data[0].classes)
    if now != (started.train_images, started.val_images, started.classes):
        raise InputError(
            f"the data are not those that {relative(folder)} was started on ({started.train_images} + "
            f"{started.val_images} images of {len(started.classes)} classes then, {now[0]} + {now[1]} of {len(now[2])} "
            "now): pass the same --data-dir, or start a new run with another --out"
        )


# ---- Training -----------------------------------------------------------------------------------------------------


def train(args: Args, run: Run, config: RunConfig, data: tuple[ImageSet, ImageSet], workers: Workers) -> int:
    """Train from the run's checkpoint, or from the start, to the last epoch; returns the exit code."""
    torch.manual_seed(config.seed)
    model = create_network(config.model, config.num_classes, **config.model_options)
    model.to(workers.device, memory_format=torch.channels_last)
    facts = network_facts(model, data[0].images.shape[-2:], workers.device)
    batches, val_batches = make_batches(config, data, workers)
    trainer = make_trainer(model, config, len(batches), args.compile, workers)
    trainer.stop_requested = stop = StopSignal()
    progress = load_progress(run, model, trainer)
    log = TensorBoardLog(run.folder, progress) if args.tensorboard and workers.is_main else None
    if workers.is_main:
        print(describe(run, config, facts, trainer, progress), flush=True)

    while progress.epoch < config.epochs:
        try:
            finished = trainer.train_epoch(batches, progress)
        except NonFiniteLossError as error:
            if workers.is_main:
                print(diverged(error, run, config), file=sys.stderr)
            return 1
        if finished:
            average_buffers(model, workers)
            started = time.perf_counter()
            validation = evaluate(model, val_batches, trainer)
            progress.end_epoch(trainer.training_metrics(progress), validation, time.perf_counter() - started)
        save_progress(run, config, model, trainer, progress)
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
    recipe = RECIPES[args.dataset]
    args.image_size = args.image_size or said.get("image_size")
    _, val = read_data(args, workers)
    num_classes = args.num_classes or said.get("num_classes", len(val.classes))
    if num_classes < len(val.classes):
        raise InputError(f"the weights are for {num_classes} classes and the data have {len(val.classes)}")
    flags = {key: getattr(args, key) for key in NETWORK_FLAGS if getattr(args, key) is not None}
    network = args.model or said.get("model", recipe.model)
    model = create_network(network, num_classes, **(said.get("model_options", {}) | flags))
    load_weights(model, args.checkpoint)
    model.to(workers.device, memory_format=torch.channels_last)
    mean, std = said.get("mean", recipe.mean), said.get("std", recipe.std)
    precision = Precision(workers.device, args.amp if amp_given else Precision.pays(workers.device))
    metrics = evaluate(
        model,
        EvaluationBatches(val, EVAL_BATCH, workers.device, mean, std),
        Trainer(model, None, None, precision, workers),
    )
    if workers.is_main:
        print(
            f"{network} on {args.dataset}: error {metrics['val_error']:.2f}%, top-5 error "
            f"{metrics['val_top5_error']:.2f}%, loss {metrics['val_loss']:.4f} over {len(val):,} images"
        )
        print(json.dumps(metrics | {"images": len(val)}))
    return 0


if __name__ == "__main__":
    run_script(lambda args: main(args, amp_given=not {"--amp", "--no-amp"}.isdisjoint(sys.argv)), Args, __doc__)
