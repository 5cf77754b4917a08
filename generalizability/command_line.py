"""How the scripts here start and end: one line for what is wrong, and an exit code that says so."""

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist
import tyro

from models import InputError

Args = TypeVar("Args")


class LocalError(InputError):
    """An InputError that is raised in one of several processes, which speaks for itself whatever its rank."""


def run_script(main: Callable[[Args], int | None], arguments: type[Args], description: str) -> None:
    """Parse the command line into the dataclass `arguments`, call `main` with it, and exit with what it returns.

    Flags that cannot be parsed, and InputError, end the program with one line on stderr and exit code 2; Ctrl-C
    with exit code 130.
    """
    try:
        code = main(parse(arguments, description))
    except InputError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, LocalError):  # of several processes one speaks
            print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def parse(arguments: type[Args], description: str) -> Args:
    """The command line as `arguments`.

    Raises:
        InputError: what tyro says of flags that it cannot parse, in one line.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(arguments, description=description)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        frame = re.compile(r"\x1b\[[0-9;]*m|[╭╰╮╯│─]+")
        lines = [frame.sub(" ", line).strip() for line in said.getvalue().splitlines()]
        text = " ".join(" ".join(lines[1:]).split())
        text = re.split(r" (?:Argument helptext|For full helptext)", text)[0].rstrip(".")
        raise InputError(f"{text}; see --help") from None


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM raise SystemExit meanwhile, so that processes that were started are ended, too, and files closed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
