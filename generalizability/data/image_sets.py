"""Sets of labelled images: `ImageSet` in memory, `DiskImages` in an LMDB file or in class folders, and their splits."""

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.image_lmdb import ImageFolderLMDB
from s3net_common.errors import InputError
from s3net_common.images import class_images, class_names
from s3net_common.unused_files import UnreadableImage

# ---- Images in memory ---------------------------------------------------------------------------------------------


@dataclass
class ImageSet:
    """Images in memory, with labels.

    Attributes:
        images: uint8 `(N, 3, H, W)`, 0 to 255.
        labels: int64 `(N,)`, indices into `classes`.
        classes: names of the classes.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def hold_out(self, count: float) -> tuple["ImageSet", "ImageSet"]:
        """Split into images for training and images for validation. For `count` see `stratified_split`.

        Raises:
            InputError: as `stratified_split`.
        """
        return tuple(self._select(part) for part in stratified_split(self.labels, count, self.classes))

    def subset(self, count: int | None) -> "ImageSet":
        """Return `count` images, always the same ones, or all images if `count` is None.

        Raises:
            InputError: as `random_subset`.
        """
        return self if count is None else self._select(random_subset(len(self), count))

    def with_classes(self, classes: list[str], indices: list[int]) -> "ImageSet":
        """Return the images with other classes: `indices` says for each of the present ones which of them it is."""
        return replace(self, labels=torch.tensor(indices)[self.labels], classes=classes)

    def _select(self, indices: Tensor) -> "ImageSet":
        return ImageSet(self.images[indices], self.labels[indices], self.classes)


# ---- Images on disk -----------------------------------------------------------------------------------------------


class Source(Protocol):
    """Encoded images with labels: an LMDB file or class folders."""

    classes: list[str]
    labels: np.ndarray

    def __len__(self) -> int: ...

    def encoded(self, index: int) -> tuple[bytes | memoryview, int]:
        """Return the content of an image file, and its label."""

    def name(self, index: int) -> str:
        """Return the name of the image for error messages."""


class ImageFolder:
    """The images of `folder/<class>/**` as a `Source`, classes in alphabetical order.

    Args:
        folder: contains a folder for each class.
        keep: as of `class_names`.

    Raises:
        InputError: there are no class folders, or no images.
    """

    def __init__(self, folder: Path, keep: Collection[str] | None = ()) -> None:
        self.folder, self.classes = folder, class_names(folder, keep)
        files = list(class_images(folder, self.classes))
        # One array of bytes, not a million Python strings: DataLoader workers share its memory.
        self.names = np.array([os.fsencode(path.relative_to(folder)) for path, _ in files])
        self.labels = np.array([label for _, label in files])

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Return the content of an image file, and its label.

        Raises:
            UnreadableImage: the file cannot be read.
        """
        path = Path(self.name(index))
        try:
            return path.read_bytes(), int(self.labels[index])
        except OSError as error:
            raise UnreadableImage(path, error.strerror) from error

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.folder / os.fsdecode(self.names[index]))


