import subprocess
from pathlib import Path

import pytest
from processes import run_python as run_in_process

FOLDER = Path(__file__).resolve().parents[2] / "expressibility"


@pytest.fixture
def run_script(tmp_path):
    """Run a script of the experiment in a new process, from a folder outside the repository."""

    def run(name: str, *flags: object) -> subprocess.CompletedProcess:
        return run_in_process(FOLDER / name, *flags, cwd=tmp_path)

    return run


@pytest.fixture
def run_python(tmp_path):
    """Run Python code in a new process, with the experiment's folder on sys.path."""

    def run(code: str) -> subprocess.CompletedProcess:
        return run_in_process("-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n{code}", cwd=tmp_path)

    return run


@pytest.fixture
def error_line():
    """Check that a script ended with exit code 2 and one line on stderr, and return that line."""

    def check(process: subprocess.CompletedProcess) -> str:
        assert process.returncode == 2, process.stderr
        assert process.stderr.count("\n") == 1, process.stderr
        assert process.stderr.startswith("error: ")
        return process.stderr.strip()

    return check
