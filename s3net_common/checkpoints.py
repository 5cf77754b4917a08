"""Weights of networks: loaded after a check against the network, and written with metadata.

Formats: `.safetensors` with metadata (written by `save_weights`), `.pt` (a state dict, alone or in a container), and
the two formats that the paper's authors published. Names with prefixes or in an older style are matched to the
network's. No code from a file is run, and nothing is allocated before the file's shapes fit.
"""

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from s3net_common.errors import InputError, first_line, shown
from s3net_common.output_files import ROOT, write_atomically
from s3net_common.weight_files import existing_file, is_safetensors, read_header, read_pickle, read_safetensors
from s3net_common.weight_names import Match, container_rank, match_names, published_order, without_wrappers

# In a clone the trained weights are in weights/; a wheel installs them beside this package as s3net_weights/.
WEIGHTS = next((ROOT / name for name in ("s3net_weights", "weights") if (ROOT / name).is_dir()), ROOT / "weights")
PRETRAINED_FILES = ("last.safetensors", "best.safetensors")  # in a network's folder, the first one has precedence
# Of a trainer's last.pt, which training/run_folder.py writes: its configuration and its weights.
RUN_CONFIG, RUN_WEIGHTS = "config", "model"
_FINITE = ("weight", "bias", "running_mean", "running_var")  # ends of names; other buffers may hold infinity
CONTAINER_LEVELS = 3  # containers inside containers, {"state_dict": {"model": {...}}}

Report = Callable[[str], object]  # is called with a line about what was loaded


def pretrained_file(name: str) -> Path:
    """Return the path of the trained weights of a network that come with this repository.

    They are those of the last epoch of a run or, if there are none, those of its best epoch.

    Raises:
        InputError: the network has none.
    """
    file = next((file for kind in PRETRAINED_FILES if (file := WEIGHTS / name / kind).is_file()), None)
    if file is None:
        available = ", ".join(
            sorted({path.parent.name for kind in PRETRAINED_FILES for path in WEIGHTS.glob(f"*/{kind}")})
        )
        scope = f"only for {available}" if available else f"since {WEIGHTS} is missing: get the whole repository"
        raise InputError(
            f"there are no trained weights for {name}, {scope}; or train it with generalizability/train_s3net.py and "
            "load its best.safetensors, or the authors' published file, with load_weights (--checkpoint)"
        )
    return file


def file_label(checkpoint: Path) -> str:
    """Return `<folder>-<file>` of a file of weights, for names of outputs. The folder names the run."""
    name = checkpoint.name.removesuffix(".tar").rsplit(".", 1)[0]
    return f"{checkpoint.resolve().parent.name}-{name}"


# ---- Weights ------------------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, path: str | Path, report: Report | None = None) -> nn.Module:
    """Load a checkpoint into the model and return the model.

    Takes safetensors and PyTorch files: a plain state dict, or a file with a state dict in a container (`model`,
    `state_dict_ema`, ...; averaged weights are preferred), and both formats that the paper's authors published. A
    prefix of all names (`module.`, `backbone.`, ...) is removed if the names then fit. No code from the file is run.

    Args:
        model: the network.
        path: the file.
        report: is called with one line if a container was chosen or names were changed.

    Raises:
        InputError: the file is missing, damaged or no checkpoint, or a key, shape or value does not fit the model;
            the message names the key and both shapes. The model is then unchanged.
    """
    weights = fitting_weights(model, path, report=report)
    model.load_state_dict(weights, strict=False)
    return model


def load_pretrained(model: nn.Module, name: str) -> nn.Module:
    """Load the trained weights of this repository into a network with this name, and return the network.

    If its number of classes differs from theirs, the classifier keeps its weights.

    Raises:
        InputError: there are none for this network, or the file is damaged.
    """
    file = pretrained_file(name)
    if "num_classes" not in read_metadata(file):
        raise InputError(f"{file} does not say how many classes it has: put a file there that the trainer wrote")
    weights = fitting_weights(model, file, optional=head_names(model))
    expected = model.state_dict()
    model.load_state_dict({k: v for k, v in weights.items() if v.shape == expected[k].shape}, strict=False)
    return model


def create_with_weights(build: Callable[[], nn.Module], path: str | Path, report: Report | None = None) -> nn.Module:
    """Build a network and load a checkpoint into it, after its shapes were compared without allocating the network.

    Use it if the network's options come from the file.

    Raises:
        InputError: as `build` and `load_weights`.
    """
    with torch.device("meta"):
        network = build()
    weights = fitting_weights(network, path, report=report)
    model = build()
    model.load_state_dict(weights, strict=False)
    return model


