"""Images to evaluate on, one at a time from files or an LMDB, each as the ten crops of the paper's final evaluation.

A crop is uint8 until it is on the device that classifies it: a quarter of the bytes to hand over between processes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Resize, TenCrop
from torchvision.transforms.functional import pil_to_tensor

from data.batches import leave_signals_to_main
from data.image_lmdb import ImageFolderLMDB
from data.image_sets import ImageFolder
from s3net_common.errors import InputError
from s3net_common.images import read_rgb

CENTRE = 4  # of TenCrop's order: four corners, the centre, and the five of the mirrored image


@dataclass(frozen=True)
class TenCrops:
    """An RGB image to uint8 `(10, 3, crop, crop)`: short side brought to `resize` pixels, then torchvision's TenCrop.

    The crop at `CENTRE` is the one that `CenterCrop` gives.
    """

    resize: int
    crop: int

    def __call__(self, image: Image.Image) -> Tensor:
        """The crops of one image."""
        return torch.stack(TenCrop(self.crop)(pil_to_tensor(Resize(self.resize)(image))))


def open_images(path: Path, transform: TenCrops) -> Dataset:
    """The images of an LMDB file or of class folders, as a Dataset of `(transform(image), label)` with `.classes`.

    Args:
        path: an LMDB file; `<class>/*`; or a data folder with `val.lmdb`, `val/<class>/*` or `test/<class>/*` in it.
        transform: what is done to each image, in the process that reads it.

    Raises:
        InputError: there is nothing of the kind.
    """
    if not path.exists():
        raise InputError(f"there is no {path}: pass --images with an LMDB file or a folder of <class>/*")
    path = next((path / name for name in ("val.lmdb", "val", "test") if (path / name).exists()), path)
    if path.is_file():
        return ImageFolderLMDB(path, transform)
    return FolderImages(path, transform)


class FolderImages(ImageFolder, Dataset):
    """`<class>/*`, classes in alphabetical order, as a Dataset of `(transform(image), label)`."""

    def __init__(self, folder: Path, transform: TenCrops) -> None:
        super().__init__(folder)
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        encoded, label = self.encoded(index)
        return self.transform(read_rgb(encoded, self.name(index), orient=False)), label


class _Chosen(Dataset):
    """Some images of another Dataset; one that cannot be read is the message of its error.

    (A DataLoader's processes cannot hand over an exception as it was raised.)
    """

    def __init__(self, images: Dataset, chosen: list[int]) -> None:
        self.images, self.chosen = images, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        try:
            return self.images[self.chosen[index]]
        except InputError as error:
            return str(error)


class CropBatch(NamedTuple):
    """A batch as it comes out of a DataLoader.

    Attributes:
        crops: uint8 `(images, 10, 3, crop, crop)`; None where no image of the batch could be read.
        labels: int64 `(images,)`, the images' own labels.
        unreadable: a message for each image that could not be read.
    """

    crops: Tensor | None
    labels: Tensor
    unreadable: list[str]


def crop_batches(images: Dataset, chosen: list[int], batch_size: int, readers: int, pin: bool) -> DataLoader:
    """The chosen images in order, as `CropBatch`es.

    Args:
        images: as from `open_images`.
        chosen: indices into it.
        batch_size: images in a batch.
        readers: processes that read and decode; 0 for this one.
        pin: keep batches in page-locked memory, from which a GPU copies faster.
    """
    return DataLoader(
        _Chosen(images, chosen),
        batch_size,
        num_workers=readers,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=leave_signals_to_main,
    )


def _collate(items: list[tuple[Tensor, int] | str]) -> CropBatch:
    read = [item for item in items if not isinstance(item, str)]
    return CropBatch(
        crops=torch.stack([crops for crops, _ in read]) if read else None,
        labels=torch.tensor([label for _, label in read], dtype=torch.int64),
        unreadable=[item for item in items if isinstance(item, str)],
    )
