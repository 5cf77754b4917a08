"""S3-Net: convolutional networks with the sparse shortcut topology of arXiv 1811.09003, Figure 1.

            +------------------------------------------+
            |        +------------------------------+  |
            |        |        +------------------+  |  |
            |        |        |                  v  v  v
    H_0 ----+-> H_1 -+-> H_2 -+-> ... --> H_L -> [  concat  ] -> next block

Each layer reads only the layer before it (the chain), and each output takes one shortcut to the end of the block,
where all of them are concatenated once (the aggregation). A block of L layers so has O(L) connections, where a dense
block has O(L^2), and the width that a layer reads does not grow with depth.

    from models import create_model, list_models, load_weights

    model = create_model("s3net_cifar", pretrained=True)  # the weights in this repository: CIFAR-100
    model = create_model("s3net_cifar", growth_rate=24, depth=40, num_classes=10)  # random weights
    model = load_weights(model, "runs/cifar10-s3net_cifar-s0/best.safetensors")

To build on the topology, start at `Block`; to change a network, pass other arguments to `S3Net`.
"""

import argparse
import difflib
import inspect
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cpu_kernels import concatenate, norm_relu, norm_relu_conv


class InputError(ValueError):
    """Something the user gave cannot be used; the message says in one line what is wrong and what to do."""


# ---- The topology -------------------------------------------------------------------------------------------------


class NormReluConv(nn.Module):
    """BatchNorm, ReLU, convolution without bias: the pre-activation unit that everything is made of.

    Maps `(N, in_channels, H, W)` to `(N, out_channels, H // pool, W // pool)`. With `pool` above 1 an average pool
    of that size stands before the convolution; for a 1x1 convolution that is the same function as after it (both
    are linear and act on different axes) at a `pool**2`-th of the multiply-adds.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, pool: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """`conv(pool(relu(norm(x))))`."""
        return norm_relu_conv(x, self.norm, self.conv, self.pool)


class Layer(nn.Sequential):
    """One layer H_{i-1} -> H_i of a block: `(N, in_channels, H, W)` to `(N, growth_rate, H, W)`.

    Args:
        in_channels: channels that it reads.
        growth_rate: channels that it gives, k in the paper.
        bn_size: None for the plain layer (BN, ReLU, 3x3); a number for the bottleneck layer, which first brings its
            input to `bn_size * growth_rate` channels (BN, ReLU, 1x1, BN, ReLU, 3x3).
        drop_rate: probability in [0, 1) of dropping an element of the output in training.
    """

    def __init__(self, in_channels: int, growth_rate: int, bn_size: int | None = None, drop_rate: float = 0.0) -> None:
        units = []
        if bn_size is not None:
            units.append(NormReluConv(in_channels, bn_size * growth_rate, kernel_size=1))
            in_channels = bn_size * growth_rate
        units.append(NormReluConv(in_channels, growth_rate, kernel_size=3))
        if drop_rate > 0:
            units.append(nn.Dropout(drop_rate))
        super().__init__(*units)


CONNECTIONS = ("sparse", "chain", "dense")


class Block(nn.Module):
    """The sparse shortcut topology (Figure 1): a chain whose outputs all meet in one aggregation.

    Maps `(N, in_channels, H, W)` to `(N, out_channels, H, W)`: `in_channels + num_layers * growth_rate` channels in
    the order [block input, layer 1, ..., layer L].

    `connections` is "sparse", or one of two ablations of the same layers: "chain" has no shortcuts, so that the block
    gives what its last layer gives; in "dense" each layer reads the concatenation of all before it, as in a DenseNet.
    """

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int,
        bn_size: int | None = None,
        drop_rate: float = 0.0,
        connections: str = "sparse",
    ) -> None:
        super().__init__()
        self.connections = connections
        widths = [in_channels] + [growth_rate] * (num_layers - 1)  # the chain: layer i reads only layer i-1
        if connections == "dense":
            widths = [in_channels + i * growth_rate for i in range(num_layers)]
        self.layers = nn.ModuleList(Layer(width, growth_rate, bn_size, drop_rate) for width in widths)
        self.out_channels = growth_rate if connections == "chain" else in_channels + num_layers * growth_rate

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain and concatenate what every layer gave."""
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(concatenate(outputs) if self.connections == "dense" else outputs[-1]))
        return outputs[-1] if self.connections == "chain" else concatenate(outputs)  # the shortcuts


