"""S3-Net: convolutional networks with the sparse shortcut topology of arXiv 1811.09003, Figure 1.

            +------------------------------------------+
            |        +------------------------------+  |
            |        |        +------------------+  |  |
            |        |        |                  v  v  v
    H_0 ----+-> H_1 -+-> H_2 -+-> ... --> H_L -> [  concat  ] -> next block

Each layer reads only the layer before it (the chain). Each output, H_0 included, also takes one shortcut to the end
of the block, where all outputs are concatenated once (the aggregation). A block of L layers has O(L) connections,
where a dense block has O(L^2), and the number of channels that a layer reads does not grow with depth.

    from models import create_model, list_models, load_weights

    model = create_model("s3net_cifar", pretrained=True)  # the weights in this repository: CIFAR-100
    model = create_model("s3net_cifar", growth_rate=24, depth=40, num_classes=10)  # random weights
    model = load_weights(model, "runs/cifar10-s3net_cifar-s0/best.safetensors")

To build on the topology, start at `Block`. To change a network, pass other arguments to `S3Net`.
"""

import inspect
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from s3net_common.checkpoints import load_pretrained, load_weights, pretrained_file, read_metadata
from s3net_common.cpu_kernels import concatenate, norm_relu, norm_relu_conv
from s3net_common.errors import InputError, nearest_names, shown

__all__ = ["Block", "InputError", "Layer", "NormReluConv", "S3Net"]
__all__ += ["create_model", "layers_per_block", "list_models", "load_weights", "pretrained_file", "read_metadata"]

# Largest option, number of layers and number of parameters (8 GB in float32) of a network.
MOST, MOST_LAYERS, MOST_PARAMETERS = 100_000, 2_000, 2_000_000_000

# ---- The topology -------------------------------------------------------------------------------------------------


class NormReluConv(nn.Module):
    """BatchNorm, ReLU and convolution without bias: the pre-activation unit of every layer and transition.

    Maps `(N, in_channels, H, W)` to `(N, out_channels, H // pool, W // pool)`. If `pool` is above 1, an average pool
    of that size comes before the convolution. For a 1x1 convolution this is the same function as a pool after it
    (both are linear and act on different axes), with `pool**2` times fewer multiply-adds.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, pool: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Compute `conv(pool(relu(norm(x))))`."""
        return norm_relu_conv(x, self.norm, self.conv, self.pool)


class Layer(nn.Sequential):
    """One layer H_{i-1} -> H_i of a block: `(N, in_channels, H, W)` to `(N, growth_rate, H, W)`.

    Args:
        in_channels: channels of the input.
        growth_rate: channels of the output, k in the paper.
        bn_size: None for the plain layer (BN, ReLU, 3x3 convolution). A number for the bottleneck layer (BN, ReLU, 1x1
            convolution to `bn_size * growth_rate` channels, BN, ReLU, 3x3 convolution).
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


class Block(nn.Module):
    """The sparse shortcut topology (Figure 1): a chain of layers whose outputs are concatenated once, at the end.

    Maps `(N, in_channels, H, W)` to `(N, out_channels, H, W)`: `in_channels + num_layers * growth_rate` channels in
    the order [block input, layer 1, ..., layer L]. For the other arguments see `Layer`.
    """

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int,
        bn_size: int | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [growth_rate] * (num_layers - 1)  # layer i reads only layer i - 1
        self.layers = nn.ModuleList(Layer(width, growth_rate, bn_size, drop_rate) for width in widths)
        self.out_channels = in_channels + num_layers * growth_rate

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain, then concatenate the input and the output of every layer."""
        outputs = [x]  # H_0
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))  # the chain: H_i reads only H_{i-1}
        return concatenate(outputs, self.training)  # one shortcut from each H_i to the end of the block


