"""Scripts replace files of their own only. Files are written and locked as well on Windows, which a test imitates."""

import ctypes
import errno
import importlib.util
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from s3net_common import output_files
from s3net_common.errors import InputError
from s3net_common.output_files import (
    claim_folder,
    figure_text,
    lock_exclusively,
    run_record,
    write_atomically,
    write_json,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).parents[2]


def test_the_files_of_the_same_script_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "expressibility" / "benchmark.py")])
    assert claim_folder(tmp_path / "new", "benchmark.json", "benchmark.png") == tmp_path / "new"
    write_json(tmp_path / "benchmark.json", record := run_record())
    assert 0 < record["cpu_seconds"] <= sum(os.times()[:4]) + 0.1
    (tmp_path / "benchmark.png").touch()
    monkeypatch.setattr(sys, "argv", [str(ROOT / "expressibility" / "benchmark.py"), "--repeats", "3"])
    claim_folder(tmp_path, "benchmark.json", "benchmark.png")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "generalizability" / "benchmark.py")])
    with pytest.raises(InputError, match=r"already holds benchmark.json, benchmark.png, not written by this script"):
        claim_folder(tmp_path, "benchmark.json", "benchmark.png")
    claim_folder(tmp_path, "benchmark.json", "benchmark.png", overwrite=True)


@pytest.mark.parametrize("record", ["", "[]", "3", "{}", '{"command": null}', '{"command": "python \'"}', "\xff"])
def test_a_record_of_something_else_is_not_replaced(tmp_path, record):
    (tmp_path / "results.json").write_text(record, encoding="latin-1")
    with pytest.raises(InputError, match=r"already holds results.json, not written by this script: pass another --out"):
        claim_folder(tmp_path, "results.json")


