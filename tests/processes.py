"""Run Python programs in new processes, as users run them: on one thread, within a time that only a hang needs."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LIMIT_SECONDS = 300
THREADS = {"OMP_NUM_THREADS": "1", "NPROC": "1"}  # the latter is JAX's
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def run_python(*words: object, check: bool = False, **options: object) -> subprocess.CompletedProcess:
    """Run `python words...` and return its exit code and what it printed, as text.

    Args:
        words: a script and its flags, or "-c" and a program, or `*TORCHRUN`, "--nproc_per_node=2" and a script.
        check: whether the exit code must be 0.
        options: of subprocess.run. `env` is added to the environment of the tests.
    """
    done = subprocess.run(*_command(words, options), timeout=LIMIT_SECONDS, capture_output=True, **options)
    assert not check or done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


@contextmanager
def started_python(*words: object, **options: object) -> Iterator[subprocess.Popen]:
    """Start `python words...` for a `with` statement. The process is killed at its end, or after the time limit."""
    with subprocess.Popen(*_command(words, options), **options) as process:
        limit = threading.Timer(LIMIT_SECONDS, process.kill)
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            process.kill()


def _command(words: tuple[object, ...], options: dict[str, object]) -> tuple[list[str]]:
    """Return the command, and complete the options of subprocess for it."""
    options["env"] = os.environ | THREADS | {"S3NET_PROGRESS_SECONDS": "9999"} | options.get("env", {})
    options.setdefault("text", True)
    return ([sys.executable, *map(str, words)],)
