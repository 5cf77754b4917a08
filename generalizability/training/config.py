"""From the flags that the user gave to the configuration of a run."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.datasets import DATASETS
from data.image_sets import Halves
from recipes import RunConfig, recipe_for
from s3net_common.errors import InputError, nearest_names
from s3net_common.output_files import relative
from s3net_networks import fix_options, list_networks
from training.engine import SCHEDULES, Precision

Flags = dict[str, Any]  # the flags that the user gave, by name; see s3net_common.command_line.given_flags

DEFAULT_DATASET = "cifar100"
NETWORK_FLAGS = ("growth_rate", "depth", "drop_rate", "connections")
# Flags that are no part of the recipe. The run's folder keeps them, and --resume uses them if they are not given again.
ENVIRONMENT_FLAGS = {
    **dict.fromkeys(("data_dir", "device"), str),
    **dict.fromkeys(("workers", "checkpoint_every", "max_pixels"), int),
    **dict.fromkeys(("skip_unreadable", "compile", "tensorboard"), bool),
}
DATA_FLAGS = ("dataset", "image_size", "hold_out", "limit_train", "limit_val")  # which images, and how they are read
MINIMUM = {
    **dict.fromkeys(("epochs", "batch_size", "accumulate", "checkpoint_every", "num_classes"), 1),
    **dict.fromkeys(("limit_train", "limit_val"), 1),
    **dict.fromkeys(("momentum", "weight_decay", "seed", "workers"), 0),
    "image_size": 4,
}


def check_flags(flags: Flags) -> None:
    """Check names and ranges before anything is read or computed.

    Raises:
        InputError: a name is unknown (the message lists close matches) or a number is out of range.
    """
    for kind, name, known in (
        ("data set", flags.get("dataset"), DATASETS),
        ("network", flags.get("model"), list_networks()),
        ("schedule", flags.get("schedule"), SCHEDULES),
    ):
        if name is not None and name not in known:
            raise InputError(f"there is no {kind} {name!r}: {nearest_names(name, known)}")
    for name, minimum in MINIMUM.items():
        value = flags.get(name, minimum)
        if not minimum <= value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value} is not possible: give a number of {minimum} or more")
    held_out = flags.get("hold_out", 1)
    if not (0 < held_out < 1 or (isinstance(held_out, int) and held_out >= 1)):
        raise InputError(
            f"--hold-out {held_out} is not possible: give a number of images of 1 or more, or a fraction below 1"
        )
    if not 0 < flags.get("lr", 1) < math.inf:
        raise InputError(f"--lr {flags['lr']} is not possible: give a number above 0")
    if flags.get("seed", 0) >= 2**62:
        raise InputError(f"--seed {flags['seed']} is not possible: give a number below 2^62")
    if "checkpoint" in flags and not flags.get("eval_only"):
        raise InputError("--checkpoint is for --eval-only: leave it out, or pass --resume to resume a run")


def resolve_config(flags: Flags, data: Halves, device: torch.device) -> RunConfig:
    """Return the configuration of a new run: the flags, completed by the data set's recipe.

    Raises:
        InputError: a value is out of its range, or does not fit the data.
    """
    train, val = data
    dataset = flags.get("dataset", DEFAULT_DATASET)
    recipe = asdict(recipe_for(dataset, flags.get("model")))
    recipe |= {name: flags[name] for name in recipe if name in flags}
    network_flags = {name: flags[name] for name in NETWORK_FLAGS if name in flags}
    config = RunConfig(
        dataset=dataset,
        **recipe,
        model_options=fix_options(recipe["model"], network_flags),
        num_classes=flags.get("num_classes", len(train.classes)),
        accumulate=flags.get("accumulate", 1),
        seed=flags.get("seed", 0),
        amp=flags.get("amp", Precision.is_faster(device)),
        limit_train=flags.get("limit_train"),
        limit_val=flags.get("limit_val"),
        hold_out=flags.get("hold_out"),
        train_images=len(train),
        val_images=len(val),
        classes=train.classes,
    )
    if config.num_classes < len(config.classes):
        raise InputError(
            f"--num-classes {config.num_classes} is too small: the data have {len(config.classes)} classes"
        )
    if config.accumulate > config.batch_size:
        raise InputError(f"--accumulate {config.accumulate} is too large: the batch has {config.batch_size} images")
    return RunConfig(**json.loads(json.dumps(asdict(config))))  # tuples become lists, as in config.json


def environment_of(flags: Flags) -> dict[str, str | int]:
    """Return the values of `ENVIRONMENT_FLAGS` that the user gave, for JSON; the data folder as an absolute path."""
    environment = {name: flags[name] for name in ENVIRONMENT_FLAGS if name in flags}
    if "data_dir" in flags:
        environment["data_dir"] = str(flags["data_dir"].absolute())
    return environment


def flags_of(environment: dict) -> Flags:
    """Return the flags that `environment_of` stored. Values of a wrong type, in an edited file, are left out."""
    flags = {name: environment[name] for name, kind in ENVIRONMENT_FLAGS.items() if type(environment.get(name)) is kind}
    return flags | ({"data_dir": Path(flags["data_dir"])} if "data_dir" in flags else {})


def check_same_recipe(flags: Flags, started: RunConfig) -> None:
    """Check that no flag differs from the configuration of the run to be resumed.

    Raises:
        InputError: a flag differs; the message names it.
    """
    settings = asdict(started) | {name: started.model_options.get(name) for name in NETWORK_FLAGS}
    for name, value in settings.items():
        if name in flags and flags[name] != value:
            flag = "--" + name.replace("_", "-")
            default = "its default" if value is None else value
            raise InputError(
                f"{flag} {flags[name]} changes the recipe of the run, which was started with {default}: "
                f"leave {flag} out to resume, or start a new run with another --out"
            )


def check_same_data(data: Halves, started: RunConfig, folder: Path) -> None:
    """Check that the data are those of the run to be resumed, in `folder`.

    Raises:
        InputError: the number of images or the classes differ.
    """
    now = (len(data[0]), len(data[1]), data[0].classes)
    if now != (started.train_images, started.val_images, started.classes):
        raise InputError(
            f"the data are not those that {relative(folder)} was started on ({started.train_images} + "
            f"{started.val_images} images of {len(started.classes)} classes then, {now[0]} + {now[1]} of {len(now[2])} "
            "now): pass the same --data-dir, or start a new run with another --out"
        )
