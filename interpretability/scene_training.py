"""Networks trained on digit scenes: the one of the segmentation table, and those of saliency_comparison.py."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit_scenes import DIGITS, MEAN, SIZE, STD, TRAINING, make_scenes, normalise
from s3net_common.checkpoints import save_weights
from s3net_common.progress import ProgressBar
from s3net_networks import create_network

NETWORK = "s3net_cifar"
EVALUATION_BATCH = 128
TEST_SEED, HELD_OUT_SEED = 1, 2  # of the scenes of test digits and of held-out training digits


@dataclass(frozen=True)
class Training:
    """Settings of one training on digit scenes. SGD with Nesterov momentum 0.9, weight decay 1e-4, one cycle.

    Attributes:
        network: name in `s3net_networks`.
        options: of `create_network`.
        epochs: passes over the training digits, in each of which every digit gets a new scene.
        batch_size: scenes in one step.
        peak_lr: peak of the one-cycle learning-rate schedule.
        seed: of the initial weights, the scenes and their order.
        held_out: the last N training digits are left out, for choosing settings.
        size: height and width of the scenes in pixels.
    """

    network: str = NETWORK
    options: dict[str, Any] = field(default_factory=lambda: {"growth_rate": 12, "depth": 13})
    epochs: int = 24
    batch_size: int = 64
    peak_lr: float = 0.1
    seed: int = 0
    held_out: int = 0
    size: int = SIZE

    @property
    def digits(self) -> int:
        """Number of digits that the network is trained on."""
        return TRAINING - self.held_out

    @property
    def steps(self) -> int:
        """Number of steps; the last digits of an epoch that fill no batch are left out."""
        return self.epochs * (self.digits // self.batch_size)


def digits_checkpoint(folder: Path, device: torch.device, training: Training | None = None) -> Path:
    """Return the file of a trained network's weights in `folder`; train it first, in about a minute, if missing.

    Without `training` this is the S3-Net (k=12, depth=13) of the segmentation table.
    """
    training = training or Training()
    path = folder / f"digits-{training.epochs}epochs.safetensors"
    if not path.is_file():
        with ProgressBar(total=training.steps, desc="training on digits", unit="step") as bar:
            model = train(training, device, bar.update)
        save_network(path, training, model, {"test_accuracy": round(accuracy_on_test_digits(model), 4)})
    return path


def save_network(path: Path, training: Training, model: nn.Module, results: dict[str, Any]) -> None:
    """Write weights with what is needed to build the network and to prepare its images, and further results."""
    metadata = {
        "model": training.network,
        "model_options": training.options,
        "num_classes": 10,
        "classes": [str(digit) for digit in range(10)],
        "mean": MEAN,
        "std": STD,
        "image_size": training.size,
        "training": asdict(training),
    }
    save_weights(path, model.state_dict(), metadata | results)


def train(
    training: Training,
    device: torch.device,
    after_step: Callable[[], object] = lambda: None,
    after_epoch: Callable[[nn.Module], object] = lambda model: None,
) -> nn.Module:
    """Train a network, in each epoch on new scenes, and return it in evaluation mode.

    Args:
        training: the settings.
        device: where to train.
        after_step: called after each step.
        after_epoch: called with the network, in evaluation mode, after each epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = create_network(training.network, 10, **training.options)
    model = model.to(device, memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.peak_lr, total_steps=training.steps)
    used = training.digits // training.batch_size * training.batch_size
    for epoch in range(training.epochs):
        model.train()
        scene_seed = 100 + epoch + 1000 * training.seed
        images, _, labels = make_scenes(np.arange(training.digits), scene_seed, training.size)
        x, y = normalise(images).to(device), torch.from_numpy(labels).to(device)
        order = torch.randperm(training.digits, generator=generator)
        for batch in order[:used].split(training.batch_size):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            after_step()
        after_epoch(model.eval())
    return model.eval()


def accuracy_on_test_digits(model: nn.Module, size: int = SIZE) -> float:
    """Return the accuracy in [0, 1] on the scenes of all test digits."""
    return accuracy(model, *_scenes(np.arange(TRAINING, DIGITS), TEST_SEED, size))


def accuracy_on_held_out_digits(model: nn.Module, count: int, size: int = SIZE) -> float:
    """Return the accuracy in [0, 1] on scenes of the last `count` training digits."""
    return accuracy(model, *_scenes(np.arange(TRAINING - count, TRAINING), HELD_OUT_SEED, size))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of normalised images `(N, 3, H, W)` whose predicted class is their label `(N,)`."""
    device = next(model.parameters()).device
    batches = zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
    correct = sum((model(x.to(device)).argmax(1).cpu() == y).sum().item() for x, y in batches)
    return correct / len(labels)


def _scenes(digits: np.ndarray, seed: int, size: int) -> tuple[Tensor, Tensor]:
    images, _, labels = make_scenes(digits, seed=seed, size=size)
    return normalise(images), torch.from_numpy(labels)
