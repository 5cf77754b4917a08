"""How every script starts and ends: typed flags, errors in one line, and the exit code. Imports no torch."""

import contextlib
import errno
import io
import math
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from s3net_common import process_group
from s3net_common.errors import InputError, LocalError, first_line, printable
from s3net_common.launcher import is_distributed, is_first_rank
from s3net_common.limits import check_numbers, limit_threads
from s3net_common.output_files import ROOT
from s3net_common.terminal import OutputError, discard_output, safe_output

Args = TypeVar("Args")
NARROWEST = 40  # columns of a terminal that --help is laid out for


def flag(kind: type, metavar: str | None, default: str) -> Any:
    """Return the type of an optional flag, for a field of a dataclass of flags.

    Args:
        kind: type of the value. The field's default is None, except for a tuple (the empty one) and a bool.
        metavar: what --help shows for the value; None for a bool, which is shown as --name/--no-name.
        default: what --help says about the default.
    """
    optional = kind if kind is bool or get_origin(kind) is tuple else kind | None
    return Annotated[optional, tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")]


# Types of flags that several scripts have, with their help.
THREADS = Annotated[
    int | None,
    tyro.conf.arg(
        metavar="N",
        help_behavior_hint="(default: one a processor)",
        help="Threads to compute with. Beside other programs that compute, 1 can be many times as fast as all.",
    ),
]
OVERWRITE = Annotated[bool, tyro.conf.arg(help="Replace files in --out that this script did not write.")]


def answer_flags(
    arguments: type[Args], description: str, is_positional: Callable[[str], bool] = lambda word: False
) -> None:
    """Answer --help and refuse wrong flags, before the script imports PyTorch or JAX, which takes seconds.

    Call it between the dataclass of flags and these imports, if the script is run, and `run_script` at the end. It
    sets the number of threads, which the packages read when they are imported. Until `run_script` is called, Ctrl-C, a
    missing package and a variable JAX_... with an impossible value end the process without a traceback.
    """
    os.environ["MPLBACKEND"] = "agg"  # Jupyter exports a backend that may be missing here; pictures go to files
    with safe_output():
        code = _guarded(lambda: parse_flags(arguments, description, is_positional) and None)
    if code:
        sys.exit(code)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_import)
    sys.excepthook = _report_import_error


def check_copy() -> None:
    """Check that the script and this package are in the same copy of the repository.

    Raises:
        InputError: the script is in another clone or worktree than this package, which Python found as an installed
            package or on PYTHONPATH. Changes of the models.py beside the script would have no effect.
    """
    script = Path(sys.argv[0]).resolve()
    for folder in list(script.parents)[:2]:
        if (folder / "s3net_common" / "command_line.py").is_file() and not folder.samefile(ROOT):
            raise InputError(
                f"{script} would use the modules of another copy of this repository, {ROOT}: install the "
                f"script's own copy with pip install -e {shlex.quote(str(folder))}, or set "
                f"PYTHONPATH={shlex.quote(str(folder))}"
            )


