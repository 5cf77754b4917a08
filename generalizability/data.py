"""Data sets that live in memory as one uint8 tensor, and batches that are augmented whole, on the training device.

`load_dataset` gives the two halves of a data set as `ImageSet`s; `TrainingBatches` and `EvaluationBatches` turn one
into normalised batches. Which images make up a batch and how each is flipped and cropped follows from the seed, the
epoch and the step alone: not from the device, the number of processes, or what ran before.

Measured by `benchmark.py data` (see README.md): faster than the same transforms an image at a time through PIL and a
DataLoader by the factor given there.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from image_lmdb import ImageFolderLMDB as ImageFolderLMDB
from models import InputError, nearest_names

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


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

    def subset(self, count: int | None) -> "ImageSet":
        """The first `count` images of a fixed random order, so that every class has its share; all of them for None.

        Raises:
            InputError: for a count below 1.
        """
        if count is None:
            return self
        if count < 1:
            raise InputError(f"a limit of {count} images leaves none: give 1 or more")
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count]
        return ImageSet(self.images[chosen], self.labels[chosen], self.classes, self.skipped)


# ---- The data sets ------------------------------------------------------------------------------------------------


def load_dataset(
    name: str, data_dir: Path, image_size: int = 32, workers: int = 0, skip_unreadable: bool = False
) -> tuple[ImageSet, ImageSet]:
    """The training and the evaluation half of a data set.

    Args:
        name: "digits", "cifar100" or "folder".
        data_dir: where the data are; "cifar100" is downloaded there if it has none; "digits" needs none.
        image_size: height and width that "folder" images are brought to (short side resized, centre cropped).
        workers: threads that decode image files; 0 for as many as there are processors.
        skip_unreadable: leave out image files that cannot be decoded, and count them, instead of stopping.

    Raises:
        InputError: the data are not there, have no classes or different ones in their halves, an image cannot be
            read, or they do not fit into memory.
    """
    if name not in DATASETS:
        raise InputError(f"there is no data set {name!r}: {nearest_names(name, DATASETS)}")
    return DATASETS[name](Path(data_dir), image_size, workers or os.cpu_count() or 1, skip_unreadable)


def _load_digits(data_dir: Path, image_size: int, workers: int, skip_unreadable: bool) -> tuple[ImageSet, ImageSet]:
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


def _load_cifar100(data_dir: Path, image_size: int, workers: int, skip_unreadable: bool) -> tuple[ImageSet, ImageSet]:
    """The official binary form or `{train,test}/<class>/*`, whichever the folder holds; downloaded if neither."""
    if (data_dir / "train").is_dir():
        return _load_folder(data_dir, 32, workers, skip_unreadable)
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


def _load_folder(data_dir: Path, image_size: int, workers: int, skip_unreadable: bool) -> tuple[ImageSet, ImageSet]:
    """`train/<class>/*` and `val/<class>/*` or `test/<class>/*`; classes in alphabetical order."""
    train_dir = data_dir / "train"
    val_dir = next((data_dir / half for half in ("val", "test") if (data_dir / half).is_dir()), None)
    if not train_dir.is_dir() or val_dir is None:
        raise InputError(
            f"{data_dir} has no images: it needs train/<class>/* and val/<class>/* (or test/<class>/*); pass --data-dir"
        )
    classes = _class_names(train_dir)
    if different := sorted(set(classes) ^ set(_class_names(val_dir))):
        inside, outside = (train_dir, val_dir) if different[0] in classes else (val_dir, train_dir)
        raise InputError(
            f"class {different[0]!r} is in {inside} but not in {outside}: give both the same class folders"
        )
    return tuple(_read_images(half, classes, image_size, workers, skip_unreadable) for half in (train_dir, val_dir))


DATASETS: dict[str, Callable[[Path, int, int, bool], tuple[ImageSet, ImageSet]]] = {
    "digits": _load_digits,
    "cifar100": _load_cifar100,
    "folder": _load_folder,
}


def _class_names(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise InputError(f"{folder} has no class folders: put the images into {folder}/<class>/")
    return names


def _read_images(folder: Path, classes: list[str], size: int, workers: int, skip_unreadable: bool) -> ImageSet:
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    if not files:
        raise InputError(f"{folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in its class folders")
    _check_memory(len(files) * 3 * size * size, f"{len(files):,} images of {size}x{size} in {folder}")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    readable = torch.ones(len(files), dtype=torch.bool)

    def read(index: int) -> None:
        try:
            pixels = decode_image(files[index][0], size)
        except InputError:
            if not skip_unreadable:
                raise
            readable[index] = False
        else:
            images[index] = torch.from_numpy(pixels).permute(2, 0, 1)

    with ThreadPoolExecutor(workers) as pool:
        progress = tqdm(total=len(files), desc=f"reading {folder.name}", unit="image", disable=None, leave=False)
        try:
            for _ in pool.map(read, range(len(files))):
                progress.update()
        except InputError:
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


def decode_image(path: Path, size: int) -> np.ndarray:
    """An image file of any size and mode as uint8 `(size, size, 3)`: short side resized, centre cropped.

    Transparent pixels become white; 16-bit values are scaled to 8; a JPEG's orientation is applied.

    Raises:
        InputError: the file cannot be read as an image; the message names it.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            image = to_rgb(ImageOps.exif_transpose(image))
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
            return np.array(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} cannot be read as an image: remove or repair it, or pass --skip-unreadable"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if values.max(initial=0) > 255:
            values = values * (255 / 65535)
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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


