"""Every network by name: S3-Net and the networks that it is compared with.

The file of a baseline, and what it imports (torchvision takes seconds), is loaded when the network is first built.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from torch import nn

from s3net_common.errors import InputError, first_line, nearest_names, shown
from s3net_networks.connections import CONNECTIONS
from s3net_networks.own_models import models

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
    """Return every name that `create_network` takes: S3-Net's first."""
    return models.list_models() + sorted(BASELINES)


def create_network(name: str, num_classes: int, **options) -> nn.Module:
    """Build an S3-Net or a baseline with random weights.

    Args:
        name: one of `list_networks()`.
        num_classes: outputs of the classifier.
        **options: of an S3-Net those of `models.create_model`, and `connections`, one of `CONNECTIONS`, between the
            layers of its blocks; of a baseline the arguments of its builder.

    Raises:
        InputError: the name is unknown (the message lists close matches), or the network lacks the option or cannot
            be built with its value.
    """
    if name in models.list_models():
        if connections := options.pop("connections", None):
            if not isinstance(connections, str) or connections not in CONNECTIONS:
                raise InputError(f"connections is {shown(connections)}: give {', '.join(CONNECTIONS)}")
            options["block"] = CONNECTIONS[connections]
        return models.create_model(name, num_classes, **options)
    build = _builder(name)
    known = inspect.signature(build).parameters.keys() - {"num_classes"}
    if unknown := sorted(options.keys() - known):
        has = f"its options are {', '.join(sorted(known))}" if known else "it has none"
        raise InputError(f"{name} has no option {unknown[0]!r}: {has}")
    try:
        return build(num_classes=num_classes, **options)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        values = ", ".join(
            f"{option}={shown(value)}" for option, value in {"num_classes": num_classes, **options}.items()
        )
        raise InputError(f"{name} cannot be built with {values} ({first_line(error)})") from error


def fix_options(name: str, options: dict) -> dict:
    """Return the options of a new network, complete with everything random in its architecture.

    A new run calls it once and saves the result, so that `create_network(name, n, **result)` always builds the same
    architecture. Only `randwire_ws` draws anything: its graphs.

    Raises:
        InputError: the name is unknown, or the package that draws the graphs is missing.
    """
    if name == "randwire_ws" and options.get("graphs") is None:
        return options | {"graphs": import_module("s3net_networks.randwire").draw_graphs()}
    if name not in list_networks():
        raise InputError(f"there is no network {name!r}: {nearest_names(name, list_networks())}")
    return options


def complete_options(name: str, options: dict) -> dict:
    """Return a copy of a network's options with the defaults of those that are not given, so that runs can be compared.

    Tuples become lists, as in JSON. The options of an unknown network are only copied.
    """
    if name in models.NETWORKS:
        build, preset = models.S3Net, models.NETWORKS[name] | {"connections": "sparse"}
    elif name in BASELINES:
        build, preset = _builder(name), {}
    else:
        return dict(options)
    parameters = inspect.signature(build).parameters.values()
    defaults = {option.name: option.default for option in parameters if option.default is not option.empty} | preset
    left_out = {"num_classes", "block"} | ({"depth"} if "block_config" in options else set())
    complete = {option: value for option, value in defaults.items() if option not in left_out} | options
    return {option: list(value) if isinstance(value, tuple) else value for option, value in complete.items()}


def published_file(name: str) -> tuple[Path, dict] | None:
    """Return file and metadata of the weights that torchvision publishes for one of its networks, else None.

    Raises:
        InputError: they cannot be downloaded.
    """
    if BASELINES.get(name) != "from_libraries":
        return None
    return import_module("s3net_networks.from_libraries").published_file(name)


def _builder(name: str) -> Callable[..., nn.Module]:
    if not isinstance(name, str) or name not in BASELINES:
        raise InputError(f"there is no network {shown(name)}: {nearest_names(str(name), list_networks())}")
    return getattr(import_module(f"s3net_networks.{BASELINES[name]}"), name)
