"""Networks of the Tiny ImageNet table that torchvision has, with the same number of parameters. Random weights."""

from pathlib import Path

import torch
from torch import nn
from torchvision import models

from s3net_common.errors import InputError, first_line


def mobilenet_v2(num_classes: int = 1000) -> nn.Module:
    """3,504,872 parameters. Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks"."""
    return models.mobilenet_v2(num_classes=num_classes)


def efficientnet_b0(num_classes: int = 1000) -> nn.Module:
    """5,288,548 parameters. Tan and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural ...".

    In training it drops whole blocks at random (stochastic depth), with a probability of up to 0.2 at the last block.
    """
    return models.efficientnet_b0(num_classes=num_classes)


def published_file(name: str) -> tuple[Path, dict]:
    """Return the file of torchvision's ImageNet weights, downloaded if it is missing, and their metadata.

    The metadata are those of `s3net_common.checkpoints.read_metadata`.

    Raises:
        InputError: they cannot be downloaded.
    """
    weights = models.get_model_weights(name).IMAGENET1K_V1
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            checksum = file.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(weights.url, str(file), checksum, progress=False)
        except (OSError, RuntimeError) as error:  # no internet access, or a damaged download
            raise InputError(
                f"the weights of {name} cannot be downloaded ({first_line(error).strip('<>')}): download "
                f"{weights.url} on a machine with internet access and put it in {file}"
            ) from error
    prepare = weights.transforms()
    return file, {
        "model": name,
        "model_options": {},
        "num_classes": len(weights.meta["categories"]),
        "classes": weights.meta["categories"],
        "mean": prepare.mean,
        "std": prepare.std,
        "image_size": prepare.crop_size[0],
    }
