"""Report of same_budget.py: results.json, tables.md and figures, from the folders of its finished runs."""

import json
import shlex
import statistics
from collections.abc import Callable, Iterable
from itertools import combinations, cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from comparison.adoption import torch_version
from comparison.intervals import mean_interval
from comparison.jobs import ENVIRONMENT_SETTINGS, TRAINER, Job
from s3net_common.output_files import ROOT, save_figure, shell_command, write_atomically, write_json

RECORDED = [  # what results.json takes from a run's summary.json
    "model",
    "model_options",
    "seed",
    "epochs",
    "parameters",
    "multiply_adds",
    "last_val_error",
    "last_val_top5_error",
    "best_val_error",
    "best_epoch",
    "total_seconds",
    "precision",
    "device",
    "versions",
]
MARKERS = "osD^vP"  # of the networks, so that figures need no colours
REPORT_FILES = ("results.json", "tables.md", "search.png", "curves.png", "ablation.png")
HEADINGS = {
    "search": "#### Search for the peak learning rate: error on held-out training images, %",
    "comparison": "#### Comparison, each network with its best peak: errors on the test images after the last epoch",
    "ablation": "#### Ablation of the shortcuts: errors on the test images after the last epoch",
}
DIFFERENCES = "#### Mean differences of the errors in the comparison, paired by seed, in percentage points"


def write_report(out: Path, jobs: dict[str, dict[tuple, Job]], peaks: dict[str, float]) -> None:
    """Write and print the results of all finished jobs.

    Args:
        out: folder to write to.
        jobs: for "search" and "ablation" the jobs by network and peak, for "comparison" by network and seed.
        peaks: the peak learning rate chosen for each network.
    """
    rows = {
        part: [result_row(network, job) for (network, _), job in part_jobs.items() if job.finished()]
        for part, part_jobs in jobs.items()
    }
    unfinished = sum(not job.finished() for part_jobs in jobs.values() for job in part_jobs.values())
    facts = {"peaks": peaks, "peaks_to_add": peaks_to_add(rows["search"]), "unfinished_runs": unfinished}
    facts |= {"differences": seed_differences(rows["comparison"]), "torch": values_by_part(rows, torch_version)}
    facts["precision"] = values_by_part(rows, lambda run: run["precision"] or "unknown")
    write_json(out / "results.json", {"command": shell_command(), **facts, **rows})
    writers = {"search": search_table, "comparison": comparison_table, "ablation": ablation_table}
    tables = "\n".join(f"{HEADINGS[part]}\n\n{write(rows[part])}" for part, write in writers.items() if rows[part])
    if facts["differences"]:
        tables += f"\n{DIFFERENCES}\n\n{differences_table(facts['differences'])}"
    tables += "".join(f"\n{line}\n" for line in notes(facts))
    write_atomically(out / "tables.md", lambda path: path.write_text(tables, encoding="utf-8"))
    figures = {
        "search": ("search.png", draw_search),
        "comparison": ("curves.png", draw_comparison),
        "ablation": ("ablation.png", draw_ablation),
    }
    for part, (name, draw) in figures.items():
        if rows[part]:
            save_figure(out / name, draw(rows[part]), dpi=110)
    print(tables)
    print(f"written to {out}" + (f"; {unfinished} runs are not finished" if unfinished else ""))


def result_row(network: str, job: Job) -> dict:
    """Return a run's entry in results.json: its settings, summary, command and curves."""
    summary = job.summary()
    history = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    command = ["python", TRAINER.relative_to(ROOT).as_posix(), *job.flags(excluded=ENVIRONMENT_SETTINGS)]
    return {
        "network": network,
        "peak_lr": job.settings["lr"],
        **{name: summary[name] for name in RECORDED},
        "images_per_second": round(statistics.median(line["images_per_second"] for line in history), 1),
        "command": shlex.join(command),
        "undisturbed_seconds": round(undisturbed_seconds(history, job.settings.get("early_epochs", 0)), 2),
        "val_error": [round(line["val_error"], 3) for line in history],
        "train_error": [round(line["train_error"], 3) for line in history],
    }


def undisturbed_seconds(history: list[dict], early_epochs: int) -> float:
    """Return the seconds of a run if all epochs with images of one size had taken as long as the fastest of them."""
    parts = [line["seconds"] for line in history[:early_epochs]], [line["seconds"] for line in history[early_epochs:]]
    return sum(len(part) * min(part) for part in parts if part)


# ---- What follows from the runs -----------------------------------------------------------------------------------


def peaks_to_add(search: list[dict]) -> dict[str, float]:
    """Return the next peak, by a factor of 2, of each network whose best one is at the edge of those tried."""
    following = {}
    for name, runs in by_network(search):
        best = min(runs, key=lambda run: run["last_val_error"])["peak_lr"]
        tried = [run["peak_lr"] for run in runs]
        if best in (min(tried), max(tried)):
            following[name] = best / 2 if best == min(tried) and len(tried) > 1 else 2 * best
    return following


