"""run_report.py: runs as they stand, in tables, curves and the marked parts of Markdown files."""

import json

import pytest
from PIL import Image
from run_folders import write_run

from run_report import Args, main
from s3net_common.errors import InputError

PAGE = """# Title

<!-- report runs -->old<!-- /report -->

between

<!-- report epochs --><!-- /report -->

| | |
|---|---|
| a | <!-- report cell -->old<!-- /report --> |
"""


def report(tmp_path, *runs, page=PAGE):
    (tmp_path / "README.md").write_text(page)
    main(Args(runs, tmp_path / "results", (tmp_path / "README.md",)))
    return json.loads((tmp_path / "results" / "report.json").read_text())["runs"], (tmp_path / "README.md").read_text()


def test_a_run_that_has_not_ended_is_not_compared_with_the_paper(tmp_path):
    run = write_run(tmp_path / "s3net", (60.0, 31.0, 32.0), epochs=200, environment={"data_dir": "/home/me/data"})
    other = write_run(tmp_path / "resnet", (50.0, 40.0), epochs=200, model="resnet20_cifar", model_options={})
    (run / "NOTE.txt").write_text("interrupted once")
    rows, page = report(tmp_path, run, other)
    assert [(row["epochs_done"], row["epochs_left"], row["next_milestone"]) for row in rows] == [
        (3, 197, 50),
        (2, 198, 50),
    ]
    assert (rows[0]["paper_error"], rows[1]["paper_error"], rows[0]["hours"]) == (29.8, None, 3.0)
    assert rows[0]["command"].endswith(
        "train_s3net.py --dataset cifar100 --model s3net_cifar --seed 0 --growth-rate 12 --num-classes 100"
    )
    assert "| `s3net_cifar` | 272,836 | epoch 3 of 200 | 0.2 | 32.00 (31.09 to 32.92) |" in page
    assert "| 31.00 (epoch 2) | 3.0 |" in page and "consistent" not in page
    assert (
        "- **`s3net_cifar` has not finished**: 197 of 200 epochs are left, and the learning rate is 0.2 until epoch 50"
        in page
    )
    assert "says nothing yet about the paper's 29.80%." in page
    assert (
        "| a | <!-- report cell -->`s3net_cifar`, one run, not finished: 32.00% after 3 of 200 epochs, 31.00%" in page
    )
    assert "| 3 | 0.2 | 31.00 | 32.00 | 8.00 |  | |  |" in page and "\nbetween\n" in page and "old" not in page
    assert "<!-- numbers: results/s3net/metrics.jsonl results/resnet/metrics.jsonl -->" in page
    copied = tmp_path / "results" / "s3net"
    assert (copied / "metrics.jsonl").read_text().count("\n") == 3
    assert (copied / "NOTE.txt").read_text() == "interrupted once" and "/home" not in (
        copied / "config.json"
    ).read_text()
    assert Image.open(tmp_path / "results" / "curves.png").width > 800


@pytest.mark.parametrize(("last", "word"), [(30.5, "is consistent"), (31.0, "is not consistent"), (28.8, "is not")])
def test_a_finished_run_is_compared_with_the_paper(tmp_path, last, word):
    errors = 199 * (60.0,) + (last,)
    _, page = report(tmp_path, write_run(tmp_path / "run", errors))  # 10,000 images: about +-0.9
    assert f"{word} " in page and "the interval covers the test images and not the seed" in page
    assert "not finished" not in page and "`s3net_cifar`, one run of 200 epochs: " in page


@pytest.mark.parametrize(
    ("errors", "changes"),
    [
        ((60.0, 30.0), {}),
        (200 * (30.0,), {"hold_out": 5000}),
        (200 * (30.0,), {"limit_train": 10_000}),
        (200 * (30.0,), {"lr": 0.4}),
        (200 * (30.0,), {"augment": False}),
        (200 * (30.0,), {"nesterov": True}),
        (200 * (30.0,), {"milestones": [0.5, 0.75]}),
    ],
)
def test_a_run_with_another_recipe_is_not_compared_with_the_paper(tmp_path, errors, changes):
    rows, page = report(tmp_path, write_run(tmp_path / "run", errors, **changes))
    assert rows[0]["paper_error"] is None and "consistent" not in page and "| 0 |" not in page


def test_a_second_report_replaces_the_first(tmp_path):
    run = write_run(tmp_path / "run", (60.0,), epochs=3)
    _, page = report(tmp_path, run)
    assert report(tmp_path, run, page=page)[1] == page
    (run / "metrics.jsonl").write_text(2 * (run / "metrics.jsonl").read_text())
    assert "epoch 2 of 3" in report(tmp_path, run, page=page)[1]


def test_a_report_outside_of_the_folder_of_the_page(tmp_path):
    page = tmp_path / "pages" / "README.md"
    page.parent.mkdir()
    page.write_text(PAGE)
    main(Args((write_run(tmp_path / "run", (60.0,), epochs=3),), tmp_path / "results", (page,)))
    assert "<!-- numbers: ../results/report.json -->" in page.read_text()


def test_what_cannot_be_reported_is_an_error_and_nothing_is_written(tmp_path):
    run = write_run(tmp_path / "run", (60.0,), epochs=3)
    for message, runs, page in (
        ("give one or more runs", (), PAGE),
        ("no finished epoch", (write_run(tmp_path / "empty", (), epochs=2),), PAGE),
        ("in folders with different names", (run, run), PAGE),
        ("one data set", (run, write_run(tmp_path / "digits", (3.0,), dataset="digits")), PAGE),
        ("has no part between", (run,), "text"),
        ("has no part between", (run,), "<!-- report other --><!-- /report -->"),
    ):
        with pytest.raises(InputError, match=message):
            report(tmp_path, *runs, page=page)
        assert (tmp_path / "README.md").read_text() == page
        assert not (tmp_path / "results").exists()
