"""The number of DataLoader workers within the system's limits, and what ends the workers."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from image_trees import digit_photos, make_imagenet

from data import loader_workers
from data.batches import DiskEvaluationBatches
from data.datasets import load_dataset
from s3net_common.errors import TOO_MANY_FILES, LocalError

PLAIN = {"device": torch.device("cpu"), "mean": (0.0,) * 3, "std": (1.0,) * 3, "image_size": 32}
GENERALIZABILITY = Path(loader_workers.__file__).parents[1]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def node(monkeypatch):
    """A node with many processors and no limits; returns a function that sets its limits."""
    monkeypatch.setattr(loader_workers, "available_processors", lambda: 128)

    def limit(memory=None, files=2**20, shared=2**40, ranks=1):
        monkeypatch.setattr(loader_workers, "available_memory", lambda: memory)
        monkeypatch.setattr(loader_workers.resource, "getrlimit", lambda kind: (files, files))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, shared))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))

    limit()
    return limit


@pytest.mark.parametrize(
    ("limits", "workers"),
    [
        ({}, 16),
        ({"ranks": 16}, 8),  # 128 processors
        ({"memory": 8 * 2**30}, 8),  # half of it, for the workers of training and of validation
        ({"memory": 8 * 2**30, "ranks": 4}, 2),
        ({"memory": 0}, 1),
        ({"files": 256}, 4),
    ],
)
def test_the_default(node, limits, workers):
    node(**limits)
    assert loader_workers.default_workers() == workers


def test_a_rank_raises_its_limit_of_open_files(monkeypatch):
    limits = [(256, 4096)]
    monkeypatch.setattr(loader_workers.resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(loader_workers.resource, "setrlimit", lambda kind, limit: limits.append(limit))
    assert loader_workers.fitting_workers(100, 1) == 100
    assert limits[-1] == (4096, 4096)


@pytest.mark.parametrize(
    ("limits", "fitting", "line"),
    [
        ({}, 16, ""),
        (
            {"shared": 2**26},
            1,
            "1 instead of 16 DataLoader workers, because of the limit of 64 MiB in /dev/shm (",
        ),
        ({"shared": 2**26, "ranks": 2}, 0, "0 instead of 16 DataLoader workers, because of the limit of 64 MiB"),
        ({"files": 200}, 2, "2 instead of 16 DataLoader workers, because of the limit of open files (ulimit -n)"),
    ],
)
def test_workers_that_do_not_fit_are_not_started(node, capsys, limits, fitting, line):
    node(**limits)
    assert loader_workers.fitting_workers(16, 12 * 2**20) == fitting
    printed = capsys.readouterr().out
    assert printed.startswith(line) and printed.count("\n") == bool(line)


@pytest.fixture
def images(tmp_path):
    tree = make_imagenet(tmp_path / "tree", digit_photos(30, (50, 40)))
    return load_dataset("imagenet", tree)[1]


def test_the_size_of_a_batch_decides(node, images):
    node(shared=4 * 4 * 3 * 32 * 32 * 3)  # room for 3 workers with 2 batches of 4 images each, twice
    batches = DiskEvaluationBatches(images, 4, workers=16, **PLAIN)
    assert batches.loader.num_workers == 3
    assert DiskEvaluationBatches(images, 4, workers=0, **PLAIN).loader.num_workers == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_workers_outlive_the_signals_that_stop_a_run(images, name):
    others = {*multiprocessing.active_children()}  # of other tests
    batches = DiskEvaluationBatches(images, 2, workers=1, **PLAIN)
    part = batches.part()
    labels = [next(part)[1]]
    (worker,) = {*multiprocessing.active_children()} - others
    for _ in range(3):
        os.kill(worker.pid, getattr(signal, name))
        time.sleep(0.05)
    labels += [batch for _, batch in part]
    assert torch.equal(torch.cat(labels), torch.as_tensor(images.source.labels))
    batches.close()
    del part
    worker.join(60)
    assert worker.exitcode == 0


def test_workers_end_with_an_interpreter_that_does_not_close_them(images):
    program = (
        "import sys; sys.path[:0] = [sys.argv[1]]; from pathlib import Path\n"
        "from data.datasets import load_dataset; from data.batches import DiskEvaluationBatches; import torch\n"
        "batches = DiskEvaluationBatches(load_dataset('imagenet', Path(sys.argv[2]))[1], 2, torch.device('cpu'), "
        "(0.0,) * 3, (1.0,) * 3, image_size=32, workers=1)\n"
        "part = batches.part(); print(next(part)[1].tolist())"
    )
    tree = images.source.folder.parent
    arguments = [sys.executable, "-c", program, str(GENERALIZABILITY), str(tree)]
    environment = os.environ | {"PYTHONPATH": str(GENERALIZABILITY.parent)}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1]\n", "")


@pytest.mark.parametrize(
    "text", ["unable to open shared memory: Too many open files (24)", "received 0 items of ancdata"]
)
def test_too_many_open_files_are_one_line(images, monkeypatch, text):
    batches = DiskEvaluationBatches(images, 2, workers=0, **PLAIN)

    def broken():
        raise RuntimeError(text)
        yield

    monkeypatch.setattr(batches, "loader", broken())
    with pytest.raises(LocalError, match=TOO_MANY_FILES[:30]):
        list(batches.part())
