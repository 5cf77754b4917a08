"""The data sets by name. `load_dataset` returns training and validation images, in memory or on disk."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import tiny_imagenet
from data.download import download, one_at_a_time, unpack
from data.image_sets import DiskImages, Halves, ImageSet, open_source
from data.memory import check_memory
from data.splits import SPLITS, find_half, find_halves
from s3net_common.errors import InputError, first_line, nearest_names
from s3net_common.framing import TINY_IMAGENET_SIZE
from s3net_common.images import check_same_classes, class_images, class_names, read_square
from s3net_common.limits import available_processors
from s3net_common.progress import ProgressBar
from s3net_common.unused_files import UnreadableImage, report_unreadable, unreadable_images


@dataclass(frozen=True)
class ReadOptions:
    """Where a data set is, and how to read it.

    Attributes:
        data_dir: folder of the data. "cifar100" is downloaded to it if it has none; "digits" ignores it.
        splits: the halves to read, "train" and "val" or one of them. If it is "train" alone, to be split, the folder
            may also have its class folders without `train/`.
        image_size: height and width of "folder" images (short side resized, then a centre crop).
        workers: threads that decode image files, 1 or more.
        skip_unreadable: skip image files that cannot be decoded, and count them, instead of stopping.
        download: download "tinyimagenet" if it is missing.
        unreadable: the errors of the images that could not be decoded, filled while reading.
    """

    data_dir: Path
    splits: tuple[str, ...] = SPLITS
    image_size: int = 32
    workers: int = field(default_factory=available_processors)
    skip_unreadable: bool = False
    download: bool = False
    unreadable: list[UnreadableImage] = field(default_factory=list)


def load_dataset(name: str, data_dir: Path, **options) -> Halves:
    """Return the training and the validation images of a data set, or only one of these halves.

    Args:
        name: one of `DATASETS`.
        data_dir: folder of the data.
        **options: as of `ReadOptions`.

    Raises:
        InputError: the name is unknown, the data are missing, their training and validation images have no classes or
            different ones, an image cannot be read, or the images do not fit into memory.
    """
    if name not in DATASETS:
        raise InputError(f"there is no data set {name!r}: {nearest_names(name, DATASETS)}")
    read_options = ReadOptions(Path(data_dir), **options)
    halves = DATASETS[name](read_options)
    if read_options.unreadable and not read_options.skip_unreadable:  # one error for training and validation images
        raise unreadable_images(read_options.unreadable)
    train = halves[0] if "train" in read_options.splits else None
    if train and len(train.classes) == 1:
        raise InputError(f"the training images have only one class, {train.classes[0]}: give two class folders or more")
    if train and read_options.unreadable and (lost := {*range(len(train.classes))} - {*train.labels.tolist()}):
        names = ", ".join(train.classes[label] for label in sorted(lost))
        raise InputError(f"no training image of these classes can be read: {names}; repair some, or remove the classes")
    return halves


# ---- The data sets ------------------------------------------------------------------------------------------------


def _load_digits(options: ReadOptions) -> tuple[ImageSet, ...]:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 grey, as 32x32 colour images: 1,437 and 360 of them."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels * (255 / 16), dtype=torch.float32).view(-1, 1, 8, 8)
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(labels, dtype=torch.int64)
    splits = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    classes = [str(digit) for digit in range(10)]
    halves = {split: ImageSet(images[i], labels[i], classes) for split, i in zip(SPLITS, splits, strict=True)}
    return tuple(halves[split] for split in options.splits)


def _load_cifar100(options: ReadOptions) -> tuple[ImageSet, ...]:
    """Read the official binary files, or `{train,test}/<class>/*`. Unpack or download the former if both are missing.

    The binary files are in `data_dir` or in `cifar-100-python/` there, or are unpacked from `cifar-100-python.tar.gz`.
    """
    data_dir = options.data_dir
    if data_dir.name == "cifar-100-python.tar.gz":
        data_dir = data_dir.parent
    elif any(find_half(data_dir, split) for split in options.splits):
        return _load_folder(replace(options, image_size=32))
    is_inner = data_dir.name == "cifar-100-python" or (data_dir / "meta").is_file()
    folder = data_dir.absolute() if is_inner else data_dir / "cifar-100-python"
    return tuple(_read_cifar100(folder, split == "train") for split in options.splits)


def _read_cifar100(folder: Path, train: bool) -> ImageSet:
    """Read one of the official files in `folder`, `train` or `test`. The other one may be missing."""
    from torchvision.datasets import CIFAR100

    if not _has_cifar100_files(folder):
        _unpack_cifar100(folder)
    reader = type("Half", (CIFAR100,), {"base_folder": folder.name, "test_list" if train else "train_list": []})
    try:
        cifar = reader(folder.parent, train=train)
    except Exception as error:  # torchvision's reading raises many kinds of exception
        raise InputError(
            f"the CIFAR-100 files in {folder} are damaged or incomplete: delete them and run with network access, "
            "or pass another --data-dir"
        ) from error
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(cifar.targets), cifar.classes)


def _has_cifar100_files(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("train", "test", "meta"))


def _unpack_cifar100(folder: Path) -> None:
    """Unpack the official archive beside `folder`, after downloading it if it is missing.

    Raises:
        InputError: the archive's checksum is wrong, or it cannot be downloaded or unpacked.
    """
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import check_integrity, extract_archive

    data_dir, archive = folder.parent, folder.parent / CIFAR100.filename
    try:
        with one_at_a_time(data_dir):
            if _has_cifar100_files(folder):
                return
            if not archive.is_file():
                download(CIFAR100.url, archive, CIFAR100.tgz_md5)
            if not check_integrity(str(archive), CIFAR100.tgz_md5):
                raise InputError(
                    f"the checksum of {archive} is wrong: it is damaged or another file; delete it and run with "
                    "network access"
                )
            unpack(lambda temporary: extract_archive(str(archive), str(temporary)), CIFAR100.base_folder, folder)
    except InputError:
        raise
    except Exception as error:  # torchvision's download and unpacking raise many kinds of exception
        raise InputError(
            f"CIFAR-100 is not in {data_dir} and could not be downloaded ({first_line(error).strip('<>')}): run with "
            "network access, or pass --data-dir with a folder that contains cifar-100-python/, "
            "cifar-100-python.tar.gz or {train,test}/<class>/*"
        ) from error


def _load_folder(options: ReadOptions) -> tuple[ImageSet, ...]:
    """Read `train/<class>/*`, and `val/<class>/*` or `test/<class>/*`; classes in alphabetical order."""
    folders = find_halves(options.data_dir, options.splits)
    classes = class_names(folders[0], _kept_without_images(options))
    if len(folders) == 2:
        check_same_classes(classes, class_names(folders[1], keep=classes), *folders)
    return tuple(
        _read_images(folder, list(class_images(folder, classes)), classes, options.image_size, options)
        for folder in folders
    )


def _load_tiny_imagenet(options: ReadOptions) -> tuple[ImageSet, ...]:
    """Read Tiny ImageNet's 64x64 images from its unpacked zip. They are resized batch by batch."""
    files, classes = tiny_imagenet.find_images(options.data_dir, options.splits, options.download)
    return tuple(
        _read_images(options.data_dir / split, split_files, classes, TINY_IMAGENET_SIZE, options)
        for split, split_files in zip(options.splits, files, strict=True)
    )


