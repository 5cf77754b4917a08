"""The paper's networks for torch.hub, without cloning or installing anything.

    model = torch.hub.load("OWNER/REPOSITORY", "s3net_cifar", pretrained=True)
    model = torch.hub.load("path/to/a/clone", "s3net_cifar", source="local", num_classes=10)

`torch.hub.list` names them. Each takes the arguments of `models.create_model` except the name. `resnet20_cifar`, for
comparison, takes `num_classes` and `pretrained`.
"""

import importlib.util as _util
import sys as _sys
from collections.abc import Callable as _Callable
from pathlib import Path as _Path
from types import ModuleType as _ModuleType

from torch import nn as _nn

from s3net_common.checkpoints import load_pretrained as _load_pretrained

dependencies = ["safetensors", "torch"]


def _load(name: str, file: str) -> _ModuleType:
    """Import a module from beside this file under a name of its own, since a user may have a module `models`."""
    spec = _util.spec_from_file_location(name, _Path(__file__).parent / file)
    module = _sys.modules[spec.name] = _util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_models = _load("s3net_models", "models.py")
_resnet = _load("s3net_resnet_cifar", "s3net_networks/resnet_cifar.py")


def _entry_point(name: str) -> _Callable[..., _nn.Module]:
    def create(num_classes: int | None = None, pretrained: bool = False, **options) -> _nn.Module:
        return _models.create_model(name, num_classes, pretrained, **options)

    create.__name__ = name
    create.__doc__ = f"""Build {name} with random or trained weights.

    The arguments, and the errors raised, are those of `models.create_model` except the name: `num_classes`,
    `pretrained`, and options of `models.S3Net`.
    """
    return create


globals().update({name: _entry_point(name) for name in _models.list_models()})


def resnet20_cifar(num_classes: int = 100, pretrained: bool = False) -> _nn.Module:
    """Build ResNet-20 for images of 32x32 pixels with random or trained weights.

    If `num_classes` differs from that of the trained weights, the classifier keeps random weights.

    Raises:
        InputError: this repository has no trained weights for it, or they are damaged.
    """
    model = _resnet.resnet20_cifar(num_classes)
    return _load_pretrained(model, "resnet20_cifar") if pretrained else model
