"""The data sets, each as a training and an evaluation half: in memory as one uint8 tensor, or on disk.

`load_dataset` reads one; `batches.py` and `disk_images.py` make batches of it.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import tiny_imagenet
from data.image_lmdb import ImageFolderLMDB as ImageFolderLMDB
from data.image_sets import DiskImages, ImageSet, open_source
from s3net_common.errors import InputError, nearest_names
from s3net_common.images import class_images, class_names, decode_image, same_classes

# ---- The data sets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Where a data set is, and how it is to be read.

    Attributes:
        data_dir: where the data are; "cifar100" is downloaded there if it has none; "digits" needs none.
        image_size: height and width that "folder" images are brought to (short side resized, centre cropped).
        workers: threads that decode image files, 1 or more.
        skip_unreadable: leave out image files that cannot be decoded, and count them, instead of stopping.
        download: fetch "tinyimagenet" if it is not there.
    """

    data_dir: Path
    image_size: int = 32
    workers: int = os.cpu_count() or 1
    skip_unreadable: bool = False
    download: bool = False


def load_dataset(name: str, data_dir: Path, **options) -> tuple[ImageSet, ImageSet] | tuple[DiskImages, DiskImages]:
    """The training and the evaluation half of a data set, one of `DATASETS`; `options` are those of `Reading`.

    Raises:
        InputError: the data are not there, have no classes or different ones in their halves, an image cannot be
            read, or they do not fit into memory.
    """
    if name not in DATASETS:
        raise InputError(f"there is no data set {name!r}: {nearest_names(name, DATASETS)}")
    return DATASETS[name](Reading(Path(data_dir), **options))


def _load_digits(reading: Reading) -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, as 32x32 colour images; 1,437 to train and 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels * (255 / 16), dtype=torch.float32).view(-1, 1, 8, 8)
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(labels, dtype=torch.int64)
    halves = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    return tuple(ImageSet(images[half], labels[half], [str(d) for d in range(10)]) for half in halves)


def _load_cifar100(reading: Reading) -> tuple[ImageSet, ImageSet]:
    """The official binary form or `{train,test}/<class>/*`, whichever the folder holds; downloaded if neither."""
    data_dir = reading.data_dir
    if (data_dir / "train").is_dir():
        return _load_folder(replace(reading, image_size=32))
    if data_dir.name == "cifar-100-python":
        data_dir = data_dir.parent
    from torchvision.datasets import CIFAR100

    complete = (data_dir / "cifar-100-python" / "test").is_file()
    halves = []
    for train in (True, False):
        try:
            half = CIFAR100(data_dir, train=train, download=not complete)
        except Exception as error:  # torchvision raises whatever its download, unpacking and reading raise
            if complete:
                raise InputError(
                    f"the CIFAR-100 files in {data_dir}/cifar-100-python are damaged: delete them and run with network "
                    "access, or pass another --data-dir"
                ) from error
            raise InputError(
                f"CIFAR-100 is not in {data_dir} and could not be downloaded ({_reason(error)}): run with network "
                "access, or pass --data-dir with cifar-100-python/ or {train,test}/<class>/* in it"
            ) from error
        images = torch.from_numpy(half.data).permute(0, 3, 1, 2).contiguous()
        halves.append(ImageSet(images, torch.tensor(half.targets), half.classes))
    return tuple(halves)


def _load_folder(reading: Reading) -> tuple[ImageSet, ImageSet]:
    """`train/<class>/*` and `val/<class>/*` or `test/<class>/*`; classes in alphabetical order."""
    data_dir = reading.data_dir
    train_dir = data_dir / "train"
    val_dir = next((data_dir / half for half in ("val", "test") if (data_dir / half).is_dir()), None)
    if not train_dir.is_dir() or val_dir is None:
        raise InputError(
            f"{data_dir} has no images: it needs train/<class>/* and val/<class>/* (or test/<class>/*); pass --data-dir"
        )
    classes = same_classes(class_names(train_dir), class_names(val_dir), train_dir, val_dir)
    return tuple(
        _read_images(half, list(class_images(half, classes)), classes, reading.image_size, reading)
        for half in (train_dir, val_dir)
    )


def _load_tiny_imagenet(reading: Reading) -> tuple[ImageSet, ImageSet]:
    """Tiny ImageNet's 64x64 images as its zip unpacks; they are resized batch by batch."""
    *halves, classes = tiny_imagenet.find_images(reading.data_dir, reading.download)
    return tuple(
        _read_images(reading.data_dir / half, files, classes, tiny_imagenet.IMAGE_SIZE, reading)
        for half, files in zip(("train", "val"), halves, strict=True)
    )


def _load_imagenet(reading: Reading) -> tuple[DiskImages, DiskImages]:
    """`{train,val}.lmdb` or `{train,val}/<class>/*`; they stay on disk."""
    found = [open_source(reading.data_dir, half) for half in ("train", "val")]
    if None in found:
        half = ("train", "val")[found.index(None)]
        raise InputError(
            f"{reading.data_dir} has neither {half}.lmdb nor {half}/<class>/*: make the first with folder2lmdb.py, "
            "or pass --data-dir"
        )
    (train, train_at), (val, val_at) = found
    same_classes(train.classes, val.classes, train_at, val_at)
    return tuple(DiskImages(source, torch.arange(len(source)), reading.skip_unreadable) for source in (train, val))


DATASETS: dict[str, Callable[[Reading], tuple]] = {
    "digits": _load_digits,
    "cifar100": _load_cifar100,
    "tinyimagenet": _load_tiny_imagenet,
    "imagenet": _load_imagenet,
    "folder": _load_folder,
}


def _read_images(
    folder: Path, files: list[tuple[Path, int]], classes: list[str], size: int, reading: Reading
) -> ImageSet:
    _check_memory(len(files) * 3 * size * size, f"{len(files):,} images of {size}x{size} in {folder}")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    readable = torch.ones(len(files), dtype=torch.bool)

    def read(index: int) -> None:
        try:
            pixels = decode_image(files[index][0], size)
        except InputError:
            if not reading.skip_unreadable:
                raise
            readable[index] = False
        else:
            images[index] = torch.from_numpy(pixels).permute(2, 0, 1)

    with ThreadPoolExecutor(reading.workers) as pool:
        progress = tqdm(total=len(files), desc=f"reading {folder.name}", unit="image", disable=None, leave=False)
        try:
            for _ in pool.map(read, range(len(files))):
                progress.update()
        except (InputError, KeyboardInterrupt):
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            progress.close()
    labels = torch.tensor([label for _, label in files])
    if skipped := int((~readable).sum()):
        if skipped == len(files):
            raise InputError(f"none of the {skipped} images in {folder} can be read")
        images, labels = images[readable], labels[readable]
    return ImageSet(images, labels, classes, skipped)


def _check_memory(needed: int, what: str) -> None:
    try:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return
    if needed > 0.9 * available:
        raise InputError(
            f"{what} need {needed / 2**30:.1f} GiB of memory and {available / 2**30:.1f} GiB are free: "
            "pass a smaller --image-size, or fewer images"
        )


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip("<>")
