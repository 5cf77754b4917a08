"""Compare runs with the results printed in the paper, in one table. Each row is marked as measured here or quoted.

    python generalizability/compare_results.py runs/cifar100-s3net_cifar-s*
    python generalizability/compare_results.py runs/imagenet-* runs/validate_10crop/*.json --out runs/imagenet

A RUN is the folder of a run of train_s3net.py, or a results file of validate_10crop.py. Runs that differ only in their
seed become one row (mean ± standard deviation). A run that has not ended is shown with its epoch. The table shows the
error after the last epoch, because an epoch chosen by its error on the test images gives an error that is too low. The
lowest error has a column of its own. Prints Markdown, and writes table.md, table.csv, comparison.json and scatter.png.
"""

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
    run_record,
    save_figure,
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

from comparison.comparison_table import (
    ADDED,
    CITED_PAPER,
    MEASURED,
    PAPER,
    Row,
    csv_text,
    epochs_cell,
    markdown_section,
    title,
)
from comparison.error_scatter import Point, draw_scatter
from comparison.intervals import interval_of_percent
from comparison.paper_tables import AUGMENTED_ROWS, PAPER_ROWS, PaperRow
from comparison.runs import DEFAULTS, Run, read_json, read_run
from recipes import FAST, NAMED_RECIPES, fast_settings
from s3net_networks import complete_options


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
    write_json(args.out / "comparison.json", run_record() | {"rows": [asdict(row) for row in every_row]})
    write_atomically(args.out / "table.md", lambda path: path.write_text(markdown, encoding="utf-8"))
    write_atomically(args.out / "table.csv", lambda path: path.write_text(csv_text(every_row), encoding="utf-8"))
    save_figure(args.out / "scatter.png", figure, figure.dpi)
    print(markdown)
    print(f"written to {relative(args.out)}: table.md, table.csv, comparison.json, scatter.png")


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
        best = [run.best for run in group]
        row.last_error, row.last_error_std = mean_and_deviation([metrics["val_error"] for metrics in last])
        row.best_error, row.best_error_std = mean_and_deviation([metrics["val_error"] for metrics in best])
        row.last_top5_error, _ = mean_and_deviation([metrics["val_top5_error"] for metrics in last])
        row.best_top5_error, _ = mean_and_deviation([metrics["val_top5_error"] for metrics in best])
        if first.finished and len(group) == 1 and (images := config.get("val_images")):
            row.interval_low, row.interval_high = interval_of_percent(row.last_error, images)
    return row


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation, which is None for one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def network_setting(model: str, options: dict) -> list[str]:
    """Return growth rate and depth of the network, and its options that have other values than the defaults.

    Lists are left out.
    """
    defaults, options = complete_options(model, {}), complete_options(model, options)
    names = {"growth_rate": "k", "depth": "depth"}
    texts = {name: options.pop(key) for key, name in names.items() if options.get(key) is not None}
    texts |= {key: value for key, value in options.items() if key not in defaults or value != defaults[key]}
    return [f"{key}={value}" for key, value in texts.items() if not isinstance(value, list | dict)]


def differing_settings(run: Run, runs: list[Run]) -> list[str]:
    """Return a run's limits, and its settings that differ between the runs of the same network and data set.

    Settings with the trainer's default are left out, since the other runs show theirs. `recipe=fast` stands for three
    or more settings of that recipe.
    """
    limits = {"limit_train": "training images", "limit_val": "validation images"}
    settings = [f"{run.config[key]} {name}" for key, name in limits.items() if run.config.get(key)]
    shared = [other for other in runs if all(other.config[key] == run.config[key] for key in ("dataset", "model"))]
    others = [other.config for other in shared if other.options == run.options]
    shown_elsewhere = {"seed", "epochs", "classes", "train_images", "val_images", "model_options", *limits}
    shown_elsewhere |= {"flip", "crop_padding"}  # `augment` shows them; else all runs of a data set share them
    differing = [
        key
        for key, value in run.config.items()
        if key not in shown_elsewhere and any(other.get(key) != value for other in others)
    ]
    fast = fast_recipe(run.config).keys() & differing
    if len(fast) > 2:
        settings.append("recipe=fast")
        differing = [key for key in differing if key not in fast]
    values = {key: run.config[key] for key in differing}
    return settings + [
        f"{key}={value}" for key, value in values.items() if key not in DEFAULTS or value != DEFAULTS[key]
    ]


def fast_recipe(config: dict) -> dict:
    """Return the settings of `--recipe fast` by name if the configuration has all of them; else {}.

    The number of epochs is none of them.
    """
    settings = FAST | fast_settings(config["epochs"], config["image_size"])
    del settings["epochs"]
    has_all = all(config.get(name) == value for name, value in settings.items())
    return settings if has_all and config["dataset"] in NAMED_RECIPES["fast"] else {}


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
    epochs = epochs_cell(row) + (f" epoch{'s' if row.epochs > 1 else ''}" if row.finished else "")
    return f"({epochs}{f', {len(row.seeds)} seeds' if len(row.seeds) > 1 else ''})"


def kind_of(row: Row) -> str:
    """Return the row's key in `STYLES`."""
    if row.source == MEASURED and not row.finished:
        return "measured here, training not finished"
    if row.source == MEASURED:
        return "measured here" if row.augmented else "measured here, without augmentation"
    return {True: "quoted", False: "quoted, without augmentation", None: "quoted, augmentation unknown"}[row.augmented]


if __name__ == "__main__":
    run_script(main, Args, __doc__)
