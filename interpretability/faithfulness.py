"""Insertion and deletion (Petsiuk et al. 2018): does the network need the pixels that a map marks as salient?

Deletion replaces the pixels by the mean colour, the most salient first. The probability of the class should fall fast.
Insertion reveals them on a blurred copy of the image. The probability should rise fast. The score is the mean height
of the curve, in [0, 1].
"""

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

STEPS = 20


def blurred(images: Tensor) -> Tensor:
    """Blur images `(N, C, H, W)` with a Gaussian; its standard deviation is a tenth of the longer side."""
    sigma = max(images.shape[-2:]) / 10
    radius = min(int(3 * sigma), (min(images.shape[-2:]) - 1) // 2)
    return gaussian_blur(images, [2 * radius + 1] * 2, [sigma] * 2)


@torch.no_grad()
def deletion_curve(
    model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, steps: int = STEPS, batch_size: int = 64
) -> np.ndarray:
    """Compute the probability of the class after removing 0, 1/steps, 2/steps, ..., all of the pixels.

    Args:
        model: in evaluation mode; returns logits.
        images: `(N, C, H, W)`, normalised so that 0 is the mean colour.
        maps: `(N, 1, H, W)`. The pixels with the largest values are removed first.
        target: `(N,)` class indices.
        steps: number of steps; a curve has one point more.
        batch_size: images in one forward pass.

    Returns:
        `(N, steps + 1)` probabilities.
    """
    return _curve(model, images, torch.zeros_like(images), maps, target, steps, batch_size)


@torch.no_grad()
def insertion_curve(
    model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, steps: int = STEPS, batch_size: int = 64
) -> np.ndarray:
    """Compute the probability of the class after revealing 0, 1/steps, ..., all of the pixels on a blurred copy.

    Arguments and result are as in `deletion_curve`.
    """
    return _curve(model, blurred(images), images, maps, target, steps, batch_size)


def area(curves: np.ndarray) -> np.ndarray:
    """Return the mean height `(N,)` of curves `(N, steps + 1)`, by the trapezoidal rule."""
    return (curves[:, 1:] + curves[:, :-1]).mean(axis=1) / 2


def _curve(
    model: nn.Module, start: Tensor, end: Tensor, maps: Tensor, target: Tensor, steps: int, batch_size: int
) -> np.ndarray:
    """Compute probabilities while the pixels of `start` are replaced by those of `end`, the most salient first."""
    n, _, height, width = start.shape
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    positions = torch.arange(height * width, device=maps.device).expand(n, -1)
    rank = torch.empty_like(order).scatter_(1, order, positions)
    rank = rank.view(n, 1, height, width)
    columns = []
    for step in range(steps + 1):
        mixed = torch.where(rank < round(step / steps * height * width), end, start)
        probabilities = torch.cat([model(batch).softmax(1) for batch in mixed.split(batch_size)])
        columns.append(probabilities.gather(1, target[:, None])[:, 0])
    return torch.stack(columns, dim=1).cpu().numpy()