# ---- Batches ------------------------------------------------------------------------------------------------------


class _Batches:
    """Normalised channels-last batches of an `ImageSet`, on a device."""

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        device: torch.device,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        """`batch_size` counts the images of all processes together; `mean` and `std` are for pixels in [0, 1]."""
        self.batch_size, self.device = batch_size, device
        self.images, self.labels = data.images, data.labels
        if device.type == "cuda" and data.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.images, self.labels = self.images.to(device), self.labels.to(device)
        scale = 1 / (255 * torch.tensor(std, device=device))
        self.scale = scale.view(1, 3, 1, 1)
        self.shift = (-torch.tensor(mean, device=device) * 255 * scale).view(1, 3, 1, 1)

    def __len__(self) -> int:
        """Batches in one pass."""
        return -(-len(self.labels) // self.batch_size)

    def _fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.images.device, non_blocking=True)
        images, labels = self.images.index_select(0, index), self.labels.index_select(0, index)
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 `(B, 3, H, W)` to float32, zero mean and unit variance over the data set, channels last."""
        images = images.float().mul_(self.scale).add_(self.shift)
        return images.contiguous(memory_format=torch.channels_last)


class TrainingBatches(_Batches):
    """Random order, flips and crops, each image with its own draw.

    Every process draws for the whole batch, always on the CPU, and takes its part: so the images of a step are the
    same whatever the device and the number of processes, and an epoch can be entered at any step.
    """

    def __init__(self, *args, flip: bool, crop_padding: float, seed: int, rank: int = 0, world_size: int = 1, **kwargs):
        """As `_Batches`; `crop_padding` is a share of the image's height and width."""
        super().__init__(*args, **kwargs)
        self.flip, self.seed, self.rank, self.world_size = flip, seed, rank, world_size
        self.padding = round(crop_padding * self.images.shape[-1])

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """Yield this process's part of each batch, and the number of images in the whole of it.

        The part is images `(b, 3, H, W)`, labels `(b,)` and weights `(b,)`.
        The weights are 1. Only where a batch has fewer images than there are processes does a process without one
        get the batch's first image with weight 0, so that all of them take part in the step.
        """
        count = len(self.labels)
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        order = torch.randperm(count, generator=generator)
        flips = torch.rand(count, generator=generator) < (0.5 if self.flip else 0.0)
        offsets = torch.randint(2 * self.padding + 1, (2, count), generator=generator)
        for step in range(first_step, len(self)):
            batch = slice(step * self.batch_size, min((step + 1) * self.batch_size, count))
            part = torch.arange(batch.start, batch.stop).tensor_split(self.world_size)[self.rank]
            weight = 1.0
            if not len(part):
                part, weight = torch.tensor([batch.start]), 0.0
            images, labels = self._fetch(order[part])
            images = flip_and_crop(images, flips[part], offsets[:, part], self.padding)
            weights = torch.full((len(part),), weight, device=self.device)
            yield self.normalize(images), labels, weights, batch.stop - batch.start


class EvaluationBatches(_Batches):
    """Every image once, in order; of several processes each takes whole batches in turn.

    So a batch holds the same images, and gives the same logits, whatever the number of processes.
    """

    def part(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images `(b, 3, H, W)` and labels `(b,)` of this process's batches."""
        for step in range(rank, len(self), world_size):
            index = torch.arange(step * self.batch_size, min((step + 1) * self.batch_size, len(self.labels)))
            images, labels = self._fetch(index)
            yield self.normalize(images), labels


def flip_and_crop(images: Tensor, flips: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Crop each image at its own place of its zero-padded self, and mirror those that are to be.

    Args:
        images: `(B, C, H, W)`.
        flips: bool `(B,)`, which images to mirror after cropping.
        offsets: int `(2, B)`, row and column of the crop in the padded image, 0 to `2 * padding`.
        padding: zero pixels on each side.

    Returns:
        `(B, C, H, W)`.
    """
    batch, _, height, width = images.shape
    device = images.device
    if padding:
        windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W)
        rows, columns = offsets.to(device, non_blocking=True)
        images = windows[torch.arange(batch, device=device), :, rows, columns]
    return torch.where(flips.to(device, non_blocking=True).view(-1, 1, 1, 1), images.flip(3), images)


def _mix(seed: int, epoch: int) -> int:
    """A generator seed for each pair; seeds that differ by one must not share epochs."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
