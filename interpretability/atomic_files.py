"""Output files that are there whole or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from models import InputError


def make_folder(folder: Path) -> Path:
    """Make the folder and its parents; returns it.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): pass another --out") from error
    return folder


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, then move the result there.

    Raises:
        InputError: it cannot be written; what was at `path` is still there.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}): pass another --out") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))
