"""Which files a run replaces, and what its folder knows of it."""

import errno
import json
import os
import signal
import stat
import sys
from pathlib import Path

import pytest
from PIL import Image
from processes import run_python

import train_s3net
from s3net_common import output_files
from s3net_common.errors import InputError
from train_s3net import Args
from training import run_folder
from training.run_folder import RUN_FILES, Run

TINY = {"dataset": "digits", "growth_rate": 4, "depth": 7, "device": "cpu", "limit_train": 40, "limit_val": 20}
TINY |= {"epochs": 1}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train_s3net.main(Args(out=folder, **TINY)) == 0
    return folder


def copy_run(source, target, names=RUN_FILES):
    target.mkdir()
    for name in names:
        (target / name).write_bytes((source / name).read_bytes())
    return target


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(**flags):
    with pytest.raises(InputError) as error:
        train_s3net.main(Args(**TINY, **flags))
    return str(error.value)


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_file_of_something_else_is_replaced_only_with_overwrite(tmp_path, name):
    (tmp_path / name).write_text('{"architectures": ["Other"]}')
    before = contents(tmp_path)
    for resume in (False, True):
        message = refusal(out=tmp_path, resume=resume)
        assert "another --out" in message
        assert contents(tmp_path) == before
    assert train_s3net.main(Args(out=tmp_path, overwrite=True, **TINY)) == 0
    assert set(RUN_FILES) == set(contents(tmp_path))


def test_a_run_without_last_pt_is_not_resumed(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path / "run", [name for name in RUN_FILES if name != "last.pt"])
    before = contents(folder)
    message = refusal(out=folder, resume=True)
    assert "but no last.pt, without which no run can be resumed: put last.pt back" in message
    assert "already holds a run: pass --resume" in refusal(out=folder)
    assert contents(folder) == before


def test_a_damaged_file_of_metrics_is_written_again(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(b"\x81\xff")
    assert train_s3net.main(Args(out=folder, resume=True)) == 0
    assert (folder / "metrics.jsonl").read_bytes() == (finished_run / "metrics.jsonl").read_bytes()


def test_config_json_alone_starts_the_run(finished_run, tmp_path, capsys):
    folder = copy_run(finished_run, tmp_path / "run", ["config.json"])
    assert train_s3net.main(Args(out=folder, resume=True)) == 0
    assert "40 training and 20 validation images" in capsys.readouterr().out
    assert set(RUN_FILES) == set(contents(folder))


def test_the_folder_knows_where_the_data_are_and_how_they_are_read(tmp_path, monkeypatch, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for level in range(6):
            Image.new("RGB", (8, 8), (level, 9, 9)).save(tmp_path / "data" / name / f"{level}.png")
    (tmp_path / "data" / "cat" / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    flags = {"dataset": "folder", "data_dir": train_s3net.Path("data"), "hold_out": 0.25, "skip_unreadable": True}
    flags |= {"growth_rate": 4, "depth": 7, "epochs": 2, "device": "cpu", "workers": 1, "image_size": 16}
    save = Run.save

    def save_and_stop(self, state):
        save(self, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_s3net.main(Args(out=tmp_path / "run", **flags))
    monkeypatch.undo()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    data = str(tmp_path / "data")
    assert config["environment"] == {"data_dir": data, "device": "cpu", "skip_unreadable": True, "workers": 1}
    (tmp_path / "data").rename(tmp_path / "moved")
    assert train_s3net.main(Args(out=tmp_path / "run", resume=True, data_dir=tmp_path / "moved")) == 0
    assert "2/2" in capsys.readouterr().out
    assert train_s3net.main(Args(out=tmp_path / "run", resume=True)) == 0  # it now knows the new folder
    assert "8 training and 4 validation images, 2 classes" in capsys.readouterr().out


def test_edited_flags_of_a_wrong_type_are_left_out(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    for environment in ({"workers": "many", "data_dir": 3, "device": None, "compile": 1}, [], None, "x"):
        (folder / "config.json").write_text(json.dumps(config | {"environment": environment}))
        assert train_s3net.main(Args(out=folder, resume=True, device="cpu")) == 0


def test_a_flag_that_is_switched_off_is_not_given(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_s3net.py", "--no-overwrite", "--no-compile", "--no-resume"])
    assert "already holds a run" in refusal(out=finished_run)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
def test_a_checkpoint_that_the_system_refuses_is_one_line(tmp_path):
    """The limit of a file's size acts like a full disk: config.json fits, last.pt does not."""
    import resource

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    flags = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", value)]
    script = Path(train_s3net.__file__)
    done = run_python(script, *flags, "--out", tmp_path / "run", preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith(
        "last.pt cannot be written (File too large): raise the limit of a file's size (ulimit -f unlimited)\n"
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json"]


# -- Locks --


def flock_like_nfs(descriptor, operation, flock=output_files.fcntl and output_files.fcntl.flock):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EBADF, "Bad file descriptor")
    flock(descriptor, operation)


def test_a_folder_on_nfs_is_locked_by_a_file_in_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output_files.fcntl, "flock", flock_like_nfs)
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.2)
    first, second = Run(tmp_path), Run(tmp_path)
    first.hold()
    with pytest.raises(run_folder.RunInUseError, match=f"another process trains into {tmp_path}"):
        second.hold()
    first.release()
    second.hold()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"] and capsys.readouterr().out == ""
    second.release()


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch, capsys):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_files.fcntl, "flock", no_locks)
    for run in (Run(tmp_path), Run(tmp_path)):
        run.hold()
        line = f"the file system of {tmp_path} has no locks: start no second run in this folder\n"
        assert capsys.readouterr().out == line
        run.release()
