"""From the flags that the user gave to the configuration of a run."""

import json
import math
import shlex
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import torch
import torchvision

from data.datasets import DATASETS
from data.image_sets import Halves
from distributed import Ranks
from recipes import (
    DECODERS,
    DEFAULT_DATASET,
    FAST,
    NAMED_RECIPES,
    NETWORK_FLAGS,
    RunConfig,
    fast_settings,
    recipe_for,
)
from s3net_common.checkpoints import check_metadata, is_number
from s3net_common.class_names import match_classes
from s3net_common.errors import InputError, nearest_names, shown
from s3net_common.limits import check_numbers
from s3net_common.output_files import relative
from s3net_networks import complete_options, fix_options, list_networks
from training.engine import Precision
from training.optimization import SCHEDULES

Flags = dict[str, Any]  # the flags that the user gave, by name; see s3net_common.command_line.given_flags

# Flags that are no part of the recipe. The run's folder keeps them, and --resume uses them if they are not given again.
ENVIRONMENT_FLAGS = {
    **dict.fromkeys(("data_dir", "device"), str),
    **dict.fromkeys(("workers", "checkpoint_every", "max_pixels"), int),
    **dict.fromkeys(("skip_unreadable", "compile", "graphs", "tensorboard"), bool),
}
TRAINING_FLAGS = ("norm_decay", "nesterov", "label_smoothing", "average_epochs", "early_size", "early_epochs")
DATA_FLAGS = ("dataset", "image_size", "hold_out", "limit_train", "limit_val")  # which images, and how they are read
MINIMUM = {
    **dict.fromkeys(("epochs", "batch_size", "accumulate", "checkpoint_every", "num_classes"), 1),
    **dict.fromkeys(("limit_train", "limit_val"), 1),
    **dict.fromkeys(("momentum", "weight_decay", "seed", "workers", "label_smoothing"), 0),
    **dict.fromkeys(("average_epochs", "early_epochs"), 0),
    **dict.fromkeys(("image_size", "early_size"), 4),
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
        ("decoder", flags.get("decode"), DECODERS),
        ("recipe", flags.get("recipe"), NAMED_RECIPES),
    ):
        if name is not None and name not in known:
            raise InputError(f"there is no {kind} {name!r}: {nearest_names(name, known)}")
    if "recipe" in flags and flags.get("dataset", DEFAULT_DATASET) not in NAMED_RECIPES[flags["recipe"]]:
        known = " or ".join(f"--dataset {dataset}" for dataset in NAMED_RECIPES[flags["recipe"]])
        raise InputError(f"--recipe {flags['recipe']} is for {known}: leave it out, to train with the data set's own")
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
    if not flags.get("label_smoothing", 0) < 1:
        raise InputError(f"--label-smoothing {flags['label_smoothing']} is not possible: give a number below 1")
    check_numbers(flags)
    if "checkpoint" in flags and not flags.get("eval_only"):
        raise InputError(
            "--checkpoint is for --eval-only: leave it out, or pass --resume to resume a run, or --init FILE to start "
            "a new one from these weights"
        )
    if "export" in flags and (others := sorted(flags.keys() - {"export", "out", "overwrite", "unfinished", "threads"})):
        raise InputError(f"--export takes the run as it is: leave out --{others[0].replace('_', '-')}")
    if "unfinished" in flags and "export" not in flags:
        raise InputError("--unfinished is for --export: leave it out")
    if "init" in flags and "eval_only" in flags:
        raise InputError("--init is for training: to evaluate weights, pass them as --checkpoint FILE")


def recipe_flags(flags: Flags) -> Flags:
    """Return the settings of the recipe that `--recipe` names, by flag; {} without it. Given flags replace them.

    `--epochs`, `--image-size` and `--early-epochs 0` change other settings of the fast recipe.
    """
    if "recipe" not in flags:
        return {}
    recipe = asdict(recipe_for(flags.get("dataset", DEFAULT_DATASET), flags.get("model")))
    settings = {name: recipe[name] for name in ("epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule")}
    settings |= {field.name: field.default for field in fields(RunConfig) if field.name in TRAINING_FLAGS}
    if flags["recipe"] == "fast":
        settings |= FAST
        image_size = flags.get("image_size", recipe["image_size"])
        settings |= fast_settings(flags.get("epochs", settings["epochs"]), image_size)
        if flags.get("early_epochs") == 0:
            settings["early_size"] = None
    return settings


