"""What same_budget.py found: results.json, tables.md and the pictures, from the folders of its finished runs."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from comparison.jobs import read_summary
from s3net_common.output_files import write_atomically

if TYPE_CHECKING:
    from comparison.jobs import Job

KEPT = [
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
HEADINGS = {
    "search": "#### Search for the peak learning rate: error on held-out training images, %",
    "comparison": "#### Comparison, each network with its best peak: errors on the test images after the last epoch",
    "ablation": "#### Ablation of the shortcuts: errors after the last epoch",
}


def write_report(out: Path, jobs: "dict[str, dict[tuple, Job]]", peaks: dict[str, float]) -> None:
    """Write everything that the finished ones of the jobs allow.

    Args:
        out: folder to write to.
        jobs: for "search" and "ablation" the jobs by network and peak, for "comparison" by network and seed.
        peaks: the peak learning rate chosen for each network.
    """
    rows = {
        part: [row(network, job) for (network, _), job in of.items() if job.finished()] for part, of in jobs.items()
    }
    unfinished = sum(not job.finished() for of in jobs.values() for job in of.values())
    results = {"peaks": peaks, "unfinished_runs": unfinished, **rows}
    write_atomically(out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    writers = {"search": search_table, "comparison": comparison_table, "ablation": ablation_table}
    tables = "\n".join(f"{HEADINGS[part]}\n\n{write(rows[part])}" for part, write in writers.items() if rows[part])
    write_atomically(out / "tables.md", lambda path: path.write_text(tables))
    for part, draw in (("search", draw_search), ("comparison", draw_comparison), ("ablation", draw_ablation)):
        if rows[part]:
            name = "curves.png" if part == "comparison" else f"{part}.png"
            write_atomically(out / name, lambda path, d=draw, p=part: save_figure(d(rows[p]), path))
    print(tables)
    print(f"written to {out}" + (f"; {unfinished} runs are still to be done" if unfinished else ""))


def row(network: str, job: "Job") -> dict:
    """A run's line of results.json: what it was, its summary, its command and its curves."""
    summary = read_summary(job.folder)
    history = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    pairs = zip(job.flags[::2], job.flags[1::2], strict=True)
    flags = [part for flag, value in pairs if flag not in ("--out", "--data-dir", "--device") for part in (flag, value)]
    return {
        "network": network,
        "peak_lr": float(job.flags[job.flags.index("--lr") + 1]),
        **{name: summary[name] for name in KEPT},
        "images_per_second": round(statistics.median(line["images_per_second"] for line in history), 1),
        "command": " ".join(["python train_s3net.py", *flags]),
        "val_error": [round(line["val_error"], 3) for line in history],
        "train_error": [round(line["train_error"], 3) for line in history],
    }


# ---- Tables -------------------------------------------------------------------------------------------------------


def search_table(rows: list[dict]) -> str:
    """Held-out error by network and peak learning rate."""
    peaks = sorted({row["peak_lr"] for row in rows})
    lines = ["| network | " + " | ".join(f"peak {peak:g}" for peak in peaks) + " |", rule(len(peaks))]
    lines += [f"| {name} | " + " | ".join(errors_by_peak(of, peaks)) + " |" for name, of in by_network(rows)]
    return "\n".join(lines) + "\n"


def errors_by_peak(rows: list[dict], peaks: list[float]) -> list[str]:
    """One network's last error at each peak learning rate, the lowest of several in bold; a dash for a missing one."""
    errors = {row["peak_lr"]: row["last_val_error"] for row in rows}
    cells = {peak: f"{error:.2f}" for peak, error in errors.items()}
    if len(errors) > 1:
        best = min(errors, key=errors.get)
        cells[best] = f"**{cells[best]}**"
    return [cells.get(peak, "–") for peak in peaks]


