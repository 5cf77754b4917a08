"""Table of compare_results.py: its rows, and how they are written as Markdown and CSV."""

import csv
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields

from s3net_common.output_files import csv_cell

TITLES = {
    "cifar100": "CIFAR-100",
    "tinyimagenet": "Tiny ImageNet",
    "imagenet": "ImageNet",
    "digits": "scikit-learn's digits",
    "folder": "images in folders",
}
# Sources of a row: this repository, the paper's authors, a paper that the authors cite, or its other results.
MEASURED, PAPER, CITED_PAPER = "measured here", "quoted (paper)", "quoted (cited in the paper)"
ADDED = "quoted (not in the paper)"
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
    "augmentation",
    "source",
)
NUMERIC_COLUMNS = slice(2, 9)  # aligned to the right


@dataclass
class Row:
    """One row of the table. Errors are in percent. None means unknown or not applicable.

    Attributes:
        dataset: name as in train_s3net.py; None if the results do not contain it.
        network, setting: what was trained, and what distinguishes it from other rows of the network.
        source: MEASURED, PAPER, CITED_PAPER or ADDED.
        parameters: as printed in the paper for its rows, else equal to `code_parameters`.
        code_parameters: parameters of the network that the code builds.
        multiply_adds: for one image.
        last_error, last_top5_error: after the last epoch, mean over seeds; for a quoted network its only error.
        best_error, best_top5_error: at the epoch with the lowest top-1 error.
        last_error_std, best_error_std: standard deviation over seeds, for two or more.
        interval_low, interval_high: 95% interval of `last_error` over images, of one finished run or of a
            validate_10crop.py result.
        epochs_done, epochs: finished and planned epochs of a run.
        seeds: seeds of the runs in this row.
        finished: whether the run reached its last epoch.
        prints_fewer: whether the paper prints fewer parameters than its code builds.
        augmented: whether the training images were cropped and flipped at random; None if unknown.
        looked_up: where a quoted error was looked up, as `PaperRow.source`.
        runs: paths of the runs or results.
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
    augmented: bool | None = True
    looked_up: str | None = None
    runs: list[str] = field(default_factory=list)


def title(dataset: str | None) -> str:
    """Return the title of a data set."""
    return TITLES.get(dataset, dataset or "unnamed data set")


@dataclass(frozen=True)
class Footnote:
    """A remark on the cells of one column: which rows it applies to, and its text for those rows."""

    column: str
    applies: Callable[[Row], bool]
    text: Callable[[list[Row]], str]


FOOTNOTES = [
    Footnote(
        "parameters",
        lambda row: row.prints_fewer,
        lambda rows: (
            "The paper prints fewer parameters than the published code and this repository build: "
            + "; ".join(f"{row.setting}: {row.code_parameters:,}" for row in rows)
            + "."
        ),
    ),
    Footnote(
        "parameters",
        lambda row: row.source != MEASURED and row.parameters is not None and row.parameters == row.code_parameters,
        lambda rows: "Not printed in the paper: counted in the network that the published code builds, 1000 outputs.",
    ),
    Footnote(
        "multiply-adds",
        lambda row: row.source != MEASURED and row.multiply_adds is not None,
        lambda rows: "Not printed in the paper: counted in this repository's network of the same setting.",
    ),
    Footnote(
        "error %",
        lambda row: row.augmented is False,
        lambda rows: "Trained without augmentation: not comparable with networks trained with random crops and flips.",
    ),
    Footnote(
        "error %",
        lambda row: row.looked_up == "",
        lambda rows: "Not checked: the table of the cited paper could not be looked up.",
    ),
    Footnote(
        "error %",
        lambda row: ": " in (row.looked_up or ""),
        lambda rows: "Looked up: " + "; ".join(f"{row.network}, {row.looked_up}" for row in rows) + ".",
    ),
    Footnote(
        "error %",
        lambda row: row.interval_low is not None,
        lambda rows: "With the 95% interval over the images (Wilson score). It does not cover another seed.",
    ),
]


def markdown_section(dataset: str | None, rows: list[Row]) -> str:
    """Return a data set's heading, table and footnotes."""
    used = [note for note in FOOTNOTES if any(note.applies(row) for row in rows)]
    rules = ["---"] * len(COLUMNS)
    rules[NUMERIC_COLUMNS] = ["--:"] * len(rules[NUMERIC_COLUMNS])
    lines = [f"## {title(dataset)}", "", f"| {' | '.join(COLUMNS)} |", f"|{'|'.join(rules)}|"]
    for row in rows:
        cells = row_cells(row)
        for number, note in enumerate(used, start=1):
            cells[note.column] += f" [{number}]" if note.applies(row) else ""
        lines.append(f"| {' | '.join(cells[column] for column in COLUMNS)} |")
    lines += [
        "",
        "Runs: the error is that after the last epoch, the best error that at the epoch with the lowest top-1 error. "
        "Several seeds: mean ± standard deviation.",
    ]
    for number, note in enumerate(used, start=1):
        lines += ["", f"[{number}] {note.text([row for row in rows if note.applies(row)])}"]
    return "\n".join(lines)


def row_cells(row: Row) -> dict[str, str]:
    """Return the text of a row's cells, by column."""
    error = percent(row.last_error, row.last_error_std)
    if row.interval_low is not None:
        error += f" ({row.interval_low:.2f} to {row.interval_high:.2f})"
    return {
        "network": row.network,
        "setting": row.setting,
        "parameters": large_number(row.parameters),
        "multiply-adds": large_number(row.multiply_adds),
        "error %": error,
        "best error %": percent(row.best_error, row.best_error_std),
        "top-5 error %": percent(row.last_top5_error),
        "epochs": epochs_cell(row),
        "seeds": str(len(row.seeds)) if row.seeds else "",
        "augmentation": {True: "yes", False: "no", None: "unknown"}[row.augmented],
        "source": row.source if row.finished else f"{row.source}, unfinished",
    }


def epochs_cell(row: Row) -> str:
    """Return the epochs of a run that has ended, or which of its epochs it has reached."""
    if row.epochs is None:
        return ""
    return str(row.epochs) if row.finished else f"epoch {row.epochs_done} of {row.epochs}"


def percent(value: float | None, deviation: float | None = None) -> str:
    """Return an error with its standard deviation, if there is one."""
    if value is None:
        return ""
    return f"{value:.2f}" if deviation is None else f"{value:.2f} ± {deviation:.2f}"


def large_number(value: float | None) -> str:
    """Return a number in thousands (k), millions (M) or billions (G)."""
    if value is None:
        return ""
    if value < 1e5:
        return f"{value / 1e3:.1f}k"
    return f"{value / 1e9:.1f}G" if value >= 1e9 else f"{value / 1e6:.2f}".removesuffix("0") + "M"


def csv_text(rows: list[Row]) -> str:
    """Return all attributes of all rows as CSV. The items of a list are separated by spaces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row) | {"seeds": " ".join(map(str, row.seeds)), "runs": " ".join(row.runs)}
        writer.writerow({name: csv_cell(cell) if isinstance(cell, str) else cell for name, cell in values.items()})
    return text.getvalue()
