"""The page of reproduce.py: one HTML file with everything in it, from the results of the steps."""

import base64
import json
import re
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from reproduction.record import FINISHED, LEFT_OUT, Record, logs_folder, read_record
from reproduction.steps import EXPERIMENTS, LOG, Step, Table
from s3net_common.output_files import ROOT

STYLE = Path(__file__).with_name("page.css")
MEDIA = {".png": "image/png", ".svg": "image/svg+xml"}
NUMBER_CLASS = ' class="number"'
NUMBER = re.compile(r"[-+]?\*{0,2}[\d.,]+.*")

INTRODUCTION = (
    "The paper proposes a topology between a plain chain and a dense block: each layer reads only the layer before it, "
    "and its output takes one shortcut to the end of the block, where all outputs meet once. A block of L layers so "
    "has O(L) connections where a dense block has O(L²). This page was written by one command that ran the "
    "repository's scripts on the machine named below; beside every figure and table stands the command that made it."
)
QUESTIONS = {
    "expressibility": (
        "What can such a network represent, training luck aside? The paper compares infinitely wide networks, whose "
        "predictions a kernel gives exactly, and proves that one neuron a layer is enough."
    ),
    "generalizability": "Do convolutional networks with this topology classify unseen images well for their size?",
    "interpretability": "Where does the network look? Saliency maps that account for the output exactly.",
}


def write_page(path: Path, budget: str, steps: Sequence[Step], out: Path) -> None:
    """Write the page on what the steps have left in `out`, whole or not at all."""
    records = {step.name: read_record(out, step.name) for step in steps}
    topology = inline_picture(ROOT / "generalizability" / "results" / "topology.svg", "The sparse shortcut topology")
    parts = [
        "<h1>On a sparse shortcut topology: the whole story, measured</h1>",
        f'<p class="lead">{escape(INTRODUCTION)}</p>{topology}',
        '<p>The paper: <a href="https://arxiv.org/abs/1811.09003">arXiv 1811.09003</a>. '
        f"Budget: <b>{escape(budget)}</b>. Written on {datetime.now().astimezone():%d %B %Y, %H:%M %Z}.</p>",
        contents(steps, records),
    ]
    for experiment in EXPERIMENTS:
        own = [step for step in steps if step.experiment == experiment]
        parts.append(f'<h2 id="{experiment}">{experiment.capitalize()}</h2><p>{escape(QUESTIONS[experiment])}</p>')
        parts += [section(step, records[step.name], out) for step in own]
    document = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Sparse shortcut topology: '
        f"reproduction</title>\n<style>{STYLE.read_text()}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(document, encoding="utf-8")
    temporary.replace(path)


def contents(steps: Sequence[Step], records: dict[str, Record | None]) -> str:
    """The table of all steps: what became of each, and how long it took."""
    rows = []
    for step in steps:
        record = records[step.name]
        status = record.status if record else "not run yet"
        mark = f'<span class="{status.replace(" ", "-")}">{status}</span>'
        took = duration(record.seconds) if record and record.seconds else ""
        link = f'<a href="#{step.name}">{escape(step.title)}</a>'
        rows.append(f'<tr><td>{step.experiment}</td><td>{link}</td><td>{mark}</td><td class="number">{took}</td></tr>')
    total = duration(sum(record.seconds for record in records.values() if record))
    rows.append(f'<tr class="total"><td></td><td>all of it</td><td></td><td class="number">{total}</td></tr>')
    head = f"<tr><th>experiment</th><th>step</th><th>status</th><th{NUMBER_CLASS}>time</th></tr>"
    return f'<table class="contents">{head}{"".join(rows)}</table>'


def section(step: Step, record: Record | None, out: Path) -> str:
    """A step: what it shows, its pictures and tables, and how they were made."""
    parts = [f'<section id="{step.name}"><h3>{escape(step.title)}</h3><p>{escape(step.about)}</p>']
    if record is None:
        return parts[0] + '<p class="note">Not run yet.</p></section>'
    if record.status != FINISHED:
        what = record.reason or "the run was ended before it was done"
        parts.append(f'<p class="note">{record.status.capitalize()}: {escape(what)}</p>')
    if record.status != LEFT_OUT:
        parts += [shown(what, step, out) for what in step.shows]
        parts.append(provenance(record))
    return "\n".join(parts) + "</section>"