def comparison_table(rows: list[dict]) -> str:
    """Error, size, cost and speed of each network, over its seeds."""
    lines = [
        "| network | peak lr | seeds | error, % | top-5 error, % | parameters | multiply-adds | images/s | hours |",
        rule(8),
    ]
    for name, of in by_network(rows):
        lines.append(
            f"| {name} | {of[0]['peak_lr']:g} | {len(of)} | {spread(of, 'last_val_error')} | "
            f"{spread(of, 'last_val_top5_error')} | {of[0]['parameters']:,} | {of[0]['multiply_adds'] / 1e6:.1f}M | "
            f"{statistics.median(r['images_per_second'] for r in of):.0f} | "
            f"{statistics.median(r['total_seconds'] for r in of) / 3600:.2f} |"
        )
    return "\n".join(lines) + "\n"


def ablation_table(rows: list[dict]) -> str:
    """Size of each kind of connections, and its error at each peak learning rate."""
    peaks = sorted({row["peak_lr"] for row in rows})
    errors = " | ".join(f"test error, %, peak {peak:g}" for peak in peaks)
    lines = [f"| connections | parameters | multiply-adds | {errors} |", rule(2 + len(peaks))]
    for name, of in by_network(rows):
        cells = [f"{of[0]['parameters']:,}", f"{of[0]['multiply_adds'] / 1e6:.1f}M", *errors_by_peak(of, peaks)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rule(numbers: int) -> str:
    """The line under a table's head: a name and so many numbers."""
    return "|---|" + "--:|" * numbers


def spread(rows: list[dict], key: str) -> str:
    """Mean and, of several seeds, standard deviation."""
    values = [row[key] for row in rows]
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def by_network(rows: Iterable[dict]) -> list[tuple[str, list[dict]]]:
    """The rows of each network, in the order of first appearance."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["network"], []).append(row)
    return list(groups.items())


# ---- Pictures -----------------------------------------------------------------------------------------------------


def draw_search(rows: list[dict]) -> Figure:
    """Held-out error against the peak learning rate."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, of in by_network(rows):
        of = sorted(of, key=lambda row: row["peak_lr"])
        axes.plot([row["peak_lr"] for row in of], [row["last_val_error"] for row in of], marker="o", label=name)
    ticks = sorted({row["peak_lr"] for row in rows})
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="error on held-out training images (%)")
    axes.set_title("Search for the peak learning rate", fontsize="medium")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_comparison(rows: list[dict]) -> Figure:
    """Validation and training error of each network over the epochs, a line for each seed."""
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    for axes, quantity, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("val_error", "train_error"),
        ("test images", "training images"),
        strict=True,
    ):
        draw_curves(axes, by_network(rows), quantity)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("epoch")
    figure.suptitle("Comparison, each network with its best peak learning rate")
    figure.axes[0].set_ylabel("top-1 error (%)")
    figure.axes[0].legend()
    return figure


def draw_ablation(rows: list[dict]) -> Figure:
    """Error of each kind of connections, with its better peak, over the epochs, and at the end against parameters."""
    rows = [min(of, key=lambda row: row["last_val_error"]) for _, of in by_network(rows)]
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    figure.suptitle("Ablation of the shortcuts, each with the better of its peak learning rates")
    curves, sizes = figure.subplots(1, 2, sharey=True)
    draw_curves(curves, by_network(rows), "val_error")
    curves.set(xlabel="epoch", ylabel="top-1 error on test images (%)")
    curves.set_title("over the epochs", fontsize="medium")
    curves.legend(fontsize="small")
    for row in rows:
        sizes.plot(row["parameters"], row["last_val_error"], "o")
    sizes.set(xscale="log", xlabel="parameters")
    sizes.set_title("after the last epoch, in the same colours", fontsize="medium")
    sizes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    sizes.xaxis.set_major_formatter(EngFormatter(sep=""))
    sizes.xaxis.set_minor_formatter(NullFormatter())
    sizes.margins(x=0.2, y=0.1)
    sizes.grid(alpha=0.3)
    return figure


def draw_curves(axes: Axes, groups: list[tuple[str, list[dict]]], quantity: str) -> None:
    """A colour for each network, a line for each of its runs."""
    for i, (name, of) in enumerate(groups):
        for j, row in enumerate(of):
            label = name if j == 0 else None
            axes.plot(range(1, len(row[quantity]) + 1), row[quantity], color=f"C{i}", label=label, alpha=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def save_figure(figure: Figure, path: Path) -> None:
    """As PNG."""
    figure.savefig(path, dpi=110)
