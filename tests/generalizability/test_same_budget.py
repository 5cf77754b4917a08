"""same_budget.py: the runs, their order and the report. The tests replace the training itself."""

import json
import os
import signal
import sys
import threading
import time

import pytest
from PIL import Image

from comparison import jobs
from comparison.budget_report import RECORDED
from comparison.jobs import Job, run_jobs
from s3net_common.errors import InputError
from s3net_common.progress import ProgressBar
from same_budget import Args, ablated_networks, compared_networks, main

COMMAND = (
    "python generalizability/train_s3net.py --dataset cifar100 --model s3net_cifar --growth-rate 12 --depth 40 "
    "--schedule onecycle --lr 0.4 --batch-size 128 --epochs 30 --seed 0"
)
SPEED = {"resnet20_cifar": 20.0, "s3net_cifar": 10.0, "densenet_cifar": 5.0}


@pytest.fixture
def trained(monkeypatch):
    """Replace training: write a run's files with an error that depends on its settings. Return the folders in order."""
    folders = []

    def train(job, single_thread, active, bar):
        settings = job.settings
        images_per_second = SPEED[settings["model"]]
        folders.append(job.folder)
        job.folder.mkdir(parents=True)
        error = 60 + abs(settings["lr"] - 0.4) * images_per_second + settings["seed"] % 1000
        error += {"chain": 9, "dense": -4}.get(settings.get("connections"), 0)
        rows = [
            {"val_error": error + 5 - i, "train_error": error - i, "images_per_second": images_per_second}
            | {"seconds": 1200.0 - i, "val_top5_error": 1.0}
            for i in range(6)
        ]
        (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary = dict.fromkeys(RECORDED, 1) | {
            "last_val_error": error,
            "last_val_top5_error": error / 2,
            "parameters": 272_836,
            "multiply_adds": 63_000_000,
            "total_seconds": 7200,
            "epochs": 6,
            "seed": settings["seed"],
            "versions": {"torch": "2.14.1"},
        }
        (job.folder / "summary.json").write_text(json.dumps(summary))
        (job.folder / "config.json").write_text(json.dumps(settings | {"model_options": {}}, default=str))

    monkeypatch.setattr(jobs, "run_training", train)
    return folders


def test_the_compared_densenet_is_the_closest_in_parameters():
    names = [network.title for network in compared_networks(Args())]
    assert names == ["S3-Net k=12, depth=40", "ResNet-20", "DenseNet k=12, depth=22"]  # 272,836; 275,572; 291,676


def test_ablated_networks_have_the_same_width_or_size():
    names = [network.title for network in ablated_networks(Args())]
    # 272,836; 51,196 and 278,809; 238,510 and 1,100,476 parameters
    assert names == [
        "sparse shortcuts, k=12",
        "no shortcuts, k=12",
        "no shortcuts, k=29",
        "dense connections, k=5",
        "dense connections, k=12",
    ]


def test_every_run_is_made_once_and_reported(trained, tmp_path, capsys):
    args = Args(out=tmp_path, seeds=2, peaks=(0.2, 0.4, 0.8))
    main(args)
    assert len(trained) == len(set(trained)) == 9 + 6 + 10
    assert [folder.parent.name for folder in trained] == 9 * ["search"] + 3 * ["comparison"] + 10 * ["ablation"] + 3 * [
        "comparison"
    ]
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["peaks"].values()) == {0.4} and results["unfinished_runs"] == 0
    first = results["comparison"][0]
    assert first["peak_lr"] == 0.4 and first["val_error"] == [65, 64, 63, 62, 61, 60]
    assert first["command"] == COMMAND
    assert str(tmp_path) not in json.dumps(results)
    printed = capsys.readouterr().out
    assert printed.startswith((tmp_path / "tables.md").read_text())
    assert "| S3-Net k=12, depth=40 | 62.00 | **60.00** | 64.00 |" in printed
    assert "| ResNet-20 | 0.4 | 2 | 60.50 ± 0.71 | 30.25 ± 0.35 | 272,836 | 63.0M | 20 | 2.00 | 1.99 |" in printed
    assert "| connections | parameters | multiply-adds | test error, %, peak 0.2 | test error, %, peak 1.6 |" in printed
    assert "| no shortcuts, k=12 | 272,836 | 63.0M | **71.00** | 81.00 |" in printed
    for name in ("curves", "search", "ablation"):
        assert Image.open(tmp_path / f"{name}.png").width > 500
    trained.clear()
    main(args)
    assert trained == []


