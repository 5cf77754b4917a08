"""How an image becomes the input of a network: framing (resize and crop), then normalisation.

Evaluation, ten-crop evaluation, prediction and saliency maps prepare their images here.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from s3net_common.normalisation import CIFAR100_MEAN, CIFAR100_STD, IMAGENET_MEAN, IMAGENET_STD

TINY_IMAGENET_SIZE = 64  # height and width of its images
INTERPOLATIONS = {mode.value: getattr(Image.Resampling, mode.name, None) for mode in InterpolationMode}
CROP, FIT, SQUASH = "crop", "fit", "squash"


@dataclass(frozen=True)
class Preparation:
    """How images become the input of a network, as in its training without the random augmentation.

    Attributes:
        resize: length of the short side in pixels, to which an image is resized first.
        crop: height and width of the crop of its centre.
        image_size: height and width of the network's input, to which the crop is resized.
        mean, std: normalisation of each colour channel, for pixels in [0, 1].
        method: "crop": resize the short side, then crop the centre. "fit": resize the largest centred square, which is
            the same without a margin. "squash": resize the whole image to a square, as in the paper's figures.
        interpolation: of the resizing, by its name in torchvision: "bilinear", "bicubic", ...
    """

    resize: int
    crop: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    method: str = CROP
    interpolation: str = "bilinear"

    def with_image_size(self, size: int) -> "Preparation":
        """Return this preparation for a network's input of another size, with a margin of the same proportion."""
        if self.crop != self.image_size:
            return replace(self, image_size=size)
        return replace(self, resize=round(size * self.resize / self.crop), crop=size, image_size=size)

    def squashed(self) -> "Preparation":
        """Return this preparation with the whole image resized to the input's square, without cropping."""
        return replace(self, resize=self.image_size, crop=self.image_size, method=SQUASH)

    def frame(self, image: Image.Image) -> Image.Image:
        """Resize and crop an image of any size to `crop` x `crop` pixels."""
        return self._frame(image, self.crop, INTERPOLATIONS[self.interpolation])

    def frame_mask(self, mask: Image.Image) -> Image.Image:
        """Frame the mask of an image as `frame` frames the image, at `image_size`, by nearest neighbour."""
        return self._frame(mask, self.image_size, Image.Resampling.NEAREST)

    def _frame(self, image: Image.Image, size: int, interpolation: Image.Resampling) -> Image.Image:
        if self.method == CROP:
            mode = next(mode for mode in InterpolationMode if INTERPOLATIONS[mode.value] == interpolation)
            resized = transforms.resize(image, round(self.resize * size / self.crop), mode)
            return transforms.center_crop(resized, size)
        if image.size == (size, size):
            return image
        return (ImageOps.fit if self.method == FIT else Image.Image.resize)(image, (size, size), interpolation)

    def pixels(self, image: Image.Image) -> Tensor:
        """Convert an RGB image to uint8 `(3, crop, crop)`."""
        return torch.from_numpy(np.array(self.frame(image))).permute(2, 0, 1)

    def crop_centre(self, images: Tensor) -> Tensor:
        """Crop the centre of uint8 images `(N, 3, resize, resize)`. Images of another size are returned unchanged."""
        if images.shape[-1] != self.resize or self.resize == self.crop:
            return images
        return transforms.center_crop(images, self.crop)

    def normalization(self, device: torch.device) -> "Normalization":
        """Return the conversion of framed images to the network's input."""
        return Normalization(device, self.mean, self.std, self.image_size)


class Normalization:
    """Conversion of uint8 images to the network's input, on the training device.

    Args:
        device: device of the images.
        mean, std: of each colour channel, for pixels in [0, 1].
        image_size: height and width of the network's input; images of another size are resized (bilinear).
    """

    def __init__(self, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...], image_size: int) -> None:
        scale = 1 / (255 * torch.tensor(std, device=device))
        self.scale = scale.view(1, 3, 1, 1)
        self.shift = (-torch.tensor(mean, device=device) * 255 * scale).view(1, 3, 1, 1)
        self.image_size = image_size

    def __call__(self, images: Tensor) -> Tensor:
        """Return uint8 `(B, 3, H, W)` as float32 `(B, 3, image_size, image_size)` in channels-last memory format.

        With several crops per image, `(B, crops, 3, H, W)`, the result has the same additional dimension.
        """
        leading = images.shape[:-3]
        images = images.flatten(0, -4).float().mul_(self.scale).add_(self.shift)
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return images.contiguous(memory_format=torch.channels_last).unflatten(0, leading)


# ---- The preparation of a network ---------------------------------------------------------------------------------


def dataset_preparation(
    dataset: str | None,
    image_size: int,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Preparation:
    """Return how the trainer prepares the validation images of a data set."""
    resize = crop = image_size
    if dataset == "imagenet":
        resize = round(image_size * 256 / 224)
    elif dataset == "tinyimagenet":  # they are read in their own size, and enlarged batch by batch
        resize = crop = TINY_IMAGENET_SIZE
    return Preparation(resize, crop, image_size, tuple(mean), tuple(std), CROP if resize > crop else FIT)


def stored_preparation(metadata: dict[str, Any]) -> Preparation | None:
    """Return the preparation that the trainer's file of weights names in its metadata, if any (`read_metadata`)."""
    if not {"mean", "std", "image_size"} <= metadata.keys():
        return None
    return dataset_preparation(metadata.get("dataset"), metadata["image_size"], metadata["mean"], metadata["std"])


def usual_dataset(name: str) -> str:
    """Return the data set that a network is assumed to be trained on, if its file does not name one."""
    return "cifar100" if name.endswith("_cifar") else "imagenet"


def usual_preparation(name: str) -> Preparation:
    """Return the preparation of a network of this repository, if its file of weights does not name one."""
    if usual_dataset(name) == "cifar100":
        return dataset_preparation("cifar100", 32, CIFAR100_MEAN, CIFAR100_STD)
    return dataset_preparation("imagenet", 224)


def torchvision_preparation(transform: object) -> Preparation:
    """Return the preparation of torchvision's weights, from `weights.transforms()`."""
    (resize,), (crop,) = transform.resize_size, transform.crop_size
    mean, std = tuple(transform.mean), tuple(transform.std)
    return Preparation(resize, crop, crop, mean, std, CROP, transform.interpolation.value)


def timm_preparation(config: dict[str, Any]) -> Preparation:
    """Return the preparation of timm's weights, from `model.pretrained_cfg`."""
    size = config["input_size"][-1]
    resize = int(size / config.get("crop_pct", 0.875))
    interpolation = config.get("interpolation", "bicubic")
    return Preparation(
        resize,
        size,
        size,
        tuple(config["mean"]),
        tuple(config["std"]),
        SQUASH if config.get("crop_mode") == "squash" else CROP,
        interpolation if INTERPOLATIONS.get(interpolation) is not None else "bilinear",
    )
