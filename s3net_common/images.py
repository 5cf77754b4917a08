"""Read image files of any format as RGB, and list the images of a folder of classes."""

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from s3net_common.errors import InputError, first_line
from s3net_common.text_files import read_text

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

warnings.filterwarnings("ignore", module="PIL")  # an image that can be decoded is used, whatever Pillow warns about


# ---- Folders of classes -------------------------------------------------------------------------------------------


def class_names(folder: Path) -> list[str]:
    """Return the names of the class folders in `folder`, in alphabetical order.

    Raises:
        InputError: there are none.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{folder} has no class folders: put the images into {folder}/<class>/")
    return names


def read_class_names(file: Path) -> list[str]:
    """Read the file of a `--classes` flag: one class name per line; text after a tab is ignored.

    Raises:
        InputError: the file cannot be read, is empty, or contains a name twice.
    """
    try:
        names = [name for line in read_text(file).splitlines() if (name := line.partition("\t")[0].strip())]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--classes {file} cannot be read: pass a text file with one class name per line") from error
    if not names:
        raise InputError(f"--classes {file} is empty: it needs one class name per line")
    if len(set(names)) < len(names):
        duplicate = next(name for i, name in enumerate(names) if name in names[:i])
        raise InputError(f"--classes {file} contains {duplicate!r} twice")
    return names


def class_images(folder: Path, classes: list[str]) -> Iterator[tuple[Path, int]]:
    """Yield the image files below `folder/<class>` with their labels: class by class, alphabetically in each class.

    Args:
        folder: contains a folder for each class.
        classes: names of the classes; an image's label is the index of its class in this list.

    Raises:
        InputError: there are no image files.
    """
    empty = True
    for label, name in enumerate(classes):
        for path in sorted((folder / name).rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
                empty = False
                yield path, label
    if empty:
        raise InputError(f"{folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in its class folders")


def check_same_classes(train: list[str], val: list[str], train_path: Path, val_path: Path) -> None:
    """Check that the training and the validation images have the same classes in the same order.

    Raises:
        InputError: they differ; the message names the first difference.
    """
    if different := sorted(set(train) ^ set(val)):
        present, absent = (train_path, val_path) if different[0] in train else (val_path, train_path)
        raise InputError(f"class {different[0]!r} is in {present} but not in {absent}: give both the same classes")
    for label, (train_name, val_name) in enumerate(zip(train, val, strict=True)):
        if train_name != val_name:
            raise InputError(
                f"class {label} is {train_name!r} in {train_path} and {val_name!r} in {val_path}: "
                "give both the same order"
            )


# ---- Image files --------------------------------------------------------------------------------------------------


def decode(file: Path | bytes | memoryview, orient: bool = False) -> Image.Image:
    """Decode an image of any mode as 8-bit RGB. Transparent pixels become white; 16-bit values are scaled to 8 bits.

    Args:
        file: path of an image file, or the file's content.
        orient: rotate the image as its EXIF orientation says. ImageNet's networks are trained and evaluated without
            this, as torchvision reads images.

    Raises:
        InputError: the image cannot be decoded; the message is the reason.
    """
    try:
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as image:
            return to_rgb(ImageOps.exif_transpose(image) if orient else image)
    except UnidentifiedImageError as error:
        raise InputError("no image format that Pillow knows") from error
    except Exception as error:  # Pillow's decoders raise many kinds of exception
        raise InputError(first_line(error)) from error


def read_rgb(file: Path | bytes | memoryview, name: str | Path | None = None, orient: bool = True) -> Image.Image:
    """Decode an image like `decode`, with an error message for the user.

    Args:
        file: path of an image file, or the file's content.
        name: the image's name in the message; by default its path.
        orient: as in `decode`.

    Raises:
        InputError: the image cannot be decoded; the message names it and says what to do.
    """
    try:
        return decode(file, orient)
    except InputError as error:
        raise InputError(
            f"{file if name is None else name} cannot be read as an image ({error}): remove or repair it, or pass "
            "--skip-unreadable"
        ) from error


def read_square(path: Path, size: int) -> np.ndarray:
    """Read an image file as uint8 `(size, size, 3)`: the short side resized to `size`, then a centre crop.

    Raises:
        InputError: as `read_rgb`.
    """
    image = read_rgb(path)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to 8-bit RGB, as `decode` does."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if values.max(initial=0) > 255:
            values = values * (255 / 65535)
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