class RefusingFile(io.BytesIO):
    """A file that takes 1000 bytes."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, data):
        if self.tell() + len(data) > 1000:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(data)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "(No space left on device): make room, or pass another --out"),
        (errno.EDQUOT, "(Disk quota exceeded): make room, or pass another --out"),
        (errno.EROFS, "(Read-only file system): pass another --out"),
        (errno.EFBIG, "(File too large): raise the limit of a file's size (ulimit -f unlimited)"),
        (errno.EIO, "(Input/output error): make room, or pass another --out"),
        (errno.EMFILE, ": too many open files: raise their limit (ulimit -n 65536), or use fewer workers"),
    ],
)
def test_what_the_system_refuses_while_torch_saves_is_named(tmp_path, number, message):
    """torch.save ends with a RuntimeError about a position in its archive."""
    (tmp_path / "last.pt").write_text("earlier")
    state = {"weights": torch.zeros(1000)}
    with pytest.raises(InputError) as error:
        write_atomically(tmp_path / "last.pt", lambda path: torch.save(state, RefusingFile(number)))
    assert str(error.value).endswith(f"last.pt cannot be written{' ' if message[0] == '(' else ''}{message}")
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert (tmp_path / "last.pt").read_text() == "earlier"


def test_a_figure_without_a_record_is_not_replaced(tmp_path):
    (tmp_path / "figure-2.png").touch()
    with pytest.raises(InputError, match=r"already holds figure-2.png"):
        claim_folder(tmp_path, "saliency.json", "figure-[0-9]*.png")


OUTPUTS = {
    "expressibility/ntk_comparison.py": ["ntk_results.json", "ntk_results.png", "finite_width.png"],
    "expressibility/ntk_sensitivity.py": ["sensitivity.json", "baselines.png"],
    "expressibility/one_neuron_approximation.py": ["one_neuron.json", "one_neuron.png"],
    "expressibility/benchmark.py": ["benchmark.json", "benchmark.png"],
    "generalizability/benchmark.py": ["benchmark.json"],
    "generalizability/same_budget.py": ["results.json", "tables.md", "curves.png"],
    "interpretability/benchmark.py": ["speed.json", "completeness.json"],
    "interpretability/interpret_fullgrad.py": ["saliency.json", "figure.png", "maps", "faithfulness.json"],
    "interpretability/plot_segmentation_map.py": ["scores.json", "dice.csv", "faithfulness.png"],
}
FLAGS = {
    "expressibility/ntk_comparison.py": {"finite_width": True},
    "interpretability/interpret_fullgrad.py": {"faithfulness": True},
    "interpretability/plot_segmentation_map.py": {"faithfulness": True},
}


@pytest.mark.parametrize(("script", "name"), [(script, name) for script, names in OUTPUTS.items() for name in names])
def test_every_script_checks_its_files_before_it_computes(tmp_path, script, name):
    spec = importlib.util.spec_from_file_location(f"checked_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    (tmp_path / name).write_text("of the user")
    with pytest.raises(InputError, match=f"{name}, not written by this script"):
        module.main(module.Args(out=tmp_path, **FLAGS.get(script, {})))
    assert [(path.name, path.read_text()) for path in tmp_path.glob(name)] == [(name, "of the user")]


def test_a_record_is_written_before_the_files_that_it_explains(tmp_path, monkeypatch):
    module = importlib.import_module("interpret_fullgrad")
    module.claim_files(module.Args(out=tmp_path))
    record = json.loads((tmp_path / "saliency.json").read_text())
    assert record["maps"] == [] and record["command"].startswith("python ")
    (tmp_path / "maps").mkdir()
    module.claim_files(module.Args(out=tmp_path))


@pytest.mark.parametrize("name", ["$", "US$ a_1 $x^2$", r"\$5 \alpha_{1}$", "_$$^", r"C:\cats\$1"])
def test_names_in_figures_are_no_formulas(tmp_path, name):
    figure = Figure()
    figure.text(0.1, 0.5, figure_text(name))
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(tmp_path / "a.svg")
    assert f">{name}</text>" in (tmp_path / "a.svg").read_text()


# -- Windows --


@pytest.fixture
def windows(monkeypatch):
    """Imitate Windows: folders cannot be opened, fsync wants a descriptor for writing, and kernel32 locks files.

    Returns the descriptors that were to be locked, in order.
    """
    if fcntl is None:
        pytest.skip("this is Windows")
    attempts = []

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        os.fsync(descriptor)

    def open_file(path, *arguments):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        return os.open(path, *arguments)

    def lock_file(handle, low, high, bytes_low, bytes_high):
        assert (low, high, bytes_low, bytes_high) == (0, 2**30, 1, 0)  # one byte, far behind every file's end
        attempts.append(handle.value)
        try:
            fcntl.flock(handle.value, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        return 1

    imitation = SimpleNamespace(**vars(os) | {"name": "nt", "fsync": fsync, "open": open_file})
    monkeypatch.setattr(output_files, "os", imitation)
    monkeypatch.setattr(output_files, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(get_osfhandle=lambda descriptor: descriptor))
    monkeypatch.setattr(ctypes, "WinDLL", lambda *_, **__: SimpleNamespace(LockFile=lock_file), raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: 33, raising=False)
    monkeypatch.setattr(ctypes, "WinError", lambda code: PermissionError(13, f"lock violation {code}"), raising=False)
    return attempts


def test_files_are_written_on_windows(tmp_path, windows):
    write_json(tmp_path / "new" / "a.json", {"a": 1})
    write_json(tmp_path / "new" / "a.json", {"a": 2})  # replaced
    assert {path.name: json.loads(path.read_text()) for path in (tmp_path / "new").iterdir()} == {"a.json": {"a": 2}}


def test_files_are_locked_on_windows(tmp_path, windows):
    with (tmp_path / "lock").open("a+") as first, (tmp_path / "lock").open("a+") as second:
        assert lock_exclusively(first.fileno())
        assert not lock_exclusively(second.fileno())
        first.close()
        assert lock_exclusively(second.fileno())
        assert len(windows) == 3


def test_a_run_is_locked_on_windows(tmp_path, windows, monkeypatch):
    run_folder = importlib.import_module("training.run_folder")
    monkeypatch.setattr(run_folder, "os", output_files.os)
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.0)
    first, second = run_folder.Run(tmp_path), run_folder.Run(tmp_path)
    first.hold()
    assert len(windows) == 1  # on Windows a second lock by the same descriptor would fail
    with pytest.raises(run_folder.RunInUseError, match="another process trains into"):
        second.hold()
    first.release()
    second.hold()
    second.release()
