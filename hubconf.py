"""The paper's networks for torch.hub, without cloning or installing anything.

    model = torch.hub.load("OWNER/REPOSITORY", "s3net_cifar", pretrained=True)
    model = torch.hub.load("path/to/a/clone", "s3net_cifar", source="local", num_classes=10)

`torch.hub.list` names them. Each takes the arguments of `models.create_model` but for the name.
"""

from collections.abc import Callable as _Callable

from models import S3Net as _S3Net
from models import create_model as _create_model
from models import list_models as _list_models

dependencies = ["safetensors", "torch"]


def _entry_point(name: str) -> _Callable[..., _S3Net]:
    def create(num_classes: int | None = None, pretrained: bool = False, **options) -> _S3Net:
        return _create_model(name, num_classes, pretrained, **options)

    create.__name__ = name
    doc = _create_model.__doc__.replace("one of the paper's networks", name)
    create.__doc__ = doc.replace("        name: one of `list_models()`.\n", "")  # which the function doesn't take
    return create


globals().update({name: _entry_point(name) for name in _list_models()})