def _load_imagenet(options: ReadOptions) -> tuple[DiskImages, ...]:
    """Open `{train,val}.lmdb` or `{train,val}/<class>/*`. The images stay on disk."""
    first, *others = paths = find_halves(options.data_dir, options.splits, lmdb=True)
    sources = [open_source(first, _kept_without_images(options))]
    for path in others:
        sources.append(open_source(path, keep=sources[0].classes))
        check_same_classes(sources[0].classes, sources[1].classes, *paths)
    return tuple(DiskImages(source, torch.arange(len(source)), options.skip_unreadable) for source in sources)


def _kept_without_images(options: ReadOptions) -> tuple | None:
    """Return `keep` of `class_names` for the first half. An evaluation keeps all folders: they number the outputs."""
    return () if "train" in options.splits else None


DATASETS: dict[str, Callable[[ReadOptions], Halves]] = {
    "digits": _load_digits,
    "cifar100": _load_cifar100,
    "tinyimagenet": _load_tiny_imagenet,
    "imagenet": _load_imagenet,
    "folder": _load_folder,
}


# ---- Image files into memory --------------------------------------------------------------------------------------


def _read_images(
    folder: Path, files: list[tuple[Path, int]], classes: list[str], size: int, options: ReadOptions
) -> ImageSet:
    """Read `(path, label)` files of `folder` as `size`x`size` images, in threads.

    Images that cannot be read are left out, and their errors are added to `options.unreadable`.

    Raises:
        InputError: the images do not fit into memory, or all cannot be read and are to be skipped.
    """
    check_memory(len(files) * 3 * size * size, f"{len(files):,} images of {size}x{size} in {folder}")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def read(index: int) -> UnreadableImage | None:
        try:
            pixels = read_square(files[index][0], size)
        except UnreadableImage as error:
            return error
        images[index] = torch.from_numpy(pixels).permute(2, 0, 1)
        return None

    with ThreadPoolExecutor(options.workers) as pool:
        progress = ProgressBar(total=len(files), desc=f"reading {folder.name}", unit="image", leave=False)
        errors = []
        try:
            for error in pool.map(read, range(len(files))):
                errors.append(error)
                progress.update()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            progress.close()
    labels = torch.tensor([label for _, label in files])
    if unreadable := [error for error in errors if error]:
        options.unreadable.extend(unreadable)
        if options.skip_unreadable:
            report_unreadable(unreadable, folder)
            if len(unreadable) == len(files):
                raise InputError(f"none of the {len(files):,} images in {folder} can be read")
        readable = torch.tensor([error is None for error in errors])
        images, labels = images[readable], labels[readable]
    return ImageSet(images, labels, classes)
