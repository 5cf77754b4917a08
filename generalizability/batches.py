"""Batches of data sets in memory, augmented whole, on the training device.

Which images make up a batch and how each is flipped and cropped follows from the seed, the epoch and the step alone:
not from the device, the number of processes, or what ran before.

Measured by `benchmark.py --only data` (see README.md): faster than the same transforms an image at a time through PIL
and a DataLoader by the factor given there.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import ImageSet


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
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
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


def mix(seed: int, epoch: int) -> int:
    """A generator seed for each pair; seeds that differ by one must not share epochs."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
