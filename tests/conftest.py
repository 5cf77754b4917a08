import os
import signal

import matplotlib.figure
import pytest
from figure_styles import check_styles

# The tests run in several processes (pyproject.toml), and many start others: one thread each does not make them wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def environment():
    """Restore the variables that `run_script` sets in the tests' process."""
    names = ("MPLBACKEND", "MKL_NUM_THREADS", "NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Check every figure that the tests' process saves."""
    save = matplotlib.figure.Figure.savefig

    def check_and_save(figure, *args, **options):
        check_styles(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", check_and_save)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore the signal handlers, which a training run in the tests' process replaces."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for commands in the background
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
