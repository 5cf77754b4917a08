"""Read image files of any format as RGB, and list the images of folders. Every script reads and lists with this."""

import io
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from s3net_common.class_names import composed
from s3net_common.errors import InputError, first_line, printable
from s3net_common.pixel_modes import scale_transparency, to_rgb, use_full_range
from s3net_common.text_files import read_text
from s3net_common.unused_files import (
    NEEDED_PACKAGES,
    SYSTEM_FILES,
    SYSTEM_FOLDERS,
    Skipped,
    UnreadableImage,
    describe_content,
    read_start,
)

with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()

Image.init()  # registers all of Pillow's formats
# Raster formats only: Pillow would start Ghostscript to draw an EPS file, whatever its name.
RASTER_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "QOI", "HEIF")
FORMATS = tuple(name for name in RASTER_FORMATS if name in Image.OPEN)  # without those that need a package
IMAGE_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
MAX_PIXELS = 178_956_970  # Pillow's limit
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # Pillow refuses images with 1 MB of text or profile

warnings.filterwarnings("ignore", module="PIL")  # an image that can be decoded is used, whatever Pillow warns about


# ---- Listing --------------------------------------------------------------------------------------------------------


def _walk(folder: Path, skipped: Skipped, visited: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield the image files below a folder, sorted by path. Follow symbolic links to folders, as torchvision does.

    Args:
        folder: where to start.
        skipped: counts everything else.
        visited: device and inode number of folders that are not entered (again), so that links form no loop.
    """
    try:
        identity = _identity(folder)
        if identity in visited:
            skipped.add("links to folders that are listed already or contain the link", folder)
            return
        visited.add(identity)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        skipped.add(f"folders that cannot be opened ({error.strerror})", folder)
        return
    for entry in entries:
        path = Path(entry.path)
        is_folder, reason = _classify(entry)
        if reason:
            skipped.add(reason, path)
        elif is_folder:
            yield from _walk(path, skipped, visited)
        elif reason is None:
            yield path


def _classify(entry: os.DirEntry) -> tuple[bool, str | None]:
    """Return whether a folder's entry is a folder, and why it is left out: None if it is used, "" without a report."""
    name, suffix = entry.name.lower(), Path(entry.name).suffix.lower()
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError:  # a symbolic link to itself
        is_folder = is_file = False
    if is_folder:
        if name.startswith("."):
            return True, "hidden folders"
        return True, "folders of the operating system or an archive program" if name in SYSTEM_FOLDERS else None
    if name.startswith("."):
        return False, "hidden files" if suffix in IMAGE_SUFFIXES else ""  # .DS_Store and its kin are in every folder
    if name in SYSTEM_FILES:
        return False, ""
    if not is_file and not _is_broken_link(entry):
        return False, "pipes, sockets or devices"
    if suffix in IMAGE_SUFFIXES:
        return False, None  # also a broken link: the reader reports that the image is missing
    if suffix in NEEDED_PACKAGES:
        return False, NEEDED_PACKAGES[suffix]
    if not is_file:
        return False, "broken links"
    if not suffix:
        return False, None if _is_image(Path(entry.path)) else "files without a suffix that are no images"
    return False, "files with other suffixes"


def _is_broken_link(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not Path(entry.path).exists()


def _is_image(path: Path) -> bool:
    """Return whether a file begins as an image does. True if it cannot be opened: the reader reports the reason."""
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:  # Pillow's decoders raise many kinds of exception
        return True


def _images_below(folder: Path, skipped: Skipped) -> Iterator[Path]:
    """Yield the image files below a folder, sorted by path; count in `skipped` what is left out."""
    parents = {*folder.absolute().parents, *folder.resolve().parents}  # links to them would be loops
    return _walk(folder, skipped, {_identity(parent) for parent in parents})


def _identity(folder: Path) -> tuple[int, int]:
    """Return the device and the inode number of a folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the given image files, and the image files in the given folders and their subfolders, sorted by path.

    Prints what is left out of each folder.

    Raises:
        InputError: a path does not exist or is no regular file, or a folder contains no image.
    """
    files = []
    for path in paths:
        if path.is_dir():
            skipped = Skipped(path)
            images = list(_images_below(path, skipped))
            if not images:
                raise InputError(f"there is no image in {printable(path)} {_expected(skipped)}")
            skipped.report()
            files += images
        elif path.is_file():
            files.append(path)
        elif path.exists():
            raise InputError(f"{printable(path)} is neither a file nor a folder")
        else:
            raise InputError(f"there is no image {printable(path)}")
    return files


def _expected(skipped: Skipped) -> str:
    return f"({', '.join(sorted(FORMATS))})" + (f"; left out: {skipped}" if skipped.counts else "")


# ---- Folders of classes ---------------------------------------------------------------------------------------------


def class_folders(folder: Path) -> dict[str, Path]:
    """Return the class folders in `folder` by name, in alphabetical order. Accents in the names are composed (NFC).

    Hidden folders and those of operating systems (`SYSTEM_FOLDERS`) are no classes.

    Raises:
        InputError: the folder cannot be opened, or two names differ only in the form of their accents.
    """
    try:
        paths = sorted(Path(entry.path) for entry in os.scandir(folder) if _classify(entry) == (True, None))
    except OSError as error:
        raise InputError(f"{printable(folder)} cannot be opened ({error.strerror})") from error
    folders: dict[str, Path] = {}
    for path in paths:
        if (name := composed(path.name)) in folders:
            raise InputError(
                f"{printable(folder)} has two folders {printable(name)}, whose accents are stored in different forms: "
                "move the images into one of them"
            )
        folders[name] = path
    return dict(sorted(folders.items()))


def class_names(folder: Path, keep: Collection[str] | None = ()) -> list[str]:
    """Return the names of `class_folders` without those that have no images.

    Args:
        folder: contains a folder for each class.
        keep: names of folders that are classes even without images; None for all. An evaluation needs all of them,
            because the outputs of a network without class names are numbered by them.

    Raises:
        InputError: as `class_folders`; or there are none.
    """
    folders = class_folders(folder)
    if not folders:
        raise InputError(f"{printable(folder)} has no class folders: put the images into {printable(folder)}/<class>/")
    if keep is None:
        return list(folders)
    skipped = Skipped(folder)
    names = [name for name, path in folders.items() if name in keep or any(_images_below(path, skipped))]
    if not names:
        raise InputError(f"{printable(folder)} has no images in its class folders {_expected(skipped)}")
    return names


def class_images(folder: Path, classes: list[str], reports: bool = True) -> Iterator[tuple[Path, int]]:
    """Yield the image files below `folder/<class>` with their labels: class by class, sorted by path in each class.

    At the end, prints what is left out, class folders without images included.

    Args:
        folder: contains a folder for each class.
        classes: names of the classes; an image's label is the index of its class in this list.
        reports: False to print nothing, if the folder is listed again.

    Raises:
        InputError: there are no image files.
    """
    folders = class_folders(folder)
    skipped, filled = Skipped(folder), set()
    for label, name in enumerate(classes):
        for path in _images_below(folders[name], skipped) if name in folders else ():
            filled.add(name)
            yield path, label
    if not filled:
        raise InputError(f"{printable(folder)} has no images in its class folders {_expected(skipped)}")
    if reports:
        _skip_outside_classes(folder, classes, filled, skipped)
        skipped.report()


def _skip_outside_classes(folder: Path, classes: list[str], filled: set[str], skipped: Skipped) -> None:
    """Count what lies beside the class folders, and class folders without images."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path, name = Path(entry.path), composed(entry.name)
        is_folder, reason = _classify(entry)
        if reason is None and not is_folder:
            reason = "images outside of class folders"
        elif reason is None and name not in filled:
            unused = name not in classes and any(_images_below(path, skipped))
            reason = "folders of other classes" if unused else "class folders without images"
        if reason:
            skipped.add(reason, path)


def read_class_names(file: Path) -> list[str]:
    """Read the file of a `--classes` flag: one class name per line; text after a tab is ignored.

    Raises:
        InputError: the file cannot be read, is empty, or contains a name twice.
    """
    try:
        lines = (line.partition("\t")[0].strip() for line in read_text(file).splitlines())
        names = [composed(name) for name in lines if name]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise InputError(
            f"--classes {file} cannot be read ({reason}): pass a text file with one class name per line"
        ) from error
    if not names:
        raise InputError(f"--classes {file} is empty: it needs one class name per line")
    if len(set(names)) < len(names):
        duplicate = next(name for i, name in enumerate(names) if name in names[:i])
        raise InputError(f"--classes {file} contains {duplicate!r} twice")
    return names


def check_same_classes(train: list[str], val: list[str], train_path: Path, val_path: Path) -> None:
    """Check that the training and the validation images have the same classes in the same order.

    Raises:
        InputError: they differ; the message names the first difference.
    """
    if different := sorted(set(train) ^ set(val)):
        present, absent = (train_path, val_path) if different[0] in train else (val_path, train_path)
        raise InputError(
            f"class {different[0]!r} is in {present} but not in {absent}, or has no images there: give both the same "
            "classes"
        )
    for label, (train_name, val_name) in enumerate(zip(train, val, strict=True)):
        if train_name != val_name:
            raise InputError(
                f"class {label} is {train_name!r} in {train_path} and {val_name!r} in {val_path}: "
                "give both the same order"
            )


# ---- Reading --------------------------------------------------------------------------------------------------------


def limit_pixels(count: int | None) -> None:
    """Set the flag --max-pixels: larger images are refused. None for Pillow's limit, `MAX_PIXELS`.

    Raises:
        InputError: the number is below 1.
    """
    if count is not None and count < 1:
        raise InputError(f"--max-pixels {count} is not possible: give a number of 1 or more")
    Image.MAX_IMAGE_PIXELS = (count or MAX_PIXELS) / 2  # Pillow warns above this number and refuses twice it


Prepare = Callable[[Image.Image], object]  # called with an image whose header has been read, but not its pixels


def load_image(
    file: Path | bytes | memoryview, orient: bool, rgb: bool = False, prepare: Prepare | None = None
) -> Image.Image:
    """Load an image in its own mode, or convert it with `to_rgb`. For the other arguments see `decode`.

    Raises:
        InputError: the image cannot be decoded; the message is the reason.
    """
    try:
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file), formats=FORMATS) as image:
            scale_transparency(image)
            if prepare:
                prepare(image)
            image.load()
            image = use_full_range(image)
            image = _turn_upright(image) if orient else image
            return to_rgb(image) if rgb else image
    except Exception as error:  # Pillow's decoders raise many kinds of exception
        raise InputError(_reason(error, file)) from error


def decode(file: Path | bytes | memoryview, orient: bool = False, prepare: Prepare | None = None) -> Image.Image:
    """Decode an image of any mode as 8-bit RGB. Transparent pixels become white; other ranges are scaled to 8 bits.

    Args:
        file: path of an image file, or the file's content.
        orient: rotate the image as its EXIF orientation says: for users' photographs. ImageNet, ten-crop evaluation
            and LMDB files use the stored pixels, as torchvision does.
        prepare: called before the pixels are decoded; it may set the size at which a JPEG is decoded.

    Raises:
        InputError: the image cannot be decoded; the message is the reason.
    """
    return load_image(file, orient, rgb=True, prepare=prepare)


def read_rgb(
    file: Path | bytes | memoryview,
    name: str | Path | None = None,
    orient: bool = True,
    prepare: Prepare | None = None,
) -> Image.Image:
    """Decode an image like `decode`, with an error message for the user.

    Args:
        file: path of an image file, or the file's content.
        name: the image's name in the message; by default its path.
        orient: as in `decode`.
        prepare: as in `decode`.

    Raises:
        UnreadableImage: the image cannot be decoded.
    """
    try:
        return decode(file, orient, prepare)
    except InputError as error:
        raise UnreadableImage(file if name is None else name, str(error)) from error


def read_square(path: Path, size: int) -> np.ndarray:
    """Read an image file as uint8 `(size, size, 3)`: turned upright, short side resized to `size`, then a centre crop.

    Raises:
        UnreadableImage: as `read_rgb`.
    """
    image = read_rgb(path)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.array(image)


def _turn_upright(image: Image.Image) -> Image.Image:
    """Rotate or mirror a loaded image as its EXIF orientation says. Damaged EXIF data count as upright."""
    turns = Image.Transpose
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parser raises many kinds of exception
        orientation = 1
    turn = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }.get(orientation)
    if turn is None:
        return image
    upright = image.transpose(turn)
    upright.format = image.format
    return upright


def _reason(error: Exception, file: Path | bytes | memoryview) -> str:
    """Return why Pillow could not read a file, in words for its owner."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))[0]
        limit = int(2 * Image.MAX_IMAGE_PIXELS)
        return f"its {int(pixels):,} pixels exceed the limit of {limit:,}: if you trust it, pass --max-pixels {pixels}"
    try:
        start = read_start(file) if isinstance(file, Path) else bytes(file[:4096])
    except OSError as failure:
        return failure.strerror or first_line(failure)
    if isinstance(error, UnidentifiedImageError):
        return describe_content(start)
    reason = printable(first_line(error))
    return reason if "truncated" in reason.lower() else f"damaged or truncated: {reason}"
