"""Checks the content of `last.pt` before anything is restored from it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes import RunConfig
from s3net_common.checkpoints import RUN_CONFIG, RUN_WEIGHTS, check_tensors, is_number
from s3net_common.errors import InputError
from training.config import config_from_json, has_type
from training.engine import AVERAGE, METRICS, Progress, Trainer


def check_state(state: dict, path: Path, config: RunConfig, model: nn.Module, trainer: Trainer, steps: int) -> None:
    """Check types, shapes and ranges of everything in a checkpoint.

    Args:
        state: content of `last.pt`.
        path: the file, for messages.
        config: of `config.json`.
        model: the network.
        trainer: of a new run with this configuration.
        steps: per epoch.

    Raises:
        InputError: the content does not fit the run; the message names what.
    """
    for name in (RUN_CONFIG, "progress", RUN_WEIGHTS, "processes", "optimizer", "scheduler", "scaler"):
        if name not in state:
            raise _unfit(path, f"it lacks {name}")
    if config_from_json(state[RUN_CONFIG], path) != config:
        raise _unfit(path, "its settings are not those of config.json")
    _check_progress(state["progress"], path, config, steps)
    weights, expected = state[RUN_WEIGHTS], model.state_dict()
    if not isinstance(weights, dict) or weights.keys() != expected.keys():
        raise _unfit(path, "its weights are of another network")
    if not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise _unfit(path, "its weights are no tensors")
    check_tensors(path, weights, expected, finite=False)  # training may go on if running statistics are infinite
    _check_processes(state["processes"], path)
    if trainer.average is not None:
        _check_average(state, path, trainer.average)
    _check_optimizer(state["optimizer"], path, trainer)
    for name in ("optimizer", "scheduler", "scaler"):
        if not _is_like(state[name], trainer.state()[name]):
            raise _unfit(path, f"its {name} is of another kind")
    finished = state["progress"]["epoch"] * steps + state["progress"]["step"]
    if state["scheduler"].get("last_epoch") != finished:
        raise _unfit(path, f"its learning-rate schedule is not at step {finished}")


def _unfit(path: Path, reason: str) -> InputError:
    return InputError(f"{path} does not fit this run, since {reason}: start a new one with another --out")


def _check_average(state: dict, path: Path, average: nn.Module) -> None:
    weights, expected = state.get(AVERAGE), average.state_dict()
    if not isinstance(weights, dict) or weights.keys() != expected.keys():
        raise _unfit(path, "its averaged weights are missing or of another network")
    if not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise _unfit(path, "its averaged weights are no tensors")
    check_tensors(path, weights, expected, finite=False)
    if not all(isinstance(process.get("average_buffers"), dict) for process in state["processes"]):
        raise _unfit(path, "it has no averaged statistics of the processes")


def _check_progress(progress: Any, path: Path, config: RunConfig, steps: int) -> None:
    kinds = {field.name: field.type for field in fields(Progress)}
    if not isinstance(progress, dict) or progress.keys() != kinds.keys():
        raise _unfit(path, "its progress is incomplete")
    for name, kind in kinds.items():
        if not has_type(progress[name], kind):
            raise _unfit(path, f"its progress has no valid {name}")
    if not 0 <= progress["epoch"] <= config.epochs or not 0 <= progress["step"] <= steps:
        raise _unfit(path, "its progress is beyond the end")
    rows = progress["history"]
    if [row.get("epoch") for row in rows] != list(range(1, progress["epoch"] + 1)):
        raise _unfit(path, "its history does not have one row an epoch")
    if not all(isinstance(row.get(name), int | float) for row in rows for name in METRICS):
        raise _unfit(path, "its history has values that are no numbers")


def _check_processes(processes: Any, path: Path) -> None:
    kinds = {"random": dict, "buffers": dict, "losses": list[float], "errors": int}
    if not isinstance(processes, list) or not processes:
        raise _unfit(path, "it has no state of processes")
    for process in processes:
        if not isinstance(process, dict) or not all(has_type(process.get(name), kind) for name, kind in kinds.items()):
            raise _unfit(path, "the state of a process is incomplete")
        generator = process["random"].get("cpu")
        if not isinstance(generator, Tensor) or generator.shape != torch.get_rng_state().shape:
            raise _unfit(path, "it has no state of the random generator")


def _check_optimizer(optimizer: Any, path: Path, trainer: Trainer) -> None:
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    buffers = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(buffers, dict) or not all(isinstance(values, dict) for values in buffers.values()):
        raise _unfit(path, "its optimizer has no state")
    for index, values in buffers.items():
        if not isinstance(index, int) or not 0 <= index < len(parameters):
            raise _unfit(path, "its optimizer has other parameters")
        for name, value in values.items():
            if value is not None and not isinstance(value, Tensor):
                raise _unfit(path, f"its optimizer has a {name} that is no tensor")
            if value is not None:
                check_tensors(path, {f"{name} {index}": value}, {f"{name} {index}": parameters[index]}, finite=False)


def _is_like(value: Any, fresh: Any) -> bool:
    """Whether a saved value has the type of a new one and, inside containers, the same holds for all that both have.

    The optimizer's "state" is empty in a new one. PyTorch's versions differ in the keys that they save.
    """
    if isinstance(fresh, dict):
        return isinstance(value, dict) and all(_is_like(value[key], fresh[key]) for key in fresh.keys() & value.keys())
    if isinstance(fresh, list | tuple):
        is_list = isinstance(value, list | tuple) and len(value) == len(fresh)
        return is_list and all(map(_is_like, value, fresh))
    if fresh is None or isinstance(fresh, bool):
        return value is None or isinstance(value, bool)
    if isinstance(fresh, int | float):
        return is_number(value, -1e300, 1e300)
    return type(value) is type(fresh)