def provenance(record: Record) -> str:
    """The command, its time, the machine and the versions."""
    libraries = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    facts = " · ".join(escape(fact) for fact in (duration(record.seconds), record.machine, libraries) if fact)
    words = " ".join(f"<span>{escape(word)}</span>" for word in record.shown_command().split(" "))  # never broken at -
    return f'<div class="made"><code>{words}</code><br>{facts}</div>'


def shown(what: str | Table, step: Step, out: Path) -> str:
    """One picture, table or log; nothing where the step has not written it."""
    if what == LOG:
        path = logs_folder(out) / f"{step.name}.log"
        return f"<pre>{escape(path.read_text(errors='replace').strip())}</pre>" if path.is_file() else ""
    path = out / step.name / (what.file if isinstance(what, Table) else what)
    if not path.is_file():
        return ""
    try:
        return table_of_file(what, path) if isinstance(what, Table) else inline_picture(path, step.title)
    except (ValueError, UnidentifiedImageError):
        return f'<p class="note">{escape(path.name)} is damaged: delete the folder {step.name} and run again.</p>'


def table_of_file(table: Table, path: Path) -> str:
    """A table with its caption.

    Raises:
        ValueError: the file is damaged.
    """
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    text = path.read_text(encoding="utf-8")
    return caption + (markdown_tables(text) if table.rows is None else table_of_rows(table.rows(json.loads(text))))


def inline_picture(path: Path, description: str) -> str:
    """A picture as a data URI; one much wider than high, several panels side by side, scrolls on narrow screens.

    Raises:
        UnidentifiedImageError: the file is damaged.
    """
    data = base64.b64encode(path.read_bytes()).decode()
    width, height = (1, 1) if path.suffix == ".svg" else Image.open(path).size
    panels = ' class="panels"' if width > 2 * height else ""
    return f'<figure{panels}><img alt="{escape(description)}" src="data:{MEDIA[path.suffix]};base64,{data}"></figure>'


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


# ---- Tables -------------------------------------------------------------------------------------------------------


def table_of_rows(rows: Sequence[dict]) -> str:
    """Rows by column as an HTML table."""
    columns = list(rows[0])
    return html_table(
        [name.replace("_", " ") for name in columns], [[cell(row[name]) for name in columns] for row in rows]
    )


def cell(value: object) -> str:
    """A value as text: numbers with 4 significant digits, large integers in groups of three."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown_tables(text: str) -> str:
    """The part of Markdown that the scripts write, as HTML: headings, tables, paragraphs and bold."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if lines[0].startswith("#"):
            blocks.append(f"<h4>{escape(lines[0].lstrip('# '))}</h4>")
        elif lines[0].startswith("|"):
            blocks += [markdown_table(part) for part in split_tables(lines)]
        else:
            blocks.append(f'<p class="caption">{bold(escape(" ".join(lines)))}</p>')
    return "\n".join(blocks)


def split_tables(lines: Sequence[str]) -> list[list[str]]:
    """Lines of tables that follow each other: a table begins at the line before its rule."""
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"\|[\s:|-]+\|", line)]
    starts = [i - 1 for i in rules]
    return [list(lines[start:end]) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]


def markdown_table(lines: Sequence[str]) -> str:
    """A Markdown table: its head, a rule, and rows."""
    head, _, *rows = [[text.strip() for text in line.strip().strip("|").split("|")] for line in lines]
    return html_table(head, rows)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; columns of numbers are set to the right."""
    numbers = [all(NUMBER.fullmatch(text) or not text for text in column) for column in zip(*rows, strict=True)]
    lines = [html_row("th", head, numbers), *(html_row("td", row, numbers) for row in rows)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def html_row(kind: str, texts: Sequence[str], numbers: Sequence[bool]) -> str:
    """A row of `th` or `td` cells; in Markdown's bold where the text is."""
    cells = [
        f"<{kind}{NUMBER_CLASS if number else ''}>{bold(escape(text))}</{kind}>"
        for text, number in zip(texts, numbers, strict=True)
    ]
    return f"<tr>{''.join(cells)}</tr>"


def bold(text: str) -> str:
    """**Bold** of Markdown, in text that is escaped already."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