def fitting_weights(
    model: nn.Module, path: str | Path, optional: Collection[str] = (), report: Report | None = None
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by the model's names, on the CPU.

    Args:
        model: the network, which may be on the meta device.
        path: the file.
        optional: names that the file may lack, and whose tensors may have other shapes.
        report: as for `load_weights`.

    Raises:
        InputError: as `load_weights`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"weights are loaded into a torch.nn.Module, and {type(model).__name__} is none")
    path = existing_file(path)
    state = model.state_dict()
    wrapped_names = {without_wrappers(name): name for name in state}
    expected = {name: state[wrapped] for name, wrapped in wrapped_names.items()}
    optional = {without_wrappers(name) for name in optional}
    containers = _containers(path)
    matches: dict[str, Match] = {}
    for name in sorted(containers, key=container_rank):
        try:
            matches[name] = match_names(containers[name], expected, optional)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        if matches[name].fits:
            break
    else:
        _raise_misfit(path, min(matches.values(), key=lambda match: len(match.missing)), expected)
    match = matches[name]
    head = {without_wrappers(name) for name in head_names(model)}
    check_tensors(path, match.tensors, expected, optional, head)
    if report and (line := _describe(path, name, match, set(containers) - {name})):
        report(line)
    tensors = published_order(match.tensors) if match.reordered else match.tensors
    return {wrapped_names[name]: tensor for name, tensor in tensors.items()}