class S3Net(nn.Module):
    """Stem, blocks with transitions between them, and a linear classifier on the globally averaged features.

    Args:
        growth_rate: channels of each layer, k.
        block_config: layers of each block.
        num_init_features: channels of the stem.
        bn_size: None for plain layers; the bottleneck's width in units of the growth rate otherwise.
        compression: share of its channels that a transition keeps, in (0, 1].
        stem: "cifar" (3x3, stride 1) or "imagenet" (7x7, stride 2, and a 3x3 max pool, stride 2).
        drop_rate: dropout after each layer, in [0, 1).
        connections: "sparse", the topology itself; "chain" or "dense" for an ablation (see `Block`).
        num_classes: outputs of the classifier.

    Input `(N, 3, H, W)`, normalised as in training; output logits `(N, num_classes)`. H and W may be anything that
    the strides leave at least one pixel of: 4 upwards for the CIFAR stem and three blocks, 16 for ImageNet's, twice
    that for a fourth block.

    Raises:
        InputError: for an argument out of its range.
    """

    def __init__(
        self,
        growth_rate: int,
        block_config: Sequence[int],
        num_init_features: int,
        bn_size: int | None = None,
        compression: float = 1.0,
        stem: str = "cifar",
        drop_rate: float = 0.0,
        connections: str = "sparse",
        num_classes: int = 100,
    ) -> None:
        super().__init__()
        _check_positive(growth_rate=growth_rate, num_init_features=num_init_features, num_classes=num_classes)
        if not block_config:
            raise InputError("block_config is empty: give the number of layers of one block or more")
        _check_positive(**{f"block_config[{i}]": layers for i, layers in enumerate(block_config)})
        if bn_size is not None:
            _check_positive(bn_size=bn_size)
        if not 0 < compression <= 1:
            raise InputError(f"compression is {compression}: give a number above 0 and at most 1")
        if not 0 <= drop_rate < 1:
            raise InputError(f"drop_rate is {drop_rate}: give a number from 0 to below 1")
        if connections not in CONNECTIONS:
            raise InputError(f"connections is {connections!r}: give {', '.join(CONNECTIONS)}")

        self.growth_rate = growth_rate
        channels = num_init_features
        self.stem = _stem(stem, channels)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, num_layers in enumerate(block_config):
            self.blocks.append(Block(num_layers, channels, growth_rate, bn_size, drop_rate, connections))
            channels = self.blocks[-1].out_channels
            if i + 1 < len(block_config):
                kept = int(channels * compression)
                self.transitions.append(NormReluConv(channels, kept, kernel_size=1, pool=2))
                channels = kept
            else:
                self.transitions.append(nn.Identity())
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        self._initialize(stem)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, num_classes)` of images `(N, 3, H, W)`."""
        x = norm_relu(self.stem.conv(x), self.stem.norm)
        x = self.stem.pool(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            x = transition(block(x))
        x = norm_relu(x, self.norm)
        return self.classifier(x.mean(dim=(2, 3)))

    def _initialize(self, stem: str) -> None:
        """As in the published code: the CIFAR networks keep PyTorch's defaults for weights."""
        nn.init.zeros_(self.classifier.bias)
        if stem == "imagenet":
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)


def _stem(kind: str, channels: int) -> nn.ModuleDict:
    if kind == "cifar":
        conv, pool = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.Identity()
    elif kind == "imagenet":
        conv = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        pool = nn.MaxPool2d(3, stride=2, padding=1)
    else:
        raise InputError(f'stem is {kind!r}: give "cifar" or "imagenet"')
    return nn.ModuleDict({"conv": conv, "norm": nn.BatchNorm2d(channels), "pool": pool})


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name} is {value}: give 1 or more")


# ---- The paper's networks by name ---------------------------------------------------------------------------------

_IMAGENET = {"stem": "imagenet", "compression": 0.5, "num_classes": 1000}

NETWORKS: dict[str, dict] = {
    # CIFAR: depth 40 counts the stem, 3 x 12 layers, 2 transitions and the classifier.
    "s3net_cifar": {"growth_rate": 12, "depth": 40, "num_init_features": 24, "num_classes": 100},
    # Tiny ImageNet. The published code has no setting for k=96; this one has the parameters that the paper prints.
    "s3net_tiny_k96": {"growth_rate": 96, "block_config": (6, 6, 6), "num_init_features": 32, "bn_size": 2},
    "s3net_tiny_k108": {"growth_rate": 108, "block_config": (6, 6, 6), "num_init_features": 64, "bn_size": 4},
    # ImageNet
    "s3net_imagenet_small": {"growth_rate": 96, "block_config": (5, 5, 5, 5), "num_init_features": 64, "bn_size": 4},
    "s3net_imagenet_k110": {"growth_rate": 110, "block_config": (5, 5, 5), "num_init_features": 32, "bn_size": 4},
    "s3net_imagenet_k48": {"growth_rate": 48, "block_config": (16, 16, 16), "num_init_features": 64, "bn_size": 4},
    "s3net_imagenet_large": {"growth_rate": 160, "block_config": (6, 6, 6), "num_init_features": 32, "bn_size": 4},
    "s3net_imagenet_k180": {"growth_rate": 180, "block_config": (6, 6, 6), "num_init_features": 32, "bn_size": 4},
}


def list_models() -> list[str]:
    """The names that `create_model` takes."""
    return list(NETWORKS)


def create_model(name: str, num_classes: int | None = None, pretrained: bool = False, **options) -> S3Net:
    """Build one of the paper's networks, with random weights or with those of this repository.

    Args:
        name: one of `list_models()`.
        num_classes: outputs; by default 100 for `s3net_cifar` and 1000 for the others.
        pretrained: load the trained weights, which `s3net_cifar` has, with its own options; `drop_rate` is free. With
            another number of classes than theirs the classifier is a new one with random weights, to be trained.
        **options: arguments of `S3Net` that replace the named network's own. `s3net_cifar` also takes `depth`
            (40 by default): its three blocks have `(depth - 4) / 3` layers each.

    Raises:
        InputError: for an unknown name (with the nearest ones), an unknown option, options that contradict each
            other, a value out of its range, or trained weights that there are not or that are damaged.
    """
    if name not in NETWORKS:
        raise InputError(f"there is no network {name!r}: {nearest_names(name, NETWORKS)}")
    settings = NETWORKS[name] if name == "s3net_cifar" else _IMAGENET | NETWORKS[name]
    own = {option.name: option.default for option in inspect.signature(S3Net).parameters.values()} | settings
    for option in options:
        if option not in own:
            raise InputError(f"{name} has no option {option!r}: {nearest_names(option, own)}")
    if {"depth", "block_config"} <= options.keys():
        raise InputError("depth and block_config both say how many layers the blocks have: leave one of them out")
    changed = [option for option in options if option != "drop_rate" and options[option] != own[option]]
    settings = settings | options
    if num_classes is not None:
        settings["num_classes"] = num_classes
    if (depth := settings.pop("depth", None)) is not None:
        settings.setdefault("block_config", (layers_per_block(depth),) * 3)
    model = S3Net(**settings)
    return _load_pretrained(model, name, changed) if pretrained else model


def layers_per_block(depth: int) -> int:
    """Layers of each of the three blocks of a CIFAR network of that depth.

    Raises:
        InputError: where depth - 4 is not a positive multiple of 3, with the nearest depths that are possible.
    """
    if depth < 7 or (depth - 4) % 3:
        below = max(7, 4 + (depth - 4) // 3 * 3)
        raise InputError(
            f"depth {depth} is not possible, since depth - 4 must be a positive multiple of 3: "
            f"the nearest are {below} and {below + 3}"
        )
    return (depth - 4) // 3


def nearest_names(name: str, known: Mapping | Sequence | set) -> str:
    """For error messages: "did you mean ...?" with the names most like it, or all of the known ones."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"give one of {', '.join(sorted(known))}"


# ---- Weights ------------------------------------------------------------------------------------------------------

WEIGHTS = Path(__file__).resolve().parent / "weights"


def pretrained_file(name: str) -> Path:
    """The repository's trained weights of a network; `read_metadata` gives their class names and normalisation.

    Raises:
        InputError: there are none.
    """
    file = WEIGHTS / name / "best.safetensors"
    if not file.is_file():
        there = ", ".join(sorted(found.parent.name for found in WEIGHTS.glob("*/best.safetensors")))
        has = f"only for {there}" if there else f"since {WEIGHTS} is not there: get the whole repository"
        raise InputError(
            f"there are no trained weights for {name}, {has}; or train it with generalizability/train_s3net.py and "
            "load its best.safetensors, or the authors' published file, with load_weights (--checkpoint)"
        )
    return file


def _load_pretrained(model: S3Net, name: str, changed: Sequence[str]) -> S3Net:
    file, head = pretrained_file(name), model.classifier
    if changed:
        own = ", ".join(f"{option}={value}" for option, value in NETWORKS[name].items() if option != "num_classes")
        raise InputError(f"there are trained weights for {name} with {own} only: leave out {', '.join(changed)}")
    if "num_classes" not in (said := read_metadata(file)):
        raise InputError(f"{file} does not say how many classes it has: put the trainer's best.safetensors there")
    model.classifier = nn.Linear(head.in_features, said["num_classes"])
    load_weights(model, file)
    if head.out_features != model.classifier.out_features:
        model.classifier = head
    return model


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a checkpoint into the model and return the model.

    Takes the `.safetensors` and `.pt` files of this repository, a plain state dict, and both kinds of checkpoint
    that the paper's authors published (ImageNet: `state_dict` with `module.features...` keys; CIFAR: `model` with
    `denseblocks...` keys, whose blocks are laid out in another order). No code from the file is run.

    Raises:
        InputError: the file is missing, damaged or no checkpoint, or a key or shape does not fit the model; the
            message names the key and both shapes. The model is then unchanged.
    """
    state = read_state_dict(path)
    if isinstance(model, S3Net):
        state = _published_to_ours(state, model)
    ours = model.state_dict()
    for key, tensor in ours.items():
        if key not in state:
            raise InputError(f"{path} does not fit this network: it lacks {key} of shape {tuple(tensor.shape)}")
        if state[key].shape != tensor.shape:
            raise InputError(
                f"{path} does not fit this network: {key} has shape {tuple(state[key].shape)} in the file and "
                f"{tuple(tensor.shape)} in the network; check the network's name, options and number of classes"
            )
    if extra := sorted(state.keys() - ours.keys()):
        raise InputError(
            f"{path} does not fit this network: it also holds {extra[0]} of shape {tuple(state[extra[0]].shape)}, "
            "which the network lacks; check the network's name and options"
        )
    model.load_state_dict(state)
    return model


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU, without running code from the file.

    Raises:
        InputError: the file is missing, damaged, would run code, or holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is damaged or no safetensors file ({_first_line(error)}): get it again"
            ) from error
    content = read_pickle(path)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"{path} holds no weights: a checkpoint is a dict of tensors by name, or has one inside")
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}


def read_metadata(path: str | Path) -> dict:
    """What a file of the trainer says of its weights; empty where it says nothing.

    Returns:
        `model`, `model_options`, `num_classes`, `classes` (names by index), `mean` and `std` (of each colour, for
        pixels in [0, 1]), `image_size` in pixels and `dataset`, as far as the file says them.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    if path.suffix != ".safetensors":
        content = read_pickle(path)
        config = content.get("config") if isinstance(content, dict) else None
        return config if isinstance(config, dict) and "model_options" in config else {}
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
        if "options" not in said:
            return {}
        known = {key: said[key] for key in ("model", "dataset") if key in said}
        known["model_options"] = json.loads(said["options"])
        return known | {key: json.loads(said[key]) for key in ("num_classes", "classes", "mean", "std", "image_size")}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is damaged or no safetensors file of the trainer ({_first_line(error)}): get it again"
        ) from error


def read_pickle(path: str | Path) -> object:
    """What `torch.save` wrote, on the CPU: tensors, containers, numbers, strings and `argparse.Namespace` only.

    Raises:
        InputError: the file is damaged, no checkpoint, or would run code on loading.
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
        raise InputError(f"{path} is damaged or no PyTorch checkpoint ({_first_line(error)}): get it again") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# The published names, as patterns, and ours. Groups that are digits count from 0 (CIFAR) or from 1 (ImageNet).
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


def _published_to_ours(state: dict[str, Tensor], model: S3Net) -> dict[str, Tensor]:
    """Rename the keys of a published checkpoint; any other state dict comes back as it is."""
    if "init_cnn_layer.conv0.weight" in state:
        renamed = {_rename(key, _CIFAR_NAMES): tensor for key, tensor in state.items()}
        return _reorder_blocks(renamed, model.growth_rate)
    if "features.conv0.weight" in state:
        return {_rename(key, _IMAGENET_NAMES): tensor for key, tensor in state.items()}
    return state


def _rename(key: str, names: list[tuple[str, str, int]]) -> str:
    for pattern, ours, first in names:
        if match := re.fullmatch(pattern, key):
            numbers = [int(group) - first for group in match.groups() if group.isdigit()]
            return match.expand(ours).format(*numbers)
    return key


def _reorder_blocks(state: dict[str, Tensor], growth_rate: int) -> dict[str, Tensor]:
    """From the published CIFAR order of a block's output, [layer L, block input, layer 1, ..., layer L-1], to ours.

    It concerns what reads a block's output: the BatchNorm and 1x1 convolution of a transition, the last BatchNorm
    and the classifier. Moving layer L from the front to the end is a roll by -k of their input channels.
    """
    reader = re.compile(
        r"transitions\.\d+\.norm\.|norm\.|(?P<matrix>transitions\.\d+\.conv\.weight|classifier\.weight)"
    )
    reordered = dict(state)
    for key, tensor in state.items():
        if (match := reader.match(key)) and tensor.dim() > 0:
            reordered[key] = tensor.roll(-growth_rate, dims=1 if match["matrix"] else 0)
    return reordered
