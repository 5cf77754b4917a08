"""Images with true masks, and an S3-Net trained on them, without a download: handwritten digits beside clutter.

A scene has 36x36 pixels of coloured noise. On it are a digit from scikit-learn, at a random position in a random
colour, and clutter: the shuffled pixels of another digit. Brightness and edges therefore do not reveal where the digit
is. The strokes of the digit are the true mask.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pictures import Picture
from s3net_common.checkpoints import save_weights
from s3net_common.progress import ProgressBar
from s3net_networks import create_network

SIZE = 36
MEAN, STD = (0.3, 0.3, 0.3), (0.2, 0.2, 0.2)
NETWORK = "s3net_cifar"
OPTIONS = {"growth_rate": 12, "depth": 13}
DIGITS = 1797  # in scikit-learn's data
TRAINING = 1438  # the first digits are for training, the others for testing
EPOCHS, BATCH_SIZE, PEAK_LR = 24, 64, 0.1


def make_scenes(digits: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a scene of each digit; `digits` are indices `(N,)` into scikit-learn's data.

    Returns:
        Images `(N, 36, 36, 3)` uint8, masks `(N, 36, 36)` bool (True on the digit's strokes), labels `(N,)`.
    """
    rng = np.random.default_rng(seed)
    data = load_digits()
    n = len(digits)
    strokes = _enlarge(data.images[digits] / 16)
    clutter = _enlarge(rng.permuted(data.data[rng.integers(len(data.data), size=n)], axis=1).reshape(n, 8, 8) / 16)
    scenes = rng.uniform(0.1, 0.3, (n, 1, 1, 3)) + rng.normal(0, 0.06, (n, SIZE, SIZE, 3))
    positions = rng.integers(0, SIZE - strokes.shape[1] + 1, (n, 2))
    # Of eight random positions for the clutter, the one farthest from the digit: they rarely overlap.
    candidates = rng.integers(0, SIZE - strokes.shape[1] + 1, (n, 8, 2))
    farthest = np.abs(candidates - positions[:, None]).max(axis=2).argmax(axis=1)
    strokes, clutter = _place(strokes, positions), _place(clutter, candidates[np.arange(n), farthest])
    for layer in (clutter, strokes):
        colour = rng.uniform(0.5, 1.0, (n, 1, 1, 3))
        scenes += layer[..., None] * (colour - scenes)
    images = (scenes.clip(0, 1) * 255).round().astype(np.uint8)
    return images, strokes > 0.5, data.target[digits]


def scene_pictures(count: int) -> list[Picture]:
    """Return `count` scenes of test digits with their masks: the first of each class, then the second, and so on."""
    test = np.arange(TRAINING, DIGITS)
    labels = load_digits().target[test]
    rank_in_class = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)])
    chosen = test[np.lexsort((labels, rank_in_class))][:count]
    images, masks, labels = make_scenes(chosen, seed=1)
    return [
        Picture(f"digit{label}-{index}", image, mask)
        for index, label, image, mask in zip(chosen, labels, images, masks, strict=True)
    ]


def digits_checkpoint(folder: Path, device: torch.device, epochs: int = EPOCHS) -> Path:
    """Return the file of the trained network's weights in `folder`; train it first, in about a minute, if missing."""
    path = folder / f"digits-{epochs}epochs.safetensors"
    if not path.is_file():
        model, accuracy = train_digits_network(epochs, device)
        metadata = {
            "model": NETWORK,
            "model_options": OPTIONS,
            "num_classes": 10,
            "classes": [str(digit) for digit in range(10)],
            "mean": MEAN,
            "std": STD,
            "image_size": SIZE,
            "test_accuracy": round(accuracy, 4),
        }
        save_weights(path, model.state_dict(), metadata)
    return path


def train_digits_network(epochs: int, device: torch.device) -> tuple[nn.Module, float]:
    """Train S3-Net (k=12, depth=13), in each epoch on new scenes.

    Returns:
        The network, in evaluation mode, and its accuracy in [0, 1] on scenes of the test digits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_network(NETWORK, 10, **OPTIONS).to(device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=1e-4, nesterov=True)
    steps = epochs * (TRAINING // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    with ProgressBar(total=steps, desc="training on digits", unit="step") as bar:
        for epoch in range(epochs):
            images, _, labels = make_scenes(np.arange(TRAINING), seed=100 + epoch)
            x, y = normalise(images).to(device), torch.from_numpy(labels).to(device)
            order = torch.randperm(TRAINING, generator=generator)
            for batch in order[: TRAINING // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
                loss = F.cross_entropy(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    images, _, labels = make_scenes(np.arange(TRAINING, DIGITS), seed=1)
    model.eval()
    with torch.no_grad():
        predicted = model(normalise(images).to(device)).argmax(1).cpu().numpy()
    return model, float((predicted == labels).mean())


def normalise(images: np.ndarray) -> Tensor:
    """Convert scenes `(N, 36, 36, 3)` uint8 to the network's input `(N, 3, 36, 36)`."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _enlarge(digits: np.ndarray) -> np.ndarray:
    """Resize `(N, 8, 8)` to `(N, 16, 16)` by bilinear interpolation."""
    enlarged = F.interpolate(torch.from_numpy(digits)[:, None], size=(16, 16), mode="bilinear", align_corners=False)
    return enlarged[:, 0].numpy()


def _place(patches: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Put each patch `(size, size)` on an empty scene, with its top left corner at its position."""
    size = patches.shape[1]
    canvases = np.zeros((len(patches), SIZE, SIZE))
    for canvas, patch, (top, left) in zip(canvases, patches, positions, strict=True):
        canvas[top : top + size, left : left + size] = patch
    return canvases
