r"""Report on long runs as they stand, also before they have ended: their errors with intervals, and their curves.

    python generalizability/run_report.py runs/cifar100-s3net_cifar-s0 runs/cifar100-resnet20_cifar-s0
    python generalizability/run_report.py RUN... --out generalizability/results/cifar100_200_epochs \
        --update README.md generalizability/README.md

Copies configuration, metrics and notes of each run to --out, and writes report.json, report.md and curves.png beside
them. --update replaces the parts of Markdown files between <!-- report NAME --> and <!-- /report -->, where NAME is
runs (a table and a statement), epochs (a table) or cell (a statement for a cell of a table). The same command with
newer runs brings everything up to date.

The interval of an error is about the choice of the test images. It does not cover another seed. A run that has not
ended is never compared with the paper's error.
"""

import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from s3net_common.command_line import OVERWRITE, answer_flags, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import (
    claim_folder,
    default_out,
    figure_text,
    json_line,
    relative,
    run_record,
    save_figure,
    write_atomically,
    write_json,
)


@dataclass
class Args:
    """Report on long runs as they stand: their errors with intervals, and their curves."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Folders of runs of train_s3net.py on one data set."""
    out: Path = field(default_factory=lambda: default_out("run_report"))
    """Folder for the report, and for copies of the runs' metrics."""
    update: tuple[Path, ...] = ()
    """Markdown files whose marked parts are replaced."""
    overwrite: OVERWRITE = False


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import numpy as np
from matplotlib.figure import Figure

from comparison.intervals import interval_of_percent
from comparison.paper_tables import PAPER_ROWS
from comparison.runs import DEFAULTS, Run, read_json, read_run
from recipes import RECIPES, recipe_for
from training.config import config_from_json, shell_command_of

FILES = ("report.json", "report.md", "curves.png")


def main(args: Args) -> None:
    """Read the runs, write the report and update the Markdown files.

    Raises:
        InputError: a path is no run, a run has no epoch, two runs have one name, or a Markdown file has no such parts.
    """
    runs = [read_run(path) for path in args.runs]
    check_runs(runs)
    rows = [report_row(run) for run in runs]
    pages = {path: updated(path, parts(runs, rows, relative_name(args.out, path.parent))) for path in args.update}
    claim_folder(args.out, *FILES, overwrite=args.overwrite)
    for run in runs:
        copy_run(run, args.out / run.path.resolve().name)
    write_json(args.out / "report.json", run_record() | {"runs": rows})
    save_figure(args.out / "curves.png", draw_curves(runs), dpi=110)
    report = parts(runs, rows, ".")
    pages[args.out / "report.md"] = f"{report['runs'].strip()}\n\n{report['epochs'].strip()}\n"
    for path, text in pages.items():
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    print(pages[args.out / "report.md"])
    print(f"written to {relative(args.out)}: {', '.join(FILES)}", *(f"; updated {path}" for path in args.update))


def check_runs(runs: list[Run]) -> None:
    """Raise an InputError if there is nothing to report, or the runs cannot stand in one report."""
    if not runs:
        raise InputError("give one or more runs: runs/cifar100-s3net_cifar-s0")
    for run in runs:
        if not run.history or not all({"lr", "train_error", "seconds"} <= row.keys() for row in run.history):
            raise InputError(f"{relative(run.path)} has no finished epoch with its metrics: train it first")
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names) or len({run.config["dataset"] for run in runs}) > 1:
        raise InputError("give runs on one data set, in folders with different names")


def copy_run(run: Run, folder: Path) -> None:
    """Copy configuration, metrics and note of a run, without the paths of its computer."""
    config = read_json(run.path / "config.json")
    config.pop("environment", None)
    write_json(folder / "config.json", config)
    lines = "".join(json_line(row) + "\n" for row in run.history)
    write_atomically(folder / "metrics.jsonl", lambda path: path.write_text(lines))
    if (run.path / "NOTE.txt").is_file():
        note = (run.path / "NOTE.txt").read_text(encoding="utf-8")
        write_atomically(folder / "NOTE.txt", lambda path: path.write_text(note, encoding="utf-8"))


def relative_name(folder: Path, start: Path) -> str:
    """Return the path of a folder as seen from another one, for a link."""
    return Path(os.path.relpath(folder.resolve(), start.resolve())).as_posix()


# ---- Numbers ------------------------------------------------------------------------------------------------------


