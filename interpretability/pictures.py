"""Images to explain and their masks, read from files and prepared as a network's input."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

from s3net_common.errors import InputError, printable
from s3net_common.framing import SQUASH, Preparation
from s3net_common.images import IMAGE_SUFFIXES, load_image, read_rgb
from s3net_common.pixel_modes import to_rgb
from s3net_common.unused_files import UnreadableImage, report_once, unreadable_images

ASPECT_TOLERANCE = 0.02  # relative, because a mask may have been rounded to whole pixels
SAMPLE_CROPS = {  # square crops of scikit-learn's photographs: left, top and side in pixels
    "temple": ("china.jpg", 10, 0, 400),
    "roof": ("china.jpg", 90, 20, 240),
    "lake": ("china.jpg", 380, 180, 160),
    "tree": ("china.jpg", 520, 125, 120),
    "flower": ("flower.jpg", 145, 55, 330),
    "petals": ("flower.jpg", 230, 140, 160),
}

_reported: set[str] = set()  # messages about images left out, which are read once for each image size


@dataclass
class Picture:
    """One image to explain.

    Attributes:
        name: unique among the pictures of a run; names its output files.
        pixels: `(size, size, 3)`, uint8: what the network sees, before the normalisation.
        mask: `(size, size)`, True on the object; None if the image has no mask.
        original: `(side, side, 3)`, uint8: the image before resizing; None if it is not kept.
        label: index of the object's class; None if it is unknown.
        aspect: width / height of what `pixels` show, other than 1 if the image was squashed to a square.
    """

    name: str
    pixels: np.ndarray
    mask: np.ndarray | None = None
    original: np.ndarray | None = None
    label: int | None = None
    aspect: float = 1.0


# ---- Pictures -------------------------------------------------------------------------------------------------------


def read_pictures(
    files: Sequence[Path], preparation: Preparation, masks: Path | None = None, skip_unreadable: bool = False
) -> list[Picture]:
    """Read image files, turn them upright, and resize and crop them as a network's input.

    Args:
        files: image files.
        preparation: of the network.
        masks: a folder with a mask for each image, or the mask of the only image; None to read no masks.
        skip_unreadable: leave out files that cannot be read, and print their names once, instead of stopping.

    Raises:
        InputError: files cannot be read as images (the message names all of them), an image has no mask, or its mask
            does not fit.
    """
    pictures: dict[str, Picture] = {}
    errors = []
    for file in files:
        try:
            image = read_rgb(file)
            mask = None if masks is None else read_mask(find_mask(file, masks), preparation, image.size, file)
        except UnreadableImage as error:
            errors.append(error)
            continue
        stem = printable(file.stem)
        candidates = chain([stem], (f"{stem}-{number}" for number in count(2)))
        name = next(name for name in candidates if name not in pictures)
        pictures[name] = make_picture(name, image, preparation, mask)
    if errors and not (skip_unreadable and pictures):
        raise unreadable_images(errors)
    report_once(errors, _reported)
    return list(pictures.values())


def make_picture(name: str, image: Image.Image, preparation: Preparation, mask: np.ndarray | None = None) -> Picture:
    """Return an RGB image as a network sees it. Small crops are enlarged to the network's input, and rounded."""
    framed = preparation.pixels(image)
    if framed.shape[-1] != preparation.image_size:
        size = [preparation.image_size] * 2
        framed = F.interpolate(framed[None].float(), size, mode="bilinear", antialias=True)[0]
        framed = framed.round().clamp(0, 255).to(torch.uint8)
    aspect = image.width / image.height if preparation.method == SQUASH else 1.0
    return Picture(name, framed.permute(1, 2, 0).numpy(), mask, aspect=aspect)


def sample_pictures(preparation: Preparation) -> list[Picture]:
    """Return scikit-learn's two freely licensed photographs: a temple and a flower."""
    return [
        make_picture(Path(name).stem, Image.fromarray(pixels), preparation) for name, pixels in _photographs().items()
    ]


def sample_crops(preparation: Preparation) -> list[Picture]:
    """Return square crops of the two photographs, each with one object, for networks that take small images."""
    photographs = _photographs()
    crops = {
        name: photographs[file][top : top + side, left : left + side]
        for name, (file, left, top, side) in SAMPLE_CROPS.items()
    }
    return [
        replace(make_picture(name, Image.fromarray(crop), preparation), original=crop) for name, crop in crops.items()
    ]


def _photographs() -> dict[str, np.ndarray]:
    samples = load_sample_images()
    return {Path(name).name: pixels for name, pixels in zip(samples.filenames, samples.images, strict=True)}


# ---- Masks ----------------------------------------------------------------------------------------------------------


def find_mask(image: Path, masks: Path) -> Path:
    """Return the mask of an image: the file of the same stem, of any image format, in `masks`, or `masks` if a file.

    Raises:
        InputError: there is none.
    """
    if masks.is_file():
        return masks
    files = [file for file in masks.glob("*") if file.stem == image.stem and file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        path = printable(masks / f"{image.stem}.png")
        raise InputError(f"there is no mask for {printable(image)}: put one in {path}")
    return min(files)


def read_mask(path: Path, preparation: Preparation, image_size: tuple[int, int], image: Path) -> np.ndarray:
    """Return a mask as `(size, size)` booleans, True on the object, framed as its image.

    The object is where alpha is above 127, or the grey value if the mask has no alpha channel.

    Args:
        path: the mask.
        preparation: of the network; the mask is resized by nearest neighbour.
        image_size: width and height of the image.
        image: path of the image, for error messages.

    Raises:
        UnreadableImage: the mask cannot be read.
        InputError: the mask marks no pixel, or none that the network sees, or has
            another aspect ratio than the image.
    """
    try:
        mask = load_image(path, orient=True)
        mask = mask.convert("RGBA").getchannel("A") if mask.has_transparency_data else to_rgb(mask).convert("L")
    except InputError as error:
        raise UnreadableImage(path, str(error)) from error
    width, height = mask.size
    if abs(width * image_size[1] / (height * image_size[0]) - 1) > ASPECT_TOLERANCE:
        raise InputError(
            f"the mask {printable(path)} is {width}x{height}, but its image {printable(image)} is "
            f"{image_size[0]}x{image_size[1]}: they must have the same aspect ratio"
        )
    marked = np.asarray(preparation.frame_mask(mask)) > 127
    if not marked.any() and (np.asarray(mask) > 127).any():
        raise InputError(
            f"the mask {printable(path)} marks no pixel of the part of {printable(image)} that the network sees: pass "
            "--squash to show it the whole image"
        )
    if not marked.any():
        raise InputError(
            f"the mask {printable(path)} marks no pixel: alpha (or the grey value) must be above 127 on the object"
        )
    return marked
