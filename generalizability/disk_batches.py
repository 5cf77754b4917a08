"""Batches of data sets on disk: decoded, cropped and flipped by worker processes.

They have the interface of the batches in memory and keep the same promise: which images make up a batch, and how each
is cropped and flipped, follows from the seed, the epoch and the step alone. So an epoch can be entered at any step,
with any number of processes and of workers.
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as transforms

from batches import Normalization, mix, step_part
from command_line import LocalError
from disk_images import DiskImages, Source
from image_files import read_rgb
from models import InputError

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
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
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
