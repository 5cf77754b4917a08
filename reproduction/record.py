"""The record of a step, kept next to its log. With it, finished steps are skipped and the page is written."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from s3net_common.output_files import write_json

FINISHED, FAILED, LEFT_OUT, UNFINISHED = "finished", "failed", "left out", "unfinished"


@dataclass
class Record:
    """The state of one step.

    Attributes:
        command: the program, the script and its arguments.
        status: FINISHED, FAILED, LEFT_OUT or UNFINISHED.
        seconds: time spent on this command, over all attempts.
        reason: one line that says why the step failed or was left out.
        machine: the processor and the GPUs.
        versions: versions of Python and of the installed packages.
    """

    command: list[str]
    status: str = UNFINISHED
    seconds: float = 0.0
    reason: str = ""
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def logs_folder(out: Path) -> Path:
    """Return the folder of the steps' logs and records."""
    return out / "logs"


def read_record(out: Path, name: str) -> Record | None:
    """Return the record of a step, or None if it is missing or damaged."""
    try:
        return Record(**json.loads((logs_folder(out) / f"{name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_record(out: Path, name: str, record: Record) -> None:
    """Write the record of a step.

    Raises:
        InputError: the file cannot be written.
    """
    write_json(logs_folder(out) / f"{name}.json", asdict(record))
