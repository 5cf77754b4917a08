"""Compare runs with the results printed in the paper, in one table. Each row is marked as measured here or quoted.

    python generalizability/compare_results.py runs/cifar100-s3net_cifar-s*
    python generalizability/compare_results.py runs/imagenet-* runs/validate_10crop/*.json --out runs/imagenet

A RUN is the folder of a run of train_s3net.py, or a results file of validate_10crop.py. Runs that differ only in their
seed become one row (mean ± standard deviation). The table shows the error after the last epoch, because an epoch chosen
by its error on the test images gives an error that is too low. The lowest error has a column of its own. Prints
Markdown, and writes table.md, table.csv, comparison.json and scatter.png.
"""

import json
import statistics
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import tyro

from s3net_common.command_line import OVERWRITE, answer_flags, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import (
    claim_folder,
    default_out,
    figure_text,
    relative,
    save_figure,
    shell_command,
    write_atomically,
    write_json,
)


@dataclass
class Args:
    """Compare runs with the results printed in the paper, in one table."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Folders of runs of train_s3net.py, and results files of validate_10crop.py."""
    out: Path = field(default_factory=lambda: default_out("comparison"))
    """Folder for the table and the figure. The files of an earlier comparison are replaced."""
    overwrite: OVERWRITE = False


if __name__ == "__main__":
    answer_flags(Args, __doc__)

from comparison.comparison_table import ADDED, CITED_PAPER, MEASURED, PAPER, Row, csv_text, markdown_section, title
from comparison.error_scatter import Point, draw_scatter
from comparison.paper_tables import AUGMENTED_ROWS, PAPER_ROWS, PaperRow
from s3net_networks.own_models import models
from s3net_networks.size import network_size


def main(args: Args) -> None:
    """Read the runs, then print and write the comparison.

    Raises:
        InputError: a path is neither a run nor a results file, a file is damaged, or a run is given twice.
    """
    paths = list(dict.fromkeys(path.resolve() for path in args.runs))
    if not paths:
        raise InputError("give one or more runs to compare: runs/cifar100-s3net_cifar-s0")
    runs = [read_run(path) for path in paths if not path.is_file()]
    rows = run_rows(runs) + [row for path in paths if path.is_file() for row in crop_rows(path)]
    tables = by_dataset(rows)
    claim_folder(args.out, "comparison.json", "table.md", "table.csv", "scatter.png", overwrite=args.overwrite)
    markdown = "\n\n".join(markdown_section(dataset, rows) for dataset, rows in tables.items()) + "\n"
    every_row = [row for rows in tables.values() for row in rows]
    figure = draw_scatter({title(dataset): scatter_points(rows) for dataset, rows in tables.items()})
    write_json(args.out / "comparison.json", {"command": shell_command(), "rows": [asdict(row) for row in every_row]})
    write_atomically(args.out / "table.md", lambda path: path.write_text(markdown, encoding="utf-8"))
    write_atomically(args.out / "table.csv", lambda path: path.write_text(csv_text(every_row), encoding="utf-8"))
    save_figure(args.out / "scatter.png", figure, figure.dpi)
    print(markdown)
    print(f"written to {relative(args.out)}: table.md, table.csv, comparison.json, scatter.png")


# ---- Reading ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run as read from its folder: configuration, errors of its finished epochs, and the size of its network."""

    path: Path
    config: dict
    history: list[dict]
    size: dict[str, int]

    @property
    def finished(self) -> bool:
        """Whether the run reached its last epoch."""
        return len(self.history) >= self.config["epochs"]

    def recipe(self) -> str:
        """Return all settings except the seed as text, which is the same for runs that differ only in the seed."""
        return json.dumps({key: value for key, value in self.config.items() if key != "seed"}, sort_keys=True)


