"""Tiny ImageNet: download and unpack its zip, and find its images and labels.

Layout of the unpacked zip:

tiny-imagenet-200/
    train/<wnid>/images/*.JPEG
    val/images/*.JPEG
    val/val_annotations.txt         file name, wnid and box of each image, separated by tabs

Its test images have no labels, so networks are evaluated on the validation images.
"""

import os
import shutil
import zipfile
from pathlib import Path

from torchvision.datasets.utils import check_integrity, download_url
from tqdm import tqdm

from s3net_common.errors import InputError
from s3net_common.images import check_same_classes, class_images, class_names

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
FOLDER = "tiny-imagenet-200"
IMAGE_SIZE = 64

Files = list[tuple[Path, int]]  # paths and labels


def find_images(data_dir: Path, download: bool = False) -> tuple[Files, Files, list[str]]:
    """Return the training files, the validation files, and the classes (wnids in alphabetical order).

    Args:
        data_dir: the unpacked folder, or the folder that contains it or its zip. If there is only a zip, unpack it.
        download: download the zip if it is missing, too.

    Raises:
        InputError: the data are missing, damaged or incomplete, or could not be downloaded.
    """
    root = data_dir if (data_dir / "train").is_dir() else data_dir / FOLDER
    if not (root / "train").is_dir():
        archive = data_dir / f"{FOLDER}.zip"
        if not archive.is_file() and not download:
            raise InputError(
                f"Tiny ImageNet is not in {data_dir}: pass --download to download it (237 MiB), or --data-dir with a "
                f"folder that contains {FOLDER}/ or {FOLDER}.zip"
            )
        if not archive.is_file():
            download_archive(archive)
        check_archive(archive, download)
        unpack(archive, root)
    annotations = root / "val" / "val_annotations.txt"
    classes = class_names(root / "train")
    val_files, val_classes = read_annotations(annotations)
    check_same_classes(classes, val_classes, root / "train", annotations)
    labels = {name: label for label, name in enumerate(classes)}
    return list(class_images(root / "train", classes)), [(path, labels[name]) for path, name in val_files], classes


def read_annotations(annotations: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """Return the paths and class names of the validation images, and all class names in alphabetical order.

    Raises:
        InputError: the file or the folder of the images is missing or cannot be read, or a line of the file has the
            wrong format or names a missing image.
    """
    images = annotations.parent / "images"
    try:
        lines = annotations.read_text().splitlines()
        image_names = {entry.name for entry in os.scandir(images)}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): unpack {FOLDER}.zip again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{annotations} is not a text file: unpack {FOLDER}.zip again") from error
    files = []
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) < 2 or not fields[1]:
            raise InputError(f"{annotations}, line {number}: expected a file name, a tab and a wnid, not {line!r}")
        if fields[0] not in image_names:
            raise InputError(
                f"{annotations}, line {number}: {images / fields[0]} is missing; unpack {FOLDER}.zip again"
            )
        files.append((images / fields[0], fields[1]))
    return files, sorted({name for _, name in files})


def download_archive(archive: Path) -> None:
    """Download the zip, with a progress bar.

    Raises:
        InputError: the download failed.
    """
    partial = archive.with_name(f".{archive.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        download_url(URL, str(partial.parent), partial.name)
        partial.replace(archive)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise InputError(
            f"{URL} could not be downloaded ({error}): get {FOLDER}.zip in another way and put it into {archive.parent}"
        ) from error
    finally:
        if partial.exists():  # also after Ctrl-C
            partial.unlink()


def check_archive(archive: Path, download: bool) -> None:
    """Check the zip's MD5 checksum. `download`: whether --download was given, for the advice in the message.

    Raises:
        InputError: the checksum is wrong.
    """
    if not check_integrity(str(archive), MD5):
        advice = "try again later" if download else "pass --download to download it again"
        raise InputError(f"the checksum of {archive} is wrong: it is damaged or another file; delete it and {advice}")


def unpack(archive: Path, root: Path) -> None:
    """Unpack the zip beside it. `root` appears only when it is complete.

    Raises:
        InputError: the zip is damaged, or the disk is full.
    """
    temporary = root.with_name(f".{root.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            for member in tqdm(content.infolist(), desc=f"unpacking {archive.name}", unit="file", disable=None):
                content.extract(member, temporary)
        (temporary / FOLDER).replace(root)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{archive} cannot be unpacked ({error}): make room, or download it again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