def report_row(run: Run) -> dict:
    """Return what is known about a run: its errors in percent, their 95% intervals over the images, and its cost."""
    last, best, config = run.history[-1], run.best, run.config
    return {
        "run": run.path.resolve().name,
        "network": config["model"],
        "command": shell_command_of(config_from_json(config, run.path / "config.json")),
        **run.size,
        "seed": config["seed"],
        "finished": run.finished,
        "epochs_done": len(run.history),
        "epochs": config["epochs"],
        "epochs_left": config["epochs"] - len(run.history),
        "learning_rate": last["lr"],
        "next_milestone": next_milestone(run),
        "last_error": last["val_error"],
        "last_error_interval": interval_of_percent(last["val_error"], config["val_images"]),
        "last_top5_error": last["val_top5_error"],
        "last_train_error": last["train_error"],
        "best_error": best["val_error"],
        "best_epoch": best["epoch"],
        "hours": sum(row["seconds"] for row in run.history) / 3600,
        "paper_error": paper_error(run),
        **({"versions": run.summary["versions"]} if "versions" in run.summary else {}),
    }


def next_milestone(run: Run) -> int | None:
    """Return the epoch after which the learning rate is divided next; None if it is not, or in another schedule."""
    if run.config["schedule"] != "step":
        return None
    epochs = [round(share * run.config["epochs"]) for share in run.config["milestones"]]
    return next((epoch for epoch in epochs if epoch >= len(run.history)), None)


def paper_error(run: Run) -> float | None:
    """Return the error in the paper's row of this network and data set; None if it has none, or with another recipe."""
    if not follows_recipe(run.config):
        return None
    return next(
        (
            row.error
            for row in PAPER_ROWS
            if row.measured and row.dataset == run.config["dataset"] and row.code_parameters == run.size["parameters"]
        ),
        None,
    )


def follows_recipe(config: dict) -> bool:
    """Return whether a run trains and validates on all images, with the recipe of its data set and network."""
    recipe = asdict(recipe_for(config["dataset"], config["model"])) if config["dataset"] in RECIPES else {}
    expected = DEFAULTS | {"limit_train": None, "limit_val": None} | recipe
    free = {"accumulate", "sync_bn", "decode", "mean", "std"}  # they hardly change what is trained
    return bool(recipe) and all(
        np.array_equal(np.round(config[name], 9), np.round(value, 9))
        if isinstance(value, (float, tuple))
        else config[name] == value
        for name, value in expected.items()
        if name not in free
    )


# ---- Text ---------------------------------------------------------------------------------------------------------


def parts(runs: list[Run], rows: list[dict], folder: str) -> dict[str, str]:
    """Return the texts by the names of their places. `folder`: path of the report as seen from the Markdown file."""
    metrics = " ".join(f"{folder}/{row['run']}/metrics.jsonl" for row in rows)
    return {
        "runs": f"\n<!-- numbers: {folder}/report.json -->\n{runs_table(rows)}\n\n{statement(rows)}\n",
        "epochs": f"\n<!-- numbers: {metrics} -->\n{epochs_table(runs)}\n",
        "cell": " ".join(map(cell_statement, rows)),
    }