def _containers(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return every dict of a file that contains tensors by name. The key is its place in the file, "" for the file.

    Raises:
        InputError: the file is damaged, would run code, or contains no tensors by name.
    """
    containers: dict[str, dict[str, Tensor]] = {}
    visited: set[int] = set()

    def collect(content: dict, place: str, level: int) -> None:
        visited.add(id(content))
        entries = {name: value for name, value in content.items() if isinstance(name, str)}
        if tensors := {name: value for name, value in entries.items() if isinstance(value, Tensor)}:
            containers[place] = tensors
        for name, value in entries.items():
            if isinstance(value, dict) and level < CONTAINER_LEVELS and id(value) not in visited:
                collect(value, f"{place}.{name}".lstrip("."), level + 1)

    content = read_safetensors(path) if is_safetensors(path) else read_pickle(path)
    if isinstance(content, dict):
        collect(content, "", 0)
    if not containers:
        raise InputError(f"{path} holds no weights: a checkpoint is a dict of tensors by name, or has one inside")
    return containers


def tensor_names(path: str | Path) -> set[str]:
    """Return the names of all tensors in a file.

    Raises:
        InputError: the file is missing or damaged, would run code, or contains no tensors by name.
    """
    return set().union(*_containers(existing_file(path)).values())


def _raise_misfit(path: Path, match: Match, expected: dict[str, Tensor]) -> None:
    if match.missing:
        name = match.missing[0]
        raise InputError(f"{path} does not fit this network: it lacks {name} of shape {tuple(expected[name].shape)}")
    raise InputError(
        f"{path} does not fit this network: it also holds {match.extra[0]}, which the network lacks; check the "
        "network's name and options"
    )


def _describe(path: Path, container: str, match: Match, others: set[str]) -> str | None:
    """Return a line about the choices that were made for a file, or None if there were none."""
    parts = []
    if container:
        rejected = sorted(name for name in others if name)[:3]
        parts.append(f"took {container}" + (f" (not {', '.join(rejected)})" if rejected else ""))
    parts += match.changes
    if match.left_out:
        parts.append(f"left out other tensors: {len(match.left_out)} ({match.left_out[0]}, ...)")
    return f"weights of {path.name}: {'; '.join(parts)}" if parts else None


def check_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    expected: dict[str, Tensor],
    optional: Collection[str] = (),
    head: Collection[str] = (),
    finite: bool = True,
) -> None:
    """Check kind, shape and values of a file's tensors against a network's, by name.

    Args:
        path: the file, for messages.
        tensors: of the file, by the network's names.
        expected: of the network; may be on the meta device.
        optional: names whose shapes may differ.
        head: names of the classifier's tensors.
        finite: refuse weights that are NaN or infinite, and variances below 0.

    Raises:
        InputError: a tensor cannot be loaded; the message names it.
    """
    for name, tensor in tensors.items():
        target = expected[name]
        if kind := _unsupported_kind(tensor, target):
            raise InputError(f"{path} does not fit this network: {name} is {kind}; save plain float tensors")
        if tensor.shape != target.shape and name not in optional:
            shapes = f"{name} has shape {tuple(tensor.shape)} in the file and {tuple(target.shape)} in the network"
            advice = "check the network's name, options and number of classes"
            if name in head and tensor.shape[1:] == target.shape[1:]:
                classes = len(tensor)
                advice = (
                    f"pass {classes} as the number of classes (--num-classes {classes}), or train a new classifier on "
                    "top of these weights: train_s3net.py --init FILE"
                )
            raise InputError(f"{path} does not fit this network: {shapes}; {advice}")
        if finite and name.endswith(_FINITE) and not torch.isfinite(tensor.to(target.dtype)).all():
            raise InputError(f"{path}: {name} holds NaN or infinite values: take an earlier checkpoint")
        if finite and name.endswith("running_var") and tensor.min() < 0:
            raise InputError(f"{path} is damaged: {name}, a variance, has values below 0; get it again")


def _unsupported_kind(tensor: Tensor, target: Tensor) -> str | None:
    """Return what kind of tensor it is if it cannot be copied into `target`, else None."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return "a sparse or nested tensor"
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_meta:
        return "a meta tensor without values"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if target.is_floating_point() and not tensor.is_floating_point():
        return f"of type {tensor.dtype}"
    return f"of type {tensor.dtype}" if tensor.is_complex() else None


def head_names(model: nn.Module) -> list[str]:
    """Return the names of weight and bias of the model's last linear layer, its classifier; [] if it has none."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        return []
    name, head = layers[-1]
    return [f"{name}.{part}".lstrip(".") for part, _ in head.named_parameters(recurse=False)]


# ---- Metadata -----------------------------------------------------------------------------------------------------

# Metadata of a safetensors file: our name, the name in the file, and whether the value is stored as JSON.
_METADATA = {
    "model": ("model", False),
    "dataset": ("dataset", False),
    "model_options": ("options", True),
    "num_classes": ("num_classes", True),
    "classes": ("classes", True),
    "mean": ("mean", True),
    "std": ("std", True),
    "image_size": ("image_size", True),
}
_OPTIONAL_METADATA = {"model", "dataset"}
MOST_CLASSES, LARGEST_IMAGE = 100_000, 4096


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a trainer's file of weights, or an empty dict if the file has none.

    Returns:
        `model`, `model_options`, `num_classes`, `classes` (names by index), `mean` and `std` (of each colour, for
        pixels in [0, 1]), `image_size` in pixels and `dataset`, as far as the file has them. Types and ranges are
        checked.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = existing_file(path)
    if not is_safetensors(path):
        content = read_pickle(path)
        config = content.get(RUN_CONFIG) if isinstance(content, dict) else None
        config = config if isinstance(config, dict) and "model_options" in config else {}
        return check_metadata(config, path)
    stored = read_header(path)
    if "options" not in stored:
        return {}
    try:
        metadata = {
            name: json.loads(stored[key]) if as_json else stored[key]
            for name, (key, as_json) in _METADATA.items()
            if key in stored or name not in _OPTIONAL_METADATA
        }
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged or no safetensors file of the trainer ({first_line(error)}): get it again"
        ) from error
    return check_metadata(metadata, path)


def check_metadata(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check types and ranges of the metadata of weights, as far as they are in `values`, and return `values`.

    Raises:
        InputError: a value cannot be used; the message names it.
    """
    for name, (is_valid, description) in _VALID.items():
        if name in values and not is_valid(values[name]):
            raise InputError(f"{path} is damaged: {name} is {shown(values[name])}, and not {description}; get it again")
    if len(values.get("classes", ())) > values.get("num_classes", MOST_CLASSES):
        raise InputError(f"{path} is damaged: it names {len(values['classes'])} classes of {values['num_classes']}")
    return values


def is_whole(value: object, least: int, most: int) -> bool:
    """Whether a value is a whole number in [least, most]; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: object, least: float, most: float) -> bool:
    """Whether a value is a number in [least, most]; True, False, NaN and infinity are none."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and least <= value <= most and abs(value) < math.inf


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000


def are_options(value: object) -> bool:
    """Whether a value is a dict of a network's options. The network's builder checks their values."""
    reserved = {"name", "num_classes", "pretrained", "block"}
    return isinstance(value, dict) and all(isinstance(name, str) and name not in reserved for name in value)


def read_options(text: str | None) -> dict:
    """Parse the value of --model-options.

    Raises:
        InputError: it is not a JSON object of options.
    """
    try:
        if are_options(options := json.loads(text or "{}")):
            return options
    except (ValueError, RecursionError):
        pass
    raise InputError(f"--model-options {text} is no JSON object of options: write '{{\"growth_rate\": 24}}'")


def _is_colour(value: object, least: float) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(is_number(v, least, 1000) for v in value)


# Name of each value: its test, and what it should be.
_VALID: dict[str, tuple[Callable[[object], bool], str]] = {
    "model": (_is_text, "a network's name"),
    "dataset": (_is_text, "a data set's name"),
    "model_options": (are_options, "a dict of options"),
    "num_classes": (lambda value: is_whole(value, 1, MOST_CLASSES), f"a whole number from 1 to {MOST_CLASSES:,}"),
    "classes": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of names"),
    "mean": (lambda value: _is_colour(value, -1000), "three numbers"),
    "std": (lambda value: _is_colour(value, 1e-6), "three numbers above 0"),
    "image_size": (lambda value: is_whole(value, 1, LARGEST_IMAGE), f"a whole number from 1 to {LARGEST_IMAGE:,}"),
}


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write weights as safetensors, with metadata that `read_metadata` returns.

    Args:
        path: ends in `.safetensors`.
        weights: a state dict, on any device.
        metadata: as returned by `read_metadata`; other keys (JSON values) are stored, too.

    Raises:
        InputError: the file cannot be written.
    """
    stored = {"format": "pt"}
    for name, value in metadata.items():
        key, as_json = _METADATA.get(name, (name, True))
        stored[key] = json.dumps(value) if as_json else value
    tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, stored)))
