"""Insertion and deletion (Petsiuk et al. 2018): does the network itself need the pixels that a map calls salient?

Deletion replaces the most salient pixels by the mean colour, step by step: the class's probability should fall fast.
Insertion reveals them on a blurred copy: it should rise fast. The score is the mean height of the curve, in [0, 1].
"""

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

STEPS = 20


def blurred(images: Tensor) -> Tensor:
    """Images without detail: a Gaussian of a tenth of their size, `(N, C, H, W)` to the same."""
    sigma = max(images.shape[-2:]) / 10
    reach = min(int(3 * sigma), (min(images.shape[-2:]) - 1) // 2)
    return gaussian_blur(images, [2 * reach + 1] * 2, [sigma] * 2)


@torch.no_grad()
def deletion_curve(
    model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, steps: int = STEPS, batch_size: int = 64
) -> np.ndarray:
    """Probability of the class after removing 0, 1/steps, ..., all of the pixels, the most salient first.

    Args:
        model: in evaluation mode; gives logits.
        images: `(N, C, H, W)`, normalised, so that 0 is the mean colour.
        maps: `(N, 1, H, W)`.
        target: `(N,)` classes.
        steps: points of the curve, less one.
        batch_size: images in one forward pass.

    Returns:
        `(N, steps + 1)`.
    """
    return _curve(model, images, torch.zeros_like(images), maps, target, steps, batch_size)


@torch.no_grad()
def insertion_curve(
    model: nn.Module, images: Tensor, maps: Tensor, target: Tensor, steps: int = STEPS, batch_size: int = 64
) -> np.ndarray:
    """Probability of the class after revealing 0, 1/steps, ..., all of the pixels; arguments as `deletion_curve`."""
    return _curve(model, blurred(images), images, maps, target, steps, batch_size)


def area(curves: np.ndarray) -> np.ndarray:
    """Mean height of each curve, by the trapezium rule: `(N, steps + 1)` to `(N,)`."""
    return (curves[:, 1:] + curves[:, :-1]).mean(axis=1) / 2


def _curve(
    model: nn.Module, start: Tensor, end: Tensor, maps: Tensor, target: Tensor, steps: int, batch_size: int
) -> np.ndarray:
    """From `start` to `end`, the most salient pixels first."""
    n, _, height, width = start.shape
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(height * width, device=maps.device).expand(n, -1)
    rank = torch.empty_like(order).scatter_(1, order, places)
    rank = rank.view(n, 1, height, width)
    columns = []
    for step in range(steps + 1):
        changed = torch.where(rank < round(step / steps * height * width), end, start)
        probabilities = torch.cat([model(part).softmax(1) for part in changed.split(batch_size)])
        columns.append(probabilities.gather(1, target[:, None])[:, 0])
    return torch.stack(columns, dim=1).cpu().numpy()