def resolve_config(flags: Flags, data: Halves, device: torch.device, start: dict[str, Any]) -> RunConfig:
    """Return the configuration of a new run: the flags, completed by the weights of --init and the data set's recipe.

    `start` is the metadata of these weights, which give the network's options and the normalisation.

    Raises:
        InputError: a value is out of its range, or does not fit the data.
    """
    train, val = data
    flags = recipe_flags(flags) | flags
    dataset = flags.get("dataset", DEFAULT_DATASET)
    recipe = asdict(recipe_for(dataset, flags.get("model")))
    recipe |= {name: start[name] for name in ("mean", "std") if name in start}
    recipe |= {name: flags[name] for name in recipe if name in flags}
    if not flags.get("augment", True):
        recipe |= {"flip": False, "crop_padding": 0.0}
    options = start.get("model_options", {}) if start.get("model") == recipe["model"] else {}
    options |= {name: flags[name] for name in NETWORK_FLAGS if name in flags}
    config = RunConfig(
        dataset=dataset,
        **recipe,
        model_options=fix_options(recipe["model"], options),
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
        init=flags.get("init"),
        sync_bn=flags.get("sync_bn", False),
        decode=flags.get("decode", "cpu"),
        augment=flags.get("augment", True),
        **{name: flags[name] for name in TRAINING_FLAGS if name in flags},
    )
    check_sizes(config)
    return RunConfig(**json.loads(json.dumps(asdict(config))))  # tuples become lists, as in config.json


def check_sizes(config: RunConfig) -> None:
    """Check the settings that depend on each other.

    Raises:
        InputError: there are too few outputs, more accumulation steps than images in a batch, more epochs of one kind
            than epochs, or one of two flags that belong together.
    """
    if config.num_classes < len(config.classes):
        raise InputError(
            f"--num-classes {config.num_classes} is too small: the data have {len(config.classes)} classes"
        )
    if config.accumulate > config.batch_size:
        raise InputError(f"--accumulate {config.accumulate} is too large: the batch has {config.batch_size} images")
    for name in ("average_epochs", "early_epochs"):
        if (epochs := getattr(config, name)) > config.epochs:
            flag = f"--{name.replace('_', '-')} {epochs}"
            raise InputError(f"{flag} is too large: the run has {config.epochs} epochs")
    if (config.early_size is None) != (config.early_epochs == 0):
        raise InputError("--early-size and --early-epochs belong together: give both, or none")
    if config.early_size and config.early_size >= config.image_size:
        raise InputError(f"--early-size {config.early_size} is not smaller than the images, {config.image_size} pixels")
    if config.nesterov and config.momentum == 0:
        raise InputError("--nesterov needs a --momentum above 0")


def check_device(config: RunConfig, flags: Flags, ranks: Ranks) -> None:
    """Check that the device and the number of processes are those that the flags need.

    Raises:
        InputError: they are not.
    """
    if flags.get("graphs") and (ranks.device.type != "cuda" or ranks.world_size > 1):
        raise InputError("--graphs is for a single process on a CUDA GPU: leave it out")
    if config.sync_bn and ranks.device.type != "cuda":
        raise InputError("--sync-bn is for CUDA GPUs: PyTorch has no BatchNorm over several processes on other devices")
    if config.decode != "cpu" and config.dataset != "imagenet":
        raise InputError(
            f"--decode {config.decode} is for images on disk, --dataset imagenet: other data sets are decoded once, "
            "before the training"
        )
    if config.decode != "cpu" and not config.augment:
        raise InputError(f"--decode {config.decode} decodes random crops: leave out --no-augment, or --decode")
    if config.decode == "gpu" and (ranks.device.type != "cuda" or not hasattr(torchvision.io, "decode_jpeg")):
        raise InputError(
            "--decode gpu needs a CUDA GPU, and a torchvision with decode_jpeg: pass --decode draft, or leave it out"
        )


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


def config_from_json(values: object, path: Path) -> RunConfig:
    """Return the configuration in a run's `config.json` or `last.pt`. Settings of other versions are ignored.

    Args:
        values: the parsed content.
        path: the file, for messages.

    Raises:
        InputError: a setting is missing, or its type or its value is not possible.
    """
    advice = "restore it, or start a new run with another --out"
    if not isinstance(values, dict):
        raise InputError(f"{path} is missing or damaged: it holds no settings; {advice}")
    settings = {}
    for field in fields(RunConfig):
        if field.name not in values and field.default is MISSING:
            raise InputError(f"{path} is missing or damaged: it lacks {field.name}; {advice}")
        settings[field.name] = value = values.get(field.name, field.default)
        if not has_type(value, field.type):
            raise InputError(f"{path} is missing or damaged: {field.name} is {shown(value)}; {advice}")
    try:
        check_metadata(settings, path)
        check_flags({name: value for name, value in settings.items() if value is not None})
        config = RunConfig(**settings)
        check_sizes(config)
    except InputError as error:
        raise InputError(f"{path} is missing or damaged ({error}); {advice}") from error
    if not all(0 <= share <= 1 for share in [*config.milestones, config.crop_padding]):
        raise InputError(f"{path} is missing or damaged: milestones or crop_padding are not from 0 to 1; {advice}")
    return config


