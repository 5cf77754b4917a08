"""How the scripts here end: one line for what is wrong with the input, and exit code 2."""

import contextlib
import io
import re
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from models import InputError

Args = TypeVar("Args")


def run_main(main: Callable[[Args], None], arguments: type[Args], description: str) -> None:
    """Parse the command line into the dataclass `arguments` and call `main` with it.

    Flags that cannot be parsed, and InputError, end the program with one line on stderr and exit code 2; Ctrl-C
    with exit code 130.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = tyro.cli(arguments, description=description)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        sys.exit(_fail(_unframed(said.getvalue()) + "; see --help"))
    try:
        main(args)
    except InputError as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _unframed(said: str) -> str:
    """What tyro says inside its frame of several lines, without its title and the flag's help text."""
    lines = [re.sub(r"\x1b\[[0-9;]*m|[╭╰╮╯│─]+", " ", line) for line in said.splitlines()[1:]]
    return re.split(r" (?:Argument helptext|For full helptext)", " ".join(" ".join(lines).split()))[0].rstrip(".")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
