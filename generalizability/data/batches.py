"""Normalised batches on the training device: of images in memory, augmented as whole batches, and of images on disk.

The images of a batch, their flips and their crops depend on the seed, the epoch and the step only: not on the device,
the number of distributed ranks, or earlier steps. A run can therefore be resumed at any step of an epoch.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.decoding import (
    CropDrawer,
    Decoder,
    DraftDecoder,
    Item,
    Transform,
    collate,
    collate_encoded,
    decode_crops,
    random_crop,
)
from data.device_input import to_device
from data.image_sets import DiskImages, Halves, ImageSet
from data.loader_workers import fitting_workers, ignore_stop_signals, is_file_limit, starting_workers
from distributed import Ranks
from recipes import RunConfig
from s3net_common.errors import TOO_MANY_FILES, LocalError
from s3net_common.framing import Normalization, dataset_preparation
from s3net_common.unused_files import report_once, unreadable_images

SEARCH_SECONDS = 60  # after an unreadable image, the time to look for others, so that one error names them


def step_part(step: int, batch_size: int, count: int, rank: int, world_size: int) -> tuple[slice, float, int]:
    """Return the part of a training batch that belongs to a rank.

    Args:
        step: number of the batch in the epoch, from 0.
        batch_size: images in a batch, over all ranks.
        count: images in the epoch.
        rank: of this process, from 0.
        world_size: number of ranks.

    Returns:
        The positions of the images in the epoch's order, their weight in the loss (1), and the size of the whole batch.
        If a batch has fewer images than there are ranks, the ranks without an image get the first one with weight 0,
        because every rank must take part in the step.
    """
    batch = range(step * batch_size, min((step + 1) * batch_size, count))
    images, rest = divmod(len(batch), world_size)
    start = batch.start + rank * images + min(rank, rest)
    stop = start + images + (rank < rest)
    if start == stop:
        return slice(batch.start, batch.start + 1), 0.0, len(batch)
    return slice(start, stop), 1.0, len(batch)


def combine_seeds(seed: int, epoch: int) -> int:
    """Return a generator's seed for a run's seed and an epoch. Neighbouring seeds have no epoch in common."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ---- Images in memory ---------------------------------------------------------------------------------------------


class _Batches:
    """Batches of an `ImageSet`.

    Args:
        data: the images; they are kept on a GPU if they fill less than half of its free memory.
        batch_size: images in a batch, over all distributed ranks.
        device, mean, std, image_size: as of `Normalization`; by default the images keep their size.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        device: torch.device,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        image_size: int | None = None,
    ) -> None:
        self.batch_size, self.device = batch_size, device
        self.images, self.labels = data.images, data.labels
        if device.type == "cuda" and data.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.normalize = Normalization(device, mean, std, image_size or self.images.shape[-1])

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def close(self) -> None:
        """Do nothing: only batches from disk have worker processes to end."""

    def _select(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return to_device(images, self.device), to_device(labels, self.device)


class TrainingBatches(_Batches):
    """Batches in random order, each image flipped and cropped at random.

    Every rank draws the random numbers of the whole epoch on the CPU and copies them to the device at once, then takes
    its part of each batch.

    Args:
        *args, **kwargs: as of `_Batches`.
        flip: mirror half of the images.
        crop_padding: zero padding on each side before the random crop, relative to the image's height and width.
        seed: of the order, the flips and the crops.
        rank, world_size: of this process.
    """

    def __init__(self, *args, flip: bool, crop_padding: float, seed: int, rank: int = 0, world_size: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.flip, self.seed, self.rank, self.world_size = flip, seed, rank, world_size
        self.padding = round(crop_padding * self.images.shape[-1])

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """Yield this rank's part of each batch from `first_step` on.

        Yields:
            Images `(b, 3, H, W)`, labels `(b,)`, weights in the loss `(b,)` (see `step_part`), and the number of
            images in the whole batch.
        """
        count = len(self.labels)
        generator = torch.Generator().manual_seed(combine_seeds(self.seed, epoch))
        order = torch.randperm(count, generator=generator)
        flips = torch.rand(count, generator=generator) < (0.5 if self.flip else 0.0)
        offsets = torch.randint(2 * self.padding + 1, (2, count), generator=generator)
        order = to_device(order, self.images.device)
        flips, offsets = to_device(flips, self.device), to_device(offsets, self.device)
        for step in range(first_step, len(self)):
            part, weight, whole_batch = step_part(step, self.batch_size, count, self.rank, self.world_size)
            indices = order[part]
            images, labels = self._select(self.images.index_select(0, indices), self.labels.index_select(0, indices))
            images = flip_and_crop(images, flips[part], offsets[:, part], self.padding)
            weights = torch.full((len(labels),), weight, device=self.device)
            yield self.normalize(images), labels, weights, whole_batch


class EvaluationBatches(_Batches):
    """Batches that contain every image once, in order.

    Distributed ranks take turns batch by batch, so that a batch has the same images, and gives the same logits, for
    any number of ranks.
    """

    def part(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images `(b, 3, H, W)` and labels `(b,)` of the batches of a rank."""
        for step in range(rank, len(self), world_size):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            images, labels = self._select(self.images[batch], self.labels[batch])
            yield self.normalize(images), labels


