"""`--init`: a new run starts from the weights of a file, or from the published weights of its network."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distributed import Ranks
from recipes import RunConfig
from s3net_common.checkpoints import fitting_weights, head_names, pretrained_file, read_metadata
from s3net_common.class_names import class_numbers, composed, list_names
from s3net_common.output_files import relative
from s3net_networks import create_network, published_file
from training.config import Flags

PRETRAINED = "pretrained"


def open_start(init: str, model: str) -> tuple[Path, dict[str, Any]]:
    """Return the file of `--init` and its metadata, as `s3net_common.checkpoints.read_metadata` returns them.

    Args:
        init: a file, or "pretrained" for the weights in this repository or those that a library publishes.
        model: name of the network, for "pretrained".

    Raises:
        InputError: the file is missing or damaged, or the network has no published weights.
    """
    if init == PRETRAINED and (published := published_file(model)):
        return published
    file = pretrained_file(model) if init == PRETRAINED else Path(init)
    return file, read_metadata(file)


def complete_flags(flags: Flags, metadata: dict[str, Any]) -> Flags:
    """Return the flags completed by the network and the image size that the weights were trained with."""
    return {name: metadata[name] for name in ("model", "image_size") if name in metadata} | flags


def build_network(config: RunConfig, load: bool, ranks: Ranks) -> nn.Module:
    """Build a run's network on the CPU, with random weights or those of `--init`.

    The main rank reads the file and prints what was loaded. The others receive the buffers here; the parameters are
    sent when the network is wrapped for distributed training.

    Args:
        config: of the run.
        load: load the weights of `--init`, if the run has it. False if a checkpoint is restored afterwards.
        ranks: the distributed ranks.

    Raises:
        InputError: the file of `--init` is missing or damaged, or does not fit.
    """
    torch.manual_seed(config.seed)
    model = create_network(config.model, config.num_classes, **config.model_options)
    if config.init and load:
        line = ranks.on_main_rank(lambda: start_from(*open_start(config.init, config.model), model, config))
        buffers = ranks.gather(dict(model.named_buffers()))[0]
        model.load_state_dict(buffers, strict=False)
        if ranks.is_main:
            print(line, flush=True)
    return model


def start_from(file: Path, metadata: dict[str, Any], model: nn.Module, config: RunConfig) -> str:
    """Load weights into a new network, and return a line that says what was loaded.

    The classifier's rows of classes with the same name are loaded, too; those of other classes keep their random
    weights. If the file names no classes and the data's are the numbers 0 to N - 1, they count as row numbers.

    Raises:
        InputError: the file is damaged, or other tensors than the classifier's do not fit.
    """
    lines: list[str] = []
    head = head_names(model)
    weights = fitting_weights(model, file, optional=head, report=lines.append)
    expected = model.state_dict()
    loaded = {name: tensor for name, tensor in weights.items() if name not in head}
    rows: list[tuple[int, int]] = []
    if head and all(name in weights for name in head):
        outputs = weights[head[0]].shape[:1]
        if all(weights[name].shape == outputs + expected[name].shape[1:] for name in head):
            rows = matching_rows(config, metadata.get("classes"), *outputs)
    for name in head:
        loaded[name] = copy_rows(expected[name], weights.get(name), rows)
    model.load_state_dict(loaded, strict=False)
    body = sum(name not in head for name in weights)
    done = f"starting from {relative(file)}: loaded all {body} tensors before the classifier"
    return "; ".join([done, describe_rows(rows, config), *lines])


def matching_rows(config: RunConfig, names: list[str] | None, outputs: int) -> list[tuple[int, int]]:
    """Return the rows of the classifier that are loaded: pairs of a row of the network and a row of the file.

    Args:
        config: of the run; its classes name the network's first rows.
        names: of the file's classes, by row; None if it has none.
        outputs: rows of the file's classifier.
    """
    if names is None:
        numbers = class_numbers(config.classes) or []
        return [(row, number) for row, number in enumerate(numbers) if number < outputs]
    index = {composed(name): row for row, name in reversed(list(enumerate(names[:outputs])))}
    return [(row, index[composed(name)]) for row, name in enumerate(config.classes) if composed(name) in index]


def copy_rows(new: Tensor, old: Tensor | None, rows: list[tuple[int, int]]) -> Tensor:
    """Return `new` with the rows of `old` that `rows` pairs: (row of new, row of old)."""
    result = new.detach().clone()
    if old is not None and rows:
        new_rows, old_rows = torch.tensor(rows).unbind(1)
        result[new_rows] = old[old_rows].to(result.dtype)
    return result


def describe_rows(rows: list[tuple[int, int]], config: RunConfig) -> str:
    """Return which classes keep their rows of the classifier and which start anew."""
    loaded_rows = {row for row, _ in rows}
    names = {"kept": [], "new": []}
    for row, name in enumerate(config.classes):
        names["kept" if row in loaded_rows else "new"].append(name)
    parts = [f"{len(group)} {state} ({list_names(group)})" for state, group in names.items() if group]
    return f"rows of the classifier: {', '.join(parts)}"


def recorded_init(init: str) -> str:
    """Return `--init` as it is recorded: the absolute path of the file, or "pretrained".

    A file that is called "pretrained" is written "./pretrained".
    """
    return init if init == PRETRAINED else str(Path(init).absolute())
