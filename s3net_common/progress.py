"""Progress of long work: a bar on a terminal, and a line every few minutes elsewhere, such as in a batch job's log."""

import os
import sys
import time
from typing import Any

from tqdm import tqdm

from s3net_common.errors import printable

MARK = "... "  # at the beginning of a line, to tell it from results
SECONDS = "S3NET_PROGRESS_SECONDS"  # environment variable: the interval of the lines, 180 by default


class ProgressBar(tqdm):
    """A tqdm bar on stderr. If stderr is no terminal, a line is printed every few minutes instead.

    The arguments are those of tqdm, except that `disable=None` is not needed.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._prints_lines = not sys.stderr.isatty()
        self._seconds = float(os.environ.get(SECONDS, 180))
        self._printed = time.monotonic()
        if "desc" in options:
            options["desc"] = printable(options["desc"])
        if self._prints_lines:
            options |= {"leave": False, "miniters": 1}
        super().__init__(*args, **options)

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        super().set_description(printable(desc or ""), refresh)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self._prints_lines:
            return super().display(msg, pos)
        if msg is None and time.monotonic() - self._printed >= self._seconds:
            self._printed = time.monotonic()
            print(MARK + self.line(), file=sys.stderr, flush=True)
        return False

    def clear(self, nolock: bool = False) -> None:
        if not self._prints_lines:
            super().clear(nolock)

    def line(self) -> str:
        """Return the progress as text: what, how much of the total, speed, time left and what the caller adds."""
        state = self.format_dict
        done, total, seconds = state["n"], state["total"], state["elapsed"]
        rate = state["rate"] or (done - state["initial"]) / max(seconds, 1e-9)
        things = self.unit + ("es" if self.unit.endswith(("s", "ch")) else "s")
        parts = [f"{done:,} of {total:,} {things}" if total else f"{done:,} {things}"]
        if rate > 0:
            parts.append(f"{rate:.3g} a second")
            if total:
                parts.append(f"{self.format_interval((total - done) / rate)} left")
        parts += [state["postfix"]] if state["postfix"] else []
        return (f"{self.desc.removesuffix(': ')}: " if self.desc else "") + ", ".join(parts)
