"""The networks that S3-Net is compared with, and one registry over them and S3-Net.

A baseline's file, and what it imports (torchvision takes seconds), is read when the network is first asked for.
"""

import inspect
from collections.abc import Callable
from importlib import import_module

from torch import nn

import models
from models import InputError, nearest_names

# Each network's file in this folder; its builder there has the network's name.
BASELINES: dict[str, str] = {
    # CIFAR, 100 classes by default
    "densenet_cifar": "densenet_cifar",
    "resnet20_cifar": "resnet_cifar",
    # The paper's Tiny ImageNet table, 1000 classes by default
    "efficientnet_b0": "from_libraries",
    "ghostnet": "ghostnet",
    "lambda_resnet50": "lambda_resnet",
    "mobilenet_v2": "from_libraries",
    "octresnet50": "octresnet",
    "randwire_ws": "randwire",
    "scalenet50": "scalenet",
    "se_resnet50": "se_resnet",
}


def list_networks() -> list[str]:
    """Every name that `create_network` takes: S3-Net's first."""
    return models.list_models() + sorted(BASELINES)


def create_network(name: str, num_classes: int, **options) -> nn.Module:
    """Build an S3-Net or a baseline with random weights.

    Raises:
        InputError: for an unknown name (with the nearest ones) or an option that the network does not have.
    """
    if name in models.list_models():
        return models.create_model(name, num_classes, **options)
    build = _builder(name)
    known = inspect.signature(build).parameters.keys() - {"num_classes"}
    if unknown := sorted(options.keys() - known):
        has = f"its options are {', '.join(sorted(known))}" if known else "it has none"
        raise InputError(f"{name} has no option {unknown[0]!r}: {has}")
    return build(num_classes=num_classes, **options)


def fix_options(name: str, options: dict) -> dict:
    """The options of a new network, complete with everything random in its architecture.

    A run calls it once, when it is started, and saves what it gives: `create_network(name, n, **fixed)` is then the
    same architecture wherever and whenever it is called. Only `randwire_ws` has anything to draw: its graphs.

    Raises:
        InputError: for an unknown name, or where what draws them is not installed.
    """
    if name == "randwire_ws" and options.get("graphs") is None:
        return options | {"graphs": import_module("baselines.randwire").draw_graphs()}
    if name not in list_networks():
        raise InputError(f"there is no network {name!r}: {nearest_names(name, list_networks())}")
    return options


def _builder(name: str) -> Callable[..., nn.Module]:
    if name not in BASELINES:
        raise InputError(f"there is no network {name!r}: {nearest_names(name, list_networks())}")
    return getattr(import_module(f"baselines.{BASELINES[name]}"), name)
