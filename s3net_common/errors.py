"""Errors that users can correct, and helpers for their messages. Imports the standard library only."""

import difflib
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

TOO_MANY_FILES = "too many open files: raise their limit (ulimit -n 65536), or use fewer workers"


class InputError(ValueError):
    """User input that cannot be used. The message is one line: what is wrong and what to do."""


class LocalError(InputError):
    """An InputError that concerns one distributed rank. That rank prints it; all others stay silent."""


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" with the known names closest to `name`, or a list of all known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"give one of {', '.join(sorted(known))}"


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message without a final period, or its class's name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def shown(value: object) -> str:
    """Return a value for a message: its repr in one line of at most 60 characters."""
    return " ".join(repr(value).split())[:60]


def printable(text: str | Path) -> str:
    """Return a text or path for messages, with its control characters and undecodable bytes escaped.

    No terminal obeys them then. All kinds of space are kept.
    """
    decoded = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in decoded
    )
