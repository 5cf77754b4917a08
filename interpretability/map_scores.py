"""How well a saliency map finds the object: map `(H, W)` against mask `(H, W)`, True on the object."""

import numpy as np
from sklearn.metrics import average_precision_score

PERCENTILES = tuple(range(99, 79, -1))  # as in the paper


def segment(saliency: np.ndarray, percentile: float) -> np.ndarray:
    """The pixels at or above the map's percentile (in 0 to 100), as booleans."""
    return saliency >= np.percentile(saliency, percentile)


def dice(segmentation: np.ndarray, mask: np.ndarray) -> float:
    """2 |S n M| / (|S| + |M|), in [0, 1]."""
    return 2 * float((segmentation & mask).sum()) / float(segmentation.sum() + mask.sum())


def intersection_over_union(segmentation: np.ndarray, mask: np.ndarray) -> float:
    """|S n M| / |S u M|, in [0, 1]."""
    return float((segmentation & mask).sum()) / float((segmentation | mask).sum())


def score_map(saliency: np.ndarray, mask: np.ndarray, percentile: float = 90) -> dict:
    """Every score of one map.

    Returns:
        `dice` by percentile; `dice_at` and `iou_at` the given percentile; `pointing`, whether the map's largest pixel
        lies on the object (Zhang et al. 2016); `average_precision` of the map as a classifier of pixels.
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
    """A baseline that never looks at the image: `(size, size)`, standard deviation a quarter of the size."""
    offsets = (np.arange(size) - (size - 1) / 2) / (size / 4)
    profile = np.exp(-(offsets**2) / 2)
    return np.outer(profile, profile)


def edge_map(pixels: np.ndarray) -> np.ndarray:
    """A baseline that never looks at the network: the size of the brightness gradient of `(H, W, 3)` pixels."""
    down, right = np.gradient(pixels.astype(float) @ (0.299, 0.587, 0.114))
    return np.hypot(down, right)
