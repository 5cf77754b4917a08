"""One table of finished runs beside the paper's, each row marked as measured here or quoted.

    python compare_results.py runs/cifar100-s3net_cifar-s*
    python compare_results.py runs/imagenet-* runs/validate_10crop/*.json --out runs/imagenet-comparison

A RUN is the folder of a run of train_s3net.py, or a file of results of validate_10crop.py. Runs that differ in nothing
but their seed become one row (mean ± standard deviation). Of a run the table shows the last epoch's error, since
choosing an epoch by its error on the test images flatters; the best one stands beside it. Prints Markdown, and writes
table.md, table.csv, comparison.json and scatter.png.
"""

import json
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import tyro

from comparison.comparison_table import MEASURED, QUOTED_THERE, TRAINED_THERE, Row, csv_text, markdown_section, title
from comparison.error_scatter import Point, draw_scatter
from comparison.paper_tables import PAPER_ROWS, PaperRow
from models import NETWORKS
from s3net_common.command_line import run_script
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT, make_folder, relative, write_atomically
from s3net_networks.size import network_size


@dataclass
class Args:
    """One table of finished runs beside the paper's, each row marked as measured here or quoted."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Folders of runs, and results of validate_10crop.py."""
    out: Path = ROOT / "runs" / "comparison"
    """Folder for the table and the picture; what a former comparison left there is replaced."""


def main(args: Args) -> None:
    """Read, compare, print and write.

    Raises:
        InputError: something given is neither a run nor results, or is damaged; or one run is given twice.
    """
    paths = list(dict.fromkeys(path.resolve() for path in args.runs))
    if not paths:
        raise InputError("give one or more runs to compare: runs/cifar100-s3net_cifar-s0")
    runs = [read_run(path) for path in paths if not path.is_file()]
    rows = run_rows(runs) + [row for path in paths if path.is_file() for row in crop_rows(path)]
    tables = by_dataset(rows)
    make_folder(args.out)
    markdown = "\n\n".join(markdown_section(dataset, rows) for dataset, rows in tables.items()) + "\n"
    every_row = [row for rows in tables.values() for row in rows]
    comparison = {"command": shlex.join(["python", *sys.argv]), "rows": [asdict(row) for row in every_row]}
    written: dict[str, Callable[[Path], object]] = {
        "table.md": lambda path: path.write_text(markdown),
        "table.csv": lambda path: path.write_text(csv_text(every_row)),
        "comparison.json": lambda path: path.write_text(json.dumps(comparison, indent=2) + "\n"),
        "scatter.png": lambda path: draw_scatter({title(d): scatter_points(rows) for d, rows in tables.items()}, path),
    }
    for name, write in written.items():
        write_atomically(args.out / name, write)
    print(markdown)
    print(f"written to {relative(args.out)}: {', '.join(written)}")


# ---- Reading ------------------------------------------------------------------------------------------------------


@dataclass
class ReadRun:
    """A run's folder: its configuration, the metrics of its epochs so far, and its network's size."""

    path: Path
    config: dict
    history: list[dict]
    facts: dict[str, int]

    @property
    def finished(self) -> bool:
        """Whether it came to its last epoch."""
        return len(self.history) >= self.config["epochs"]

    def recipe(self) -> str:
        """Everything that decides the result but the seed, as a text that equal runs share."""
        return json.dumps({key: value for key, value in self.config.items() if key != "seed"}, sort_keys=True)


SIZES = ("parameters", "multiply_adds")
NEEDED = {  # of a run's config.json, with their types
    **dict.fromkeys(("dataset", "model"), str),
    **dict.fromkeys(("num_classes", "image_size", "epochs", "seed"), int),
    "model_options": dict,
}


def read_run(folder: Path) -> ReadRun:
    """Read a run's folder.

    Raises:
        InputError: it is not there, no run's folder, or damaged.
    """
    if not folder.exists():
        raise InputError(f"there is no {relative(folder)}: give the folder of a run")
    if not (folder / "config.json").is_file():
        raise InputError(f"{relative(folder)} is no folder of a run: it has no config.json")
    config = read_json(folder / "config.json")
    for name, kind in NEEDED.items():
        if not isinstance(config.get(name), kind):
            raise InputError(
                f"{relative(folder / 'config.json')} is not of a run of train_s3net.py: it has no valid {name}"
            )
    metrics = folder / "metrics.jsonl"
    try:
        history = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
        history = [{name: float(row[name]) for name in ("val_error", "val_top5_error")} for row in history]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{relative(metrics)} is damaged: resume the run, which writes it anew") from error
    summary = folder / "summary.json"
    facts = read_json(summary) if summary.is_file() else {}
    if not facts.keys() >= set(SIZES):
        facts = network_size(config["model"], config["num_classes"], config["model_options"], config["image_size"])
    return ReadRun(folder, config, history, {name: facts[name] for name in SIZES})


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        InputError: the file holds none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{relative(path)} is damaged, or no JSON file") from error
    if not isinstance(content, dict):
        raise InputError(f"{relative(path)} holds no JSON object")
    return content


# ---- Rows ---------------------------------------------------------------------------------------------------------


