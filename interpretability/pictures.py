"""Images to explain and their masks, read from files and resized to squares."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from s3net_common.errors import InputError, first_line
from s3net_common.images import IMAGE_SUFFIXES, decode, to_rgb

ASPECT_TOLERANCE = 0.02  # relative, because a mask may have been rounded to whole pixels
SAMPLE_CROPS = {  # square crops of scikit-learn's photographs: left, top and side in pixels
    "temple": ("china.jpg", 10, 0, 400),
    "roof": ("china.jpg", 90, 20, 240),
    "lake": ("china.jpg", 380, 180, 160),
    "tree": ("china.jpg", 520, 125, 120),
    "flower": ("flower.jpg", 145, 55, 330),
    "petals": ("flower.jpg", 230, 140, 160),
}


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


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the given image files, and the image files in the given folders and their subfolders, sorted by path.

    Raises:
        InputError: a path does not exist, or a folder contains no image.
    """
    files = []
    for path in paths:
        if path.is_dir():
            images = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise InputError(f"there is no image in {path} ({', '.join(sorted(IMAGE_SUFFIXES))})")
            files += images
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"there is no image {path}")
    return files


def read_pictures(files: Sequence[Path], size: int, masks: Path | None = None) -> list[Picture]:
    """Read image files and resize them to `size` x `size` without cropping, as in the paper.

    Args:
        files: image files.
        size: height and width in pixels.
        masks: a folder with a mask for each image, or the mask of the only image; None to read no masks.

    Raises:
        InputError: a file cannot be read as an image, an image has no mask, or its mask does not fit.
    """
    pictures: dict[str, Picture] = {}
    for file in files:
        image = _read(file, lambda path: decode(path, orient=True))
        mask = None if masks is None else read_mask(find_mask(file, masks), size, image.size, file)
        candidates = chain([file.stem], (f"{file.stem}-{number}" for number in count(2)))
        name = next(name for name in candidates if name not in pictures)
        pictures[name] = Picture(name, _resize(image, size), mask)
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
        raise InputError(f"there is no mask for {image}: put one in {masks / (image.stem + '.png')}")
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
        InputError: the mask cannot be read, marks no pixel, or differs from the image in its aspect ratio.
    """
    mask = _read(path, _decode_alpha)
    width, height = mask.size
    if abs(width * image_size[1] / (height * image_size[0]) - 1) > ASPECT_TOLERANCE:
        raise InputError(
            f"the mask {path} is {width}x{height}, but its image {image} is {image_size[0]}x{image_size[1]}: "
            "they must have the same aspect ratio"
        )
    marked = np.asarray(mask.resize((size, size), Image.Resampling.NEAREST)) > 127
    if not marked.any():
        raise InputError(f"the mask {path} marks no pixel: alpha (or the grey value) must be above 127 on the object")
    return marked


def _decode_alpha(path: Path) -> Image.Image:
    """Return the alpha channel of an image file, or its grey values if it has none, as an image of mode "L"."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.has_transparency_data:
            return image.convert("RGBA").getchannel("A")
        return to_rgb(image).convert("L")


def _read(path: Path, decoder: Callable[[Path], Image.Image]) -> Image.Image:
    """Return `decoder(path)`.

    Raises:
        InputError: it failed; the message contains the path and the reason.
    """
    try:
        return decoder(path)
    except Exception as error:  # each image format's decoder raises exceptions of its own
        raise InputError(
            f"{path} cannot be read as an image ({first_line(error)}): repair it or leave it out"
        ) from error
