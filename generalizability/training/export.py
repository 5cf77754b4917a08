"""`--export`: the last epoch's weights of a run as a file to share, with a model card.

The weights of the epoch with the smallest error on the test images were chosen by these images, and their error is too
small. The last epoch is not chosen, so its error is the one to state.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from comparison.comparison_table import title
from comparison.intervals import interval_of_percent
from recipes import RunConfig
from s3net_common.checkpoints import RUN_CONFIG, check_tensors, save_weights
from s3net_common.errors import InputError
from s3net_common.output_files import default_out, make_folder, relative, run_record, write_atomically, write_json
from s3net_networks import create_network
from s3net_networks.size import network_size
from training.config import config_from_json, shell_command_of
from training.engine import Progress
from training.run_folder import Run, evaluated_weights, weights_metadata

FILES = ("last.safetensors", "last.json", "README.md")
TEST_SETS = {"cifar100"}  # data sets with test images; the others have validation images
NOTE = "NOTE.txt"  # in a run's folder: what the reader of the weights should know, written by hand


def export_run(folder: Path, out: Path | None, overwrite: bool, unfinished: bool) -> None:
    """Write weights, their record and a card to a folder, `runs/export/<run>` if `out` is None.

    Args:
        folder: of the run, which may have been written by an earlier version of the trainer.
        out: the folder to write to.
        overwrite: whether these files may be replaced.
        unfinished: whether the run may have epochs left.

    Raises:
        InputError: the folder holds no run with weights that fit its network, the run has epochs left, or files would
            be replaced.
    """
    if not folder.is_dir():
        raise InputError(f"there is no {folder}: give the folder of a run")
    run = Run(folder)
    config, state = run.read_config(), run.read_checkpoint()
    if state is None:
        raise InputError(f"{relative(folder)} has no last.pt, which holds the weights of the last epoch")
    progress, weights = checked_content(state, config, folder / "last.pt")
    name = folder.resolve().name
    if progress.epoch < config.epochs and not unfinished:
        raise InputError(
            f"{relative(folder)} has reached epoch {progress.epoch} of {config.epochs}: resume it, or pass "
            "--unfinished to export it as it is"
        )
    out = out or default_out("export") / name
    if not overwrite and (existing := [file for file in FILES if (out / file).exists()]):
        raise InputError(f"{relative(out)} already holds {', '.join(existing)}: pass --overwrite to replace them")
    record = export_record(run, config, progress)
    make_folder(out)
    save_weights(out / FILES[0], weights, weights_metadata(config) | record)
    write_json(out / FILES[1], run_record() | record)
    card = card_text(config, record)
    write_atomically(out / FILES[2], lambda path: path.write_text(card, encoding="utf-8"))
    print(f"written to {relative(out)}: {', '.join(FILES)}")


def checked_content(state: dict, config: RunConfig, path: Path) -> tuple[Progress, dict[str, Tensor]]:
    """Return progress and weights of a checkpoint.

    Raises:
        InputError: it is damaged or of another run, has no finished epoch, or its weights do not fit the network.
    """
    try:
        same = config_from_json(state[RUN_CONFIG], path) == config
        progress, weights = Progress(**state["progress"]), evaluated_weights(state)
        complete = len(progress.history) == progress.epoch <= config.epochs
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: get it again") from error
    if not same or not complete:
        raise InputError(f"{path} is not the checkpoint of the run that config.json describes")
    if not progress.epoch:
        raise InputError(f"{relative(path.parent)} has no finished epoch: resume it")
    expected = create_network(config.model, config.num_classes, **config.model_options).state_dict()
    if not isinstance(weights, dict) or weights.keys() != expected.keys():
        raise InputError(f"{path} holds the weights of another network")
    check_tensors(path, weights, expected)
    return progress, weights


def export_record(run: Run, config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Return what is known about the exported weights. Errors are in percent.

    Weights within an epoch were not evaluated: their errors are None, and `epoch_before` has those of the last epoch.
    """
    last, summary = progress.history[-1], run.summary()
    names = ("val_error", "val_top5_error", "train_error")
    errors = {name: last[name] for name in names}
    errors["val_error_interval"] = interval_of_percent(last["val_error"], config.val_images)
    within = {} if progress.step == 0 else {"epoch_before": errors, "steps": progress.step}
    if within:
        errors = dict.fromkeys(errors)
    note = run.folder / NOTE
    size = network_size(config.model, config.num_classes, config.model_options, config.image_size)
    return {
        "epoch": progress.epoch,
        "epochs": config.epochs,
        **within,
        **errors,
        **size,
        "interval_percent": 95,
        "recipe": {name: value for name, value in asdict(config).items() if name not in weights_metadata(config)},
        "image_size": config.image_size,
        "num_classes": config.num_classes,
        "model_options": config.model_options,
        "training_command": shell_command_of(config),
        "training_versions": summary.get("versions"),
        "training_hours": sum(row["seconds"] for row in progress.history) / 3600,
        "device": summary.get("device"),
        "precision": summary.get("precision"),
        "note": " ".join(note.read_text(encoding="utf-8").split()) if note.is_file() else None,
    }


