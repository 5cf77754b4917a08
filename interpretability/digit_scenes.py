"""Images with true masks, without a download: handwritten digits beside clutter.

A scene has 36x36 pixels (or another size) of coloured noise. On it are a digit from scikit-learn, at a random position
in a random colour, and clutter: the shuffled pixels of another digit. Brightness and edges therefore do not reveal
where the digit is. The strokes of the digit are the true mask.
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from network_flags import DIGITS, SIZE, TEST, TRAINING  # noqa: F401
from pictures import Picture

MEAN, STD = (0.3, 0.3, 0.3), (0.2, 0.2, 0.2)


def make_scenes(digits: np.ndarray, seed: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a scene of each digit.

    Args:
        digits: indices `(N,)` into scikit-learn's data.
        seed: of positions, colours, noise and clutter.
        size: height and width of a scene in pixels, 18 or more; those of a digit are 4/9 of it.

    Returns:
        Images `(N, size, size, 3)` uint8, masks `(N, size, size)` bool (True on the digit's strokes), labels `(N,)`.
    """
    rng = np.random.default_rng(seed)
    data = load_digits()
    n = len(digits)
    side = size * 4 // 9
    strokes = _enlarge(data.images[digits] / 16, side)
    others = rng.permuted(data.data[rng.integers(len(data.data), size=n)], axis=1)
    clutter = _enlarge(others.reshape(n, 8, 8) / 16, side)
    scenes = rng.uniform(0.1, 0.3, (n, 1, 1, 3)) + rng.normal(0, 0.06, (n, size, size, 3))
    positions = rng.integers(0, size - side + 1, (n, 2))
    # Of eight random positions for the clutter, the one farthest from the digit: they rarely overlap.
    candidates = rng.integers(0, size - side + 1, (n, 8, 2))
    farthest = np.abs(candidates - positions[:, None]).max(axis=2).argmax(axis=1)
    strokes, clutter = _place(strokes, positions, size), _place(clutter, candidates[np.arange(n), farthest], size)
    for layer in (clutter, strokes):
        colour = rng.uniform(0.5, 1.0, (n, 1, 1, 3))
        scenes += layer[..., None] * (colour - scenes)
    images = (scenes.clip(0, 1) * 255).round().astype(np.uint8)
    return images, strokes > 0.5, data.target[digits]


def scene_pictures(count: int, size: int = SIZE) -> list[Picture]:
    """Return `count` scenes of test digits with their masks: the first of each class, then the second, and so on."""
    test = np.arange(TRAINING, DIGITS)
    labels = load_digits().target[test]
    rank_in_class = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)])
    chosen = test[np.lexsort((labels, rank_in_class))][:count]
    images, masks, labels = make_scenes(chosen, seed=1, size=size)
    return [
        Picture(f"digit{label}-{index}", image, mask, label=int(label))
        for index, label, image, mask in zip(chosen, labels, images, masks, strict=True)
    ]


def normalise(images: np.ndarray) -> Tensor:
    """Convert scenes `(N, size, size, 3)` uint8 to the network's input `(N, 3, size, size)`."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _enlarge(digits: np.ndarray, side: int) -> np.ndarray:
    """Resize `(N, 8, 8)` to `(N, side, side)` by bilinear interpolation."""
    enlarged = F.interpolate(torch.from_numpy(digits)[:, None], size=(side, side), mode="bilinear", align_corners=False)
    return enlarged[:, 0].numpy()


def _place(patches: np.ndarray, positions: np.ndarray, size: int) -> np.ndarray:
    """Put each patch `(side, side)` on an empty scene, with its top left corner at its position."""
    side = patches.shape[1]
    canvases = np.zeros((len(patches), size, size))
    for canvas, patch, (top, left) in zip(canvases, patches, positions, strict=True):
        canvas[top : top + side, left : left + side] = patch
    return canvases
