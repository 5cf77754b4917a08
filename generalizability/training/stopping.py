"""When a run looks for a request to stop: about every two seconds, at the same step on all ranks."""

import errno
import os
import signal
import time

import torch.distributed as dist

from distributed import Ranks

try:
    import termios
except ImportError:  # Windows
    termios = None

SECONDS = 2.0  # between two looks


class StopSignal:
    """Records that Ctrl-C, SIGTERM or SIGHUP arrived. A second Ctrl-C raises KeyboardInterrupt.

    A process whose parent has ended counts as stopped by SIGTERM: when torchrun is killed, its ranks would go on.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.received, self.parent = 0.0, os.getppid()
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows lacks SIGHUP
            number = getattr(signal, name, None)
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # with nohup
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        # A terminal sends the same Ctrl-C to this process and to torchrun, which sends it again.
        if number == signal.SIGINT == self.number and time.monotonic() - self.received > 1:
            raise KeyboardInterrupt
        if self.number is None:
            self.number, self.received = number, time.monotonic()
        _silence_closed_terminal()

    def __call__(self) -> bool:
        """Whether a signal arrived, or the parent process has ended."""
        if self.number is None and os.getppid() != self.parent:
            self.number = signal.SIGTERM
        return self.number is not None


def _silence_closed_terminal() -> None:
    """Send the output nowhere if it is a terminal that was closed: printing would be an error."""
    if termios is None:
        return
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # and ENOTTY for a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class Stopped(Exception):
    """A rank was asked to stop. Raised on all ranks at the same step, after the checkpoint was saved."""


class Agreement:
    """Lets all ranks exchange numbers about every `SECONDS` without a message at each step.

    The ranks count their steps. The number of steps between two exchanges follows from the duration on the slowest
    rank, which is part of the exchange, and is therefore the same on all of them.

    Args:
        ranks: the distributed ranks.
        every_step: exchange at every step.
    """

    def __init__(self, ranks: Ranks, every_step: bool = False) -> None:
        self.ranks, self.every_step = ranks, every_step
        self.interval, self.steps, self.started = 1, 0, time.perf_counter()

    def is_due(self) -> bool:
        """Count a step. Return whether it is time for an exchange."""
        self.steps += 1
        return self.steps >= self.interval

    def largest(self, *values: float) -> list[float]:
        """Return the largest of each value over all ranks. All ranks must call it after the same number of steps."""
        seconds = time.perf_counter() - self.started
        *values, seconds = self.ranks.reduce([*values, seconds], dist.ReduceOp.MAX)
        if not self.every_step:
            fitting = int(self.steps * SECONDS / max(seconds, 1e-9))
            self.interval = max(1, min(fitting, 4 * self.interval))
        self.steps, self.started = 0, time.perf_counter()
        return values
