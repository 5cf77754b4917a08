"""Run Python programs in new processes, as users run them: on one thread, within a time that only a hang needs."""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    done = subprocess.run(_command(words), timeout=LIMIT_SECONDS, capture_output=True, **_completed(options))
    assert not check or done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


@contextmanager
def started_python(*words: object, **options: object) -> Iterator[subprocess.Popen]:
    """Start `python words...` for a `with` statement. The process is killed at its end, or after the time limit."""
    with subprocess.Popen(_command(words), **_completed(options)) as process:
        limit = threading.Timer(LIMIT_SECONDS, process.kill)
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            process.kill()


def run_forked(script: Path, *flags: object, check: bool = False, **options: object) -> subprocess.CompletedProcess:
    """Run a script as `run_python` does, but quicker: see `ForkedScript`."""
    with ForkedScript(script, *flags, **options) as process:
        done = process.wait()
    assert not check or done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


class ForkedScript:
    """A running script; at the end of a `with` statement, or after the time limit, it is killed.

    On Linux it is a fork of a process that has imported PyTorch and other slow packages (script_server.py). What
    scripts import, and when, has tests of its own, which start new processes (test_command_line.py).

    Args:
        script, flags: the command.
        cwd, env: as in `run_python`.
    """

    def __init__(self, script: Path, *flags: object, cwd: Path | None = None, env: dict[str, str] | None = None):
        options = _completed({"env": env or {}})
        python, *self.command = _command((script, *flags))
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        self._code, self._server = None, None
        if sys.platform == "linux":
            self._server = _script_server()
            request = {"arguments": self.command, "cwd": str(cwd or Path.cwd()), "environment": options["env"]}
            request |= {"stdout": str(self._files[0]), "stderr": str(self._files[1])}
            self._server.stdin.write(json.dumps(request) + "\n")
            self.pid = int(self._server.stdout.readline())
        else:  # Windows cannot fork, and macOS not safely
            with self._files[0].open("w") as stdout, self._files[1].open("w") as stderr:
                process = subprocess.Popen([python, *self.command], cwd=cwd, stdout=stdout, stderr=stderr, **options)
            self.pid, self._wait = process.pid, process.wait
        self._limit = threading.Timer(LIMIT_SECONDS, self.kill)
        self._limit.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the script."""
        os.kill(self.pid, number)

    def wait_for(self, *texts: str) -> None:
        """Wait until the script has printed one of the texts."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not any(text in self._files[0].read_text(encoding="utf-8") for text in texts):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def wait(self) -> subprocess.CompletedProcess:
        """Wait until the script has ended, and return its exit code and what it printed."""
        if self._code is None:
            self._code = int(self._server.stdout.readline()) if self._server else self._wait()
        texts = [path.read_text(encoding="utf-8") for path in self._files]
        return subprocess.CompletedProcess(self.command, self._code, *texts)

    def __enter__(self) -> "ForkedScript":
        return self

    def __exit__(self, *exception: object) -> None:
        self._limit.cancel()
        if self._code is None:
            self.kill()
            self.wait()
        self._folder.cleanup()


@functools.cache
def _script_server() -> subprocess.Popen:
    """Start script_server.py. It ends with this process."""
    environment = {name: value for name, value in (os.environ | THREADS).items() if name != "PYTHONPATH"}
    words = [sys.executable, str(Path(__file__).with_name("script_server.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(words, **pipes, env=environment, text=True, bufsize=1)
    atexit.register(server.communicate)  # closes its stdin, which ends it
    return server


def _command(words: tuple[object, ...]) -> list[str]:
    """Return the command `python words...`."""
    return [sys.executable, *map(str, words)]


def _completed(options: dict[str, object]) -> dict[str, object]:
    """Return options of subprocess with the variables of the tests, and for output as text."""
    environment = os.environ | THREADS | {"S3NET_PROGRESS_SECONDS": "9999"} | options.get("env", {})
    return {"text": True} | options | {"env": environment}