SIZES = ("parameters", "multiply_adds")
REQUIRED_SETTINGS = {  # in a run's config.json, with their types
    **dict.fromkeys(("dataset", "model"), str),
    **dict.fromkeys(("num_classes", "image_size", "epochs", "seed"), int),
    "model_options": dict,
}


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        InputError: the folder is missing, is not a run's, or has a damaged file.
    """
    if not folder.exists():
        raise InputError(f"there is no {relative(folder)}: give the folder of a run")
    if not (folder / "config.json").is_file():
        raise InputError(f"{relative(folder)} is not the folder of a run: it has no config.json")
    config = read_json(folder / "config.json")
    config.pop("environment", None)  # where the data were, the number of workers
    for name, kind in REQUIRED_SETTINGS.items():
        if not isinstance(config.get(name), kind):
            raise InputError(
                f"{relative(folder / 'config.json')} was not written by train_s3net.py: it has no valid {name}"
            )
    metrics = folder / "metrics.jsonl"
    try:
        history = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
        history = [{name: float(row[name]) for name in ("val_error", "val_top5_error")} for row in history]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{relative(metrics)} is damaged: resume the run, which writes it again") from error
    summary = folder / "summary.json"
    size = read_json(summary) if summary.is_file() else {}
    if not size.keys() >= set(SIZES):
        size = network_size(config["model"], config["num_classes"], config["model_options"], config["image_size"])
    return Run(folder, config, history, {name: size[name] for name in SIZES})


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


# ---- Rows ---------------------------------------------------------------------------------------------------------


def run_rows(runs: list[Run]) -> list[Row]:
    """Return a row for each group of finished runs that differ only in the seed, and for each unfinished run.

    Raises:
        InputError: two finished runs have the same settings and seed. They would count as two seeds.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        key = (run.recipe(),) if run.finished else (run.recipe(), run.path)
        groups.setdefault(key, []).append(run)
    rows = []
    for group in groups.values():
        group.sort(key=lambda run: run.config["seed"])
        for first, second in pairwise(group):
            if first.config["seed"] == second.config["seed"]:
                raise InputError(
                    f"{relative(first.path)} and {relative(second.path)} are the same run "
                    f"(seed {first.config['seed']}): leave one of them out"
                )
        rows.append(run_row(group, differing_settings(group[0], runs)))
    return rows


def run_row(group: list[Run], differing: list[str]) -> Row:
    """Return the row of runs that differ only in the seed."""
    first = group[0]
    config = first.config
    row = Row(
        dataset=config["dataset"],
        network=config["model"],
        setting=", ".join(network_setting(config["model"], config["model_options"]) + differing),
        source=MEASURED,
        parameters=first.size["parameters"],
        code_parameters=first.size["parameters"],
        multiply_adds=first.size["multiply_adds"],
        epochs_done=len(first.history),
        epochs=config["epochs"],
        seeds=[run.config["seed"] for run in group],
        finished=first.finished,
        augmented=config.get("augment", True),
        runs=[str(relative(run.path)) for run in group],
    )
    if first.history:
        last = [run.history[-1] for run in group]
        best = [min(run.history, key=lambda metrics: metrics["val_error"]) for run in group]
        row.last_error, row.last_error_std = mean_and_deviation([metrics["val_error"] for metrics in last])
        row.best_error, row.best_error_std = mean_and_deviation([metrics["val_error"] for metrics in best])
        row.last_top5_error, _ = mean_and_deviation([metrics["val_top5_error"] for metrics in last])
        row.best_top5_error, _ = mean_and_deviation([metrics["val_top5_error"] for metrics in best])
    return row


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation, which is None for one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def network_setting(model: str, options: dict) -> list[str]:
    """Return the network's options in the paper's terms, S3-Net's with their defaults. Lists are left out."""
    defaults = models.NETWORKS.get(model, {})
    options = {key: defaults[key] for key in ("growth_rate", "depth") if key in defaults} | options
    names = {"growth_rate": "k"}
    return [f"{names.get(key, key)}={value}" for key, value in options.items() if not isinstance(value, list | dict)]


def differing_settings(run: Run, runs: list[Run]) -> list[str]:
    """Return a run's limits, and its settings that differ between the runs of the same network and data set."""
    limits = {"limit_train": "training images", "limit_val": "validation images"}
    settings = [f"{run.config[key]} {name}" for key, name in limits.items() if run.config.get(key)]
    shared = ("dataset", "model", "model_options")
    others = [other.config for other in runs if all(other.config[key] == run.config[key] for key in shared)]
    shown_elsewhere = {"seed", "epochs", "classes", "train_images", "val_images", *limits}
    for key, value in run.config.items():
        if key not in shown_elsewhere and any(other.get(key) != value for other in others):
            settings.append(f"{key}={value}")
    return settings


