"""Networks by name, with weights, and how they want their images: S3-Net, torchvision, timm."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from models import create_model, list_models
from s3net_common.checkpoints import load_weights, pretrained_file, read_metadata
from s3net_common.errors import InputError, nearest_names

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAPER_NETWORKS = ("vgg19", "squeezenet1_0", "resnet50", "densenet169")  # beside S3-Net in the paper's figures


@dataclass
class Network:
    """A classifier, ready to explain.

    Attributes:
        name: for columns, files and JSON.
        model: in evaluation mode.
        image_size: height and width in pixels.
        mean: of each colour, for values in [0, 1].
        std: of each colour.
        classes: names by index; None where unknown.
    """

    name: str
    model: nn.Module
    image_size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    classes: list[str] | None = None

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """`(N, H, W, 3)` uint8 to `(N, 3, H, W)` as the model expects."""
        x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 255
        return (x - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)

    def class_name(self, index: int) -> str:
        """The class's name, or its number."""
        return self.classes[index] if self.classes and index < len(self.classes) else f"class {index}"


def load_network(
    name: str, checkpoint: Path | None = None, num_classes: int | None = None, random_weights: bool = False
) -> Network:
    """A network with its checkpoint's weights or, without one, its published ones (S3-Net: this repository's).

    Args:
        name: of `models.list_models()`, of torchvision's classifiers or of timm (`timm/NAME` where both have it).
        checkpoint: weights; what a file of the trainer says of itself (options, classes, normalisation) is used.
        num_classes: outputs, where the checkpoint differs from the network's default.
        random_weights: keep the initial weights (seed 0), to try the method without weights.

    Raises:
        InputError: the name is unknown, the checkpoint does not fit, or the weights cannot be had.
    """
    if checkpoint is None and not random_weights and name in list_models():
        checkpoint = pretrained_file(name)
    said = read_metadata(checkpoint) if checkpoint else {}
    published = checkpoint is None and not random_weights
    torch.manual_seed(0)
    if name in list_models():
        network = _s3net(name, said, num_classes)
    elif not name.startswith("timm/") and name in torchvision.models.list_models(module=torchvision.models):
        network = _torchvision(name, num_classes, published)
    else:
        network = _timm(name, num_classes, published)
    if checkpoint:
        load_weights(network.model, checkpoint)
    if said:
        network.mean, network.std = tuple(said["mean"]), tuple(said["std"])
        network.image_size, network.classes = said["image_size"], said["classes"]
    network.model.eval()
    return network


def _s3net(name: str, said: dict, num_classes: int | None) -> Network:
    options = said.get("model_options", {}) if said.get("model", name) == name else {}
    model = create_model(name, num_classes or said.get("num_classes"), **options)
    classes = model.classifier.out_features
    return Network(
        name, model, 32 if name == "s3net_cifar" else 224, classes=imagenet_classes() if classes == 1000 else None
    )


def _torchvision(name: str, num_classes: int | None, published: bool) -> Network:
    options = {} if num_classes is None or published else {"num_classes": num_classes}
    size = 299 if name == "inception_v3" else 224
    if not published:
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        model = torchvision.models.get_model(name, weights=None, **options)
        return Network(name, model, size, classes=imagenet_classes() if num_classes in (None, 1000) else None)
    available = torchvision.models.get_model_weights(name)
    weights = next((w for w in available if w.name == "IMAGENET1K_V1"), available.DEFAULT)  # the ones of the paper
    try:
        model = torchvision.models.get_model(name, weights=weights)
    except (OSError, RuntimeError) as error:  # no network, or a damaged download
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
        raise InputError(
            f"the weights of {name} cannot be downloaded ({_reason(error)}): fetch {weights.url} where there is a "
            f"network and put it in {file}, or pass --checkpoint {name}=FILE"
        ) from error
    return Network(name, model, size, classes=weights.meta["categories"])


def _timm(name: str, num_classes: int | None, published: bool) -> Network:
    import timm  # only here: it takes seconds to import

    plain = name.removeprefix("timm/")
    if not timm.is_model(plain):
        known = [*list_models(), *torchvision.models.list_models(module=torchvision.models), *timm.list_models()]
        near = nearest_names(name, known)
        raise InputError(
            f"there is no network {name!r}: {near if len(near) < 200 else 'see models.py, torchvision and timm'}"
        )
    options = {} if num_classes is None else {"num_classes": num_classes}
    try:
        model = timm.create_model(plain, pretrained=published, **options)
    except Exception as error:  # timm passes on whatever its several ways of downloading raise
        if not published:
            raise
        raise InputError(
            f"the weights of {name} cannot be downloaded ({_reason(error)}): save them as a state dict where there "
            f"is a network, with timm.create_model({plain!r}, pretrained=True), and pass --checkpoint {name}=FILE"
        ) from error
    config = model.default_cfg
    classes = imagenet_classes() if model.num_classes == 1000 else None
    size = config["input_size"][-1]
    return Network(name.replace("/", "-"), model, size, tuple(config["mean"]), tuple(config["std"]), classes)


def imagenet_classes() -> list[str]:
    """The 1000 names in label order, as torchvision has them."""
    return torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip("<>.")[:120]
