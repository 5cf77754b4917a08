"""Classifiers by name, with their weights and their preprocessing: S3-Net, its baselines, torchvision and timm."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
import torchvision
from torch import nn

from s3net_common.checkpoints import fitting_weights, load_weights, pretrained_file, read_metadata, tensor_names
from s3net_common.class_names import find_class
from s3net_common.errors import InputError, first_line, nearest_names
from s3net_common.framing import (
    Preparation,
    stored_preparation,
    timm_preparation,
    torchvision_preparation,
    usual_preparation,
)
from s3net_networks import create_network, list_networks

PAPER_NETWORKS = ("vgg19", "squeezenet1_0", "resnet50", "densenet169")  # beside S3-Net in the paper's figures
REACH_SECONDS = 5.0
OPTIONS_ADVICE = "; if the network has other options, pass --model-options"


@dataclass
class Network:
    """A classifier with what is needed to explain it.

    Attributes:
        name: for figures, file names and JSON.
        model: in evaluation mode; maps normalised images `(N, 3, H, W)` to logits.
        preparation: how images become its input; by default as for ImageNet.
        classes: names by index; None if unknown.
    """

    name: str
    model: nn.Module
    preparation: Preparation = field(default_factory=partial(usual_preparation, "imagenet"))
    classes: list[str] | None = None

    def target_index(self, target: str | None) -> int | None:
        """Return the index of the class that --target names (see `find_class`); None for None.

        Raises:
            InputError: there is no class of this name.
        """
        return None if target is None else find_class(target, self.classes)

    def class_name(self, index: int) -> str:
        """Return the name of a class, or "class `index`" if its name is unknown."""
        return self.classes[index] if self.classes and index < len(self.classes) else f"class {index}"


def load_network(
    name: str,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    random_weights: bool = False,
    options: dict[str, Any] | None = None,
) -> Network:
    """Return a network in evaluation mode with the weights of a checkpoint, published weights or random ones.

    Without a checkpoint, torchvision's and timm's networks get their published weights, and all others the trained
    weights in this repository.

    Args:
        name: a network of torchvision, of `s3net_networks.list_networks()` or of timm. Names are looked up in this
            order; `timm/NAME` asks for timm's network.
        checkpoint: file of weights. If the trainer wrote it, its metadata gives the network's options, class names,
            preparation of images.
        num_classes: outputs of the classifier; by default the checkpoint's number, else the network's usual one.
        random_weights: keep the initial weights (seed 0).
        options: of a network of `s3net_networks`, which replace the checkpoint's.

    Raises:
        InputError: the name is unknown, the checkpoint does not fit, or there are no weights.
    """
    in_torchvision = name in _torchvision_names()
    in_repository = name in list_networks() and not in_torchvision
    if options and not in_repository:
        raise InputError(f"--model-options is for networks of this repository, and {name} is not one: leave it out")
    if checkpoint is None and not random_weights and in_repository:
        checkpoint = pretrained_file(name)
    metadata = read_metadata(checkpoint) if checkpoint else {}
    num_classes = num_classes or metadata.get("num_classes")
    published = checkpoint is None and not random_weights
    torch.manual_seed(0)
    if in_torchvision:
        build = partial(_from_torchvision, name, num_classes, published, checkpoint)
    elif in_repository:
        build = partial(_from_repository, name, num_classes, metadata, options or {})
    else:
        build = partial(_from_timm, name, num_classes, published)
    if metadata and (in_torchvision or in_repository):  # the file gives the sizes: compare them before allocating
        with torch.device("meta"):
            fitting_weights(build().model, checkpoint)
    network = build()
    if checkpoint:
        advice = "" if not in_repository or metadata or options else OPTIONS_ADVICE
        _load_checkpoint(network.model, checkpoint, advice)
    network.preparation = stored_preparation(metadata) or network.preparation
    network.classes = metadata.get("classes", network.classes)
    network.model.eval()
    return network


def _load_checkpoint(model: nn.Module, checkpoint: Path, advice: str) -> None:
    """Load weights. `advice` is added to the message of an error."""
    try:
        load_weights(model, checkpoint, report=print)
    except InputError as error:
        if not advice:
            raise
        raise InputError(f"{error}{advice}") from error


def local_networks() -> list[str]:
    """Return the names of the networks of `s3net_networks` and of torchvision."""
    return [*list_networks(), *_torchvision_names()]


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _from_repository(name: str, num_classes: int | None, metadata: dict[str, Any], options: dict[str, Any]) -> Network:
    stored = metadata.get("model_options", {}) if metadata.get("model", name) == name else {}
    num_classes = num_classes or (100 if name.endswith("_cifar") else 1000)
    model = create_network(name, num_classes, **stored | options)
    return Network(name, model, usual_preparation(name), imagenet_classes() if num_classes == 1000 else None)


def _from_torchvision(name: str, num_classes: int | None, published: bool, checkpoint: Path | None) -> Network:
    options = {} if num_classes is None or published else {"num_classes": num_classes}
    available = torchvision.models.get_model_weights(name)
    weights = next((w for w in available if w.name == "IMAGENET1K_V1"), available.DEFAULT)  # the paper's
    preparation = torchvision_preparation(weights.transforms())
    if not published:
        if name in ("googlenet", "inception_v3"):
            # The published weights, and those fine-tuned from them, were trained with pixels in [-1, 1]; torchvision
            # sets transform_input together with its own weights only. The auxiliary classifiers may be left out.
            auxiliary = checkpoint is None or any("aux" in key.lower() for key in tensor_names(checkpoint))
            options |= {"transform_input": True, "init_weights": False, "aux_logits": auxiliary}
        model = torchvision.models.get_model(name, weights=None, **options)
        return Network(name, model, preparation, imagenet_classes() if num_classes in (None, 1000) else None)
    try:
        model = torchvision.models.get_model(name, weights=weights)
    except (OSError, RuntimeError) as error:  # no internet access, or a damaged download
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
        raise InputError(
            f"the weights of {name} cannot be downloaded ({_reason(error)}): download {weights.url} on a "
            f"machine with internet access and put it in {file}, or pass --checkpoint {name}=FILE"
        ) from error
    return Network(name, model, preparation, weights.meta["categories"])


def _from_timm(name: str, num_classes: int | None, published: bool) -> Network:
    import timm  # only here: it takes seconds to import
    from huggingface_hub import constants

    plain = name.removeprefix("timm/")
    if not timm.is_model(plain):
        hint = nearest_names(name, [*local_networks(), *timm.list_models()])
        if len(hint) > 200:  # no name is close, and all of them are listed
            hint = "see s3net_networks, torchvision and timm"
        raise InputError(f"there is no network {name!r}: {hint}")
    options = {} if num_classes is None else {"num_classes": num_classes}
    create = partial(timm.create_model, plain, pretrained=published, **options)
    offline = constants.HF_HUB_OFFLINE
    try:
        try:
            constants.HF_HUB_OFFLINE = True  # cached files need no network
            model = create()
        except Exception as error:
            if not published:
                raise
            if offline:
                raise ConnectionError(f"HF_HUB_OFFLINE is set: {_reason(error)}") from None
            if reason := _unreachable(constants.ENDPOINT):  # a download has many retries
                raise ConnectionError(reason) from None
            constants.HF_HUB_OFFLINE = False
            model = create()
    except Exception as error:  # each of timm's ways of downloading raises its own
        if not published:
            raise
        raise InputError(
            f"the weights of {name} cannot be downloaded ({_reason(error)}): on a machine with internet access, save "
            f"the state dict of timm.create_model({plain!r}, pretrained=True), and pass --checkpoint {name}=FILE"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline
    classes = imagenet_classes() if model.num_classes == 1000 else None
    return Network(name.replace("/", "-"), model, timm_preparation(model.pretrained_cfg), classes)


def _unreachable(address: str) -> str | None:
    """Return why a web server cannot be reached within `REACH_SECONDS`; None if it can be."""
    try:
        urlopen(Request(address, method="HEAD"), timeout=REACH_SECONDS).close()
    except HTTPError:  # an answer
        return None
    except OSError as error:
        return _reason(error)
    return None


def imagenet_classes() -> list[str]:
    """Return the names of ImageNet's 1000 classes in the order of their indices, from torchvision."""
    return torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]


def _reason(error: Exception) -> str:
    return first_line(error).strip("<>")[:120]
