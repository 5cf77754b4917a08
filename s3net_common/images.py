"""Image files of any kind as RGB pixels, and the images of a folder of classes."""

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from s3net_common.errors import InputError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

warnings.filterwarnings("ignore", module="PIL")  # an image is good if it can be decoded


def class_names(folder: Path) -> list[str]:
    """The class folders in it, in alphabetical order.

    Raises:
        InputError: there are none.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{folder} has no class folders: put the images into {folder}/<class>/")
    return names


def read_class_names(file: Path) -> list[str]:
    """The names in the file of a `--classes` flag, one a line, without what follows a tab.

    Raises:
        InputError: it cannot be read, is empty, or names a class twice.
    """
    try:
        names = [name for line in file.read_text().splitlines() if (name := line.partition("\t")[0].strip())]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--classes {file} cannot be read: pass a text file with a class name a line") from error
    if not names:
        raise InputError(f"--classes {file} is empty: it needs a class name a line")
    if len(set(names)) < len(names):
        double = next(name for i, name in enumerate(names) if name in names[:i])
        raise InputError(f"--classes {file} names {double!r} twice")
    return names


def class_images(folder: Path, classes: list[str]) -> Iterator[tuple[Path, int]]:
    """The image files below `folder/<class>`, class by class, alphabetically in each, with their class's index.

    Raises:
        InputError: there are none.
    """
    found = False
    for label, name in enumerate(classes):
        for path in sorted((folder / name).rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
                found = True
                yield path, label
    if not found:
        raise InputError(f"{folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in its class folders")


def same_classes(train: list[str], val: list[str], train_at: Path, val_at: Path) -> list[str]:
    """The classes of both halves of a data set.

    Raises:
        InputError: they differ; the message names the first difference.
    """
    if different := sorted(set(train) ^ set(val)):
        inside, outside = (train_at, val_at) if different[0] in train else (val_at, train_at)
        raise InputError(f"class {different[0]!r} is in {inside} but not in {outside}: give both the same classes")
    if train != val:
        first = next(i for i, (ours, theirs) in enumerate(zip(train, val, strict=True)) if ours != theirs)
        raise InputError(
            f"class {first} is {train[first]!r} in {train_at} and {val[first]!r} in {val_at}: give both the same order"
        )
    return train


def decode(file: Path | bytes | memoryview, orient: bool = False) -> Image.Image:
    """An image file, or its bytes, of any mode as 8-bit RGB.

    Transparent pixels become white; 16-bit values are scaled to 8; a JPEG's orientation is applied where `orient` asks
    for it. (ImageNet's networks are trained and evaluated on images as they are stored, as torchvision reads them.)

    Raises:
        InputError: it cannot be read as an image; the message says why.
    """
    try:
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as image:
            return to_rgb(ImageOps.exif_transpose(image) if orient else image)
    except Exception as error:  # whatever the decoders of all the formats raise
        reason = "no image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InputError((reason.strip().splitlines() or [type(error).__name__])[0]) from error


def read_rgb(file: Path | bytes | memoryview, name: str | Path | None = None, orient: bool = True) -> Image.Image:
    """As `decode`, with a message that calls the image `name`, by default its path, and says what to do.

    Raises:
        InputError: it cannot be read as an image.
    """
    try:
        return decode(file, orient)
    except InputError as error:
        called = file if name is None else name
        raise InputError(
            f"{called} cannot be read as an image ({error}): remove or repair it, or pass --skip-unreadable"
        ) from error


def decode_image(path: Path, size: int) -> np.ndarray:
    """An image file of any size and mode as uint8 `(size, size, 3)`: short side resized, centre cropped.

    Raises:
        InputError: the file cannot be read as an image; the message names it.
    """
    image = read_rgb(path)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if values.max(initial=0) > 255:
            values = values * (255 / 65535)
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