def run_rows(runs: list[ReadRun]) -> list[Row]:
    """A row for each set of finished runs that differ in the seed only, and for each unfinished run.

    Raises:
        InputError: two finished runs have the same configuration and seed: counting both would feign a second seed.
    """
    groups: dict[tuple, list[ReadRun]] = {}
    for run in runs:
        key = (run.recipe(),) if run.finished else (run.recipe(), run.path)
        groups.setdefault(key, []).append(run)
    rows = []
    for group in groups.values():
        group.sort(key=lambda run: run.config["seed"])
        for one, other in pairwise(group):
            if one.config["seed"] == other.config["seed"]:
                raise InputError(
                    f"{relative(one.path)} and {relative(other.path)} are the same run (seed {one.config['seed']}): "
                    "leave one of them out"
                )
        rows.append(run_row(group, differing_settings(group[0], runs)))
    return rows


def run_row(group: list[ReadRun], differing: list[str]) -> Row:
    """The row of runs that differ in the seed only."""
    first = group[0]
    config = first.config
    row = Row(
        dataset=config["dataset"],
        network=config["model"],
        setting=", ".join(network_setting(config["model"], config["model_options"]) + differing),
        source=MEASURED,
        parameters=first.facts["parameters"],
        code_parameters=first.facts["parameters"],
        multiply_adds=first.facts["multiply_adds"],
        epochs_done=len(first.history),
        epochs=config["epochs"],
        seeds=[run.config["seed"] for run in group],
        finished=first.finished,
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
    """The mean, and the standard deviation of the population that they are a sample of; None for one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def network_setting(model: str, options: dict) -> list[str]:
    """The network's options in the paper's terms, S3-Net's own where none is given; no graphs or other lists."""
    options = {
        key: NETWORKS[model][key] for key in ("growth_rate", "depth") if key in NETWORKS.get(model, {})
    } | options
    names = {"growth_rate": "k"}
    return [f"{names.get(key, key)}={value}" for key, value in options.items() if not isinstance(value, list | dict)]


def differing_settings(run: ReadRun, runs: list[ReadRun]) -> list[str]:
    """What else tells a run from the others of the same network on the same data, and what limits it."""
    limits = {"limit_train": "training images", "limit_val": "validation images"}
    said = [f"{run.config[key]} {name}" for key, name in limits.items() if run.config.get(key)]
    same = ("dataset", "model", "model_options")
    others = [other.config for other in runs if all(other.config[key] == run.config[key] for key in same)]
    shown_elsewhere = {"seed", "epochs", "classes", "train_images", "val_images", *limits}
    for key, value in run.config.items():
        if key not in shown_elsewhere and any(other.get(key) != value for other in others):
            said.append(f"{key}={value}")
    return said


def crop_rows(path: Path) -> list[Row]:
    """The two rows, centre crop and ten crops, of a result of validate_10crop.py.

    Raises:
        InputError: the file is no such result.
    """
    said = read_json(path)
    if said.get("kind") != "validate_10crop":
        raise InputError(f"{relative(path)} is neither the folder of a run nor a result of validate_10crop.py")
    rows = []
    try:
        setting = network_setting(said["model"], said["model_options"])
        if said["images"]["limit"]:
            setting.append(f"{said['images']['count']} images")
        for crops, name in (("centre_crop", "centre crop"), ("ten_crops", "10 crops")):
            found = said[crops]
            row = Row(said["dataset"], said["model"], ", ".join([*setting, name]), MEASURED, said["parameters"])
            row.code_parameters, row.multiply_adds = said["parameters"], said["multiply_adds"]
            row.last_error, row.last_top5_error = float(found["top1_error"]), float(found["top5_error"])
            row.interval_low, row.interval_high = map(float, found["top1_interval"])
            row.runs = [str(relative(path))]
            rows.append(row)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{relative(path)} is damaged: run validate_10crop.py again") from error
    return rows


def paper_row(quoted: PaperRow) -> Row:
    """A row of one of the paper's tables."""
    return Row(
        dataset=quoted.dataset,
        network=quoted.network,
        setting=quoted.setting,
        source=TRAINED_THERE if quoted.measured else QUOTED_THERE,
        parameters=quoted.parameters or quoted.code_parameters,
        code_parameters=quoted.code_parameters,
        multiply_adds=quoted.multiply_adds,
        last_error=quoted.error,
        prints_fewer=quoted.prints_fewer,
    )


def by_dataset(rows: list[Row]) -> dict[str | None, list[Row]]:
    """The rows of each data set with the paper's, by error; unfinished runs last."""
    tables: dict[str | None, list[Row]] = {}
    for row in rows:
        tables.setdefault(row.dataset, []).append(row)
    for dataset, table in tables.items():
        table += [paper_row(quoted) for quoted in PAPER_ROWS if quoted.dataset == dataset]
        table.sort(key=lambda row: (not row.finished, 100.0 if row.last_error is None else row.last_error))
    return tables


# ---- The picture --------------------------------------------------------------------------------------------------


def scatter_points(rows: list[Row]) -> list[Point]:
    """The rows that have an error, as points; the paper's networks at the parameters that their code has."""
    return [
        Point(
            label=" ".join([row.network, row.setting.replace(", ", " ").replace("depth=", "d=")]).strip()
            + ("" if row.finished else f" (epoch {row.epochs_done} of {row.epochs})"),
            error=row.last_error,
            parameters=row.code_parameters or row.parameters,
            multiply_adds=row.multiply_adds,
            measured_here=row.source == MEASURED,
        )
        for row in rows
        if row.last_error is not None
    ]


if __name__ == "__main__":
    run_script(main, Args, __doc__)
