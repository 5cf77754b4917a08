"""The training script's flags, and from them the configuration of a run."""

import json
import math
import os
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import tyro

from baselines import fix_options, list_networks
from command_line import flag
from data import DATASETS, ImageSet
from disk_images import DiskImages
from engine import SCHEDULES, Precision
from models import CONNECTIONS, InputError, nearest_names
from recipes import RECIPES, recipe_for
from reporting import relative
from runs import RunConfig
from workers import Workers

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_DATASET = "cifar100"
Halves = tuple[ImageSet, ImageSet] | tuple[DiskImages, DiskImages]  # training and validation images


RECIPE, NETWORK = "the data set's recipe", "the network's own"


@dataclass
class Args:
    """Train S3-Net, or a network to compare it with, on images."""

    dataset: flag(str, f"{{{','.join(DATASETS)}}}", DEFAULT_DATASET) = None
    """Images to train on: scikit-learn's digits (embedded), CIFAR-100, Tiny ImageNet, ImageNet, or your own."""
    data_dir: flag(Path, "DIR", "data/<dataset>") = None
    """Where the images are: cifar-100-python/, tiny-imagenet-200/, train.lmdb and val.lmdb, or train/<class>/* and
    val/<class>/* (or test/<class>/*)."""
    download: bool = False
    """Fetch Tiny ImageNet (237 MiB) if it is not there. CIFAR-100 is fetched without asking."""
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
    accumulate: flag(int, "N", "1") = None
    """Compute each step in so many parts, one after the other: a large batch in little memory. The gradient is that of
    the whole batch; BatchNorm sees the parts."""
    lr: flag(float, "FLOAT", RECIPE) = None
    """Learning rate of SGD: the peak one for onecycle, else the first."""
    momentum: flag(float, "FLOAT", RECIPE) = None
    """Momentum of SGD."""
    weight_decay: flag(float, "FLOAT", RECIPE) = None
    """L2 penalty."""
    schedule: flag(str, f"{{{','.join(SCHEDULES)}}}", RECIPE) = None
    """Course of the learning rate: a tenth after each milestone, up and down, or down a half cosine."""
    image_size: flag(int, "INT", RECIPE) = None
    """Height and width in pixels of the images as the network sees them."""
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
    workers: flag(int, "N", "one a processor") = None
    """Workers of each process that decode image files: processes for ImageNet, whose images stay on disk (0 for none),
    threads for the others."""
    skip_unreadable: bool = False
    """Leave out image files that cannot be read, and count them, instead of stopping."""

    out: flag(Path, "DIR", "runs/<dataset>-<model>-s<seed>") = None
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in --out (start it if there is none yet)."""
    checkpoint_every: flag(int, "N", "each epoch only") = None
    """Also save a checkpoint every so many steps of an epoch."""
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


POSITIVE = [
    "epochs",
    "batch_size",
    "accumulate",
    "checkpoint_every",
    "num_classes",
    "hold_out",
    "limit_train",
    "limit_val",
]
NETWORK_FLAGS = ("growth_rate", "depth", "drop_rate", "connections")
LOWEST = {
    **dict.fromkeys(POSITIVE, 1),
    **dict.fromkeys(("momentum", "weight_decay", "seed", "workers"), 0),
    "image_size": 4,
}


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
    if args.seed is not None and args.seed >= 2**62:
        raise InputError(f"--seed {args.seed} is not possible: give a number below 2^62")
    if args.checkpoint is not None and not args.eval_only:
        raise InputError("--checkpoint is for --eval-only: leave it out, or pass --resume to go on with a run")


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
    """The command that goes on with this run, from the same working directory; with several nodes, on each of them."""
    flags = [flag for flag in sys.argv[1:] if flag not in ("--resume", "--overwrite")]
    if args.out is None:
        flags += ["--out", str(relative(folder))]
    program = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        program = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
        if (nodes := os.environ.get("GROUP_WORLD_SIZE", "1")) != "1":
            meeting = f"{os.environ['MASTER_ADDR']}:29500"
            program += [f"--nnodes={nodes}", "--rdzv_backend=c10d", f"--rdzv_endpoint={meeting}"]
    return shlex.join([*program, sys.argv[0], *flags, "--resume"])


def resolve_config(args: Args, amp_given: bool, data: Halves, device: torch.device) -> RunConfig:
    """Fill in what the flags leave open from the data set's recipe.

    Raises:
        InputError: a value is out of its range, or does not fit the data.
    """
    train, val = data
    recipe = asdict(recipe_for(args.dataset, args.model))
    given = {key: getattr(args, key) for key in recipe if getattr(args, key, None) is not None}
    network_flags = {key: getattr(args, key) for key in NETWORK_FLAGS if getattr(args, key) is not None}
    config = RunConfig(
        dataset=args.dataset,
        **recipe | given,
        model_options=network_flags,
        num_classes=len(train.classes) if args.num_classes is None else args.num_classes,
        accumulate=args.accumulate or 1,
        seed=args.seed or 0,
        amp=args.amp if amp_given else Precision.pays(device),
        limit_train=args.limit_train,
        limit_val=args.limit_val,
        hold_out=args.hold_out,
        train_images=len(train),
        val_images=len(val),
        classes=train.classes,
    )
    config.model_options = fix_options(config.model, network_flags)
    if config.num_classes < len(config.classes):
        raise InputError(
            f"--num-classes {config.num_classes} is too small: the data have {len(config.classes)} classes"
        )
    if config.accumulate > config.batch_size:
        raise InputError(f"--accumulate {config.accumulate} is too large: the batch has {config.batch_size} images")
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


def check_same_data(data: Halves, started: RunConfig, folder: Path) -> None:
    """Raises InputError where the data are not those that the run was started on."""
    now = (len(data[0]), len(data[1]), data[0].classes)
    if now != (started.train_images, started.val_images, started.classes):
        raise InputError(
            f"the data are not those that {relative(folder)} was started on ({started.train_images} + "
            f"{started.val_images} images of {len(started.classes)} classes then, {now[0]} + {now[1]} of {len(now[2])} "
            "now): pass the same --data-dir, or start a new run with another --out"
        )
