"""Scores of a saliency map `(H, W)` against the true mask `(H, W)` of the object, and two baseline maps."""

import numpy as np
from sklearn.metrics import average_precision_score

PERCENTILES = tuple(range(99, 79, -1))  # as in the paper


def segment(saliency: np.ndarray, percentile: float) -> np.ndarray:
    """Return the pixels at or above a percentile (0 to 100) of the map, as booleans `(H, W)`."""
    return saliency >= np.percentile(saliency, percentile)


def dice(segmentation: np.ndarray, mask: np.ndarray) -> float:
    """Return the Dice coefficient 2 |S ∩ M| / (|S| + |M|), in [0, 1]."""
    return 2 * float((segmentation & mask).sum()) / float(segmentation.sum() + mask.sum())


def intersection_over_union(segmentation: np.ndarray, mask: np.ndarray) -> float:
    """Return |S ∩ M| / |S ∪ M|, in [0, 1]."""
    return float((segmentation & mask).sum()) / float((segmentation | mask).sum())


def score_map(saliency: np.ndarray, mask: np.ndarray, percentile: float = 90) -> dict:
    """Compute every score of a map.

    Returns:
        `dice`: the Dice coefficient at each of `PERCENTILES`. `dice_at` and `iou_at`: Dice and IoU at `percentile`.
        `pointing`: whether the map's largest pixel lies on the object (Zhang et al. 2016). `average_precision`: of
        the map as a classifier of pixels.
    """
    segmentation = segment(saliency, percentile)
    return {
        "dice": {p: dice(segment(saliency, p), mask) for p in PERCENTILES},
        "dice_at": dice(segmentation, mask),
        "iou_at": intersection_over_union(segmentation, mask),
        "pointing": bool(mask.flat[saliency.argmax()]),
        "average_precision": float(average_precision_score(mask.ravel(), saliency.ravel())),
    }


def centred_gaussian(size: int) -> np.ndarray:
    """Return a baseline map `(size, size)` that ignores the image: standard deviation a quarter of the size."""
    offsets = (np.arange(size) - (size - 1) / 2) / (size / 4)
    profile = np.exp(-(offsets**2) / 2)
    return np.outer(profile, profile)


def edge_map(pixels: np.ndarray) -> np.ndarray:
    """Return a baseline map `(H, W)` that ignores the network: the brightness gradient's length at each pixel."""
    vertical, horizontal = np.gradient(pixels.astype(float) @ (0.299, 0.587, 0.114))
    return np.hypot(vertical, horizontal)
