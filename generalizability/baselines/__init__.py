"""The networks that S3-Net is compared with, and one registry over them and S3-Net."""

import inspect
from collections.abc import Callable

from torch import nn

import models
from baselines.densenet_cifar import densenet_cifar
from baselines.resnet_cifar import resnet20_cifar
from models import InputError, nearest_names

BASELINES: dict[str, Callable[..., nn.Module]] = {
    "densenet_cifar": densenet_cifar,
    "resnet20_cifar": resnet20_cifar,
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
    if name not in BASELINES:
        raise InputError(f"there is no network {name!r}: {nearest_names(name, list_networks())}")
    known = inspect.signature(BASELINES[name]).parameters.keys() - {"num_classes"}
    if unknown := sorted(options.keys() - known):
        has = f"its options are {', '.join(sorted(known))}" if known else "it has none"
        raise InputError(f"{name} has no option {unknown[0]!r}: {has}")
    return BASELINES[name](num_classes=num_classes, **options)


def fix_options(name: str, options: dict) -> dict:
    """Placeholder until merge."""
    return options
