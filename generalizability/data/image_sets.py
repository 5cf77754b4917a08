"""Data sets that stay on disk, as ImageNet must: an LMDB file or class folders, and which of their images are wanted.

`DiskImages` is what `data.ImageSet` is for data sets in memory; `disk_batches.py` makes batches of it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.image_lmdb import ImageFolderLMDB
from s3net_common.errors import InputError
from s3net_common.images import class_images, class_names


@dataclass
class ImageSet:
    """Images with labels.

    Attributes:
        images: uint8 `(N, 3, H, W)`, 0 to 255.
        labels: int64 `(N,)`, indices into `classes`.
        classes: the classes' names, in the order of their indices.
        skipped: how many unreadable images were left out.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def hold_out(self, count: int) -> tuple["ImageSet", "ImageSet"]:
        """All but `count` images, and those: a validation set that leaves the test images for the end.

        Raises:
            InputError: where there are too few images for that (see `splits.stratified_split`).
        """
        return tuple(self._choose(half) for half in stratified_split(self.labels, count, len(self.classes)))

    def subset(self, count: int | None) -> "ImageSet":
        """`count` images, always the same (see `splits.random_subset`); all of them for None."""
        return self if count is None else self._choose(random_subset(len(self), count))

    def _choose(self, index: Tensor) -> "ImageSet":
        return ImageSet(self.images[index], self.labels[index], self.classes, self.skipped)


def stratified_split(labels: np.ndarray, count: int, classes: int) -> tuple[Tensor, Tensor]:
    """The indices of all but `count` images, and of those; every class has its share in both.

    Raises:
        InputError: where `count` leaves one of the two halves with fewer images than there are classes.
    """
    if not classes <= count <= len(labels) - classes:
        raise InputError(
            f"--hold-out {count} is not possible: give a number from {classes}, one image a class, to "
            f"{max(classes, len(labels) - classes)}"
        )
    from sklearn.model_selection import train_test_split

    try:
        halves = train_test_split(np.arange(len(labels)), test_size=count, random_state=0, stratify=labels)
    except ValueError as error:  # a class with a single image
        raise InputError(f"--hold-out {count} is not possible: {error}") from error
    return tuple(torch.from_numpy(half) for half in halves)


def random_subset(images: int, count: int | None) -> Tensor:
    """The first `count` indices of a fixed random order, so that every class has its share; all in order for None.

    Raises:
        InputError: for a count below 1.
    """
    if count is None:
        return torch.arange(images)
    if count < 1:
        raise InputError(f"a limit of {count} images leaves none: give 1 or more")
    return torch.randperm(images, generator=torch.Generator().manual_seed(0))[:count]


class Source(Protocol):
    """Encoded images with labels: an LMDB file or a folder."""

    classes: list[str]
    labels: np.ndarray

    def __len__(self) -> int: ...

    def encoded(self, index: int) -> tuple[bytes | memoryview, int]:
        """The bytes of an image file, and its label."""

    def name(self, index: int) -> str:
        """What to call the image in an error message."""


class ImageFolder:
    """The images of `folder/<class>/**`, classes in alphabetical order, as a `Source`."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError where there are no class folders or images."""
        self.folder, self.classes = folder, class_names(folder)
        files = list(class_images(folder, self.classes))
        # One array of bytes instead of a million Python strings: workers share its memory.
        self.names = np.array([str(path.relative_to(folder)).encode() for path, _ in files])
        self.labels = np.array([label for _, label in files])

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, index: int) -> tuple[bytes, int]:
        """The bytes of an image file, and its label.

        Raises:
            InputError: it cannot be read.
        """
        try:
            return Path(self.name(index)).read_bytes(), int(self.labels[index])
        except OSError as error:
            raise InputError(f"{self.name(index)} cannot be read ({error.strerror})") from error

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.folder / self.names[index].decode())


@dataclass
class DiskImages:
    """Images of a source that are read when they are needed.

    Attributes:
        source: where they are.
        chosen: int64 `(N,)`, which of the source's images these are.
        skip_unreadable: leave out images that cannot be decoded instead of stopping.
        skipped: 0, since images are looked at only when they are needed.
    """

    source: Source
    chosen: Tensor
    skip_unreadable: bool = False
    skipped: int = 0

    @property
    def classes(self) -> list[str]:
        """The classes' names, in the order of their indices."""
        return self.source.classes

    def __len__(self) -> int:
        return len(self.chosen)

    def hold_out(self, count: int) -> tuple["DiskImages", "DiskImages"]:
        """As `ImageSet.hold_out`."""
        labels = np.asarray(self.source.labels)[self.chosen]
        return tuple(
            replace(self, chosen=self.chosen[half]) for half in stratified_split(labels, count, len(self.classes))
        )

    def subset(self, count: int | None) -> "DiskImages":
        """As `ImageSet.subset`."""
        if count is None:
            return self
        return replace(self, chosen=self.chosen[random_subset(len(self), count)])


def open_source(folder: Path, half: str) -> tuple[Source, Path] | None:
    """`<half>.lmdb` or `<half>/<class>/*`, whichever the folder holds, and its path; None for neither."""
    if (path := folder / f"{half}.lmdb").is_file():
        return ImageFolderLMDB(path), path
    if (path := folder / half).is_dir():
        return ImageFolder(path), path
    return None


Halves = tuple[ImageSet, ImageSet] | tuple[DiskImages, DiskImages]  # training and validation images