def runs_table(rows: list[dict]) -> str:
    """Return a Markdown table with a row for each run."""
    lines = [
        "| | parameters | epochs | learning rate | error, % (95% interval over the images) | top-5 error, % | "
        "training error, % | smallest error, % | hours |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        low, high = row["last_error_interval"]
        epochs = str(row["epochs"]) if row["finished"] else f"epoch {row['epochs_done']} of {row['epochs']}"
        lines.append(
            f"| `{row['network']}` | {row['parameters']:,} | {epochs} | {row['learning_rate']:g} | "
            f"{row['last_error']:.2f} ({low:.2f} to {high:.2f}) | {row['last_top5_error']:.2f} | "
            f"{row['last_train_error']:.2f} | {row['best_error']:.2f} (epoch {row['best_epoch']}) | "
            f"{row['hours']:.1f} |"
        )
    return "\n".join(lines)


def statement(rows: list[dict]) -> str:
    """Return what can be said about each run, and what cannot."""
    sentences = []
    for row in rows:
        name = f"`{row['network']}`"
        if row["finished"]:
            sentences.append(f"{name} has finished, with seed {row['seed']}{verdict(row)}.")
            continue
        until = f" until epoch {row['next_milestone']}" if row["next_milestone"] else ""
        sentences.append(
            f"**{name} has not finished**: {row['epochs_left']} of {row['epochs']} epochs are left, and the learning "
            f"rate is {row['learning_rate']:g}{until}. So its error is not one of the whole recipe"
            + (f", and says nothing yet about the paper's {row['paper_error']:.2f}%." if row["paper_error"] else ".")
        )
    return "\n".join(f"- {sentence}" for sentence in sentences)


def verdict(row: dict) -> str:
    """Return how the last error of a finished run compares with the paper's, or "" if the paper has none."""
    if row["paper_error"] is None:
        return ""
    low, high = row["last_error_interval"]
    word = "consistent" if low <= row["paper_error"] <= high else "not consistent"
    return (
        f": {row['last_error']:.2f}% ({low:.2f} to {high:.2f}) is {word} with the paper's {row['paper_error']:.2f}%, "
        "as far as one seed can show: the interval covers the test images and not the seed"
    )


def cell_statement(row: dict) -> str:
    """Return a run's error in one sentence."""
    name = f"`{row['network']}`"
    if row["finished"]:
        error = verdict(row) or f": {row['last_error']:.2f}%"
        return f"{name}, one run of {row['epochs']} epochs{error}."
    return (
        f"{name}, one run, not finished: {row['last_error']:.2f}% after {row['epochs_done']} of {row['epochs']} "
        f"epochs, {row['best_error']:.2f}% at best."
    )


def epochs_table(runs: list[Run]) -> str:
    """Return a Markdown table of the errors after some epochs: around each change of the rate, and the last ones."""
    epochs = max(run.config["epochs"] for run in runs)
    chosen = {1, 10, epochs} | {len(run.history) for run in runs}
    for run in runs:
        if run.config["schedule"] == "step":
            ends = [round(share * run.config["epochs"]) for share in run.config["milestones"]]
            chosen |= {epoch for end in ends for epoch in (end, end + 1)}
    titles = [f"`{run.config['model']}`: training error, % | test error, % | top-5 test error, %" for run in runs]
    lines = [f"| epoch | learning rate | {' | '.join(titles)} |", "|--:|--:|" + 3 * len(runs) * "--:|"]
    for epoch in sorted(chosen - {0}):
        reached = [run.history[epoch - 1] if epoch <= len(run.history) else None for run in runs]
        if not any(reached):
            continue
        cells = [
            " | ".join(f"{row[name]:.2f}" for name in ("train_error", "val_error", "val_top5_error"))
            if row
            else " | | "
            for row in reached
        ]
        rate = next(row["lr"] for row in reached if row)
        lines.append(f"| {epoch} | {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def updated(path: Path, texts: dict[str, str]) -> str:
    """Return the content of a Markdown file with its marked parts replaced.

    Raises:
        InputError: it is missing, or has no marked part, or one with an unknown name.
    """
    if not path.is_file():
        raise InputError(f"there is no {path}: give the Markdown files to update")
    pattern = re.compile(r"(<!-- report (\w+) -->)(.*?)(<!-- /report -->)", re.DOTALL)
    content = path.read_text(encoding="utf-8")
    names = [match[2] for match in pattern.finditer(content)]
    if not names or not set(names) <= texts.keys():
        raise InputError(f"{path} has no part between <!-- report {'|'.join(texts)} --> and <!-- /report -->")
    return pattern.sub(lambda match: match[1] + texts[match[2]] + match[4], content)


# ---- The figure ---------------------------------------------------------------------------------------------------


def draw_curves(runs: list[Run]) -> Figure:
    """Draw test and training error of each run over the epochs of its whole recipe, and the paper's error."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, quantity, title in zip(panels, ("val_error", "train_error"), ("test", "training"), strict=True):
        for run, style in zip(runs, ("-", "--", ":", "-.") * len(runs), strict=False):
            progress = "" if run.finished else f", epoch {len(run.history)} of {run.config['epochs']}"
            label = figure_text(f"{run.config['model']}{progress}")
            errors = [row[quantity] for row in run.history]
            axes.plot([row["epoch"] for row in run.history], errors, style, linewidth=1.3, label=label)
        axes.set(title=f"{title} images", xlabel="epoch", xlim=(0, max(run.config["epochs"] for run in runs)))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    known = {(run.config["model"], error) for run in runs if (error := paper_error(run))}
    for model, error in sorted(known):
        label = figure_text(f"{error:.2f}%: {model} in the paper, at the end")
        panels[0].axhline(error, color="gray", linewidth=1, linestyle=(0, (1, 2)), label=label)
    panels[0].set_ylabel("top-1 error (%)")
    panels[0].legend()
    return figure


if __name__ == "__main__":
    run_script(main, Args, __doc__)
