"""Runs of train_s3net.py as other scripts read them: configuration, epochs and sizes, from the files of the folder."""

import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from recipes import RunConfig
from s3net_common.errors import InputError
from s3net_common.output_files import relative
from s3net_networks import complete_options
from s3net_networks.size import network_size

SIZES = ("parameters", "multiply_adds")
# Settings that runs of earlier versions lack: those runs had these values.
DEFAULTS = {setting.name: setting.default for setting in fields(RunConfig) if setting.default is not MISSING}
REQUIRED_SETTINGS = {  # in a run's config.json, with their types
    **dict.fromkeys(("dataset", "model"), str),
    **dict.fromkeys(("num_classes", "image_size", "epochs", "seed"), int),
    "model_options": dict,
}


@dataclass
class Run:
    """A run as read from its folder.

    Attributes:
        path: the folder.
        config: content of `config.json`, without the flags that are no part of the recipe, with every default.
        history: metrics of the finished epochs, as in `metrics.jsonl`.
        size: `parameters` and `multiply_adds` of its network.
        summary: content of `summary.json`; {} before the run has ended.
    """

    path: Path
    config: dict
    history: list[dict]
    size: dict[str, int]
    summary: dict = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the run reached its last epoch."""
        return len(self.history) >= self.config["epochs"]

    @property
    def best(self) -> dict:
        """The metrics of the epoch with the lowest validation error (the first, if several are equal)."""
        return min(self.history, key=lambda metrics: metrics["val_error"])

    @property
    def options(self) -> dict:
        """The network's options, with the defaults of those that are not given."""
        return complete_options(self.config["model"], self.config["model_options"])

    def recipe(self) -> str:
        """Return all settings except the seed as text, which is the same for runs that differ only in the seed."""
        settings = {key: value for key, value in self.config.items() if key != "seed"}
        return json.dumps(settings | {"model_options": self.options}, sort_keys=True)


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        InputError: the folder is missing, is not a run's, or has a damaged file.
    """
    if not folder.exists():
        raise InputError(f"there is no {relative(folder)}: give the folder of a run")
    if not (folder / "config.json").is_file():
        raise InputError(f"{relative(folder)} is not the folder of a run: it has no config.json")
    config = DEFAULTS | read_json(folder / "config.json")
    config.pop("environment", None)  # where the data were, the number of workers
    for name, kind in REQUIRED_SETTINGS.items():
        if not isinstance(config.get(name), kind):
            raise InputError(
                f"{relative(folder / 'config.json')} was not written by train_s3net.py: it has no valid {name}"
            )
    metrics = folder / "metrics.jsonl"
    try:
        history = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
        history = [row | {name: float(row[name]) for name in ("val_error", "val_top5_error")} for row in history]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{relative(metrics)} is damaged: resume the run, which writes it again") from error
    path = folder / "summary.json"
    size = summary = read_json(path) if path.is_file() else {}
    if not size.keys() >= set(SIZES):
        size = network_size(config["model"], config["num_classes"], config["model_options"], config["image_size"])
    return Run(folder, config, history, {name: size[name] for name in SIZES}, summary)


def read_json(path: Path) -> dict:
    """Return the JSON object in a file.

    Raises:
        InputError: the file is damaged or contains no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{relative(path)} is damaged or not a JSON file") from error
    if not isinstance(content, dict):
        raise InputError(f"{relative(path)} contains no JSON object")
    return content
