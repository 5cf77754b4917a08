import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "expressibility"


@pytest.fixture
def script(tmp_path):
    """Runs a script of the experiment in a process of its own, from a folder that isn't the repository."""

    def launch(name: str, *options: object) -> subprocess.CompletedProcess:
        command = [sys.executable, str(FOLDER / name), *map(str, options)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return launch


@pytest.fixture
def python(tmp_path):
    """Runs Python code in a process of its own with the experiment's folder on the path."""

    def launch(code: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n{code}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return launch


@pytest.fixture
def refused():
    """Asserts that a script ended with exit code 2 and one line on stderr, and returns that line."""

    def line(done: subprocess.CompletedProcess) -> str:
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ")
        return done.stderr.strip()

    return line
