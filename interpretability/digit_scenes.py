"""A network and images that need no download: handwritten digits among clutter, and an S3-Net trained on them.

A scene is 36x36: one digit of scikit-learn's, at a random place in a random colour, beside the shuffled pixels of
another digit, on coloured noise. So brightness and edges alone don't tell where the digit is, and its strokes are a
true mask.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

from models import S3Net, create_model
from pictures import Picture
from s3net_common.checkpoints import save_weights

SIZE = 36
MEAN, STD = (0.3, 0.3, 0.3), (0.2, 0.2, 0.2)
NETWORK = "s3net_cifar"
OPTIONS = {"growth_rate": 12, "depth": 13}
TRAINING = 1438  # of the 1797 digits; the others are for testing
EPOCHS, BATCH, PEAK_LR = 24, 64, 0.1


def make_scenes(digits: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scenes of the digits with these indices in scikit-learn's data.

    Returns:
        Images `(N, 36, 36, 3)` uint8, masks `(N, 36, 36)` bool (the digit's strokes), labels `(N,)`.
    """
    rng = np.random.default_rng(seed)
    data = load_digits()
    n = len(digits)
    strokes = _enlarged(data.images[digits] / 16)
    clutter = _enlarged(rng.permuted(data.data[rng.integers(len(data.data), size=n)], axis=1).reshape(n, 8, 8) / 16)
    scenes = rng.uniform(0.1, 0.3, (n, 1, 1, 3)) + rng.normal(0, 0.06, (n, SIZE, SIZE, 3))
    places = rng.integers(0, SIZE - strokes.shape[1] + 1, (n, 2))
    others = rng.integers(0, SIZE - strokes.shape[1] + 1, (n, 8, 2))
    farthest = np.abs(others - places[:, None]).max(axis=2).argmax(axis=1)  # so that clutter rarely hides under it
    strokes, clutter = _placed(strokes, places), _placed(clutter, others[np.arange(n), farthest])
    for layer in (clutter, strokes):
        colour = rng.uniform(0.5, 1.0, (n, 1, 1, 3))
        scenes += layer[..., None] * (colour - scenes)
    images = (scenes.clip(0, 1) * 255).round().astype(np.uint8)
    return images, strokes > 0.5, data.target[digits]


def scene_pictures(count: int) -> list[Picture]:
    """Scenes of test digits with their masks: the first `count` of them, one of each class in turn."""
    test = np.arange(TRAINING, 1797)
    labels = load_digits().target[test]
    rank = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)])
    chosen = test[np.lexsort((labels, rank))][:count]
    images, masks, labels = make_scenes(chosen, seed=1)
    return [
        Picture(f"digit{label}-{index}", image, mask)
        for index, label, image, mask in zip(chosen, labels, images, masks, strict=True)
    ]


def digits_checkpoint(folder: Path, device: torch.device, epochs: int = EPOCHS) -> Path:
    """The trained network's weights in the folder; trained now, in about a minute, where they are not there yet."""
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


def train_digits_network(epochs: int, device: torch.device) -> tuple[S3Net, float]:
    """S3-Net k=12, depth=13 trained on fresh scenes in every epoch; and its accuracy on scenes of test digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(NETWORK, 10, **OPTIONS).to(device, memory_format=torch.channels_last)
        shuffled = torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=1e-4, nesterov=True)
        steps = epochs * (TRAINING // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
        with tqdm(total=steps, desc="training on digits", unit="step", disable=None) as bar:
            for epoch in range(epochs):
                images, _, labels = make_scenes(np.arange(TRAINING), seed=100 + epoch)
                x, y = normalise(images).to(device), torch.from_numpy(labels).to(device)
                order = torch.randperm(TRAINING, generator=shuffled)
                for batch in order[: TRAINING // BATCH * BATCH].split(BATCH):
                    loss = F.cross_entropy(model(x[batch]), y[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
    images, _, labels = make_scenes(np.arange(TRAINING, 1797), seed=1)
    model.eval()
    with torch.no_grad():
        predicted = model(normalise(images).to(device)).argmax(1).cpu().numpy()
    return model, float((predicted == labels).mean())


def normalise(images: np.ndarray) -> Tensor:
    """`(N, 36, 36, 3)` uint8 to `(N, 3, 36, 36)` as the network reads it."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _enlarged(digits: np.ndarray) -> np.ndarray:
    """`(N, 8, 8)` to `(N, 16, 16)`, smoothly."""
    enlarged = F.interpolate(torch.from_numpy(digits)[:, None], size=(16, 16), mode="bilinear", align_corners=False)
    return enlarged[:, 0].numpy()


def _placed(patches: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Each `(size, size)` patch on an empty canvas, with its top left corner at its place `(N, 2)`."""
    size = patches.shape[1]
    canvases = np.zeros((len(patches), SIZE, SIZE))
    for canvas, patch, (top, left) in zip(canvases, patches, places, strict=True):
        canvas[top : top + size, left : left + size] = patch
    return canvases
