"""Data sets that stay on disk, as ImageNet must: an LMDB file or class folders, and which of their images are wanted.

`DiskImages` is what `data.ImageSet` is for data sets in memory; `disk_batches.py` makes batches of it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from image_files import class_images, class_names
from image_lmdb import ImageFolderLMDB
from models import InputError
from splits import random_subset, stratified_split


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