# ---- The card -----------------------------------------------------------------------------------------------------


def card_text(config: RunConfig, record: dict[str, Any]) -> str:
    """Return the model card as Markdown."""
    state = "after its last epoch" if record["epoch"] == record["epochs"] else "**which has not ended**"
    rows = {
        "network": network_line(config, record),
        "data": data_line(config),
        "recipe": recipe_line(config),
        "progress": epoch_line(record),
        "error": error_line(config, record),
        "seed": f"{config.seed}; one run",
        "input": "RGB in `[0, 1]`, normalised with the mean and standard deviation in the file's metadata",
        "trained with": trained_line(record),
        "licence": None if config.dataset == "folder" else "MIT",  # own images: the owner's decision
    }
    lines = [f"| {name} | {text} |" for name, text in rows.items() if text]
    return "\n".join(
        [
            f"# {config.model}",
            "",
            f"[{FILES[0]}]({FILES[0]}) holds the weights of one training run, {state}. The epoch was not chosen by its "
            "error.",
            "",
            f"<!-- numbers: {FILES[1]} -->",
            "| | |",
            "|---|---|",
            *lines,
            "",
            *([record["note"], ""] if record["note"] else []),
            "The file's metadata hold the class names by index, the network's options and the normalisation",
            "(`models.read_metadata`). No code from the file is run when it is loaded. The weights were trained with",
            "",
            "```bash",
            record["training_command"],
            "```",
            "",
        ]
    )


def network_line(config: RunConfig, record: dict[str, Any]) -> str:
    """Return the network with its options and size."""
    options = {name: value for name, value in config.model_options.items() if not isinstance(value, list | dict)}
    named = "".join(f", {name} {value}" for name, value in options.items())
    return f"`{config.model}`{named}: {record['parameters']:,} parameters, {record['multiply_adds']:,} multiply-adds"


def data_line(config: RunConfig) -> str:
    """Return the training images and their augmentation."""
    shapes = {"flips": config.flip, "crops": config.crop_padding or config.image_size > 64}
    changes = " and ".join(name for name, used in shapes.items() if used) if config.augment else ""
    limited = " (a part of them)" if config.limit_train or config.hold_out else ""
    return (
        f"{title(config.dataset)}: {config.train_images:,} training images{limited}, {config.image_size} pixels "
        f"square, {config.num_classes} classes; {f'random {changes}' if changes else 'no augmentation'}"
    )


def recipe_line(config: RunConfig) -> str:
    """Return the settings of the optimizer."""
    extras = {
        "Nesterov": config.nesterov,
        "no weight decay on BatchNorm and biases": not config.norm_decay,
        f"label smoothing {config.label_smoothing:g}": config.label_smoothing,
        f"weights averaged over the last {config.average_epochs} epochs": config.average_epochs,
        f"{config.early_size} pixels in the first {config.early_epochs} epochs": config.early_size,
        "started from other weights": config.init,
    }
    words = [name for name, used in extras.items() if used]
    settings = (
        f"SGD, momentum {config.momentum:g}, learning rate {config.lr:g} ({config.schedule}), weight decay "
        f"{config.weight_decay:g}, batch {config.batch_size}, {config.epochs} epochs"
    )
    return "; ".join([settings, *words])


def epoch_line(record: dict[str, Any]) -> str:
    """Return the epoch of the weights, and whether it is the last one."""
    if record["epoch"] == record["epochs"]:
        return f"epoch {record['epoch']}, the last one"
    steps = f" and {record['steps']} steps" if "steps" in record else ""
    return f"epoch {record['epoch']} of {record['epochs']}{steps}: **the training is not finished**"


def error_line(config: RunConfig, record: dict[str, Any]) -> str:
    """Return the error with its interval."""
    errors = record.get("epoch_before", record)
    low, high = errors["val_error_interval"]
    evaluated = "test" if config.dataset in TEST_SETS else "validation"
    images = "held-out training" if config.hold_out else evaluated
    text = (
        f"{errors['val_error']:.2f}% on {config.val_images:,} {images} images (95% interval over the images "
        f"{low:.2f}% to {high:.2f}%, which does not cover another seed); top-5 {errors['val_top5_error']:.2f}%, on the "
        f"training images {errors['train_error']:.2f}%"
    )
    return text if errors is record else f"not measured for these weights. After epoch {record['epoch']}: {text}"


def trained_line(record: dict[str, Any]) -> str:
    """Return device, precision, versions and time of the training, as far as they are recorded."""
    versions = record["training_versions"] or {}
    packages = ", ".join(
        f"{name} `{versions[name]}`" for name in ("python", "torch", "torchvision") if name in versions
    )
    words = [record["device"], record["precision"], packages, f"{record['training_hours']:.2f} hours"]
    return ", ".join(filter(None, words))
