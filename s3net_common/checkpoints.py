"""Files of weights: read without running code from them, checked against the network, and written with metadata.

Formats: `.safetensors` with metadata (written by `save_weights`), `.pt` (a plain state dict, or a dict that contains
one), and the two formats that the paper's authors published, whose keys are renamed to ours.
"""

import argparse
import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from s3net_common.errors import InputError, first_line
from s3net_common.output_files import ROOT, write_atomically

# In a clone the trained weights are in weights/; a wheel installs them beside this package as s3net_weights/.
WEIGHTS = next((ROOT / name for name in ("s3net_weights", "weights") if (ROOT / name).is_dir()), ROOT / "weights")
# Of a trainer's last.pt, which training/run_folder.py writes: its configuration and its weights.
RUN_CONFIG, RUN_WEIGHTS = "config", "model"

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


def pretrained_file(name: str) -> Path:
    """Return the path of the trained weights of a network that come with this repository.

    Raises:
        InputError: the network has none.
    """
    file = WEIGHTS / name / "best.safetensors"
    if not file.is_file():
        available = ", ".join(sorted(path.parent.name for path in WEIGHTS.glob("*/best.safetensors")))
        scope = f"only for {available}" if available else f"since {WEIGHTS} is missing: get the whole repository"
        raise InputError(
            f"there are no trained weights for {name}, {scope}; or train it with generalizability/train_s3net.py and "
            "load its best.safetensors, or the authors' published file, with load_weights (--checkpoint)"
        )
    return file


# ---- Reading ------------------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a checkpoint into the model and return the model.

    Takes `.safetensors` and `.pt` files of this repository, a plain state dict, and both kinds of checkpoint that
    the paper's authors published (ImageNet: `state_dict` with `module.features...` keys; CIFAR: `model` with
    `denseblocks...` keys, whose blocks are laid out in another order). No code from the file is run.

    Raises:
        InputError: the file is missing, damaged or no checkpoint, or a key or shape does not fit the model; the
            message names the key and both shapes. The model is then unchanged.
    """
    expected = model.state_dict()
    state = _published_to_ours(read_state_dict(path), expected)
    for key, tensor in expected.items():
        if key not in state:
            raise InputError(f"{path} does not fit this network: it lacks {key} of shape {tuple(tensor.shape)}")
        if state[key].shape != tensor.shape:
            raise InputError(
                f"{path} does not fit this network: {key} has shape {tuple(state[key].shape)} in the file and "
                f"{tuple(tensor.shape)} in the network; check the network's name, options and number of classes"
            )
    if extra := sorted(state.keys() - expected.keys()):
        raise InputError(
            f"{path} does not fit this network: it also holds {extra[0]} of shape {tuple(state[extra[0]].shape)}, "
            "which the network lacks; check the network's name and options"
        )
    model.load_state_dict(state)
    return model


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, on the CPU. No code from the file is run.

    Raises:
        InputError: the file is missing, damaged, would run code, or contains no tensors by name.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged or no safetensors file ({first_line(error)}): get it again") from error
    content = read_pickle(path)
    for key in ("state_dict", RUN_WEIGHTS):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{path} holds no weights: a checkpoint is a dict of tensors by name, or has one inside")
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a trainer's file of weights, or an empty dict if the file has none.

    Returns:
        `model`, `model_options`, `num_classes`, `classes` (names by index), `mean` and `std` (of each colour, for
        pixels in [0, 1]), `image_size` in pixels and `dataset`, as far as the file has them.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = _existing(path)
    if path.suffix != ".safetensors":
        content = read_pickle(path)
        config = content.get(RUN_CONFIG) if isinstance(content, dict) else None
        return config if isinstance(config, dict) and "model_options" in config else {}
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
        if "options" not in stored:
            return {}
        return {
            name: json.loads(stored[key]) if as_json else stored[key]
            for name, (key, as_json) in _METADATA.items()
            if key in stored or name not in _OPTIONAL_METADATA
        }
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is damaged or no safetensors file of the trainer ({first_line(error)}): get it again"
        ) from error


def read_pickle(path: str | Path) -> object:
    """Return the content of a `torch.save` file, on the CPU.

    Only tensors, containers, numbers, strings and `argparse.Namespace` are loaded.

    Raises:
        InputError: the file is damaged, no checkpoint, or would run code when loaded.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path} was not loaded: it would run code on loading ({forbidden[1]}); save a plain state dict instead"
            ) from error
        raise InputError(f"{path} is damaged or no PyTorch checkpoint: get it again") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is damaged or no PyTorch checkpoint ({first_line(error)}): get it again") from error


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    return path


