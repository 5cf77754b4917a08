"""How the scripts here start and end: one line for what is wrong, and an exit code that says so."""

import contextlib
import gc
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, TypeVar

import torch.distributed as dist
import tyro

from models import InputError

Args = TypeVar("Args")


class LocalError(InputError):
    """An InputError that is raised in one of several processes, which speaks for itself whatever its rank."""


def flag(kind: type, shown: str, default: str) -> type:
    """The type of a flag that may be left out; --help shows `shown` for its value and says what it then is."""
    return Annotated[kind | None, tyro.conf.arg(metavar=shown, help_behavior_hint=f"(default: {default})")]


def run_script(main: Callable[[Args], int | None], arguments: type[Args], description: str) -> None:
    """Parse the command line into the dataclass `arguments`, call `main` with it, and exit with what it returns.

    Flags that cannot be parsed, InputError, and a stdout that cannot be written (a full disk, a pipe whose reader is
    gone) end the program with one line on stderr and exit code 2; Ctrl-C with exit code 130.
    """
    if sys.stdout is None:  # whoever started the program closed it
        sys.stdout = io.StringIO()
    try:
        code = main(parse(arguments, description))
        sys.stdout.flush()  # while there is still someone to handle its error
    except InputError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, LocalError):  # of several processes one speaks
            print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except OSError as error:
        if error.filename is not None:  # of opening a file; writing to an open one knows no name
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would try again at its end
        print(f"error: the output cannot be written ({error.strerror}): give it a reader or room", file=sys.stderr)
        code = 2
    if dist.is_initialized():
        # A distributed network, which is part of reference cycles, keeps the threads of the process group. One of them
        # that frees a tensor while the interpreter shuts down aborts the process.
        gc.collect()
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
            sys.stdout.flush()
            raise
        frame = re.compile(r"\x1b\[[0-9;]*m|[╭╰╮╯│─]+|-{4,}")  # the last where the terminal has ASCII only
        lines = [frame.sub(" ", line).strip() for line in said.getvalue().splitlines()]
        text = " ".join(" ".join(lines[1:]).split())
        text = re.split(r" (?:Argument helptext|For full helptext)", text)[0].rstrip(".")
        text = re.sub(r"no type matching .* - <class '\w+'>: ", "", text)  # of a flag that may also be left out
        raise InputError(f"{text}; see --help") from None


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM raise SystemExit meanwhile, so that processes that were started are ended, too, and files closed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