def seed_differences(comparison: list[dict], reference: str | None = None) -> list[dict]:
    """Return the mean difference of every two networks' last errors over their common seeds, in percentage points.

    The 95% interval is Student's; it is None for a single seed. The corrected one has Bonferroni's correction for the
    number of differences. With `reference`, only this network's error minus that of each other one is returned.
    """
    errors = {name: {run["seed"]: run["last_val_error"] for run in runs} for name, runs in by_network(comparison)}
    pairs = {
        (first, second): seeds
        for first, second in combinations(errors, 2)
        if reference in (None, first) and (seeds := sorted(errors[first].keys() & errors[second].keys()))
    }
    rows = []
    for (first, second), seeds in pairs.items():
        differences = [errors[first][seed] - errors[second][seed] for seed in seeds]
        pair = {"first": first, "second": second, "seeds": seeds, "mean": statistics.mean(differences)}
        pair["interval"] = mean_interval(differences)
        rows.append(pair | {"corrected_interval": mean_interval(differences, means=len(pairs))})
    return rows


def values_by_part(rows: dict[str, list[dict]], value: Callable[[dict], str]) -> dict[str, list[str]]:
    """Return the different values that the runs of each part have, in order."""
    return {part: sorted(set(map(value, runs))) for part, runs in rows.items()}


def notes(facts: dict) -> list[str]:
    """Return the lines under the tables: peaks to add, mixed versions or number formats."""
    lines = [
        f"{name}: the best peak is at the edge of those that were tried; add {peak:g}."
        for name, peak in facts["peaks_to_add"].items()
    ]
    lines += [
        f"The runs of the {part} have different {kind}: {', '.join(values)}."
        for kind, by_part in (("versions of PyTorch", facts["torch"]), ("number formats", facts["precision"]))
        for part, values in by_part.items()
        if len(values) > 1
    ]
    return lines


# ---- Tables -------------------------------------------------------------------------------------------------------


def search_table(rows: list[dict]) -> str:
    """Return a Markdown table of the held-out error by network and peak learning rate."""
    peaks = sorted({row["peak_lr"] for row in rows})
    lines = ["| network | " + " | ".join(f"peak {peak:g}" for peak in peaks) + " |", table_rule(len(peaks))]
    lines += [f"| {name} | " + " | ".join(errors_by_peak(runs, peaks)) + " |" for name, runs in by_network(rows)]
    return "\n".join(lines) + "\n"


def errors_by_peak(runs: list[dict], peaks: list[float]) -> list[str]:
    """Return a network's last error at each peak, a dash if there is none. The lowest of several errors is bold."""
    errors = {run["peak_lr"]: run["last_val_error"] for run in runs}
    cells = {peak: f"{error:.2f}" for peak, error in errors.items()}
    if len(errors) > 1:
        best = min(errors, key=errors.get)
        cells[best] = f"**{cells[best]}**"
    return [cells.get(peak, "–") for peak in peaks]


def comparison_table(rows: list[dict]) -> str:
    """Return a Markdown table of the error, size, cost and speed of each network, over its seeds."""
    lines = [
        "| network | peak lr | seeds | error, % | top-5 error, % | parameters | multiply-adds | images/s | hours | "
        "hours at the speed of the fastest epoch |",
        table_rule(9),
    ]
    for name, runs in by_network(rows):
        images_per_second = statistics.median(run["images_per_second"] for run in runs)
        hours = statistics.median(run["total_seconds"] for run in runs) / 3600
        undisturbed = statistics.median(run["undisturbed_seconds"] for run in runs) / 3600
        lines.append(
            f"| {name} | {runs[0]['peak_lr']:g} | {len(runs)} | {mean_and_deviation(runs, 'last_val_error')} | "
            f"{mean_and_deviation(runs, 'last_val_top5_error')} | {' | '.join(size_cells(runs[0]))} | "
            f"{images_per_second:.0f} | {hours:.2f} | {undisturbed:.2f} |"
        )
    return "\n".join(lines) + "\n"