def _report_import_error(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Report a package that cannot be imported in one line and exit with 2. Other errors keep their traceback."""
    text = str(error)
    if issubclass(kind, ImportError) or (issubclass(kind, ValueError) and re.search(r"\bjax_\w+|\bJAX_\w+", text)):
        missing = issubclass(kind, ModuleNotFoundError)
        advice = ": install the packages with pip install -r requirements.txt" if missing else ""
        if getattr(sys.flags, "safe_path", False):
            advice = ": unset PYTHONSAFEPATH and leave out -P, which hide the modules beside the script"
        _report(InputError(f"{text}{advice}"))
        os._exit(2)  # an exception hook cannot choose the exit code otherwise
    sys.__excepthook__(kind, error, trace)


def _end_import(number: int, frame: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(128 + number)


def run_script(
    main: Callable[[Args], int | None],
    arguments: type[Args],
    description: str,
    is_positional: Callable[[str], bool] = lambda word: False,
    resume: str = "",
) -> None:
    """Parse the command line into the dataclass `arguments`, call `main` with it, and exit with its result.

    `is_positional` is as in `positional_first`; `resume` says how to go on after Ctrl-C, if that is possible.

    Exit code 2, with one line on stderr: flags that cannot be parsed, an InputError, a missing package, a path that the
    system refuses (too long, no permission), or a stdout that cannot be written (a full disk, or a pipe whose reader
    has ended). Ctrl-C exits with 130. SIGTERM and SIGHUP raise SystemExit, so that temporary files are removed and
    child processes ended, and exit with 143 and 129.

    A distributed rank that fails ends at once, and prints its host and rank with the error.
    """
    os.environ["MPLBACKEND"] = "agg"
    sys.excepthook = sys.__excepthook__
    if "matplotlib" in sys.modules:
        sys.modules["matplotlib"].use("agg")
    if signal.getsignal(signal.SIGINT) == _end_import:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def run() -> int | None:
        with sigterm_as_exit():
            code = main(parse_flags(arguments, description, is_positional))
        sys.stdout.flush()  # an error here is still reported below
        return code

    with safe_output():
        code = _guarded(run, resume)
    sys.exit(code)


def _guarded(run: Callable[[], int | None], resume: str = "") -> int | None:
    """Call `run` and return its exit code, or report its error and return the error's. A rank that fails ends here."""
    failed = True
    try:
        code = run()
        failed = False
    except OutputError as error:
        discard_output()
        code = _report(error)
    except (InputError, ImportError) as error:
        code = _report(error)
    except KeyboardInterrupt:
        print("stopped" + (f"; {resume}" if resume else ""), file=sys.stderr)
        code = 130
    except SystemExit as stop:
        if stop.code == 128 + signal.SIGTERM and resume:
            print(f"stopped; {resume}", file=sys.stderr)
        if not process_group.is_joined():
            raise
        code = stop.code
    except Exception as error:
        if advice := _advice(error):
            code = _report(LocalError(advice))
        elif process_group.is_joined() or (is_distributed() and "torch" in sys.modules):
            _report(error, is_rank=True)
            code = 1
        else:
            raise
    if process_group.is_joined():
        if failed:
            process_group.end_alone(code)
        process_group.end_together()
    return code


def _report(error: Exception, is_rank: bool = False) -> int:
    """Print an error on stderr and return the exit code. Of several ranks, one reports what all of them found.

    `is_rank`: print host and rank also before the ranks have joined.
    """
    if process_group.is_joined() or is_rank:
        line = process_group.error_line(error)
    else:
        prints = is_first_rank() or isinstance(error, LocalError)
        line = f"error: {printable(' '.join(str(error).split()))}" if prints else None
    if line:
        print(line, file=sys.stderr)
    return 2


def _advice(error: Exception) -> str:
    """Return what to do about an error of the system or about memory that ran out; an empty text for other errors."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        return _refusal(error)
    if isinstance(error, RuntimeError) and re.search(r"DataLoader worker .*(exited unexpectedly|killed)", text):
        return (
            f"a process that decodes images has ended ({first_line(error)}); often memory ran out: use fewer --workers "
            "or a smaller --batch-size. A training run continues with --resume"
        )
    words = r"out of memory|not enough memory|can't allocate memory|bad_alloc|Unable to allocate"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(words, text)):
        return f"memory ran out ({first_line(error)[:150]}): use a smaller --batch-size, --image-size or network"
    return ""


def _refusal(error: OSError) -> str:
    """Return what the system refused and what helps."""
    advice = {
        errno.ENOSPC: "make room on the disk",
        errno.EDQUOT: "make room on the disk",
        errno.EMFILE: "raise their limit (ulimit -n 65536), or use fewer workers",
        errno.ENOMEM: "use smaller sizes, or fewer workers",
    }.get(error.errno, "give another path" if error.filename else "look at the machine's disks and limits")
    place = f"{printable(str(error.filename))} cannot be used" if error.filename else "the system refused an operation"
    return f"{place} ({error.strerror}): {advice}"


def parse_flags(
    arguments: type[Args], description: str, is_positional: Callable[[str], bool] = lambda word: False
) -> Args:
    """Parse the command line into the dataclass `arguments`. `is_positional` is as in `positional_first`.

    Raises:
        InputError: a flag is unknown, missing or has a value that cannot be parsed, or the script is in another copy
            of the repository (see `check_copy`).
        SystemExit: after --help.
    """
    check_copy()
    message, help_text = io.StringIO(), io.StringIO()
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)  # tyro needs some room for its columns, else it never ends
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(help_text):
            words = positional_first(sys.argv[1:], arguments, is_positional)
            args = tyro.cli(arguments, args=words, description=description)
    except SystemExit as stop:
        if not stop.code:  # --help
            print(ascii_frame(help_text.getvalue()), end="", flush=True)
            raise
        frame = re.compile(r"[╭╰╮╯│─]+|-{4,}")  # tyro draws a frame, of hyphens if the terminal is ASCII
        lines = [frame.sub(" ", line).strip() for line in message.getvalue().splitlines()]
        text = " ".join(" ".join(lines[1:]).split())
        text = re.split(r" (?:Argument helptext|For full helptext)", text)[0].rstrip(". ")
        text = re.sub(r"no type matching .* - <class '\w+'>: ", "", text)  # printed for optional flags
        if re.match(r"Unrecognized options?: --local[-_]rank", text):
            text = "torch.distributed.launch passes --local-rank: start the script with torchrun instead"
        raise InputError(f"{text}; see --help") from None
    check_numbers(vars(args))
    limit_threads(getattr(args, "threads", None))
    return args


def ascii_frame(text: str) -> str:
    """Return the text with the frame that tyro draws around it, in characters that stdout's encoding has."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return text.translate(str.maketrans("╭╰╮╯│─", "++++|-"))
    return text


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
