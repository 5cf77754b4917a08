"""What a run prints and records: lines on the terminal, its summary, TensorBoard events."""

import math
from pathlib import Path

from distributed import device_name
from recipes import RunConfig
from s3net_common.output_files import relative, run_record
from training.engine import NonFiniteError, Progress, Trainer
from training.run_folder import Run


def describe(run: Run, config: RunConfig, size: dict, trainer: Trainer, progress: Progress) -> str:
    """Return three lines that describe the run that is about to start."""
    # RandWire's graphs are left out: they would fill the screen.
    options = "".join(f" {key}={value}" for key, value in config.model_options.items() if not isinstance(value, list))
    ranks = trainer.ranks
    begins = f"resuming after epoch {progress.epoch}" if progress.epoch or progress.step else "starting"
    parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    if progress.step:
        begins += f" and {progress.step} batches"
    return (
        f"{config.model}{options}: {size['parameters']:,} parameters, "
        f"{size['multiply_adds'] / 1e6:,.1f}M multiply-adds an image\n"
        f"{config.dataset}: {config.train_images:,} training and {config.val_images:,} validation images, "
        f"{len(config.classes)} classes\n"
        f"{config.epochs} epochs, batch {config.batch_size}{parts}, lr {config.lr:g} {config.schedule}, "
        f"{ranks.world_size} process{'es' if ranks.world_size > 1 else ''} on {ranks.device.type}, "
        f"{trainer.precision.name}; {begins} in {relative(run.folder)}"
    )


def epoch_line(row: dict, epochs: int) -> str:
    """Return the metrics of an epoch as one line."""
    return (
        f"epoch {row['epoch']:3d}/{epochs}  lr {row['lr']:.4f}  train loss {row['train_loss']:.4f} "
        f"error {row['train_error']:5.2f}%  val loss {row['val_loss']:.4f} error {row['val_error']:5.2f}% "
        f"top-5 {row['val_top5_error']:5.2f}%  {row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
    )


def large_loss_note(row: dict, classes: int) -> list[str]:
    """Return a line if the validation loss is more than ten times ln(classes), a guess's, and the training loss less.

    While the learning rate rises, the weights change faster than BatchNorm's running statistics, which only evaluation
    uses. On digits the loss is small again if the same weights get statistics recomputed over the training images.
    """
    guessing = math.log(max(2, classes))
    if not (row["val_loss"] > 10 * guessing and row["train_loss"] < guessing):  # false for NaN
        return []
    return [
        "  the validation loss is large although the training loss is small: BatchNorm's running statistics lag behind "
        "the weights. This usually ends after a few epochs"
    ]


def diverged(error: NonFiniteError, run: Run, config: RunConfig) -> str:
    """Return the error message of a run whose loss or weights are not finite."""
    kept = run.folder / "last.pt"
    good = f"the last good checkpoint is {relative(kept)}" if kept.is_file() else "there was no checkpoint yet"
    return f"{error}; {good}. Try a lower --lr (it was {config.lr:g}), or --no-amp"


class TensorBoardLog:
    """Writes the metrics as TensorBoard events into `<run>/tensorboard`."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=progress.epoch + 1)

    def write(self, row: dict) -> None:
        """Add an epoch's metrics."""
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()


def summarize(config: RunConfig, size: dict[str, int], progress: Progress, trainer: Trainer) -> dict:
    """Return the content of `summary.json` for a finished run."""
    best, last = progress.best(), progress.history[-1]
    device = trainer.ranks.device
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
        **size,
        "total_seconds": sum(row["seconds"] for row in progress.history),
        "device": device_name(device),
        "processes": trainer.ranks.world_size,
        "precision": trainer.precision.name,
        **run_record(),
    }