def test_a_finished_run_with_other_flags_is_an_error(trained, tmp_path):
    main(Args(out=tmp_path, only=("search",), peaks=(0.4,), search_epochs=2))
    with pytest.raises(InputError, match=r"a finished run with --epochs 2 instead of 3: pass another --out"):
        main(Args(out=tmp_path, only=("search",), peaks=(0.4,), search_epochs=3))
    assert len(trained) == 3
    with pytest.raises(InputError, match=r"a finished run with --limit-train 10000 instead of None"):
        main(Args(out=tmp_path, only=("search",), peaks=(0.4,), search_epochs=2, search_images=None))


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Replace the trainer by a script, and return its path. The test writes the script."""
    monkeypatch.setattr(jobs, "TRAINER", tmp_path / "train_s3net.py")
    return tmp_path / "train_s3net.py"


def test_sigterm_ends_the_active_run_and_starts_no_other(script, tmp_path):
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "folder = pathlib.Path(sys.argv[2])\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit((folder / 'saved').write_text('')))\n"
        "(folder / 'started').touch()\n"
        "time.sleep(30)\n"
    )
    two_jobs = [Job(tmp_path / name, {}) for name in ("a", "b")]

    def terminate():
        while not (tmp_path / "a" / "started").is_file():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        run_jobs(two_jobs, 1, "two jobs")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "a" / "saved").is_file() and not (tmp_path / "b").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_bar_advances_with_the_epochs_of_a_run(script, tmp_path):
    script.write_text("import pathlib, sys; (pathlib.Path(sys.argv[4]) / 'metrics.jsonl').write_text('{}\\n' * 3)")
    with ProgressBar(total=3) as bar:
        jobs.run_training(Job(tmp_path / "a", {"epochs": 3}), False, set(), bar)
        assert bar.n == 3


def test_a_run_inherits_open_files(script, tmp_path):
    """reproduce.py's lock is such a file: a run that outlives it keeps the lock."""
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    script.write_text("import os, sys; os.write(int(sys.argv[2]), b'held')")
    run_jobs([Job(tmp_path / "a", {"lock": writing})], 1, "one job")
    assert os.read(reading, 4) == b"held"
    os.close(reading), os.close(writing)


def test_each_network_gets_its_best_peak_from_the_finished_search(trained, tmp_path):
    with pytest.raises(InputError, match="search for the learning rates is not finished"):
        main(Args(out=tmp_path, only=("comparison",)))
    assert trained == []
    main(Args(out=tmp_path, only=("search",), peaks=(0.1, 1.6)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["peaks"].values()) == {0.1} and results["comparison"] == []
    assert results["unfinished_runs"] == 9 + 10
    tables = (tmp_path / "tables.md").read_text()
    assert "Search for the peak" in tables and "Comparison" not in tables  # no headings of tables without rows


def test_a_failed_run_is_named_with_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(InputError, match=r"lr-0\.1 ended with exit code 1: no output"):
        main(Args(out=tmp_path, peaks=(0.1,)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seeds": 0}, "--seeds 0"),
        ({"search_images": 0}, "--search-images 0"),
        ({"peaks": ()}, "--peaks needs"),
        ({"peaks": (float("nan"),)}, "--peaks needs"),
        ({"only": ()}, "--only needs one or more of search, comparison, ablation"),
    ],
)
def test_flags_out_of_range_are_errors(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        main(Args(out=tmp_path / "new", **flags))
    assert not (tmp_path / "new").exists()
