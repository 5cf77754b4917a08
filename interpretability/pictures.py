"""Images and masks from files, as square arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_sample_images

from s3net_common.errors import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
ASPECT_TOLERANCE = 0.02  # relative: a mask may have been rounded to whole pixels
SAMPLE_CROPS = {  # squares of scikit-learn's photographs: left, top and side in pixels
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
        mask: `(size, size)`, True on the object; None where there is none.
        original: `(side, side, 3)`, uint8: the image before it was brought to `size`; None where it isn't kept.
    """

    name: str
    pixels: np.ndarray
    mask: np.ndarray | None = None
    original: np.ndarray | None = None


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The image files among the paths and, sorted, in the folders among them (and their folders).

    Raises:
        InputError: a path is missing, or there is no image at all.
    """
    files = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise InputError(f"there is no image in {path} ({', '.join(sorted(SUFFIXES))})")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"there is no image {path}")
    return files


def read_pictures(files: Sequence[Path], size: int, masks: Path | None = None) -> list[Picture]:
    """Images, plainly resized to `size` x `size` as in the paper; with their masks, where a folder of masks is given.

    Raises:
        InputError: a file is no image, an image has no mask, or the mask has another aspect ratio.
    """
    pictures, taken = [], set()
    for file in files:
        with _opened(file) as image:
            original = image.size
            pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
        mask = None if masks is None else read_mask(find_mask(file, masks), size, original, file)
        name, again = file.stem, 2
        while name in taken:
            name, again = f"{file.stem}-{again}", again + 1
        taken.add(name)
        pictures.append(Picture(name, pixels, mask))
    return pictures


def sample_pictures(size: int) -> list[Picture]:
    """scikit-learn's two photographs, which may be published: a temple and a flower."""
    return [Picture(Path(name).stem, _resized(pixels, size)) for name, pixels in _photographs().items()]


def sample_crops(size: int) -> list[Picture]:
    """Squares of the two photographs, each with one thing in it, for networks of small images."""
    photographs = _photographs()
    crops = {
        name: photographs[file][top : top + side, left : left + side]
        for name, (file, left, top, side) in SAMPLE_CROPS.items()
    }
    return [Picture(name, _resized(crop, size), original=crop) for name, crop in crops.items()]


def _photographs() -> dict[str, np.ndarray]:
    samples = load_sample_images()
    return {Path(name).name: pixels for name, pixels in zip(samples.filenames, samples.images, strict=True)}


def _resized(pixels: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def find_mask(image: Path, masks: Path) -> Path:
    """The mask of an image: the file of the same name, of any image type, in the folder; or the one file given.

    Raises:
        InputError: there is none.
    """
    if masks.is_file():
        return masks
    found = sorted(file for file in masks.glob("*") if file.stem == image.stem and file.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"there is no mask for {image}: put one in {masks / (image.stem + '.png')}")
    return found[0]


def read_mask(path: Path, size: int, image_size: tuple[int, int], image: Path) -> np.ndarray:
    """`(size, size)`, True on the object: where alpha (or, in a mask without alpha, the grey value) is above 127.

    Args:
        path: the mask.
        size: height and width to bring it to, by the nearest pixel.
        image_size: the image's own width and height.
        image: the image's path, for errors.

    Raises:
        InputError: it is no image, is empty, or has another aspect ratio than the image.
    """
    with _opened(path) as mask:
        width, height = mask.size
        if abs(width * image_size[1] / (height * image_size[0]) - 1) > ASPECT_TOLERANCE:
            raise InputError(
                f"the mask {path} is {width}x{height}, but its image {image} is {image_size[0]}x{image_size[1]}: "
                "they must have the same aspect ratio"
            )
        channel = mask.getchannel("A") if "A" in mask.getbands() else mask.convert("L")
        values = np.asarray(channel.resize((size, size), Image.Resampling.NEAREST)) > 127
    if not values.any():
        raise InputError(f"the mask {path} marks no pixel: alpha (or the grey value) must be above 127 on the object")
    return values


def _opened(path: Path) -> Image.Image:
    """The image, decoded.

    Raises:
        InputError: it is missing or no image.
    """
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise InputError(f"there is no image {path}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no image that can be read") from error
    return image
