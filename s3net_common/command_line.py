"""How every script starts and ends: typed flags, errors in one line, and the exit code. Imports no torch."""

import contextlib
import io
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from s3net_common import process_group
from s3net_common.errors import InputError, LocalError, printable

Args = TypeVar("Args")


def flag(kind: type, metavar: str | None, default: str) -> Any:
    """Return the type of an optional flag, for a field of a dataclass of flags.

    Args:
        kind: type of the value. The field's default is None, except for a tuple (the empty one) and a bool.
        metavar: what --help shows for the value; None for a bool, which is shown as --name/--no-name.
        default: what --help says about the default.
    """
    optional = kind if kind is bool or get_origin(kind) is tuple else kind | None
    return Annotated[optional, tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")]


def run_script(
    main: Callable[[Args], int | None],
    arguments: type[Args],
    description: str,
    is_positional: Callable[[str], bool] = lambda word: False,
) -> None:
    """Parse the command line into the dataclass `arguments`, call `main` with it, and exit with its result.

    `is_positional` is as in `positional_first`.

    Exit code 2, with one line on stderr: flags that cannot be parsed, an InputError, a missing package, a path that the
    system refuses (too long, no permission), or a stdout that cannot be written (a full disk, or a pipe whose reader
    has ended). Ctrl-C exits with 130. SIGTERM and SIGHUP raise SystemExit, so that temporary files are removed and
    child processes ended, and exit with 143 and 129.

    A distributed rank that fails ends at once, and prints its host and rank with the error.
    """
    if sys.stdout is None:  # closed by the program that started this one
        sys.stdout = io.StringIO()
    if "matplotlib" in sys.modules:  # pictures go to files, and there may be no display
        sys.modules["matplotlib"].use("Agg")
    failed = True
    try:
        with sigterm_as_exit():
            code = main(parse_flags(arguments, description, is_positional))
        sys.stdout.flush()  # an error here is still reported below
        failed = False
    except (InputError, ImportError) as error:
        _report(error)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except OSError as error:
        if error.filename is not None:  # set if a file could not be opened, never if an open one could not be written
            message = f"{printable(str(error.filename))} cannot be used ({error.strerror}): give another path"
        else:
            # Without this, the interpreter would try to write again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            message = f"the output cannot be written ({error.strerror}): give it a reader or room"
        _report(LocalError(message))
        code = 2
    except (SystemExit, Exception) as error:
        if not process_group.is_joined():
            raise
        if not isinstance(error, SystemExit):
            _report(error)
        code = error.code if isinstance(error, SystemExit) else 1
    if process_group.is_joined():
        if failed:
            process_group.end_alone(code)
        process_group.end_together()
    sys.exit(code)


def _report(error: BaseException) -> None:
    """Print an error on stderr; of several distributed ranks, one prints an error that concerns all of them."""
    if process_group.is_joined():
        line = process_group.error_line(error)
    else:
        silent = os.environ.get("RANK", "0") != "0" and not isinstance(error, LocalError)
        line = None if silent else f"error: {printable(' '.join(str(error).split()))}"
    if line:
        print(line, file=sys.stderr)


def parse_flags(
    arguments: type[Args], description: str, is_positional: Callable[[str], bool] = lambda word: False
) -> Args:
    """Parse the command line into the dataclass `arguments`. `is_positional` is as in `positional_first`.

    Raises:
        InputError: a flag is unknown, missing or has a value that cannot be parsed.
        SystemExit: after --help.
    """
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            words = positional_first(sys.argv[1:], arguments, is_positional)
            return tyro.cli(arguments, args=words, description=description)
    except SystemExit as stop:
        if not stop.code:  # --help
            sys.stdout.flush()
            raise
        frame = re.compile(r"\x1b\[[0-9;]*m|[╭╰╮╯│─]+|-{4,}")  # tyro draws a frame, of hyphens if the terminal is ASCII
        lines = [frame.sub(" ", line).strip() for line in message.getvalue().splitlines()]
        text = " ".join(" ".join(lines[1:]).split())
        text = re.split(r" (?:Argument helptext|For full helptext)", text)[0].rstrip(". ")
        text = re.sub(r"no type matching .* - <class '\w+'>: ", "", text)  # printed for optional flags
        raise InputError(f"{text}; see --help") from None


def positional_first(words: list[str], arguments: type, is_positional: Callable[[str], bool]) -> list[str]:
    """Return the words of a command line with the positional ones first, since tyro takes them in one place only.

    Args:
        words: the command line without the script.
        arguments: dataclass of flags. If it has no positional field, the words are returned unchanged.
        is_positional: whether a word after the first value of a flag with any number of values is positional.
    """
    hints = get_type_hints(arguments, include_extras=True)
    if not any(tyro.conf.Positional in getattr(hint, "__metadata__", ()) for hint in hints.values()):
        return words
    positional, rest, missing_values, first_value = [], [], 0.0, False
    for i, word in enumerate(words):
        if word == "--":
            positional += words[i + 1 :]
            break
        if word.startswith("--") or word == "-h":
            name, has_value, _ = word[2:].partition("=")
            missing_values = 0 if has_value else _value_count(hints.get(name.replace("-", "_"), bool))
            first_value = True
            rest.append(word)
        elif missing_values > 0 and (first_value or missing_values < math.inf or not is_positional(word)):
            missing_values -= 1
            first_value = False
            rest.append(word)
        else:
            positional.append(word)
    return positional + rest


def _value_count(hint: Any) -> float:
    """Return how many values a flag of this type has; infinity for any number."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is tuple:
        return math.inf if Ellipsis in get_args(hint) else len(get_args(hint))
    return 0 if hint is bool else 1


def given_flags(args: object) -> dict[str, Any]:
    """Return the flags that the user gave, by field name.

    A flag was given if its value differs from the field's default. A bool also counts as given if --name or
    --no-name is on the command line.
    """
    given = {}
    for field in fields(args):
        value, name = getattr(args, field.name), field.name.replace("_", "-")
        on_command_line = isinstance(value, bool) and not {f"--{name}", f"--no-{name}"}.isdisjoint(sys.argv)
        if value != field.default or on_command_line:
            given[field.name] = value
    return given


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit (143, 129) inside the context, so that `finally` blocks run.

    SIGHUP, of a terminal or connection that was closed, stays ignored for a command that was started with nohup.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows lacks SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if number == signal.SIGTERM or handler != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