def differences_table(differences: list[dict]) -> str:
    """Return a Markdown table of the rows of `seed_differences`, with their intervals."""
    correction = f" with Bonferroni's correction for {len(differences)} differences |" if len(differences) > 1 else ""
    lines = [f"| | seeds | mean difference | 95% interval |{correction}", table_rule(4 if correction else 3)]
    for row in differences:
        intervals = [row["interval"], row["corrected_interval"]] if correction else [row["interval"]]
        cells = ["{:+.2f} to {:+.2f}".format(*interval) if interval else "–" for interval in intervals]
        names = f"{row['first']} minus {row['second']}"
        lines.append(f"| {names} | {len(row['seeds'])} | {row['mean']:+.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ablation_table(rows: list[dict]) -> str:
    """Return a Markdown table of the size of each kind of connections, and its error at each peak learning rate."""
    peaks = sorted({row["peak_lr"] for row in rows})
    errors = " | ".join(f"test error, %, peak {peak:g}" for peak in peaks)
    lines = [f"| connections | parameters | multiply-adds | {errors} |", table_rule(2 + len(peaks))]
    for name, runs in by_network(rows):
        lines.append(f"| {name} | " + " | ".join([*size_cells(runs[0]), *errors_by_peak(runs, peaks)]) + " |")
    return "\n".join(lines) + "\n"


def table_rule(numeric_columns: int) -> str:
    """Return the line under a table's head, for a column of names and right-aligned columns of numbers."""
    return "|---|" + "--:|" * numeric_columns


def size_cells(run: dict) -> list[str]:
    """Return the table cells for a network's parameters and multiply-adds."""
    return [f"{run['parameters']:,}", f"{run['multiply_adds'] / 1e6:.1f}M"]


def mean_and_deviation(runs: list[dict], key: str) -> str:
    """Return the mean over the runs and, for two or more, their standard deviation."""
    values = [run[key] for run in runs]
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def by_network(rows: Iterable[dict]) -> list[tuple[str, list[dict]]]:
    """Return each network's name and runs, in the order of first appearance."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["network"], []).append(row)
    return list(groups.items())


# ---- Figures ------------------------------------------------------------------------------------------------------


def draw_search(rows: list[dict]) -> Figure:
    """Draw the held-out error against the peak learning rate."""
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, runs), marker in zip(by_network(rows), cycle(MARKERS), strict=False):
        runs = sorted(runs, key=lambda run: run["peak_lr"])
        axes.plot([run["peak_lr"] for run in runs], [run["last_val_error"] for run in runs], marker=marker, label=name)
    ticks = sorted({row["peak_lr"] for row in rows})
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="error on held-out training images (%)")
    axes.set_title("Search for the peak learning rate", fontsize="medium")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure


def draw_comparison(
    rows: list[dict],
    title: str = "Comparison, each network with its best peak learning rate",
    images: str = "test images",
) -> Figure:
    """Draw the validation and training error of each network by epoch, one line for each seed.

    `images`: what the networks were validated on.
    """
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    for axes, quantity, name in zip(
        figure.subplots(1, 2, sharey=True),
        ("val_error", "train_error"),
        (images, "training images"),
        strict=True,
    ):
        draw_curves(axes, by_network(rows), quantity)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("epoch")
    figure.suptitle(title)
    figure.axes[0].set_ylabel("top-1 error (%)")
    figure.axes[0].legend()
    return figure


def draw_ablation(rows: list[dict]) -> Figure:
    """Draw the error of each kind of connections, at its best peak: by epoch, and the last one against parameters."""
    peaks = {row["peak_lr"] for row in rows}
    rows = [min(runs, key=lambda run: run["last_val_error"]) for _, runs in by_network(rows)]
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    choice = "each with its best peak learning rate" if len(peaks) > 1 else f"peak learning rate {min(peaks):g}"
    figure.suptitle(f"Ablation of the shortcuts, {choice}")
    curves, sizes = figure.subplots(1, 2, sharey=True)
    draw_curves(curves, by_network(rows), "val_error")
    curves.set(xlabel="epoch", ylabel="top-1 error on test images (%)")
    curves.set_title("by epoch", fontsize="medium")
    curves.legend(fontsize="small")
    for row, marker in zip(rows, cycle(MARKERS), strict=False):
        sizes.plot(row["parameters"], row["last_val_error"], marker, markersize=8)
    sizes.set(xscale="log", xlabel="parameters")
    sizes.set_title("after the last epoch, markers as on the left", fontsize="medium")
    sizes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    sizes.xaxis.set_major_formatter(EngFormatter(sep=""))
    sizes.xaxis.set_minor_formatter(NullFormatter())
    sizes.margins(x=0.2, y=0.1)
    sizes.grid(alpha=0.3)
    return figure


def draw_curves(axes: Axes, groups: list[tuple[str, list[dict]]], quantity: str) -> None:
    """Draw one line for each run, with the colour and the marker of its network."""
    for i, ((name, runs), marker) in enumerate(zip(groups, cycle(MARKERS), strict=False)):
        style = {"color": f"C{i}", "alpha": 0.8, "marker": marker, "markersize": 4, "markevery": 3}
        for j, run in enumerate(runs):
            epochs = range(1, len(run[quantity]) + 1)
            axes.plot(epochs, run[quantity], label=name if j == 0 else None, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