# ---- Writing ------------------------------------------------------------------------------------------------------


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


# ---- The published formats ----------------------------------------------------------------------------------------

# Patterns of the published names, and ours. Groups that are digits count from 0 (CIFAR) or from 1 (ImageNet).
_CIFAR_NAMES = [
    (r"init_cnn_layer\.(conv|norm)0\.(\w+)", r"stem.\1.\2", 0),
    (r"denseblocks\.db_(\d+)\.bottleneck\.dbl_(\d+)\.layer\.0\.(\w+)", r"blocks.{0}.layers.{1}.0.norm.\3", 0),
    (r"denseblocks\.db_(\d+)\.bottleneck\.dbl_(\d+)\.layer\.2\.(\w+)", r"blocks.{0}.layers.{1}.0.conv.\3", 0),
    (r"denseblocks\.t_(\d+)\.layer\.0\.(\w+)", r"transitions.{0}.norm.\2", 0),
    (r"denseblocks\.t_(\d+)\.layer\.2\.(\w+)", r"transitions.{0}.conv.\2", 0),
    (r"denseblocks\.nb_\d+\.(\w+)", r"norm.\1", 0),
    (r"lr\.(\w+)", r"classifier.\1", 0),
]
_IMAGENET_NAMES = [
    (r"features\.(conv|norm)0\.(\w+)", r"stem.\1.\2", 1),
    (r"features\.denseblock(\d+)\.denselayer(\d+)\.(norm|conv)1\.(\w+)", r"blocks.{0}.layers.{1}.0.\3.\4", 1),
    (r"features\.denseblock(\d+)\.denselayer(\d+)\.(norm|conv)2\.(\w+)", r"blocks.{0}.layers.{1}.1.\3.\4", 1),
    (r"features\.transition(\d+)\.(norm|conv)\.(\w+)", r"transitions.{0}.\2.\3", 1),
    (r"features\.norm5\.(\w+)", r"norm.\1", 1),
    (r"classifier\.(\w+)", r"classifier.\1", 1),
]


def _published_to_ours(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of a published checkpoint to S3-Net's. Any other state dict is returned unchanged."""
    if "init_cnn_layer.conv0.weight" in state:
        return _reorder_blocks({_rename(key, _CIFAR_NAMES): tensor for key, tensor in state.items()})
    # torchvision's DenseNets have such keys, too, and keep them.
    if "features.conv0.weight" in state and "features.conv0.weight" not in expected:
        return {_rename(key, _IMAGENET_NAMES): tensor for key, tensor in state.items()}
    return state


def _rename(key: str, names: list[tuple[str, str, int]]) -> str:
    for pattern, ours, first in names:
        if match := re.fullmatch(pattern, key):
            numbers = [int(group) - first for group in match.groups() if group.isdigit()]
            return match.expand(ours).format(*numbers)
    return key


def _reorder_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a block's output from the published CIFAR order to ours.

    Theirs is [layer L, block input, layer 1, ..., layer L-1]; in ours layer L is the last. The order matters to the
    modules that read a block's output: the BatchNorm and 1x1 convolution of a transition, the last BatchNorm, and the
    classifier. Moving layer L to the end is a roll of their input channels by the growth rate.
    """
    growth_rate = len(state.get("blocks.0.layers.0.0.conv.weight", ()))
    reader = re.compile(
        r"transitions\.\d+\.norm\.|norm\.|(?P<matrix>transitions\.\d+\.conv\.weight|classifier\.weight)"
    )
    reordered = dict(state)
    for key, tensor in state.items():
        if (match := reader.match(key)) and tensor.dim() > 0:
            reordered[key] = tensor.roll(-growth_rate, dims=1 if match["matrix"] else 0)
    return reordered
