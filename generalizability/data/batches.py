"""Batches of data sets in memory, augmented whole, on the training device.

Which images make up a batch and how each is flipped and cropped follows from the seed, the epoch and the step alone:
not from the device, the number of processes, or what ran before.

Measured by `benchmark.py --only data` (see README.md): faster than the same transforms an image at a time through PIL
and a DataLoader by the factor given there.
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as transforms

from data.image_sets import DiskImages, ImageSet, Source
from distributed import Ranks
from recipes import RunConfig
from s3net_common.errors import InputError, LocalError
from s3net_common.images import read_rgb


class Normalization:
    """uint8 images of 0 to 255 to what a network sees, on the training device.

    Args:
        device: where the images are.
        mean, std: of each colour channel, for pixels in [0, 1].
        image_size: height and width that the network sees; images of another size are resized (bilinear).
    """

    def __init__(
        self,
        device: torch.device,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        image_size: int,
    ) -> None:
        scale = 1 / (255 * torch.tensor(std, device=device))
        self.scale = scale.view(1, 3, 1, 1)
        self.shift = (-torch.tensor(mean, device=device) * 255 * scale).view(1, 3, 1, 1)
        self.image_size = image_size

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 `(B, 3, H, W)` to float32 `(B, 3, image_size, image_size)`, channels last."""
        images = images.float().mul_(self.scale).add_(self.shift)
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return images.contiguous(memory_format=torch.channels_last)


class _Batches:
    """Normalised channels-last batches of an `ImageSet`, on a device."""

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        device: torch.device,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        image_size: int | None = None,
    ) -> None:
        """`batch_size` counts the images of all processes together; for the others see `Normalization`."""
        self.batch_size, self.device = batch_size, device
        self.images, self.labels = data.images, data.labels
        if device.type == "cuda" and data.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.normalize = Normalization(device, mean, std, image_size or self.images.shape[-1])

    def __len__(self) -> int:
        """Batches in one pass."""
        return -(-len(self.labels) // self.batch_size)

    def close(self) -> None:
        """Nothing has to be ended, unlike with the batches from disk."""

    def _fetch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.images.device, non_blocking=True)
        images, labels = self.images.index_select(0, index), self.labels.index_select(0, index)
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


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

        The part is images `(b, 3, H, W)`, labels `(b,)` and weights `(b,)`; for these see `step_part`.
        """
        count = len(self.labels)
        generator = torch.Generator().manual_seed(combine_seeds(self.seed, epoch))
        order = torch.randperm(count, generator=generator)
        flips = torch.rand(count, generator=generator) < (0.5 if self.flip else 0.0)
        offsets = torch.randint(2 * self.padding + 1, (2, count), generator=generator)
        for step in range(first_step, len(self)):
            part, weight, whole_batch = step_part(step, self.batch_size, count, self.rank, self.world_size)
            images, labels = self._fetch(order[part])
            images = flip_and_crop(images, flips[part], offsets[:, part], self.padding)
            weights = torch.full((len(part),), weight, device=self.device)
            yield self.normalize(images), labels, weights, whole_batch


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


def step_part(step: int, batch_size: int, count: int, rank: int, world_size: int) -> tuple[Tensor, float, int]:
    """Which of `count` images in their order a process takes at a step, their weight, and the whole batch's size.

    The weight is 1. Only where a batch has fewer images than there are processes does a process without one get the
    batch's first image with weight 0, so that all of them take part in the step.
    """
    batch = range(step * batch_size, min((step + 1) * batch_size, count))
    part = torch.arange(batch.start, batch.stop).tensor_split(world_size)[rank]
    if not len(part):
        return torch.tensor([batch.start]), 0.0, len(batch)
    return part, 1.0, len(batch)


def combine_seeds(seed: int, epoch: int) -> int:
    """A generator seed for each pair; seeds that differ by one must not share epochs."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


EVAL_RESIZE = 256 / 224  # short side before the centre crop, in units of the crop


Item = tuple[int, int | None]  # an image's index, and the seed of its crop and flip; None for the centre