class S3Net(nn.Module):
    """Stem, blocks with transitions between them, and a linear classifier on the globally averaged features.

    Args:
        growth_rate: output channels of each layer, k.
        block_config: number of layers of each block.
        num_init_features: output channels of the stem.
        bn_size: None for plain layers, else the bottleneck's channels divided by the growth rate.
        compression: fraction of the channels that a transition keeps, in (0, 1].
        stem: "cifar" (3x3 convolution, stride 1) or "imagenet" (7x7, stride 2, then a 3x3 max pool, stride 2).
        drop_rate: dropout after each layer, in [0, 1).
        num_classes: outputs of the classifier.
        block: class of the blocks: `Block`, or one with the same arguments, `layers` and `out_channels`.

    Input: `(N, 3, H, W)`, normalised as in training. Output: logits `(N, num_classes)`. The strides must leave at
    least one pixel: for three blocks H and W are at least 4 with the CIFAR stem and 16 with ImageNet's, and twice that
    for four blocks.

    Raises:
        InputError: an argument is out of its range.
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
        num_classes: int = 100,
        block: type[nn.Module] = Block,
    ) -> None:
        super().__init__()
        _check_whole(growth_rate=growth_rate, num_init_features=num_init_features, num_classes=num_classes)
        if not isinstance(block_config, list | tuple) or not block_config:
            value = "empty" if isinstance(block_config, list | tuple) else shown(block_config)
            raise InputError(f"block_config is {value}: give the number of layers of one block or more")
        _check_whole(**{f"block_config[{i}]": num_layers for i, num_layers in enumerate(block_config)})
        if sum(block_config) > MOST_LAYERS:
            raise InputError(f"block_config has {sum(block_config)} layers: give at most {MOST_LAYERS}")
        if bn_size is not None:
            _check_whole(bn_size=bn_size)
        if not _is_real(compression) or not 0 < compression <= 1:
            raise InputError(f"compression is {shown(compression)}: give a number above 0 and at most 1")
        if not _is_real(drop_rate) or not 0 <= drop_rate < 1:
            raise InputError(f"drop_rate is {shown(drop_rate)}: give a number from 0 to below 1")

        channels = num_init_features
        self.stem = _stem(stem, channels)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for num_layers in block_config:
            if self.blocks:  # between two blocks
                kept = max(1, int(channels * compression))
                self.transitions.append(NormReluConv(channels, kept, kernel_size=1, pool=2))
                channels = kept
            try:
                self.blocks.append(block(num_layers, channels, growth_rate, bn_size, drop_rate))
                channels = self.blocks[-1].out_channels
            except (TypeError, AttributeError) as error:
                raise InputError(f"block is {shown(block)}: give Block or a class like it") from error
        self.transitions.append(nn.Identity())
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        nn.init.zeros_(self.classifier.bias)
        if stem == "imagenet":  # the published CIFAR networks keep PyTorch's initial weights
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(N, num_classes)` of images `(N, 3, H, W)`."""
        x = norm_relu(self.stem.conv(x), self.stem.norm)
        x = self.stem.pool(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            x = transition(block(x))
        x = norm_relu(x, self.norm)
        return self.classifier(x.mean(dim=(2, 3)))


def _stem(kind: str, channels: int) -> nn.ModuleDict:
    if not isinstance(kind, str) or kind not in ("cifar", "imagenet"):
        raise InputError(f'stem is {shown(kind)}: give "cifar" or "imagenet"')
    if kind == "cifar":
        conv, pool = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.Identity()
    else:
        conv = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        pool = nn.MaxPool2d(3, stride=2, padding=1)
    return nn.ModuleDict({"conv": conv, "norm": nn.BatchNorm2d(channels), "pool": pool})


# ---- The paper's networks by name ---------------------------------------------------------------------------------

# CIFAR (Table III). Depth 40 counts the stem, 3 x 12 layers, 2 transitions and the classifier.
NETWORKS: dict[str, dict] = {
    "s3net_cifar": {"growth_rate": 12, "depth": 40, "num_init_features": 24, "num_classes": 100},
}
# Tiny ImageNet and ImageNet: growth rate, layers of each block, channels of the stem, bottleneck. The published code
# has no setting for s3net_tiny_k96; this one has as many parameters as the paper prints.
_IMAGENET_NETWORKS = {
    "s3net_tiny_k96": (96, (6, 6, 6), 32, 2),
    "s3net_tiny_k108": (108, (6, 6, 6), 64, 4),
    "s3net_imagenet_small": (96, (5, 5, 5, 5), 64, 4),
    "s3net_imagenet_k110": (110, (5, 5, 5), 32, 4),
    "s3net_imagenet_k48": (48, (16, 16, 16), 64, 4),
    "s3net_imagenet_large": (160, (6, 6, 6), 32, 4),
    "s3net_imagenet_k180": (180, (6, 6, 6), 32, 4),
}
for _name, _sizes in _IMAGENET_NETWORKS.items():
    NETWORKS[_name] = dict(zip(("growth_rate", "block_config", "num_init_features", "bn_size"), _sizes, strict=True))
    NETWORKS[_name] |= {"compression": 0.5, "stem": "imagenet", "num_classes": 1000}


def list_models() -> list[str]:
    """Return the names that `create_model` takes."""
    return list(NETWORKS)


def create_model(name: str, num_classes: int | None = None, pretrained: bool = False, **options) -> S3Net:
    """Build one of the paper's networks, with random or trained weights.

    Args:
        name: one of `list_models()`.
        num_classes: outputs; by default 100 for `s3net_cifar` and 1000 for the others.
        pretrained: load the trained weights of this repository, which has them for `s3net_cifar` with its own options
            (`drop_rate` may differ). If `num_classes` differs from theirs, the classifier keeps random weights and has
            to be trained.
        **options: arguments of `S3Net` that replace those of the named network. `s3net_cifar` also takes `depth`
            (40 by default): its three blocks have `(depth - 4) / 3` layers each.

    Raises:
        InputError: the name is unknown (the message lists close matches), an option is unknown or out of range, two
            options contradict each other, or the trained weights are missing or damaged.
    """
    if not isinstance(name, str) or name not in NETWORKS:
        raise InputError(f"there is no network {shown(name)}: {nearest_names(str(name), NETWORKS)}")
    if not isinstance(pretrained, bool):
        raise InputError(f"pretrained is {shown(pretrained)}: give True or False")
    settings = NETWORKS[name]
    defaults = {key: parameter.default for key, parameter in inspect.signature(S3Net).parameters.items()} | settings
    for option in options:
        if option not in defaults:
            raise InputError(f"{name} has no option {option!r}: {nearest_names(option, defaults)}")
    if {"depth", "block_config"} <= options.keys():
        raise InputError("depth and block_config both say how many layers the blocks have: leave one of them out")
    settings = settings | options
    if num_classes is not None:
        settings["num_classes"] = num_classes
    if "depth" in settings:
        blocks = (layers_per_block(settings.pop("depth")),) * 3
        settings.setdefault("block_config", blocks)
    if options or num_classes is not None:  # count the parameters before they are allocated
        with torch.device("meta"):
            parameters = sum(p.numel() for p in S3Net(**settings).parameters())
        if parameters > MOST_PARAMETERS:
            raise InputError(f"{name} with these options has {parameters:,} parameters: give smaller ones")
    model = S3Net(**settings)
    changed = [option for option in options if option != "drop_rate" and options[option] != defaults[option]]
    return _load_pretrained(model, name, changed) if pretrained else model


def layers_per_block(depth: int) -> int:
    """Return the number of layers of each of the three blocks of a CIFAR network.

    Raises:
        InputError: depth - 4 is not a positive multiple of 3. The message names the nearest possible depths.
    """
    if not isinstance(depth, Integral) or isinstance(depth, bool) or depth > MOST_LAYERS:
        raise InputError(f"depth is {shown(depth)}: give a whole number of at most {MOST_LAYERS:,}")
    if depth < 7 or (depth - 4) % 3:
        below = max(7, 4 + (depth - 4) // 3 * 3)
        raise InputError(
            f"depth {depth} is not possible, since depth - 4 must be a positive multiple of 3: "
            f"the nearest are {below} and {below + 3}"
        )
    return (depth - 4) // 3


def _check_whole(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise InputError(f"{name} is {shown(value)}: give a whole number")
        if not 1 <= value <= MOST:
            raise InputError(f"{name} is {value}: give {'1 or more' if value < 1 else f'at most {MOST:,}'}")


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _load_pretrained(model: S3Net, name: str, changed: Sequence[str]) -> S3Net:
    pretrained_file(name)  # there are none for most networks
    if changed:
        options = ", ".join(f"{option}={value}" for option, value in NETWORKS[name].items() if option != "num_classes")
        raise InputError(f"there are trained weights for {name} with {options} only: leave out {', '.join(changed)}")
    return load_pretrained(model, name)
