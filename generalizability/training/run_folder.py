"""The folder of a run: its configuration, its checkpoint, and the files that follow from the checkpoint.

`last.pt` holds everything that resuming needs. `metrics.jsonl`, `curves.png` and, after the best epoch so far,
`best.safetensors` follow from it and are written after it, each atomically. A run can therefore be killed at any
moment: resuming it updates the other files from `last.pt`. This module alone knows the keys of `last.pt`.
"""

import contextlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from comparison.runs import read_json
from recipes import RunConfig
from s3net_common.checkpoints import RUN_CONFIG, RUN_WEIGHTS, save_weights
from s3net_common.errors import InputError, LocalError
from s3net_common.log_ticks import plain_ticks
from s3net_common.output_files import (
    json_line,
    lock_exclusively,
    make_folder,
    relative,
    supports_locks,
    write_atomically,
    write_json,
)
from s3net_common.process_group import place
from s3net_common.weight_files import read_pickle
from training.config import config_from_json
from training.engine import AVERAGE, Progress, Trainer
from training.state_check import check_state

CHECKPOINT_FORMAT = 1
RUN_FILES = ("last.pt", "best.safetensors", "metrics.jsonl", "curves.png", "summary.json", "config.json")
STOPPED, FAILED = "stopped", "failed.json"  # how the last process ended, for batch scripts and restarts by torchrun
AVERAGED = "module."  # prefix of the averaged weights in AveragedModel's state
ENVIRONMENT = "environment"  # in config.json: flags that are no part of the recipe
LOCK_FILE = ".lock"
LOCK_SECONDS = 10.0  # DataLoader workers of a killed run hold its lock until they notice, up to 5 s later


class RunInUseError(InputError):
    """Another process trains into the folder of the run."""