def has_type(value: object, kind: Any) -> bool:
    """Whether a value from JSON has a type: bool, int, float, str, dict, list[...] or one of these or None.

    Whole numbers are floats, too. NaN and infinity are none.
    """
    if isinstance(kind, UnionType):
        return any(has_type(value, part) for part in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(has_type(item, *get_args(kind)) for item in value)
    if kind is float:
        return is_number(value, -1e300, 1e300)
    return type(value) is (type(None) if kind is None else kind)


def shell_command_of(config: RunConfig) -> str:
    """Return the command, in the repository's root, that starts a run with this configuration in the default folder."""
    words = ["--dataset", config.dataset, "--model", config.model]
    usual = asdict(recipe_for(config.dataset, config.model)) | {"amp": True, "seed": None, "hold_out": None}
    usual |= {field.name: field.default for field in fields(RunConfig) if field.default is not MISSING}
    usual |= dict.fromkeys(("limit_train", "limit_val")) | dict.fromkeys(NETWORK_FLAGS)
    values = asdict(config) | {name: config.model_options.get(name) for name in NETWORK_FLAGS}
    if config.num_classes != len(config.classes):
        usual["num_classes"] = len(config.classes)
    without_flag = ("dataset", "model", "mean", "std", "milestones", "flip", "crop_padding")
    for name, default in usual.items():
        flag, value = name.replace("_", "-"), values[name]
        if name in without_flag or value == default:
            continue
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join(["python", "generalizability/train_s3net.py", *words])


def check_same_recipe(flags: Flags, started: RunConfig, folder: Path) -> None:
    """Check that no flag differs from the configuration of the run to be resumed, in `folder`.

    Raises:
        InputError: a flag differs; the message names it.
    """
    options = complete_options(started.model, started.model_options)
    settings = asdict(started) | {name: options.get(name) for name in NETWORK_FLAGS}
    images = {name: settings[name] for name in ("dataset", "model", "image_size")}
    expected = recipe_flags(images | flags) | flags
    for name, value in settings.items():
        if name in expected and expected[name] != value:
            flag, given = f"--{name.replace('_', '-')}", expected[name]
            default = "its default" if value is None else value
            weights = relative(folder / "best.safetensors")
            more = f", which may begin with the weights of this one: --init {weights}" if name == "epochs" else ""
            if name not in flags:
                flag, given, default = "--recipe", flags["recipe"], f"{name} {value}"
            raise InputError(
                f"{flag} {given} changes the recipe of the run, which was started with {default}: "
                f"leave {flag} out to resume, or start a new run with another --out{more}"
            )


def check_same_data(data: Halves, started: RunConfig, folder: Path, prints: bool = False) -> Halves:
    """Return the data with the classes in the order that the run in `folder` was started with.

    Args:
        data: the training images and the validation images.
        started: the configuration of the run to be resumed.
        folder: of the run.
        prints: whether to print a line if the order of the classes has changed.

    Raises:
        InputError: the number of images or the classes differ, or classes in another order would hold out other images.
    """
    train, val = data
    counts = f"{started.train_images} + {started.val_images} images of {len(started.classes)} classes then"
    refusal = (
        f"the data are not those that {relative(folder)} was started on ({counts}, {len(train)} + {len(val)} of "
        f"{len(train.classes)} now"
    )
    advice = "pass the same --data-dir, or start a new run with another --out"
    match = match_classes(train.classes, started.classes, started.num_classes, folder / "config.json")
    absent = match.subset and match.note
    if absent or (len(train), len(val)) != (started.train_images, started.val_images):
        raise InputError(f"{refusal}{f'; {match.note}' if absent else ''}): {advice}")
    if match.note is None:
        return data
    if (started.hold_out, started.limit_train, started.limit_val) != (None, None, None):
        raise InputError(
            f"{refusal}, and the order of the classes differs, which changes the choice of images): {advice}"
        )
    if prints:
        print(match.note)
    return tuple(half.with_classes(started.classes, match.outputs) for half in data)