@dataclass
class Decoder(Dataset):
    """Images as uint8 pixels `(3, image_size, image_size)`.

    An item is asked for as `(index, seed)`: with a seed the image is cropped and flipped at random as that seed has
    it, with None its centre is taken. Given back is `(pixels, label, problem)`; a problem is what is wrong with an
    image that cannot be decoded, since an exception would lose its one line on the way out of a worker.
    """

    source: Source
    image_size: int
    flip: bool = True

    def __getitem__(self, item: Item) -> tuple[Tensor, int, str | None]:
        index, seed = item
        label, problem = 0, None
        try:
            encoded, label = self.source.encoded(index)
            image = read_rgb(encoded, self.source.name(index), orient=False)
            image = self.centre(image) if seed is None else self.random_crop(image, seed)
        except InputError as error:
            image, problem = Image.new("RGB", (self.image_size, self.image_size)), str(error)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), label, problem

    def random_crop(self, image: Image.Image, seed: int) -> Image.Image:
        """A random share of 8% to 100% of the area, of aspect 3/4 to 4/3, resized; mirrored every other time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            top, left, height, width = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
            mirrored = self.flip and torch.rand(()) < 0.5
        box = (left, top, left + width, top + height)
        image = image.resize((self.image_size,) * 2, Image.Resampling.BILINEAR, box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image

    def centre(self, image: Image.Image) -> Image.Image:
        """The short side resized to 256/224 of the size, and the centre of that."""
        resized = transforms.resize(image, round(self.image_size * EVAL_RESIZE))
        return transforms.center_crop(resized, self.image_size)


def collate(items: list[tuple[Tensor, int, str | None]]) -> tuple[Tensor, Tensor, list[str | None]]:
    """Pixels `(B, 3, H, W)`, labels `(B,)` and problems."""
    pixels, labels, problems = zip(*items, strict=True)
    return torch.stack(pixels), torch.tensor(labels), list(problems)


def leave_signals_to_main(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: the main one decides; SIGTERM is how it ends a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclass
class _Plan:
    """The batch sampler of a `_DiskBatches`: what its next pass asks for.

    It is an object of its own so that nothing refers to itself: the workers then end when the loader is let go of, and
    not when garbage is collected, which may be never.
    """

    batches: Callable[[], Iterator[list[Item]]] = lambda: iter(())

    def __iter__(self) -> Iterator[list[Item]]:
        return self.batches()


class _DiskBatches:
    """Normalised batches of a `DiskImages`, on a device. Not to be read by two iterators at a time."""

    def __init__(
        self,
        data: DiskImages,
        batch_size: int,
        device: torch.device,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        image_size: int,
        workers: int,
        flip: bool = False,
    ) -> None:
        """As the batches in memory; `workers` processes decode, 0 for the training process itself."""
        self.data, self.batch_size, self.device = data, batch_size, device
        self.normalize = Normalization(device, mean, std, image_size)
        self.plan = _Plan()
        self.loader = DataLoader(
            Decoder(data.source, image_size, flip),
            batch_sampler=self.plan,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=leave_signals_to_main,
            generator=torch.Generator(),  # else each pass would draw from the one that dropout draws from
        )

    def __len__(self) -> int:
        """Batches in one pass."""
        return -(-len(self.data) // self.batch_size)

    def close(self) -> None:
        """End the workers. Those that are left to the interpreter it kills, which PyTorch reports as a crash."""
        self.loader = None

    def _load(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Normalised images, labels, and which of them could be read; on the device.

        Raises:
            LocalError: an image cannot be read and they are not to be skipped.
        """
        for pixels, labels, problems in self.loader:
            if (problem := next(filter(None, problems), None)) and not self.data.skip_unreadable:
                raise LocalError(problem)
            readable = torch.tensor([problem is None for problem in problems])
            pixels, labels, readable = (t.to(self.device, non_blocking=True) for t in (pixels, labels, readable))
            yield self.normalize(pixels), labels, readable


class DiskTrainingBatches(_DiskBatches):
    """Random order, crops and flips, each image with its own draw; as `batches.TrainingBatches`."""

    def __init__(self, *args, seed: int, rank: int = 0, world_size: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """As `batches.TrainingBatches.epoch`; an image that is skipped gets weight 0."""
        chosen, count = self.data.chosen, len(self.data)
        generator = torch.Generator().manual_seed(combine_seeds(self.seed, epoch))
        order = torch.randperm(count, generator=generator)
        seeds = torch.randint(2**62, (count,), generator=generator)
        steps = range(first_step, len(self))
        parts = [step_part(step, self.batch_size, count, self.rank, self.world_size) for step in steps]

        def plan() -> Iterator[list[Item]]:
            for part, _, _ in parts:
                yield list(zip(chosen[order[part]].tolist(), seeds[part].tolist(), strict=True))

        self.plan.batches = plan
        for (images, labels, readable), (_, weight, whole_batch) in zip(self._load(), parts, strict=True):
            yield images, labels, readable * weight, whole_batch


class DiskEvaluationBatches(_DiskBatches):
    """Every image once, in order; as `batches.EvaluationBatches`."""

    def part(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """As `batches.EvaluationBatches.part`, without the images that are skipped."""
        chosen = self.data.chosen.split(self.batch_size)[rank::world_size]
        self.plan.batches = lambda: ([(index, None) for index in part.tolist()] for part in chosen)
        for images, labels, readable in self._load():
            if not readable.all():
                images, labels = images[readable], labels[readable]
            if len(labels):
                yield images, labels


# Of training and validation images; to be closed
Batches = tuple[TrainingBatches, EvaluationBatches] | tuple[DiskTrainingBatches, DiskEvaluationBatches]


def eval_batch(image_size: int) -> int:
    """Images of that size that are evaluated at a time."""
    return 500 if image_size <= 64 else 100


def make_batches(
    config: RunConfig,
    data: tuple[ImageSet, ImageSet] | tuple[DiskImages, DiskImages],
    ranks: Ranks,
    loader_workers: int,
) -> Batches:
    """The run's batches on this process's device; `loader_workers` processes decode images that are on disk."""
    train, val = data
    common = {"mean": config.mean, "std": config.std, "image_size": config.image_size, "flip": config.flip}
    per_rank = {"seed": config.seed, "rank": ranks.rank, "world_size": ranks.world_size}
    evaluation = make_evaluation_batches(val, ranks, config.mean, config.std, config.image_size, loader_workers)
    if isinstance(train, DiskImages):
        return DiskTrainingBatches(
            train, config.batch_size, ranks.device, workers=loader_workers, **common, **per_rank
        ), evaluation
    return TrainingBatches(
        train, config.batch_size, ranks.device, crop_padding=config.crop_padding, **common, **per_rank
    ), evaluation


def make_evaluation_batches(
    val: ImageSet | DiskImages, ranks: Ranks, mean: list[float], std: list[float], image_size: int, loader_workers: int
) -> EvaluationBatches | DiskEvaluationBatches:
    """Batches of validation images on this process's device."""
    if isinstance(val, DiskImages):
        return DiskEvaluationBatches(
            val, eval_batch(image_size), ranks.device, mean, std, image_size, workers=loader_workers
        )
    return EvaluationBatches(val, eval_batch(image_size), ranks.device, mean, std, image_size)
