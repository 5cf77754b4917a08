"""Scores of a saliency map `(H, W)`: against the true mask `(H, W)` of the object, and of its sharpness.

Also the maps that need no network, and intervals of mean scores.
"""

import numpy as np
from sklearn.metrics import average_precision_score

PERCENTILES = tuple(range(99, 79, -1))  # as in the paper
BOOTSTRAP_SAMPLES = 2000


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


def sharpness(saliency: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Return the Gini coefficient of a map `(H, W)` without negative values, and its mass on the object, in [0, 1]."""
    return {"gini": gini(saliency), "mass": float(saliency[mask].sum() / max(saliency.sum(), np.finfo(float).tiny))}


def gini(saliency: np.ndarray) -> float:
    """Return the Gini coefficient of values that are not negative: 0 if all are equal, near 1 if one has all."""
    ordered = np.sort(saliency, axis=None).astype(float)
    n, total = ordered.size, ordered.sum()
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total)) if total > 0 else 0.0


def autocorrelation(gradient: np.ndarray) -> float:
    """Return how much a gradient `(C, H, W)` at a pixel resembles that at the next pixel, in [-1, 1].

    It is the correlation of the values with those one pixel to the right and one pixel below: near 1 for a smooth
    gradient, near 0 for white noise (a "shattered" gradient, Balduzzi et al. 2017).
    """
    centred = gradient - gradient.mean(axis=(1, 2), keepdims=True)
    products = [(centred[:, :, 1:] * centred[:, :, :-1]).mean(), (centred[:, 1:] * centred[:, :-1]).mean()]
    return float(np.mean(products) / max((centred**2).mean(), np.finfo(float).tiny))


def bootstrap(values: np.ndarray, network: int = 0, samples: int = BOOTSTRAP_SAMPLES) -> np.ndarray:
    """Return means `(samples,)` of scores `(seeds, scenes)`, with seeds and scenes drawn with replacement.

    Args:
        values: a row for each training seed.
        network: number of the trained network. Calls for two networks draw the same scenes, so that their difference
            is paired by scene, but each draws its own seeds.
        samples: number of means.
    """
    seeds, scenes = values.shape
    scene_rng, seed_rng = np.random.default_rng(0), np.random.default_rng(1 + network)
    scene_weights = scene_rng.multinomial(scenes, np.full(scenes, 1 / scenes), size=samples) / scenes
    seed_weights = seed_rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=samples) / seeds
    return ((seed_weights @ values) * scene_weights).sum(axis=1)


def interval(means: np.ndarray) -> list[float]:
    """Return the 95% interval of bootstrapped means: the 2.5th and the 97.5th percentile."""
    return [float(bound) for bound in np.percentile(means, (2.5, 97.5))]


def random_map(size: int, seed: int) -> np.ndarray:
    """Return a baseline map `(size, size)` of random numbers in [0, 1)."""
    return np.random.default_rng(seed).random((size, size))


def mask_map(mask: np.ndarray, seed: int) -> np.ndarray:
    """Return a map `(H, W)` that ranks the pixels of the true mask first: the ceiling of all scores.

    The pixels on the object are in random order, and so are all others, as no map has equal values.
    """
    return mask + 0.5 * random_map(len(mask), seed)


def centred_gaussian(size: int) -> np.ndarray:
    """Return a baseline map `(size, size)` that ignores the image: standard deviation a quarter of the size."""
    offsets = (np.arange(size) - (size - 1) / 2) / (size / 4)
    profile = np.exp(-(offsets**2) / 2)
    return np.outer(profile, profile)


def edge_map(pixels: np.ndarray) -> np.ndarray:
    """Return a baseline map `(H, W)` that ignores the network: the brightness gradient's length at each pixel."""
    vertical, horizontal = np.gradient(pixels.astype(float) @ (0.299, 0.587, 0.114))
    return np.hypot(vertical, horizontal)