class Run:
    """The folder of one run. Only the main rank may call the methods that write."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._lock: int | None = None  # a file descriptor

    # -- Opening --

    def files(self) -> list[str]:
        """Return the names of the files in the folder that a new run would replace."""
        return [name for name in RUN_FILES if (self.folder / name).exists()]

    def check_resumable(self) -> None:
        """Check that the folder holds a run with a checkpoint, or one that ended before its first epoch.

        Raises:
            InputError: it holds other files, or results without a checkpoint.
        """
        files = self.files()
        if "last.pt" not in files and files != ["config.json"]:
            raise InputError(
                f"{relative(self.folder)} holds {', '.join(files)} but no last.pt, without which no run can be "
                "resumed: put last.pt back, pass another --out for a new run, or --overwrite to replace these files"
            )

    def environment(self) -> dict:
        """Return the flags of the run that are no part of its recipe, as far as `config.json` has them."""
        environment = self._config_values().get(ENVIRONMENT)
        return environment if isinstance(environment, dict) else {}

    def is_run(self) -> bool:
        """Whether the folder holds a run, not files of something else with the same names."""
        return (self.folder / "last.pt").exists() or "model_options" in self._config_values()

    def _config_values(self) -> dict:
        try:
            values = json.loads((self.folder / "config.json").read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}

    def has_checkpoint(self) -> bool:
        """Whether the run saved a checkpoint."""
        return (self.folder / "last.pt").is_file()

    def check_writable(self) -> None:
        """Check that the folder can be created or written, without creating it.

        Raises:
            InputError: it cannot be written.
        """
        parent = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            reason = "is not writable" if parent.is_dir() else "is not a folder"
            raise InputError(f"{self.folder} cannot be written, since {parent} {reason}: pass another --out")

    def hold(self) -> None:
        """Lock the folder for exclusive writing until `release` or the end of this process.

        On Windows and NFS, which lock files but no folders, the file `.lock` in it is locked. A line says if there are
        no locks.

        Raises:
            RunInUseError: another process trains into it.
        """
        if os.name != "posix":  # Windows cannot open a folder
            self._lock = self._open_lock_file()
        else:
            self._lock = os.open(self.folder, os.O_RDONLY)
            if not supports_locks(self._lock):
                os.close(self._lock)
                self._lock = self._open_lock_file()
            if not supports_locks(self._lock):
                print(f"the file system of {relative(self.folder)} has no locks: start no second run in this folder")
        if not lock_exclusively(self._lock, LOCK_SECONDS):
            self.release()
            raise RunInUseError(
                f"another process trains into {self.folder}: wait until it has ended, or pass another --out"
            )

    def _open_lock_file(self) -> int:
        return os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def create(self, config: RunConfig, environment: dict) -> None:
        """Create and lock the folder, remove an earlier run from it, and write the configuration.

        `environment`: flags that are no part of the recipe, for resuming.

        Raises:
            InputError: the folder cannot be written, or another process trains into it.
        """
        make_folder(self.folder)
        self.hold()
        self._remove(*RUN_FILES, STOPPED, FAILED)
        write_json(self.folder / "config.json", asdict(config) | {ENVIRONMENT: environment})

    def resume(self, config: RunConfig, environment: dict) -> None:
        """Lock the folder of the run to be resumed, and keep its flags. For the arguments see `create`.

        Raises:
            InputError: another process trains into the folder, or it cannot be written.
        """
        self.hold()
        self._remove(STOPPED, FAILED)
        if environment != self.environment():
            write_json(self.folder / "config.json", asdict(config) | {ENVIRONMENT: environment})

    def _remove(self, *names: str) -> None:
        try:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written ({error.strerror}): pass another --out") from error

    def read_config(self) -> RunConfig:
        """Return the configuration that the run was started with.

        Raises:
            InputError: `config.json` is missing or damaged.
        """
        path = self.folder / "config.json"
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} is missing or damaged: start a new run with another --out") from error
        return config_from_json(values, path)

    def read_checkpoint(self) -> dict | None:
        """Return the content of `last.pt`, or None if the run ended before its first checkpoint.

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
        """Write the checkpoint, then the files that follow from it.

        Args:
            state: configuration and progress (as dicts), weights, and the trainer's states.
        """
        state = {"format": CHECKPOINT_FORMAT, **state}
        self._write("last.pt", lambda path: save_file(state, path))
        self.publish(state)

    def publish(self, state: dict) -> None:
        """Update `best.safetensors`, `curves.png` and `metrics.jsonl` from a checkpoint."""
        progress = Progress(**state["progress"])
        lines = "".join(json_line(row) + "\n" for row in progress.history)
        written = self.folder / "metrics.jsonl"
        if not lines or (written.is_file() and written.read_bytes() == lines.encode()):
            return
        if progress.step == 0 and progress.best()["epoch"] == progress.epoch:
            self._save_best(state[RUN_CONFIG], evaluated_weights(state), progress.history[-1])
        self._write("curves.png", lambda path: draw_curves(progress.history, path, title=self.folder.name))
        self._write(
            "metrics.jsonl", lambda path: path.write_text(lines)
        )  # written last: it shows that all files are up to date

    def summary(self) -> dict:
        """Return the content of `summary.json`, or {} before the run has ended.

        Raises:
            InputError: it is damaged.
        """
        path = self.folder / "summary.json"
        return read_json(path) if path.is_file() else {}

    def finish(self, summary: dict) -> None:
        """Write `summary.json`."""
        write_json(self.folder / "summary.json", summary)

    # -- How the last process ended --

    def record_stop(self, command: str) -> None:
        """Write the file `stopped` with the command that resumes the run.

        The exit code of torchrun does not tell a stop from a failure; a batch script looks for this file.
        """
        self._write(STOPPED, lambda path: path.write_text(f"{command}\n"))

    def record_failure(self, error: InputError | str) -> None:
        """Write `failed.json` if torchrun would restart the ranks, which would only fail again.

        A run that another process trains is not touched: waiting for it may help.
        """
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        is_reporter = os.environ.get("RANK", "0") == "0" or isinstance(error, LocalError)
        in_use = isinstance(error, BaseException) and isinstance(error.__cause__, RunInUseError)
        if restarts and is_reporter and not in_use:
            with contextlib.suppress(InputError):  # a full disk may be the failure
                write_json(self.folder / FAILED, {"error": str(error), "from": place()})

    def exit_code_of_failed(self) -> int | None:
        """Return the exit code of ranks that torchrun has restarted for nothing, or None if training can continue."""
        if (self.folder / STOPPED).exists():
            return 128 + signal.SIGTERM
        return 2 if (self.folder / FAILED).exists() else None

    def _save_best(self, config: dict, weights: dict[str, Tensor], metrics: dict) -> None:
        metadata = weights_metadata(RunConfig(**config))
        metadata |= {name: metrics[name] for name in ("epoch", "val_error")}
        save_weights(self.folder / "best.safetensors", weights, metadata)

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        write_atomically(self.folder / name, write)


def weights_metadata(config: RunConfig) -> dict:
    """Return what a file of a run's weights says about its network, its classes and the preparation of its images."""
    names = ("model", "model_options", "num_classes", "classes", "mean", "std", "image_size", "dataset")
    return {name: getattr(config, name) for name in names}


def save_file(state: dict, path: Path) -> None:
    """Write a checkpoint. torch.save gets an open file: if it opens one, the system's error is lost (a full disk)."""
    with path.open("wb") as file:
        torch.save(state, file)


def evaluated_weights(state: dict) -> dict[str, Tensor]:
    """Return the weights that the last validation used: the average once it has begun, else those of the training."""
    average = state.get(AVERAGE)
    if not average or not average["n_averaged"]:
        return state[RUN_WEIGHTS]
    return {name.removeprefix(AVERAGED): weight for name, weight in average.items() if name.startswith(AVERAGED)}


