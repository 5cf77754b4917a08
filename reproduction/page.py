"""The HTML page of reproduce.py, from the results of the steps. The page needs no other file and no network.

The template is page.html. It shows a list of blocks for each step. A block is a dict with its `kind` ("picture",
"table", "heading", "caption", "note" or "log") and the values that the template inserts.
"""

import base64
import json
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from PIL import Image, UnidentifiedImageError

from reproduction.record import FINISHED, LEFT_OUT, Record, logs_folder, read_record
from reproduction.steps import LOG, Step, Table
from s3net_common.output_files import ROOT, write_atomically
from s3net_common.progress import MARK

Block = dict[str, Any]
MEDIA_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
NUMBER = re.compile(r"[-+]?\*{0,2}[\d.,]+.*")
QUESTIONS = {
    "expressibility": (
        "Which functions can networks with this topology represent, apart from the randomness of training? The paper "
        "compares networks of infinite width, whose predictions follow exactly from a kernel, and proves that one "
        "neuron per layer is enough."
    ),
    "generalizability": (
        "How well do convolutional networks with this topology classify unseen images, given their size?"
    ),
    "interpretability": (
        "Which pixels does the network use? FullGrad computes saliency maps whose terms add up to the network's output."
    ),
}


def write_page(path: Path, budget: str, steps: Sequence[Step], out: Path) -> None:
    """Write the page on the results of the steps in `out`.

    Raises:
        InputError: the file cannot be written.
    """
    sections = [section(step, read_record(out, step.name), out) for step in steps]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bold": bold, "duration": duration}
    document = environment.get_template("page.html").render(
        budget=budget,
        date=f"{datetime.now().astimezone():%d %B %Y, %H:%M %Z}",
        topology=picture(ROOT / "generalizability" / "results" / "topology.svg", "The sparse shortcut topology"),
        questions=QUESTIONS,
        sections=sections,
        seconds=sum(section["record"].seconds for section in sections if section["record"]),
    )
    write_atomically(path, lambda temporary: temporary.write_text(document, encoding="utf-8"))


def section(step: Step, record: Record | None, out: Path) -> dict[str, Any]:
    """Return what the template shows of a step: its record, blocks, command (as words) and facts about its run."""
    blocks, command, facts = [], [], []
    if record is None:
        blocks.append(note("Not run yet."))
    elif record.status != FINISHED:
        blocks.append(note(f"{record.status.capitalize()}: {record.reason or 'the run was ended before it was done'}"))
    if record is not None and record.status != LEFT_OUT:
        blocks += [block for shown in step.shows for block in result_blocks(shown, step, out)]
        command = shlex.join(record.command).split(" ")  # the template keeps each word on one line
        packages = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        facts = [fact for fact in (duration(record.seconds), record.machine, packages) if fact]
    return {"step": step, "record": record, "blocks": blocks, "command": command, "facts": facts}


def result_blocks(shown: str | Table, step: Step, out: Path) -> list[Block]:
    """Return the blocks of a picture, table or log, or no blocks if the step has not written it."""
    if shown == LOG:
        path = logs_folder(out) / f"{step.name}.log"
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        text = "\n".join(line for line in lines if not line.startswith(MARK)).strip()
        return [{"kind": "log", "text": text}] if path.is_file() else []
    path = out / step.name / (shown.file if isinstance(shown, Table) else shown)
    if not path.is_file():
        return []
    try:
        return table_blocks(shown, path) if isinstance(shown, Table) else [picture(path, step.title)]
    except (ValueError, UnidentifiedImageError):
        return [note(f"{path.name} is damaged: delete the folder {step.name} and run again.")]


def note(text: str) -> Block:
    """Return a highlighted paragraph."""
    return {"kind": "note", "text": text}


def picture(path: Path, description: str) -> Block:
    """Return a picture as a data URI. A picture much wider than high has several panels, and scrolls on small screens.

    Raises:
        UnidentifiedImageError: the file is damaged.
    """
    data = base64.b64encode(path.read_bytes()).decode()
    width, height = (1, 1) if path.suffix == ".svg" else Image.open(path).size
    source = f"data:{MEDIA_TYPES[path.suffix]};base64,{data}"
    return {"kind": "picture", "description": description, "source": source, "panels": width > 2 * height}


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def bold(text: str) -> Markup:
    """Return text as HTML, with Markdown's **bold** as `<b>`."""
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(text))))


# ---- Tables -------------------------------------------------------------------------------------------------------


def table_blocks(table: Table, path: Path) -> list[Block]:
    """Return the blocks of a table and its caption.

    Raises:
        ValueError: the file is damaged.
    """
    caption = [{"kind": "caption", "text": table.caption}] if table.caption else []
    text = path.read_text(encoding="utf-8")
    return caption + (markdown_blocks(text) if table.rows is None else [table_of_rows(table.rows(json.loads(text)))])


def table_of_rows(rows: Sequence[dict]) -> Block:
    """Return a table of rows by column title."""
    columns = list(rows[0])
    return table_block(
        [name.replace("_", " ") for name in columns], [[cell_text(row[name]) for name in columns] for row in rows]
    )


def cell_text(value: object) -> str:
    """Return a value as text: floats with 4 significant digits, integers with a comma at the thousands."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown_blocks(text: str) -> list[Block]:
    """Return the blocks of the Markdown that the scripts write: headings, tables and paragraphs."""
    blocks = []
    for part in re.split(r"\n\s*\n", text.strip()):
        lines = part.splitlines()
        if lines[0].startswith("#"):
            blocks.append({"kind": "heading", "text": lines[0].lstrip("# ")})
        elif lines[0].startswith("|"):
            blocks += [markdown_table(table) for table in split_tables(lines)]
        else:
            blocks.append({"kind": "caption", "text": " ".join(lines)})
    return blocks


def split_tables(lines: Sequence[str]) -> list[list[str]]:
    """Return the lines of each of several consecutive tables. A table starts on the line before its rule."""
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"\|[\s:|-]+\|", line)]
    starts = [i - 1 for i in rules]
    return [list(lines[start:end]) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]


def markdown_table(lines: Sequence[str]) -> Block:
    """Return a table from its Markdown lines: head, rule and rows."""
    head, _, *rows = [[text.strip() for text in line.strip().strip("|").split("|")] for line in lines]
    return table_block(head, rows)


def table_block(head: list[str], rows: list[list[str]]) -> Block:
    """Return a table. Columns that contain only numbers are marked; the template aligns them to the right.

    Raises:
        ValueError: the rows differ in length.
    """
    columns = list(zip(head, *rows, strict=True))
    numeric = [all(NUMBER.fullmatch(text) or not text for text in column[1:]) for column in columns]
    return {"kind": "table", "head": head, "rows": rows, "numeric": numeric}
