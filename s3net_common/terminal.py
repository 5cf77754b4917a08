"""What a script prints: any name in any encoding, and no commands to the terminal. Imports no torch."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from s3net_common.errors import LocalError, printable

BAR_CONTROLS = "\r|\x1b\\[A"  # what a progress bar writes: to the line's start, and one line up


class OutputError(LocalError):
    """Stdout cannot be written: its disk is full, or the program that read it has ended."""


class SafeStream:
    """A text stream that escapes what its encoding lacks and what a terminal would obey.

    Args:
        stream: where the text goes.
        controls: regular expression of the controls that are kept besides line ends and tabs.
        required: whether a failure to write is an OutputError. Else it is ignored.
    """

    def __init__(self, stream: TextIO, controls: str = "", required: bool = True) -> None:
        with contextlib.suppress(AttributeError, ValueError):  # a replacement, or a closed stream
            stream.reconfigure(errors="backslashreplace")
        self._stream, self._required = stream, required
        self._parts = re.compile(f"([\n\t]+{controls and '|' + controls})")

    def write(self, text: str) -> int:
        parts = self._parts.split(text)  # the controls stand at odd places
        with self._errors():
            self._stream.write("".join(part if i % 2 else printable(part) for i, part in enumerate(parts)))
        return len(text)

    def flush(self) -> None:
        with self._errors():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if self._required:
                reason = getattr(error, "strerror", None) or "it is closed"
                raise OutputError(f"the output cannot be written ({reason}): give it a reader or room") from error


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Make stdout and stderr `SafeStream`s inside the context. Streams that are closed or absent lead nowhere."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        sys.stdout = SafeStream(before[0] or nowhere)
        sys.stderr = SafeStream(before[1] or nowhere, BAR_CONTROLS, required=False)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def discard_output() -> None:
    """Send the rest of stdout nowhere. Otherwise, the interpreter would try to write it again at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a replacement without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
