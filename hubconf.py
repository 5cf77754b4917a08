"""The paper's networks for torch.hub, without cloning or installing anything.

    model = torch.hub.load("OWNER/REPOSITORY", "s3net_cifar", pretrained=True)
    model = torch.hub.load("path/to/a/clone", "s3net_cifar", source="local", num_classes=10)

`torch.hub.list` names them. Each takes the arguments of `models.create_model` except the name.
"""

import importlib.util as _util
import sys as _sys
from collections.abc import Callable as _Callable
from pathlib import Path as _Path
from types import ModuleType as _ModuleType

from torch import nn as _nn

dependencies = ["safetensors", "torch"]


def _load_models() -> _ModuleType:
    """Import models.py from beside this file under a name of its own, since a user may have a module `models`."""
    spec = _util.spec_from_file_location("s3net_models", _Path(__file__).with_name("models.py"))
    module = _sys.modules[spec.name] = _util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_models = _load_models()


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
