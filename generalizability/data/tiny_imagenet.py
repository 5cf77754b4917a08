"""Tiny ImageNet: download and unpack its zip, and find its images and labels.

Layout of the unpacked zip:

tiny-imagenet-200/
    train/<wnid>/images/*.JPEG
    val/images/*.JPEG
    val/val_annotations.txt         file name, wnid and box of each image, separated by tabs

Many scripts sort the validation images into folders by class: val/<wnid>/*.JPEG, val/<wnid>/images/*.JPEG or
val/images/<wnid>/*.JPEG. They are read, too. The test images have no labels, so networks are evaluated on the
validation images.
"""

import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from torchvision.datasets.utils import check_integrity

from data.download import download, one_at_a_time, unpack
from s3net_common.errors import InputError
from s3net_common.images import check_same_classes, class_images, class_names
from s3net_common.progress import ProgressBar
from s3net_common.text_files import read_text

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
FOLDER = "tiny-imagenet-200"
WNID = re.compile(r"n\d{8}")

Files = list[tuple[Path, int]]  # paths and labels


def find_images(
    data_dir: Path, splits: Sequence[str] = ("train", "val"), download: bool = False
) -> tuple[list[Files], list[str]]:
    """Return the files of each split, and the classes (wnids in alphabetical order).

    Args:
        data_dir: the unpacked folder, or the folder that contains it or its zip. If there is only a zip, unpack it.
        splits: "train" and "val", or one of them.
        download: download the zip if it is missing, too.

    Raises:
        InputError: the data are missing, damaged or incomplete, or could not be downloaded.
    """
    root = next((r for r in (data_dir, data_dir / FOLDER) if (r / splits[0]).is_dir()), None)
    if root is None:
        root = data_dir / FOLDER
        archive = data_dir / f"{FOLDER}.zip"
        if not archive.is_file() and not download:
            raise InputError(
                f"Tiny ImageNet is not in {data_dir}: pass --download to download it (237 MiB), or --data-dir with a "
                f"folder that contains {FOLDER}/ or {FOLDER}.zip"
            )
        with one_at_a_time(data_dir):
            if not root.is_dir():
                if not archive.is_file():
                    download_archive(archive)
                check_archive(archive, download)
                unpack_archive(archive, root)
    classes = class_names(root / "train") if (root / "train").is_dir() else None
    files = []
    for split in splits:
        if split == "train":
            files.append(list(class_images(root / "train", classes)))
        else:
            split_files, classes = validation_files(root, classes)
            files.append(split_files)
    return files, classes


def validation_files(root: Path, classes: list[str] | None) -> tuple[Files, list[str]]:
    """Return the validation files and all classes, from the annotations, or from images sorted into folders by class.

    `classes`: names of the classes, if the training images are there.

    Raises:
        InputError: as `read_annotations`; or the classes of the validation images are not `classes`.
    """
    val, annotations = root / "val", root / "val" / "val_annotations.txt"
    for folder in (val, val / "images"):
        names = sorted(entry.name for entry in _entries(folder) if entry.is_dir() and WNID.fullmatch(entry.name))
        if names and not any(entry.is_file() for entry in _entries(val / "images")):
            check_same_classes(classes or names, names, root / "train", folder)
            return list(class_images(folder, names)), names
    named_files, names = read_annotations(annotations)
    check_same_classes(classes or names, names, root / "train", annotations)
    labels = {name: label for label, name in enumerate(names)}
    return [(path, labels[name]) for path, name in named_files], names


def _entries(folder: Path) -> list[os.DirEntry]:
    return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")] if folder.is_dir() else []


def read_annotations(annotations: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """Return the paths and class names of the validation images, and all class names in alphabetical order.

    Raises:
        InputError: the file or the folder of the images is missing or cannot be read, or a line of the file has the
            wrong format or names a missing image.
    """
    images = annotations.parent / "images"
    try:
        lines = read_text(annotations).splitlines()
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
    try:
        download(URL, archive, MD5)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise InputError(
            f"{URL} could not be downloaded ({error}): get {FOLDER}.zip in another way and put it into {archive.parent}"
        ) from error


def check_archive(archive: Path, download: bool) -> None:
    """Check the zip's MD5 checksum. `download`: whether --download was given, for the advice in the message.

    Raises:
        InputError: the checksum is wrong.
    """
    if not check_integrity(str(archive), MD5):
        advice = "try again later" if download else "pass --download to download it again"
        raise InputError(f"the checksum of {archive} is wrong: it is damaged or another file; delete it and {advice}")


def unpack_archive(archive: Path, root: Path) -> None:
    """Unpack the zip beside it. `root` appears only when it is complete.

    Raises:
        InputError: the zip is damaged, or the disk is full.
    """

    def extract(folder: Path) -> None:
        with zipfile.ZipFile(archive) as content:
            for member in ProgressBar(content.infolist(), desc=f"unpacking {archive.name}", unit="file"):
                content.extract(member, folder)

    try:
        unpack(extract, FOLDER, root)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{archive} cannot be unpacked ({error}): make room, or download it again") from error