def crop_rows(path: Path) -> list[Row]:
    """Return the rows of the centre crop and of the ten crops of a results file of validate_10crop.py.

    Raises:
        InputError: the file is no such file, or is damaged.
    """
    results = read_json(path)
    if results.get("kind") != "validate_10crop":
        raise InputError(f"{relative(path)} is neither the folder of a run nor a results file of validate_10crop.py")
    rows = []
    try:
        setting = network_setting(results["model"], results["model_options"])
        if results["images"]["limit"]:
            setting.append(f"{results['images']['count']} images")
        for crops, name in (("centre_crop", "centre crop"), ("ten_crops", "10 crops")):
            errors = results[crops]
            interval_low, interval_high = map(float, errors["top1_interval"])
            row = Row(
                dataset=results["dataset"],
                network=results["model"],
                setting=", ".join([*setting, name]),
                source=MEASURED,
                parameters=results["parameters"],
                code_parameters=results["parameters"],
                multiply_adds=results["multiply_adds"],
                last_error=float(errors["top1_error"]),
                last_top5_error=float(errors["top5_error"]),
                interval_low=interval_low,
                interval_high=interval_high,
                runs=[str(relative(path))],
            )
            rows.append(row)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{relative(path)} is damaged: run validate_10crop.py again") from error
    return rows


def paper_row(quoted: PaperRow) -> Row:
    """Return a row of the paper's tables as a row of the comparison."""
    return Row(
        dataset=quoted.dataset,
        network=quoted.network,
        setting=quoted.setting,
        source=PAPER if quoted.measured else CITED_PAPER if quoted.printed else ADDED,
        parameters=quoted.parameters or quoted.code_parameters,
        code_parameters=quoted.code_parameters,
        multiply_adds=quoted.multiply_adds,
        last_error=quoted.error,
        prints_fewer=quoted.prints_fewer,
        augmented=quoted.augmented,
        looked_up=quoted.source,
    )


def by_dataset(rows: list[Row]) -> dict[str | None, list[Row]]:
    """Return the rows of each data set and those of the paper, sorted by error, with unfinished runs at the end."""
    tables: dict[str | None, list[Row]] = {}
    for row in rows:
        tables.setdefault(row.dataset, []).append(row)
    for dataset, table in tables.items():
        table += [paper_row(quoted) for quoted in PAPER_ROWS + AUGMENTED_ROWS if quoted.dataset == dataset]
        table.sort(key=lambda row: (not row.finished, 100.0 if row.last_error is None else row.last_error))
    return tables


# ---- The figure ---------------------------------------------------------------------------------------------------


def scatter_points(rows: list[Row]) -> list[Point]:
    """Return the points of the rows that have an error. Parameters are those of the code, if known."""
    return [
        Point(
            label=_label(row),
            error=row.last_error,
            parameters=row.code_parameters or row.parameters,
            multiply_adds=row.multiply_adds,
            kind=kind_of(row),
        )
        for row in rows
        if row.last_error is not None
    ]


def _label(row: Row) -> str:
    parts = [row.network, row.setting.replace(", ", " ").replace("depth=", "d="), _epochs(row)]
    return figure_text(" ".join(filter(None, parts)))


def _epochs(row: Row) -> str:
    """Return how long a network measured here was trained, which may be shorter than the quoted ones were."""
    if row.source != MEASURED or row.epochs is None:
        return ""
    return (
        f"({row.epochs} epoch{'s' if row.epochs > 1 else ''})"
        if row.finished
        else f"(epoch {row.epochs_done} of {row.epochs})"
    )


def kind_of(row: Row) -> str:
    """Return the row's key in `STYLES`."""
    if row.source == MEASURED:
        return "measured here" if row.augmented else "measured here, without augmentation"
    return {True: "quoted", False: "quoted, without augmentation", None: "quoted, augmentation unknown"}[row.augmented]


if __name__ == "__main__":
    run_script(main, Args, __doc__)
