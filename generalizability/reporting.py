"""What a run tells people: lines on the terminal, its summary, TensorBoard events."""

import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from baselines import create_network
from engine import NonFiniteLossError, Trainer
from models import InputError
from runs import Progress, Run, RunConfig


def describe(run: Run, config: RunConfig, facts: dict, trainer: Trainer, progress: Progress) -> str:
    """A few lines on what is about to run."""
    # Numbers and names; RandWire's graphs would fill the screen.
    options = "".join(f" {key}={value}" for key, value in config.model_options.items() if not isinstance(value, list))
    workers = trainer.workers
    begins = f"resuming after epoch {progress.epoch}" if progress.epoch or progress.step else "starting"
    parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    if progress.step:
        begins += f" and {progress.step} batches"
    return (
        f"{config.model}{options}: {facts['parameters']:,} parameters, "
        f"{facts['multiply_adds'] / 1e6:,.1f}M multiply-adds an image\n"
        f"{config.dataset}: {config.train_images:,} training and {config.val_images:,} validation images, "
        f"{len(config.classes)} classes\n"
        f"{config.epochs} epochs, batch {config.batch_size}{parts}, lr {config.lr:g} {config.schedule}, "
        f"{workers.world_size} process{'es' if workers.world_size > 1 else ''} on {workers.device.type}, "
        f"{precision_name(trainer)}; {begins} in {relative(run.folder)}"
    )


def epoch_line(row: dict, epochs: int) -> str:
    """An epoch's metrics in one line."""
    return (
        f"epoch {row['epoch']:3d}/{epochs}  lr {row['lr']:.4f}  train loss {row['train_loss']:.4f} "
        f"error {row['train_error']:5.2f}%  val loss {row['val_loss']:.4f} error {row['val_error']:5.2f}% "
        f"top-5 {row['val_top5_error']:5.2f}%  {row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
    )


def diverged(error: NonFiniteLossError, run: Run, config: RunConfig) -> str:
    """What to say when the loss is not finite."""
    kept = run.folder / "last.pt"
    good = f"the last good checkpoint is {relative(kept)}" if kept.is_file() else "there was no checkpoint yet"
    return f"error: {error}; {good}. Try a lower --lr (it was {config.lr:g}), or --no-amp"


class TensorBoardLog:
    """The metrics as TensorBoard events, in `<run>/tensorboard`."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=progress.epoch + 1)

    def write(self, row: dict) -> None:
        """Add an epoch's metrics."""
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()


def network_facts(model: nn.Module, image_size: int, device: torch.device) -> dict[str, int]:
    """The network's parameters, and its multiply-adds for one image `(3, image_size, image_size)`.

    Raises:
        InputError: as `multiply_adds`.
    """
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "multiply_adds": multiply_adds(model, image_size, device)}


def multiply_adds(model: nn.Module, image_size: int, device: torch.device) -> int:
    """Multiply-adds of the convolutions and matrix products for one image, as it is evaluated.

    What works element by element (BatchNorm, activations, gates, sums) and pools or resizes is not counted, as is
    usual; a convolution's products with its zero padding are. The model is then in evaluation mode.

    Raises:
        InputError: the network cannot take images of that size.
    """
    counter = FlopCounterMode(display=False)
    model.eval()
    try:
        with counter, torch.no_grad():
            model(torch.zeros(1, 3, image_size, image_size, device=device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"this network cannot take images of {image_size}x{image_size} ({reason}): give it larger ones"
        ) from error
    return counter.get_total_flops() // 2


def facts_of(name: str, num_classes: int, options: dict, image_size: int) -> dict[str, int]:
    """`network_facts` of a network that `create_network` knows, without its memory or time.

    Raises:
        InputError: there is no such network, it lacks one of its options, or it cannot take images of that size.
    """
    meta = torch.device("meta")
    with meta:
        model = create_network(name, num_classes, **options)
    return network_facts(model, image_size, meta)


def summarize(config: RunConfig, facts: dict[str, int], progress: Progress, trainer: Trainer) -> dict:
    """What `summary.json` says of a finished run."""
    best, last = progress.best(), progress.history[-1]
    device = trainer.workers.device
    return {
        "dataset": config.dataset,
        "model": config.model,
        "model_options": config.model_options,
        "seed": config.seed,
        "epochs": config.epochs,
        "best_epoch": best["epoch"],
        "best_val_error": best["val_error"],
        "best_val_top5_error": best["val_top5_error"],
        "last_val_error": last["val_error"],
        "last_val_top5_error": last["val_top5_error"],
        **facts,
        "total_seconds": sum(row["seconds"] for row in progress.history),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": trainer.workers.world_size,
        "precision": precision_name(trainer),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "torchvision")}},
        "command": shlex.join(["python", *sys.argv]),
    }


def precision_name(trainer: Trainer) -> str:
    """The number format of the forward pass, as in "bfloat16"."""
    return str(trainer.precision.dtype).removeprefix("torch.")


def relative(path: Path) -> Path:
    """A path as the user would type it: relative where it lies below the working directory."""
    path = Path(path).resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
