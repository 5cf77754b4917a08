"""A run's folder: its configuration, its checkpoint, and what is made from them.

`last.pt` is the run: whatever else is there follows from it (`metrics.jsonl`, `curves.png`, and `best.safetensors` at
the epoch that is the best so far) and is written after it, each file whole or not at all. So a run can be killed at
any moment; opening it again brings the other files in line with `last.pt`.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from curves import draw_curves
from models import InputError, read_pickle

try:
    import fcntl
except ImportError:  # Windows, where two processes in one folder are not noticed
    fcntl = None

CHECKPOINT_FORMAT = 1
LOCK_SECONDS = 10.0  # the decoding processes of one that was killed hold its lock until they notice, up to 5 s later
VALIDATION = ("val_loss", "val_error", "val_top5_error")
METRICS = ("epoch", "lr", "train_loss", "train_error", *VALIDATION, "images_per_second", "seconds")


@dataclass
class RunConfig:
    """Everything that decides what a run computes; it is saved as `config.json` and cannot change on resuming.

    Attributes are those of `recipes.Recipe` and the command line's flags of the same names, with every default
    filled in. `train_images`, `val_images` and `classes` describe the data that the run was started on.
    """

    dataset: str
    model: str
    model_options: dict
    num_classes: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    milestones: list[float]
    mean: list[float]
    std: list[float]
    flip: bool
    crop_padding: float
    image_size: int
    seed: int
    amp: bool
    limit_train: int | None
    limit_val: int | None
    train_images: int
    val_images: int
    classes: list[str]
    hold_out: int | None = None
    accumulate: int = 1


@dataclass
class Progress:
    """How far a run is: the finished epochs' metrics, and what the epoch under way has added up so far.

    Attributes:
        epoch: finished epochs.
        history: the metrics of each of them, as `metrics.jsonl` has them (null there is NaN or infinite here).
        step: steps done in the epoch under way; the following are sums over these.
        losses: this process's summed cross-entropy, a number a step.
        errors: this process's wrongly classified images.
        images: images of all processes.
        seconds: time spent training on them.
        lr: learning rate at the epoch's first step.
    """

    epoch: int = 0
    history: list[dict] = field(default_factory=list)
    step: int = 0
    losses: list[float] = field(default_factory=list)
    errors: int = 0
    images: int = 0
    seconds: float = 0.0
    lr: float = 0.0

    def describe_epoch(self, world_size: int) -> str:
        """The epoch so far, for a progress bar: this process's loss and error, and the images/s of all."""
        images = max(1, self.images // world_size)
        return (
            f"loss {sum(self.losses) / images:.3f}, error {100 * self.errors / images:.1f}%, "
            f"{self.images / max(self.seconds, 1e-9):.0f} images/s"
        )

    def end_epoch(self, training: dict[str, float], validation: dict[str, float], seconds: float) -> None:
        """Add the epoch's line to the history and begin the next epoch. `seconds` went by in the evaluation."""
        self.epoch += 1
        metrics = training | validation | {"epoch": self.epoch, "lr": self.lr, "seconds": self.seconds + seconds}
        self.history.append({name: metrics[name] for name in METRICS})
        self.step, self.losses, self.errors, self.images, self.seconds = 0, [], 0, 0, 0.0

    def best(self) -> dict:
        """The metrics of the epoch with the lowest validation error, the first of several."""
        return min(self.history, key=lambda row: row["val_error"])


class Run:
    """The folder of one run. Only the main process may write through it."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._lock: int | None = None  # a file descriptor

    # -- Opening --

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return (self.folder / "config.json").is_file() or (self.folder / "last.pt").is_file()

    def check_writable(self) -> None:
        """Raises InputError where the folder could not be created or written; creates nothing yet."""
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            reason = "is not writable" if there.is_dir() else "is not a folder"
            raise InputError(f"{self.folder} cannot be written, since {there} {reason}: pass another --out")

    def hold(self) -> None:
        """Keep other processes from training into the folder until `release`, or until this process is gone.

        Raises:
            InputError: another process trains into it.
        """
        if fcntl is None:
            return
        self._lock = os.open(self.folder, os.O_RDONLY)
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > give_up:
                    self.release()
                    raise InputError(
                        f"another process trains into {self.folder}: wait until it has ended, or pass another --out"
                    ) from error
                time.sleep(0.1)
            except OSError:  # a file system without locks
                return

    def release(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def create(self, config: RunConfig) -> None:
        """Make the folder, hold it, and write the configuration. A run that was in it is removed.

        Raises:
            InputError: the folder cannot be written, or another process trains into it.
        """
        make_folder(self.folder)
        self.hold()
        try:
            for name in (
                "last.pt",
                "best.safetensors",
                "metrics.jsonl",
                "curves.png",
                "summary.json",
                "config.json",
            ):
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written ({error.strerror}): pass another --out") from error
        self._write_json("config.json", asdict(config))

    def read_config(self) -> RunConfig:
        """The configuration that the run was started with.

        Raises:
            InputError: `config.json` is missing or damaged.
        """
        path = self.folder / "config.json"
        try:
            values = json.loads(path.read_text())
            known = {field.name for field in fields(RunConfig)}
            return RunConfig(**{name: value for name, value in values.items() if name in known})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is missing or damaged: start a new run with another --out") from error

    def read_checkpoint(self) -> dict | None:
        """What `save` last wrote, or None where the run was ended before its first checkpoint.

        Raises:
            InputError: `last.pt` is damaged or of another version.
        """
        path = self.folder / "last.pt"
        if not path.is_file():
            return None
        state = read_pickle(path)
        if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
            raise InputError(f"{path} is no checkpoint of this version of the trainer: start a new run")
        return state

    # -- Writing --

    def save(self, state: dict) -> None:
        """Write the checkpoint, then everything that follows from it.

        Args:
            state: `config`, `progress` (both as dicts), `model`, and what else the trainer needs to resume.
        """
        state = {"format": CHECKPOINT_FORMAT, **state}
        self._write("last.pt", lambda path: torch.save(state, path))
        self.publish(state)

    def publish(self, state: dict) -> None:
        """Bring `best.safetensors`, `curves.png` and `metrics.jsonl` in line with a checkpoint."""
        progress = Progress(**state["progress"])
        lines = "".join(json_line(row) + "\n" for row in progress.history)
        if not lines or self._read("metrics.jsonl") == lines:
            return
        if progress.step == 0 and progress.best()["epoch"] == progress.epoch:
            self._save_best(state["config"], state["model"], progress.history[-1])
        self._write("curves.png", lambda path: draw_curves(progress.history, path, title=self.folder.name))
        self._write("metrics.jsonl", lambda path: path.write_text(lines))  # the last: it says that all is in line

    def finish(self, summary: dict) -> None:
        """Write `summary.json`."""
        self._write_json("summary.json", summary)

    def _save_best(self, config: dict, weights: dict[str, Tensor], metrics: dict) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        metadata = {
            "format": "pt",
            "model": config["model"],
            "options": json.dumps(config["model_options"]),
            "num_classes": str(config["num_classes"]),
            "classes": json.dumps(config["classes"]),
            "mean": json.dumps(config["mean"]),
            "std": json.dumps(config["std"]),
            "image_size": str(config["image_size"]),
            "dataset": config["dataset"],
            "epoch": str(metrics["epoch"]),
            "val_error": str(metrics["val_error"]),
        }
        self._write("best.safetensors", lambda path: path.write_bytes(save(tensors, metadata)))

    def _read(self, name: str) -> str | None:
        path = self.folder / name
        return path.read_text() if path.is_file() else None

    def _write_json(self, name: str, content: dict) -> None:
        self._write(name, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        write_atomically(self.folder / name, write)


def json_line(metrics: dict) -> str:
    """Metrics as JSON, which has no infinity and no NaN: null takes their place."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return json.dumps(finite, allow_nan=False)


def make_folder(folder: Path) -> None:
    """Create a folder, and its parents, and make sure that files can be written there.

    Raises:
        InputError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): pass another --out") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, and move the result there once it is on the disk.

    Raises:
        InputError: it cannot be written (permissions, a full disk); what was at `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{path} cannot be written ({reason}): make room, or pass another --out") from error
    finally:
        temporary.unlink(missing_ok=True)  # also after Ctrl-C