def flip_and_crop(images: Tensor, flips: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Pad each image with zeros, crop it to its original size at its own offset, and mirror some of the crops.

    Args:
        images: `(B, C, H, W)`.
        flips: bool `(B,)`, which crops to mirror.
        offsets: int `(2, B)`, row and column of the crop in the padded image, 0 to `2 * padding`.
        padding: zero pixels on each side.

    Returns:
        `(B, C, H, W)`.
    """
    batch, _, height, width = images.shape
    device = images.device
    if padding:
        windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W)
        rows, columns = to_device(offsets, device)
        images = windows[torch.arange(batch, device=device), :, rows, columns]
    return torch.where(to_device(flips, device).view(-1, 1, 1, 1), images.flip(3), images)


# ---- Images on disk -----------------------------------------------------------------------------------------------


def start_worker(max_pixels: float | None, worker: int) -> None:
    """Set the signals of a DataLoader worker and its limit of pixels (Pillow's), which a spawned process lacks."""
    Image.MAX_IMAGE_PIXELS = max_pixels
    ignore_stop_signals()


@dataclass
class _BatchSampler:
    """The batch sampler of a `_DiskBatches`, which sets the items of the next pass.

    A loader that refers to its owner would form a cycle, and its workers would only end with a garbage collection.
    """

    batches: Callable[[], Iterator[list[Item]]] = lambda: iter(())

    def __iter__(self) -> Iterator[list[Item]]:
        return self.batches()


class _DiskBatches:
    """Batches of `DiskImages`. Only one iterator may be in use at a time.

    Args:
        data: the images.
        batch_size: images in a batch, over all distributed ranks.
        device, mean, std, image_size: as of `Normalization`.
        workers: processes that decode images, fewer if the system's limits allow fewer; 0 to decode in this process.
        decoder: the data set of decoded images; by default `Decoder` with `transform`.
        transform: applied to each image.
        collate_fn: makes a batch of the items of `decoder`.
        loaded_images: images that this rank loads at a time; by default `batch_size`.
    """

    def __init__(
        self,
        data: DiskImages,
        batch_size: int,
        device: torch.device,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        image_size: int,
        workers: int,
        transform: Transform | None = None,
        decoder: Dataset | None = None,
        collate_fn: Callable = collate,
        loaded_images: int | None = None,
    ) -> None:
        self.data, self.batch_size, self.device = data, batch_size, device
        self.normalize = Normalization(device, mean, std, image_size)
        self.sampler = _BatchSampler()
        self.reported: set[str] = set()  # messages about the images left out
        decoder = decoder or Decoder(data.source, transform)
        if workers and len(data):
            image = decoder[int(data.indices[0]), 0][0]
            images = min(loaded_images or batch_size, len(data))
            workers = fitting_workers(workers, images * getattr(image, "content", image).nbytes)
        self.loader = DataLoader(
            decoder,
            batch_sampler=self.sampler,
            num_workers=workers,
            collate_fn=collate_fn,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=partial(start_worker, Image.MAX_IMAGE_PIXELS),
            generator=torch.Generator(),  # by default each pass would advance the generator that dropout uses
        )

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def close(self) -> None:
        """End the workers. The interpreter would kill them at exit, which PyTorch reports as a crash."""
        self.loader = None

    def _load(self, batches: Callable[[], Iterator[list[Item]]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield uint8 pixels, labels, and whether each image could be read (bool), on the CPU.

        Raises:
            LocalError: an image cannot be read and `data.skip_unreadable` is False. The message also names others that
                are found in `SEARCH_SECONDS`. Or the workers need too many open files.
        """
        self.sampler.batches = batches
        try:
            with starting_workers():
                loaded = iter(self.loader)
            for *batch, errors in loaded:
                if errors and not self.data.skip_unreadable:
                    deadline = time.monotonic() + SEARCH_SECONDS
                    while time.monotonic() < deadline and (more := next(loaded, None)):
                        errors += more[-1]
                    raise LocalError(str(unreadable_images(errors)))
                report_once(errors, self.reported)
                yield tuple(batch)
        except (OSError, RuntimeError) as error:
            if is_file_limit(error):
                raise LocalError(TOO_MANY_FILES) from error
            raise

    def _to_device(self, *tensors: Tensor) -> list[Tensor]:
        return [to_device(tensor, self.device) for tensor in tensors]


class DiskTrainingBatches(_DiskBatches):
    """Batches in random order, each image cropped and flipped at random; used as `TrainingBatches`.

    Args:
        *args, **kwargs: as of `_DiskBatches`.
        flip, seed, rank, world_size: as of `TrainingBatches`.
        decode: one of `DECODERS`.
        augment: whether the crops are random; else they are those of an evaluation.
    """

    def __init__(
        self,
        data: DiskImages,
        batch_size: int,
        *args,
        image_size: int,
        flip: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        decode: str = "cpu",
        augment: bool = True,
        **kwargs,
    ) -> None:
        crop = {"size": image_size, "flip": flip}
        centre = dataset_preparation("imagenet", image_size).pixels
        kinds = {
            "cpu": {"transform": partial(random_crop, **crop) if augment else centre},
            "draft": {"decoder": DraftDecoder(data.source, **crop)},
            "gpu": {"decoder": CropDrawer(data.source, **crop), "collate_fn": collate_encoded},
        }
        kwargs["loaded_images"] = -(-batch_size // world_size)
        super().__init__(data, batch_size, *args, image_size=image_size, **kinds[decode], **kwargs)
        self.seed, self.rank, self.world_size, self.decode = seed, rank, world_size, decode

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """Yield as `TrainingBatches.epoch`; an image that is skipped has weight 0."""
        count = len(self.data)
        generator = torch.Generator().manual_seed(combine_seeds(self.seed, epoch))
        order = self.data.indices[torch.randperm(count, generator=generator)]
        seeds = torch.randint(2**62, (count,), generator=generator)
        steps = range(first_step, len(self))
        parts = [step_part(step, self.batch_size, count, self.rank, self.world_size) for step in steps]

        def batches() -> Iterator[list[Item]]:
            for part, _, _ in parts:
                yield list(zip(order[part].tolist(), seeds[part].tolist(), strict=True))

        for (pixels, *rest), (_, weight, whole_batch) in zip(self._load(batches), parts, strict=True):
            labels, readable = self._to_device(*rest)
            if self.decode == "gpu":
                pixels, problems = decode_crops(pixels, self.device)
                if errors := list(filter(None, problems)):
                    if not self.data.skip_unreadable:
                        raise LocalError(str(unreadable_images(errors)))
                    report_once(errors, self.reported)
                    readable &= torch.tensor([problem is None for problem in problems], device=self.device)
            pixels = to_device(pixels, self.device)
            yield self.normalize(pixels), labels, readable * weight, whole_batch


class DiskEvaluationBatches(_DiskBatches):
    """Batches that contain every image once, in order; used as `EvaluationBatches`.

    Args:
        *args, **kwargs: as of `_DiskBatches`.
        transform: applied to each image; by default the preparation of ImageNet for `image_size`.
    """

    def __init__(self, *args, image_size: int, transform: Transform | None = None, **kwargs) -> None:
        transform = transform or dataset_preparation("imagenet", image_size).pixels
        super().__init__(*args, image_size=image_size, transform=transform, **kwargs)

    def part(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield as `EvaluationBatches.part`, without the images that are skipped. A batch may then have no images.

        A transform that returns several crops of an image gives images `(b, crops, 3, H, W)`.
        """
        parts = self.data.indices.split(self.batch_size)[rank::world_size]
        for pixels, labels, readable in self._load(lambda: ([(i, None) for i in part.tolist()] for part in parts)):
            if not readable.all():
                pixels, labels = pixels[readable], labels[readable]
            pixels, labels = self._to_device(pixels, labels)
            yield self.normalize(pixels), labels


# ---- The batches of a run -----------------------------------------------------------------------------------------

# The training batches and the evaluation batches of a run. Call close() of both when the run ends.
Batches = tuple[TrainingBatches, EvaluationBatches] | tuple[DiskTrainingBatches, DiskEvaluationBatches]


def make_batches(config: RunConfig, data: Halves, ranks: Ranks, loader_workers: int) -> Batches:
    """Return the batches of a run on this rank's device.

    Args:
        config: of the run.
        data: the training images and the validation images.
        ranks: this process among the distributed ranks.
        loader_workers: DataLoader workers that decode images, if they are on disk.
    """
    train, val = data
    evaluation = make_evaluation_batches(val, ranks, config.mean, config.std, config.image_size, loader_workers)
    options = {"mean": config.mean, "std": config.std, "image_size": config.image_size, "flip": config.flip}
    options |= {"seed": config.seed, "rank": ranks.rank, "world_size": ranks.world_size}
    if isinstance(train, DiskImages):
        options |= {"workers": loader_workers, "decode": config.decode, "augment": config.augment}
        training = DiskTrainingBatches(train, config.batch_size, ranks.device, **options)
    else:
        training = TrainingBatches(train, config.batch_size, ranks.device, crop_padding=config.crop_padding, **options)
    return training, evaluation


def make_evaluation_batches(
    val: ImageSet | DiskImages,
    ranks: Ranks,
    mean: list[float],
    std: list[float],
    image_size: int,
    loader_workers: int,
    transform: Transform | None = None,
) -> EvaluationBatches | DiskEvaluationBatches:
    """Return validation batches on this rank's device. Arguments: as of `make_batches`, `transform` of `Decoder`."""
    batch_size = 500 if image_size <= 64 else 100
    options = {"mean": mean, "std": std, "image_size": image_size}
    if isinstance(val, DiskImages):
        options |= {"workers": loader_workers, "transform": transform}
        return DiskEvaluationBatches(val, batch_size, ranks.device, **options)
    return EvaluationBatches(val, batch_size, ranks.device, **options)