def load_progress(run: Run, config: RunConfig, model: nn.Module, trainer: Trainer, steps: int) -> Progress:
    """Restore model, trainer, random state and progress from the checkpoint. Return new progress if it has none.

    `steps` is the number of steps per epoch.

    Raises:
        InputError: the checkpoint is damaged, or of another run.
    """
    ranks = trainer.ranks
    state = ranks.on_all_ranks(run.read_checkpoint)  # sending it would take several times its memory
    path = run.folder / "last.pt"
    _check_same(ranks.gather(state is None), path)
    if state is None:
        return Progress()
    ranks.on_all_ranks(lambda: check_state(state, path, config, model, trainer, steps))
    progress = ranks.on_all_ranks(lambda: _restore(state, path, model, trainer))
    _check_same(ranks.gather((progress.epoch, progress.step)), path)
    processes = len(state["processes"])
    if ranks.is_main and processes != ranks.world_size:
        print(f"the run had {processes} processes, not {ranks.world_size}: not exactly the same")
    ranks.on_main_rank(lambda: run.publish(state))
    return progress


def _check_same(values: list, path: Path) -> None:
    if len(set(values)) > 1:
        raise InputError(f"the ranks read different versions of {path}: all nodes must see one folder; try again")


def _restore(state: dict, path: Path, model: nn.Module, trainer: Trainer) -> Progress:
    ranks, processes = trainer.ranks, state["processes"]
    progress = Progress(**state["progress"])
    try:
        model.load_state_dict(state[RUN_WEIGHTS])
        trainer.load_state(state)
        if len(processes) == ranks.world_size:
            per_rank = processes[ranks.rank]
            set_random_state(per_rank["random"], ranks.device)
            model.load_state_dict(per_rank["buffers"], strict=False)
            if trainer.average is not None:
                trainer.average.load_state_dict(per_rank["average_buffers"], strict=False)
            progress.losses, progress.errors = per_rank["losses"], per_rank["errors"]
        elif ranks.is_main:
            progress.losses = [loss for process in processes for loss in process["losses"]]
            progress.errors = sum(process["errors"] for process in processes)
        else:
            progress.losses, progress.errors = [], 0
    except Exception as error:  # PyTorch raises many kinds for content that it cannot restore
        raise InputError(f"{path} does not fit this run: start a new one with another --out") from error
    return progress


def save_progress(run: Run, config: RunConfig, model: nn.Module, trainer: Trainer, progress: Progress) -> None:
    """Collect the state of all ranks and write the checkpoint and its files on the main rank.

    Raises:
        NonFiniteError: a weight is infinite or NaN. The last checkpoint is unchanged.
    """
    ranks = trainer.ranks
    trainer.check_weights(trainer.scheduler.last_epoch)
    in_mid_epoch = ranks.world_size > 1 and progress.step > 0  # else all ranks have the same buffers
    modules = {"buffers": model} | ({} if trainer.average is None else {"average_buffers": trainer.average})
    per_rank = {"random": random_state(ranks.device)}
    for key, module in modules.items():
        per_rank[key] = {name: b.cpu() for name, b in module.named_buffers()} if in_mid_epoch else {}
    per_rank |= {"losses": progress.losses, "errors": progress.errors}
    state = {
        RUN_CONFIG: asdict(config),
        "progress": asdict(progress),
        RUN_WEIGHTS: model.state_dict(),
        "processes": ranks.gather(per_rank),
        **trainer.state(),
    }
    ranks.on_main_rank(lambda: run.save(state))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the random generators that a network on this device uses."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore the states that `random_state` returned, as far as this device has these generators."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def draw_curves(history: list[dict], path: Path, title: str) -> None:
    """Draw training and validation loss and error of each epoch, and the learning rate."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, error, rate = figure.subplots(1, 3)
    style = {"marker": "o" if len(epochs) < 40 else None, "markersize": 3}
    for axes, quantity, unit in ((loss, "loss", "cross-entropy"), (error, "error", "top-1 error (%)")):
        axes.plot(epochs, [row[f"train_{quantity}"] for row in history], label="training", **style)
        axes.plot(epochs, [row[f"val_{quantity}"] for row in history], "--", label="validation", **style)
        axes.set(xlabel="epoch", ylabel=unit, yscale="log" if quantity == "loss" else "linear")
        axes.legend()
    plain_ticks(loss.yaxis)
    best = min(history, key=lambda row: row["val_error"])
    error.axhline(best["val_error"], color="gray", linewidth=0.8, linestyle=":")
    error.set_title(f"best {best['val_error']:.2f}% at epoch {best['epoch']}", fontsize="medium")
    rate.plot(epochs, [row["lr"] for row in history], color="tab:green", **style)
    rate.set(xlabel="epoch", ylabel="learning rate", yscale="log")
    plain_ticks(rate.yaxis)
    for axes in (loss, error, rate):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=110)
