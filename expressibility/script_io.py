"""What every script here does alike: its command line, its errors and its output files."""

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import matplotlib

REPOSITORY = Path(__file__).resolve().parents[1]
Args = TypeVar("Args")


class InputError(Exception):
    """The user's input can't be used; the message says what is wrong and what to do, in one line."""


def run(main: Callable[[Args], None], arguments: type[Args]) -> None:
    """Parses the command line into the dataclass `arguments` and calls `main` with it.

    What is wrong with the input, the environment or the output folder ends the program with one line on
    stderr and exit code 2.
    """
    import tyro  # here, so that the notebook can use this file's errors without a command-line library

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(arguments, description=sys.modules["__main__"].__doc__)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        sys.exit(_fail(f"{_without_frame(complaint.getvalue())}; see --help"))
    matplotlib.use("Agg")  # pictures go to files, and there may be no display
    try:
        main(parsed)
    except (InputError, ImportError) as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _without_frame(complaint: str) -> str:
    """What tyro says inside its box of several lines, without the option's help text."""
    lines = [line for line in complaint.splitlines() if "╭" not in line]
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m|[╰╯│─]", " ", " ".join(lines)).split())
    return re.split(r" Argument helptext| For full helptext", text)[0].rstrip(". ")


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def default_out(name: str) -> Path:
    """Where a script writes if it isn't told: runs/`name` in the repository, which git ignores."""
    return REPOSITORY / "runs" / name


def output_folder(path: Path) -> Path:
    """Creates the folder and tries to write in it, before anything is computed.

    Raises:
        InputError: it can't be created or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"cannot write in {path} ({error.strerror}): choose another folder with --out") from None
    return path


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place once it is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another folder with --out") from None
    finally:
        partial.unlink(missing_ok=True)


def save_json(path: Path, results: dict[str, Any]) -> None:
    """Writes `results`, the command that made them and the versions it ran with."""
    script = Path(sys.argv[0]).resolve()
    inside = script.is_relative_to(REPOSITORY)
    shown = script.relative_to(REPOSITORY).as_posix() if inside else script.name
    record = {"command": shlex.join(["python", shown, *sys.argv[1:]]), "versions": versions(), **results}
    with _replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def save_figure(path: Path, figure: Any) -> None:
    """Writes a matplotlib figure as PNG."""
    with _replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=130)


def versions() -> dict[str, str]:
    """Python, and the packages that numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in ("jax", "neural-tangents", "numpy", "scipy", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
