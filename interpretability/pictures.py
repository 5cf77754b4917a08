"""Images to explain and their masks, read from files and resized to squares."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from s3net_common.errors import InputError, printable
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
        pixels: `(size, size, 3)`, uint8.
        mask: `(size, size)`, True on the object; None if the image has no mask.
        original: `(side, side, 3)`, uint8: the image before resizing; None if it is not kept.
    """

    name: str
    pixels: np.ndarray
    mask: np.ndarray | None = None
    original: np.ndarray | None = None


# ---- Pictures -------------------------------------------------------------------------------------------------------


def read_pictures(
    files: Sequence[Path], size: int, masks: Path | None = None, skip_unreadable: bool = False
) -> list[Picture]:
    """Read image files, turn them upright, and resize them to `size` x `size` without cropping, as in the paper.

    Args:
        files: image files.
        size: height and width in pixels.
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
            mask = None if masks is None else read_mask(find_mask(file, masks), size, image.size, file)
        except UnreadableImage as error:
            errors.append(error)
            continue
        stem = printable(file.stem)
        candidates = chain([stem], (f"{stem}-{number}" for number in count(2)))
        name = next(name for name in candidates if name not in pictures)
        pictures[name] = Picture(name, _resize(image, size), mask)
    if errors and not (skip_unreadable and pictures):
        raise unreadable_images(errors)
    report_once(errors, _reported)
    return list(pictures.values())


def sample_pictures(size: int) -> list[Picture]:
    """Return scikit-learn's two freely licensed photographs: a temple and a flower."""
    return [Picture(Path(name).stem, _resize(Image.fromarray(pixels), size)) for name, pixels in _photographs().items()]


def sample_crops(size: int) -> list[Picture]:
    """Return square crops of the two photographs, each with one object, for networks that take small images."""
    photographs = _photographs()
    crops = {
        name: photographs[file][top : top + side, left : left + side]
        for name, (file, left, top, side) in SAMPLE_CROPS.items()
    }
    return [Picture(name, _resize(Image.fromarray(crop), size), original=crop) for name, crop in crops.items()]


def _photographs() -> dict[str, np.ndarray]:
    samples = load_sample_images()
    return {Path(name).name: pixels for name, pixels in zip(samples.filenames, samples.images, strict=True)}


def _resize(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


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


def read_mask(path: Path, size: int, image_size: tuple[int, int], image: Path) -> np.ndarray:
    """Return a mask as `(size, size)` booleans, True on the object.

    The object is where alpha is above 127, or the grey value if the mask has no alpha channel.

    Args:
        path: the mask.
        size: height and width to resize it to, by nearest neighbour.
        image_size: width and height of the image.
        image: path of the image, for error messages.

    Raises:
        UnreadableImage: the mask cannot be read.
        InputError: the mask marks no pixel, or differs from the image in its aspect ratio.
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
    marked = np.asarray(mask.resize((size, size), Image.Resampling.NEAREST)) > 127
    if not marked.any():
        raise InputError(
            f"the mask {printable(path)} marks no pixel: alpha (or the grey value) must be above 127 on the object"
        )
    return marked