@dataclass
class RelabelledSource:
    """A `Source` with other classes.

    Attributes:
        source: the images.
        classes: names of the classes.
        indices: int `(C,)`, for each class of `source` its index in `classes`.
    """

    source: Source
    classes: list[str]
    indices: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Labels of the images, int `(N,)`."""
        return self.indices[np.asarray(self.source.labels)]

    def __len__(self) -> int:
        return len(self.source)

    def encoded(self, index: int) -> tuple[bytes | memoryview, int]:
        """Return the content of an image file, and its label."""
        encoded, label = self.source.encoded(index)
        return encoded, int(self.indices[label])

    def name(self, index: int) -> str:
        """Return the name of the image for error messages."""
        return self.source.name(index)


def open_source(path: Path, keep: Collection[str] | None = ()) -> Source:
    """Open an LMDB file, or a folder with `<class>/*`. `keep` is as of `class_names`, for a folder.

    Raises:
        InputError: the file is no LMDB file of folder2lmdb.py, or the folder has no images.
    """
    return ImageFolder(path, keep) if path.is_dir() else ImageFolderLMDB(path)


@dataclass
class DiskImages:
    """Images of a source, which are read from disk when a batch needs them.

    Attributes:
        source: the LMDB file or the class folders.
        indices: int64 `(N,)`, the images of the source that belong to this set.
        skip_unreadable: skip images that cannot be decoded, instead of stopping.
    """

    source: Source
    indices: Tensor
    skip_unreadable: bool = False

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their labels."""
        return self.source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def hold_out(self, count: float) -> tuple["DiskImages", "DiskImages"]:
        """Split as `ImageSet.hold_out` does."""
        labels = np.asarray(self.source.labels)[self.indices]
        parts = stratified_split(labels, count, self.classes)
        return tuple(replace(self, indices=self.indices[part]) for part in parts)

    def subset(self, count: int | None) -> "DiskImages":
        """Return a subset as `ImageSet.subset` does."""
        return self if count is None else replace(self, indices=self.indices[random_subset(len(self), count)])

    def with_classes(self, classes: list[str], indices: list[int]) -> "DiskImages":
        """Return the images with other classes, as `ImageSet.with_classes` does."""
        return replace(self, source=RelabelledSource(self.source, classes, np.array(indices)))


# The training images and the validation images of a data set, or one of them.
Halves = tuple[ImageSet, ...] | tuple[DiskImages, ...]


# ---- Splits -------------------------------------------------------------------------------------------------------


def stratified_split(labels: np.ndarray | Tensor, count: float, classes: list[str]) -> tuple[Tensor, Tensor]:
    """Split images at random, but always alike, with the same proportion of each class in both parts.

    Args:
        labels: int `(N,)`.
        count: number of images in the second part, or their fraction, above 0 and below 1, of each class: at least one
            image of each class is then in either part.
        classes: names of the classes.

    Returns:
        The indices of the first part and of the second part.

    Raises:
        InputError: `count` leaves one part with fewer images than there are classes, or a class has only one image.
    """
    if count < 1:
        return _split_classes(torch.as_tensor(labels), count, classes)
    fewest, most = len(classes), len(labels) - len(classes)
    if not fewest <= count <= most:
        raise InputError(
            f"--hold-out {count} is not possible: give a number from {fewest}, one image per class, to "
            f"{max(fewest, most)}, or a fraction below 1"
        )
    from sklearn.model_selection import train_test_split

    try:
        parts = train_test_split(np.arange(len(labels)), test_size=count, random_state=0, stratify=labels)
    except ValueError as error:  # a class with a single image
        raise InputError(f"--hold-out {count} is not possible: {error}") from error
    return tuple(torch.from_numpy(part) for part in parts)


def _split_classes(labels: Tensor, fraction: float, classes: list[str]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = labels.bincount(minlength=len(classes)).tolist()
    first, second = [], []
    for name, indices in zip(classes, labels.argsort(stable=True).split(counts), strict=True):
        if len(indices) < 2:
            raise InputError(
                f"--hold-out {fraction} is not possible: class {name!r} has fewer than two images; add some, or remove "
                "the class"
            )
        held_out = min(max(1, round(fraction * len(indices))), len(indices) - 1)
        order = indices[torch.randperm(len(indices), generator=generator)]
        first.append(order[held_out:])
        second.append(order[:held_out])
    return torch.cat(first).sort().values, torch.cat(second).sort().values


def random_subset(images: int, count: int) -> Tensor:
    """Return the first `count` indices of a fixed random order of `images` images, so that no class is preferred.

    Raises:
        InputError: `count` is below 1.
    """
    if count < 1:
        raise InputError(f"a limit of {count} images leaves none: give 1 or more")
    return torch.randperm(images, generator=torch.Generator().manual_seed(0))[:count]
