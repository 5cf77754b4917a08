"""Tiny ImageNet as its zip unpacks: where the images and labels are, and getting the zip.

tiny-imagenet-200/
    train/<wnid>/images/*.JPEG
    val/images/*.JPEG
    val/val_annotations.txt         file name, wnid and box of each image, separated by tabs

There are no labels for its test images, so that the validation images are what networks are held against.
"""

import os
import shutil
import zipfile
from pathlib import Path

from torchvision.datasets.utils import check_integrity, download_url
from tqdm import tqdm

from s3net_common.errors import InputError
from s3net_common.images import class_images, class_names, same_classes

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
FOLDER = "tiny-imagenet-200"
IMAGE_SIZE = 64

Files = list[tuple[Path, int]]


def find_images(data_dir: Path, download: bool = False) -> tuple[Files, Files, list[str]]:
    """The training files and the validation files with their labels, and the classes (wnids in alphabetical order).

    Args:
        data_dir: the unpacked folder, or the one that holds it or its zip; with a zip only, that is unpacked.
        download: fetch the zip if it is not there.

    Raises:
        InputError: the data are not there, damaged or incomplete, or could not be fetched.
    """
    root = data_dir if (data_dir / "train").is_dir() else data_dir / FOLDER
    if not (root / "train").is_dir():
        archive = data_dir / f"{FOLDER}.zip"
        if not archive.is_file() and not download:
            raise InputError(
                f"Tiny ImageNet is not in {data_dir}: pass --download to fetch it (237 MiB), or --data-dir with "
                f"{FOLDER}/ or {FOLDER}.zip in it"
            )
        fetch(archive, download)
        unpack(archive, root)
    annotations = root / "val" / "val_annotations.txt"
    classes = class_names(root / "train")
    val_files, val_classes = read_annotations(annotations)
    same_classes(classes, val_classes, root / "train", annotations)
    labels = {name: label for label, name in enumerate(classes)}
    return list(class_images(root / "train", classes)), [(path, labels[name]) for path, name in val_files], classes


def read_annotations(annotations: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """The validation images with their classes' names, and those names in alphabetical order.

    Raises:
        InputError: the file or the folder of the images is missing or cannot be read, or a line of the file is not as
            it should be or names a missing image.
    """
    try:
        lines = annotations.read_text().splitlines()
        there = {entry.name for entry in os.scandir(annotations.parent / "images")}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): unpack {FOLDER}.zip again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{annotations} is no text file: unpack {FOLDER}.zip again") from error
    files = []
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) < 2 or not fields[1]:
            raise InputError(f"{annotations}, line {number}: expected a file name, a tab and a wnid, not {line!r}")
        if fields[0] not in there:
            raise InputError(
                f"{annotations}, line {number}: there is no {annotations.parent / 'images' / fields[0]}; "
                f"unpack {FOLDER}.zip again"
            )
        files.append((annotations.parent / "images" / fields[0], fields[1]))
    return files, sorted({name for _, name in files})


def fetch(archive: Path, download: bool) -> None:
    """Make sure that the zip is there and whole, with a progress bar where it is fetched.

    Raises:
        InputError: it cannot be fetched, or its MD5 checksum is wrong.
    """
    if not archive.is_file():
        partial = archive.with_name(f".{archive.name}.partial")
        try:
            partial.unlink(missing_ok=True)
            download_url(URL, str(partial.parent), partial.name)
            partial.replace(archive)
        except (OSError, RuntimeError) as error:  # URLError is an OSError
            raise InputError(
                f"{URL} could not be fetched ({error}): fetch {FOLDER}.zip some other way and put it into "
                f"{archive.parent}"
            ) from error
        finally:
            if partial.exists():  # after Ctrl-C, too
                partial.unlink()
    if not check_integrity(str(archive), MD5):
        advice = "try again later" if download else "pass --download to fetch it anew"
        raise InputError(
            f"the checksum of {archive} is wrong, so it is damaged or another file: delete it and {advice}"
        )


def unpack(archive: Path, root: Path) -> None:
    """Unpack the zip beside it; the folder appears once it is whole.

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
        raise InputError(f"{archive} cannot be unpacked ({error}): make room, or fetch it again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
