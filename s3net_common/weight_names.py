"""Matches the names in a file of weights to a network's: prefixes, wrappers, older names and the published formats.

Names are changed only if the file's own do not fit the network and the changed ones do.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor

from s3net_common.errors import InputError

# Parts that DataParallel, torch.compile, FSDP and activation checkpointing put into names, at any level.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Counters of averaged models, and of thop, which counts operations. They are no weights.
_COUNTERS = {"n_averaged", "num_updates", "decay", "initted", "step", "total_ops", "total_params"}
_AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|avg|averaged?)([^a-z]|$)")
# Names of containers, those before which others that fit are not taken.
_CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "network",
    "net",
    "weights",
    "params",
    "module",
)


@dataclass
class Match:
    """A checkpoint's tensors by a network's names.

    Attributes:
        tensors: by the network's names.
        missing: names of the network that the file lacks.
        extra: names of the file, where they contradict the network.
        left_out: other names of the file.
        changes: what was done to the names, for a message.
        reordered: whether a block's output has the published CIFAR order; `published_order` converts the tensors.
    """

    tensors: dict[str, Tensor]
    missing: list[str]
    extra: list[str]
    left_out: list[str]
    changes: list[str]
    reordered: bool = False

    @property
    def fits(self) -> bool:
        """Whether the file has the weights of this network and no others under the same prefix."""
        return not self.missing and not self.extra


def is_averaged(name: str) -> bool:
    """Whether a container or a prefix is named like the averaged weights of a training run (EMA, SWA)."""
    return _AVERAGED.search(name) is not None


def container_rank(name: str) -> tuple[bool, int]:
    """Return a sort key of containers: averaged weights first, then the usual names in order, then the others."""
    last = name.rpartition(".")[2]
    return not is_averaged(name), _CONTAINERS.index(last) if last in _CONTAINERS else len(_CONTAINERS)


def match_names(tensors: dict[str, Tensor], expected: Collection[str], optional: Collection[str] = ()) -> Match:
    """Match the names of a file to those of a network. If nothing fits, the result is the nearest match.

    Args:
        tensors: of the file.
        expected: names of the network's state dict.
        optional: names among them that the file may lack. BatchNorm's `num_batches_tracked` is always optional.

    Raises:
        InputError: several networks in the file fit.
    """
    names = dict.fromkeys(expected)  # in the order of the network
    required = {name for name in names if name not in optional and not name.endswith("num_batches_tracked")}
    nearest = None
    for renamed, changes, reordered in _renamings(tensors):
        match = _strip_prefix(renamed, names, required)
        match.changes, match.reordered = changes + match.changes, reordered
        if match.fits:
            return match
        if nearest is None or len(match.missing) < len(nearest.missing):
            nearest = match
    return nearest


def _renamings(tensors: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], list[str], bool]]:
    """Yield the tensors by their own names, then by other names that they may stand for.

    Each comes with what was changed, and with whether the order of a block's output differs from ours.
    """
    yield tensors, [], False
    for unwrap, wrappers in ((str, []), (without_wrappers, ["removed module. and similar parts from the names"])):
        for rename, layers in (
            (str, []),
            (_old_densenet, ["renamed the layers of an old DenseNet"]),
            (_imagenet_name, ["renamed the published layers"]),
            (_cifar_name, ["renamed the published layers"]),
        ):
            renamed = {rename(unwrap(name)): tensor for name, tensor in tensors.items()}
            if len(renamed) == len(tensors) and renamed.keys() != tensors.keys():
                yield renamed, wrappers + layers, rename is _cifar_name


def without_wrappers(name: str) -> str:
    """Return a name without the parts of DataParallel, torch.compile, FSDP and activation checkpointing."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _strip_prefix(tensors: dict[str, Tensor], expected: Collection[str], required: set[str]) -> Match:
    """Match the names as they are, or without a prefix that makes them fit."""
    unchanged = {name: name for name in tensors if name in expected}
    if required <= unchanged.keys():
        return _match(tensors, "", unchanged, expected, required)
    by_prefix: dict[str, dict[str, str]] = defaultdict(dict)  # prefix: {the network's name: the file's}
    for name in tensors:
        position = name.find(".")
        for _ in range(20):  # levels
            if position < 0:
                break
            if name[position + 1 :] in expected:
                by_prefix[name[: position + 1]][name[position + 1 :]] = name
            position = name.find(".", position + 1)
    matches = [
        _match(tensors, prefix, unchanged | names, expected, required)
        for prefix, names in sorted(by_prefix.items(), key=lambda item: -len(item[1]))[:20]
    ]
    fitting = [match for match in matches if match.fits]
    if len(fitting) > 1:
        fitting = [match for match in fitting if is_averaged(match.changes[0])] or fitting
    if len(fitting) > 1:
        several = " and ".join(match.changes[0].removeprefix("removed ") for match in fitting[:3])
        raise InputError(f"several networks in the file fit ({several}): save one of them as a file of its own")
    unprefixed = _match(tensors, "", unchanged, expected, required)
    return fitting[0] if fitting else min([unprefixed, *matches], key=lambda match: len(match.missing))


def _match(
    tensors: dict[str, Tensor], prefix: str, names: dict[str, str], expected: Collection[str], required: set[str]
) -> Match:
    used = set(names.values())
    unused = [name for name in tensors if name not in used and name.rpartition(".")[2] not in _COUNTERS]
    extra = [name.removeprefix(prefix) for name in unused if name.startswith(prefix)]
    return Match(
        tensors={name: tensors[key] for name, key in names.items()},
        missing=[name for name in expected if name in required and name not in names],
        extra=sorted(extra),
        left_out=[name for name in unused if not name.startswith(prefix)],
        changes=[f"removed {prefix} from the names"] if prefix else [],
    )


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
]


def _old_densenet(name: str) -> str:
    """Rename `denselayer1.norm.1.weight`, as before PyTorch 0.4, to `denselayer1.norm1.weight`."""
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", name)


def _imagenet_name(name: str) -> str:
    return _rename(_old_densenet(name), _IMAGENET_NAMES)


def _cifar_name(name: str) -> str:
    return _rename(name, _CIFAR_NAMES)


def _rename(name: str, names: list[tuple[str, str, int]]) -> str:
    """Rename the end of a name by the first pattern that matches it. A prefix stays."""
    for pattern, replacement, first in names:
        if match := re.search(rf"(?<![^.]){pattern}$", name):
            numbers = [int(group) - first for group in match.groups() if group.isdigit()]
            return name[: match.start()] + match.expand(replacement).format(*numbers)
    return name


def published_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a block's output from the published CIFAR order to ours.

    Theirs is [layer L, block input, layer 1, ..., layer L-1]; in ours layer L is the last. The order matters to the
    modules that read a block's output: the BatchNorm and 1x1 convolution of a transition, the last BatchNorm, and the
    classifier. Moving layer L to the end is a roll of their input channels by the growth rate.
    """
    growth_rate = len(tensors["blocks.0.layers.0.0.conv.weight"])
    reader = re.compile(
        r"transitions\.\d+\.norm\.|norm\.|(?P<matrix>transitions\.\d+\.conv\.weight|classifier\.weight)"
    )
    converted = dict(tensors)
    for name, tensor in tensors.items():
        if (match := reader.match(name)) and tensor.dim() > 0:
            converted[name] = tensor.roll(-growth_rate, dims=1 if match["matrix"] else 0)
    return converted
