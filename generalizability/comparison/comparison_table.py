"""The table of compare_results.py: its rows, and how they look as Markdown and CSV."""

import csv
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields

TITLES = {
    "cifar100": "CIFAR-100",
    "tinyimagenet": "Tiny ImageNet",
    "imagenet": "ImageNet",
    "digits": "scikit-learn's digits",
    "folder": "images in folders",
}
MEASURED, TRAINED_THERE, QUOTED_THERE = "measured here", "quoted (paper)", "quoted there from its own paper"
COLUMNS = (
    "network",
    "setting",
    "parameters",
    "multiply-adds",
    "error %",
    "best error %",
    "top-5 error %",
    "epochs",
    "seeds",
    "source",
)
RIGHT = slice(2, 9)  # the columns of numbers


@dataclass
class Row:
    """One line of the table. Errors are in percent; None is unknown, or does not apply.

    Attributes:
        dataset: as train_s3net.py names it; None where the results do not say.
        network, setting: what was trained, and what tells it from others of the network.
        source: MEASURED, TRAINED_THERE or QUOTED_THERE.
        parameters: as the paper prints them for its rows, else those of the code.
        code_parameters: those of the code.
        multiply_adds: for one image.
        last_error, last_top5_error: after the last epoch, the mean over seeds; the only error of a quoted network.
        best_error, best_top5_error: at the epoch of the lowest top-1 error.
        last_error_std, best_error_std: standard deviation over seeds, for two or more.
        interval_low, interval_high: the 95% interval of `last_error` over images, of a validate_10crop.py result.
        epochs_done, epochs: of a run.
        seeds: of the runs in this row.
        finished: whether the run came to its last epoch.
        prints_fewer: whether the paper prints fewer parameters than its code has.
        runs: where it was read.
    """

    dataset: str | None
    network: str
    setting: str
    source: str
    parameters: float | None = None
    code_parameters: int | None = None
    multiply_adds: int | None = None
    last_error: float | None = None
    last_error_std: float | None = None
    best_error: float | None = None
    best_error_std: float | None = None
    last_top5_error: float | None = None
    best_top5_error: float | None = None
    interval_low: float | None = None
    interval_high: float | None = None
    epochs_done: int | None = None
    epochs: int | None = None
    seeds: list[int] = field(default_factory=list)
    finished: bool = True
    prints_fewer: bool = False
    runs: list[str] = field(default_factory=list)


def title(dataset: str | None) -> str:
    """A data set's name for people."""
    return TITLES.get(dataset, dataset or "images of no named data set")


@dataclass(frozen=True)
class Footnote:
    """A remark on the cells of one column: on which rows, and its text for those rows."""

    column: str
    applies: Callable[[Row], bool]
    text: Callable[[list[Row]], str]


FOOTNOTES = [
    Footnote(
        "parameters",
        lambda row: row.prints_fewer,
        lambda rows: (
            "The paper prints fewer parameters than its code, and ours, builds: "
            + "; ".join(f"{row.setting}: {row.code_parameters:,}" for row in rows)
            + "."
        ),
    ),
    Footnote(
        "parameters",
        lambda row: row.source != MEASURED and row.parameters is not None and row.parameters == row.code_parameters,
        lambda rows: "Counted in the network that the published code builds, with 1000 outputs.",
    ),
    Footnote(
        "multiply-adds",
        lambda row: row.source != MEASURED and row.multiply_adds is not None,
        lambda rows: "Not the paper's: counted here, in our network of the same setting.",
    ),
    Footnote(
        "error %",
        lambda row: row.interval_low is not None,
        lambda rows: "With the 95% interval over the images (Wilson score).",
    ),
]


def markdown_section(dataset: str | None, rows: list[Row]) -> str:
    """A data set's heading, table and footnotes."""
    used = [note for note in FOOTNOTES if any(note.applies(row) for row in rows)]
    rules = ["---"] * len(COLUMNS)
    rules[RIGHT] = ["--:"] * len(rules[RIGHT])
    lines = [f"## {title(dataset)}", "", f"| {' | '.join(COLUMNS)} |", f"|{'|'.join(rules)}|"]
    for row in rows:
        shown = cells(row)
        for number, note in enumerate(used, start=1):
            shown[note.column] += f" [{number}]" if note.applies(row) else ""
        lines.append(f"| {' | '.join(shown[column] for column in COLUMNS)} |")
    lines += ["", "Errors of runs: after the last epoch, and at the epoch of the lowest; mean ± deviation over seeds."]
    for number, note in enumerate(used, start=1):
        lines += ["", f"[{number}] {note.text([row for row in rows if note.applies(row)])}"]
    return "\n".join(lines)


def cells(row: Row) -> dict[str, str]:
    """A row as the table shows it, by column."""
    error = percent(row.last_error, row.last_error_std)
    if row.interval_low is not None:
        error += f" ({row.interval_low:.2f} to {row.interval_high:.2f})"
    return {
        "network": row.network,
        "setting": row.setting,
        "parameters": count(row.parameters),
        "multiply-adds": count(row.multiply_adds),
        "error %": error,
        "best error %": percent(row.best_error, row.best_error_std),
        "top-5 error %": percent(row.last_top5_error),
        "epochs": "" if row.epochs is None else f"{row.epochs_done}/{row.epochs}",
        "seeds": str(len(row.seeds)) if row.seeds else "",
        "source": row.source if row.finished else f"{row.source}, unfinished",
    }


def percent(value: float | None, deviation: float | None = None) -> str:
    """An error, with its standard deviation where there is one."""
    if value is None:
        return ""
    return f"{value:.2f}" if deviation is None else f"{value:.2f} ± {deviation:.2f}"


def count(value: float | None) -> str:
    """A large number in thousands, millions or billions."""
    if value is None:
        return ""
    if value < 1e5:
        return f"{value / 1e3:.1f}k"
    return f"{value / 1e9:.1f}G" if value >= 1e9 else f"{value / 1e6:.2f}".removesuffix("0") + "M"


def csv_text(rows: list[Row]) -> str:
    """Every attribute of every row; lists with spaces between their items."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row) | {"seeds": " ".join(map(str, row.seeds)), "runs": " ".join(row.runs)}
        writer.writerow(values)
    return text.getvalue()
