"""compare_results.py: runs and the paper's rows in one table."""

import csv
import json
from pathlib import Path

import matplotlib.axes
import pytest
from PIL import Image
from processes import run_forked
from run_folders import write_run

import compare_results
from compare_results import Args, run_row, scatter_points
from comparison import error_scatter
from comparison.paper_tables import AUGMENTED_ROWS, PAPER_ROWS
from comparison.runs import read_run
from recipes import FAST, fast_settings
from s3net_common.errors import InputError
from s3net_networks.size import network_size

SCRIPT = Path(__file__).parents[2] / "generalizability" / "compare_results.py"


def compare(tmp_path, *runs):
    """Return the rows of the CSV measured here, all its rows, and the Markdown."""
    compare_results.main(Args(runs, tmp_path / "out"))
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["source"] == "measured here"], rows, (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("name", ["table.md", "table.csv", "comparison.json", "scatter.png"])
def test_only_the_files_of_an_earlier_comparison_are_replaced(tmp_path, name):
    run = write_run(tmp_path / "run", environment={"data_dir": "/data", "workers": 2})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("of the user")
    with pytest.raises(InputError, match=f"already holds {name}, not written by this script"):
        compare(tmp_path, run)
    assert (tmp_path / "out" / name).read_text() == "of the user"
    compare_results.main(Args((run,), tmp_path / "out", overwrite=True))
    (row,), *_ = compare(tmp_path, run)
    assert "data" not in row["setting"]


def test_seeds_are_aggregated_with_mean_and_deviation(tmp_path, capsys):
    runs = [
        write_run(tmp_path / f"s{seed}", (40.0, 30.0, last), seed) for seed, last in ((0, 31.0), (1, 33.0), (2, 35.0))
    ]
    (row,), _, markdown = compare(tmp_path, *runs)
    assert (float(row["last_error"]), float(row["last_error_std"])) == (33.0, 2.0)  # sample deviation of 31, 33, 35
    assert (float(row["best_error"]), float(row["best_error_std"])) == (30.0, 0.0)
    assert (float(row["last_top5_error"]), float(row["best_top5_error"])) == (8.25, 7.5)
    assert (row["seeds"], row["epochs_done"], row["epochs"]) == ("0 1 2", "3", "3")
    cells = "| 0.27M | 42.78M | 33.00 ± 2.00 | 30.00 ± 0.00 | 8.25 | 3 | 3 | yes | measured here |"
    assert f"| s3net_cifar | k=12, depth=40 {cells}" in markdown.splitlines()
    assert markdown in capsys.readouterr().out
    assert row["runs"].split() == [str(run) for run in runs]


def test_the_papers_rows_of_the_data_set_are_added_in_order_of_error(tmp_path):
    _, rows, markdown = compare(tmp_path, write_run(tmp_path / "run", (25.0,)))
    assert len(rows) == 16 + len(AUGMENTED_ROWS) and {row["dataset"] for row in rows} == {"cifar100"}
    errors = [float(row["last_error"]) for row in rows]
    assert errors == sorted(errors) and 25.0 in errors
    sources = [row["source"] for row in rows]
    assert sources.count("quoted (paper)") == 5 and sources.count("quoted (cited in the paper)") == 10
    assert (
        markdown.startswith("## CIFAR-100\n") and "| S3-Net | k=64, depth=70 | 15.4M | 2.4G [2] | 22.76 |" in markdown
    )


def test_a_footnote_marks_rows_for_which_the_paper_prints_fewer_parameters(tmp_path):
    _, _, markdown = compare(tmp_path, write_run(tmp_path / "run"))
    (note,) = [line for line in markdown.splitlines() if line.startswith("[1]")]
    assert note == (
        "[1] The paper prints fewer parameters than the published code and this repository build: "
        "k=40, depth=40: 2,400,556; k=24, depth=40: 927,244; k=12, depth=40: 272,836."
    )
    marked = [line.split(" | ")[1] for line in markdown.splitlines() if "M [1]" in line]
    assert marked == ["k=40, depth=40", "k=24, depth=40", "k=12, depth=40"]


def test_different_settings_are_never_aggregated_and_are_shown(tmp_path):
    runs = [
        write_run(tmp_path / "a", lr=0.2),
        write_run(tmp_path / "b", lr=0.1, seed=1),
        write_run(tmp_path / "c", limit_train=300, seed=2),
    ]
    rows, _, _ = compare(tmp_path, *runs)
    assert [row["seeds"] for row in rows] == ["0", "1", "2"]
    assert [row["setting"] for row in rows] == [
        "k=12, depth=40, lr=0.2",
        "k=12, depth=40, lr=0.1",
        "k=12, depth=40, 300 training images, lr=0.2",
    ]


def test_unfinished_runs_are_listed_last_with_their_epoch(tmp_path):
    finished = write_run(tmp_path / "finished", (50.0, 41.0))
    interrupted = write_run(tmp_path / "interrupted", (20.0,), seed=1, epochs=2)
    empty = write_run(tmp_path / "empty", (), seed=2, epochs=2)
    rows, all_rows, markdown = compare(tmp_path, finished, interrupted, empty)
    assert [(row["epochs_done"], row["finished"], row["last_error"]) for row in rows] == [
        ("2", "True", "41.0"),
        ("1", "False", "20.0"),
        ("0", "False", ""),
    ]
    assert all_rows[-2:] == rows[1:]  # at the end, however low the error
    assert (rows[1]["parameters"], rows[1]["multiply_adds"]) == ("272836", "42780192")  # counted without a summary
    assert markdown.count("| measured here, unfinished |") == 2 and "| epoch 0 of 2 | 1 |" in markdown


def test_one_finished_run_has_the_interval_of_its_images_and_an_unfinished_one_none(tmp_path):
    finished = write_run(tmp_path / "finished", (20.0,), val_images=50)
    unfinished = write_run(tmp_path / "unfinished", (20.0,), seed=1, epochs=2, val_images=50)
    rows, _, markdown = compare(tmp_path, finished, unfinished)
    assert [round(float(rows[0][f"interval_{end}"]), 2) for end in ("low", "high")] == [11.24, 33.04]
    assert rows[1]["interval_low"] == "" and "| 20.00 (11.24 to 33.04) [" in markdown
    assert "| epoch 1 of 2 | 1 | yes | measured here, unfinished |" in markdown
    kinds = {point.label: point.kind for point in scatter_points([run_row([read_run(unfinished)], [])])}
    assert kinds == {"s3net_cifar k=12 d=40 (epoch 1 of 2)": "measured here, training not finished"}


def test_runs_of_earlier_versions_lack_settings_and_had_their_defaults(tmp_path):
    new = write_run(tmp_path / "new", (30.0,), decode="cpu", augment=True, sync_bn=False, init=None)
    old = write_run(tmp_path / "old", (32.0,), seed=1)
    (row,), *_ = compare(tmp_path, new, old)
    assert (row["seeds"], row["last_error"], row["setting"]) == ("0 1", "31.0", "k=12, depth=40")


def test_runs_of_the_same_network_with_and_without_its_default_options_are_seeds_of_one_row(tmp_path):
    runs = [
        write_run(tmp_path / "defaults", (30.0,), model_options={}),
        write_run(tmp_path / "flags", (32.0,), seed=1, model_options={"depth": 40, "connections": "sparse"}),
        write_run(tmp_path / "dropout", (34.0,), model_options={"drop_rate": 0.2}),
        write_run(tmp_path / "densenet", (36.0,), model="densenet_cifar", model_options={}),
    ]
    rows, *_ = compare(tmp_path, *runs)
    assert [(row["seeds"], row["setting"]) for row in rows] == [
        ("0 1", "k=12, depth=40"),
        ("0", "k=12, depth=40, drop_rate=0.2"),
        ("0", "k=12, depth=40"),
    ]


def test_networks_of_other_versions_keep_their_options(tmp_path):
    network = {"model": "s3net_future", "model_options": {"growth_rate": 12, "width": 3}}
    runs = [write_run(tmp_path / f"lr {lr}", (30.0,), lr=lr, **network) for lr in (0.1, 0.3)]
    rows, *_ = compare(tmp_path, *runs)
    assert [row["setting"] for row in rows] == ["k=12, width=3, lr=0.1", "k=12, width=3, lr=0.3"]
    crops = crop_results() | {"model": "s3net_future", "model_options": None}
    (tmp_path / "crops.json").write_text(json.dumps(crops))
    with pytest.raises(InputError, match="is damaged: run validate_10crop"):
        compare_results.main(Args((tmp_path / "crops.json",), tmp_path / "out"))
    assert compare_results.network_setting("s3net_imagenet_small", {"bn_size": None}) == ["k=96", "bn_size=None"]


def test_the_fast_recipe_has_a_name_and_settings_with_their_default_are_left_out(tmp_path):
    fast = FAST | fast_settings(2, 32)
    del fast["epochs"]
    paper = write_run(tmp_path / "paper", (30.0, 29.0))
    runs = [
        write_run(tmp_path / "fast", (32.0, 31.0), **fast),
        write_run(tmp_path / "momentum", (33.0, 32.0), **fast, momentum=0.8),
        write_run(tmp_path / "almost", (34.0, 33.0), **fast | {"lr": 0.3}),
    ]
    rows, *_ = compare(tmp_path, paper, *runs[:2])
    assert [row["setting"].removeprefix("k=12, depth=40, ") for row in rows] == [
        "batch_size=64, lr=0.2, momentum=0.9, weight_decay=0.0001, schedule=step",
        "recipe=fast, momentum=0.9",
        "recipe=fast, momentum=0.8",
    ]
    *_, row = compare(tmp_path, paper, runs[2])[0]
    assert "norm_decay=False, nesterov=True, label_smoothing=0.1" in row["setting"] and "recipe" not in row["setting"]
    rows, *_ = compare(tmp_path, runs[0], runs[2])  # one setting tells them apart
    assert [row["setting"] for row in rows] == ["k=12, depth=40, lr=0.4", "k=12, depth=40, lr=0.3"]


def test_long_labels_stand_below_the_left_panel_and_their_points_have_letters():
    labels = ["short", *(f"s3net_cifar k=12 d=40 batch_size=64 lr={i / 10} weight_decay=0.001" for i in range(28))]
    points = [error_scatter.Point(label, 20.0 + i, 1e5 + i, 1e6, "quoted") for i, label in enumerate(labels)]
    left, right = error_scatter.draw_scatter({"CIFAR-100": points}).axes
    for axes in (left, right):
        assert {"short", "A", "Z", "A1", "B1"} <= {text.get_text() for text in axes.texts}
    assert f"\nA: {labels[1]}\n" in left.get_xlabel() and left.get_xlabel().endswith(f"\nB1: {labels[-1]}")
    assert right.get_xlabel() == "multiply-adds for one image"


def test_a_data_set_without_rows_in_the_paper(tmp_path):
    runs = [write_run(tmp_path / "run", (0.0,), dataset="digits"), write_run(tmp_path / "other")]
    _, rows, markdown = compare(tmp_path, *runs)
    assert [row["network"] for row in rows if row["dataset"] == "digits"] == ["s3net_cifar"]
    digits, cifar = markdown.split("\n\n## CIFAR-100\n")
    assert digits.startswith("## scikit-learn's digits") and "quoted" not in digits and "quoted" in cifar
    single, double = tmp_path / "single", Image.open(tmp_path / "out" / "scatter.png").size
    compare_results.main(Args((runs[0],), single))
    assert Image.open(single / "scatter.png").size == (double[0], double[1] // 2)


def test_results_of_validate_10crop_are_compared_with_the_papers(tmp_path):
    (tmp_path / "crops.json").write_text(json.dumps(crop_results()))
    rows, all_rows, markdown = compare(tmp_path, tmp_path / "crops.json")
    assert [(row["setting"], row["last_error"]) for row in rows] == [
        ("k=96, 10 crops", "25.0"),
        ("k=96, centre crop", "26.0"),
    ]
    assert (rows[0]["interval_low"], rows[0]["interval_high"], rows[0]["last_top5_error"]) == ("24.5", "25.5", "8.0")
    assert "| 25.00 (24.50 to 25.50) [5] |" in markdown
    assert "[4] Looked up: DenseNet-121, README of github.com/liuzhuang13/DenseNet: 25.0; " in markdown
    assert "[5] With the 95% interval over the images (Wilson score). It does not cover another seed." in markdown
    assert len(all_rows) == 2 + sum(row.dataset == "imagenet" for row in PAPER_ROWS)


def crop_results():
    crops = {
        name: {"top1_error": error, "top1_interval": [error - 0.5, error + 0.5], "top5_error": 8.0}
        for name, error in (("centre_crop", 26.0), ("ten_crops", 25.0))
    }
    description = {
        "kind": "validate_10crop",
        "dataset": "imagenet",
        "model": "s3net_imagenet_small",
        "model_options": {},
    }
    return (
        description
        | {"parameters": 9405560, "multiply_adds": 8026999808, "images": {"limit": None, "count": 50000}}
        | crops
    )


def test_the_json_file_contains_all_rows(tmp_path):
    compare(tmp_path, write_run(tmp_path / "run"))
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert len(rows) == 1 + 15 + len(AUGMENTED_ROWS)
    (measured,) = [row for row in rows if row["source"] == "measured here"]
    assert (measured["seeds"], measured["last_error"], measured["best_error"]) == ([0], 31.0, 30.0)


# -- The paper's numbers --


def test_the_papers_tables_are_complete():
    by_dataset = {
        name: [row for row in PAPER_ROWS if row.dataset == name] for name in ("cifar100", "tinyimagenet", "imagenet")
    }
    assert {name: len(rows) for name, rows in by_dataset.items()} == {
        "cifar100": 15,
        "tinyimagenet": 10,
        "imagenet": 15,
    }
    sums = {name: round(sum(row.error for row in rows), 2) for name, rows in by_dataset.items()}
    assert sums == {"cifar100": 413.82, "tinyimagenet": 466.52, "imagenet": 390.1}
    assert all(row.printed for row in PAPER_ROWS) and not any(row.printed for row in AUGMENTED_ROWS)
    assert [row.setting for row in PAPER_ROWS if row.prints_fewer] == [
        "k=12, depth=40",
        "k=24, depth=40",
        "k=40, depth=40",
        "k=96, depth=45",
    ]


@pytest.mark.parametrize(
    ("model", "options", "setting", "size"),
    [
        ("s3net_cifar", {"growth_rate": 64, "depth": 70}, "k=64, depth=70", 32),
        ("s3net_tiny_k96", {}, "k=96, lr 0.1", 224),
        ("s3net_imagenet_small", {}, "k=96, depth=45", 224),
        ("mobilenet_v2", {}, "MobileNetV2", 224),
        ("efficientnet_b0", {}, "EfficientNet-B0", 224),
        ("octresnet50", {}, "OctResNet-50", 224),
        ("lambda_resnet50", {}, "LambdaResNet-50", 224),
        ("se_resnet50", {}, "SE-ResNet-50", 224),
        ("scalenet50", {}, "ScaleNet-50", 224),
        ("ghostnet", {}, "GhostNet", 224),
        ("randwire_ws", {}, "RandWire-WS", 224),
    ],
)
def test_parameters_and_multiply_adds_equal_those_of_the_networks(model, options, setting, size):
    known = [row for row in PAPER_ROWS if row.code_parameters is not None]
    (row,) = [row for row in known if setting in (row.setting if row.network.startswith("S3-Net") else row.network)]
    size_of_network = network_size(model, 100 if row.dataset == "cifar100" else 1000, options, size)
    assert size_of_network == {"parameters": row.code_parameters, "multiply_adds": row.multiply_adds}


def test_rows_without_augmentation_are_marked(tmp_path):
    """DenseNet's errors, in the README of its code: (depth, growth rate, without and with crops and flips)."""
    source = {"k=12, depth=40": (27.55, 24.42), "k=12, depth=100": (23.79, 20.20), "k=24, depth=100": (23.42, 19.25)}
    for setting, errors in source.items():
        rows = [row for row in PAPER_ROWS + AUGMENTED_ROWS if (row.network, row.setting) == ("DenseNet", setting)]
        assert [(row.error, row.augmented) for row in rows] == list(zip(errors, (False, True), strict=True))
    write_run(tmp_path / "plain", augment=False)
    _, rows, markdown = compare(tmp_path, tmp_path / "plain")
    (notes,) = [line for line in markdown.splitlines() if "Trained without augmentation" in line]
    mark = notes.split(" ")[0]
    marked = [line for line in markdown.splitlines() if line.startswith("|") and mark in line]
    networks = [line.split("|")[1].strip() for line in marked]
    assert sorted(networks) == ["DenseNet"] * 3 + ["ResNet", "s3net_cifar"]
    assert "quoted (not in the paper)" in markdown and "accuracy 76.85 with cutout" in markdown
    assert sum(row["source"] == "quoted (not in the paper)" for row in rows) == 6


# -- The figure --


def test_labels_overlap_neither_each_other_nor_the_frame(tmp_path, monkeypatch):
    runs = [
        write_run(tmp_path / f"lr{lr}", (error,), lr=lr)
        for lr, error in ((0.1, 29.9), (0.2, 30.4), (0.3, 30.6), (0.4, 86.0))
    ]
    panels, place_labels = [], error_scatter._place_labels
    monkeypatch.setattr(
        error_scatter, "_place_labels", lambda axes, points: (place_labels(axes, points), panels.append(axes))
    )
    compare_results.main(Args(tuple(runs), tmp_path / "out"))
    assert len(panels) == 2 and len(panels[0].texts) == 21  # 11 of the paper's rows have parameters
    labels = [text.get_text() for text in panels[0].texts]
    assert "s3net_cifar k=12 d=40 lr=0.4 (1 epoch)" in labels and "S3-Net k=12 d=40" in labels, labels
    for axes in panels:
        assert isinstance(axes, matplotlib.axes.Axes) and axes.get_xscale() == "log"
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])
        frame = axes.get_window_extent()
        assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)
    filled = {line.get_marker(): len(line.get_xdata()) for line in panels[0].lines if line.get_marker() != "None"}
    assert filled == {"o": 4, "D": 11, "x": 4, "^": 2}  # measured, quoted, without augmentation, unknown


# -- Bad input: one line, exit code 2 --


def error_of(tmp_path, *runs):
    with pytest.raises(InputError) as error:
        compare_results.main(Args(runs, tmp_path / "out"))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    return str(error.value)


def test_paths_that_are_no_runs_are_errors(tmp_path):
    assert error_of(tmp_path, tmp_path / "absent") == f"there is no {tmp_path / 'absent'}: give the folder of a run"
    assert error_of(tmp_path, tmp_path) == f"{tmp_path} is not the folder of a run: it has no config.json"
    assert error_of(tmp_path).startswith("give one or more runs to compare")
    (tmp_path / "config.json").write_text('{"dataset": "digits"}')
    assert error_of(tmp_path, tmp_path).endswith("was not written by train_s3net.py: it has no valid model")
    config = json.loads((write_run(tmp_path / "run") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"epochs": "200"}))
    assert error_of(tmp_path, tmp_path).endswith("it has no valid epochs")
    (tmp_path / "config.json").write_text("{")
    assert error_of(tmp_path, tmp_path).endswith("config.json is damaged or not a JSON file")
    (tmp_path / "other.json").write_text('{"kind": "benchmark"}')
    assert error_of(tmp_path, tmp_path / "other.json").endswith("nor a results file of validate_10crop.py")
    (tmp_path / "other.json").write_text('{"kind": "validate_10crop"}')
    assert error_of(tmp_path, tmp_path / "other.json").endswith("is damaged: run validate_10crop.py again")


def test_damaged_metrics_are_named(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"epoch": 1, "val_')
    assert error_of(tmp_path, run).endswith("metrics.jsonl is damaged: resume the run, which writes it again")


def test_the_same_run_counts_once(tmp_path):
    original, copy = write_run(tmp_path / "original"), write_run(tmp_path / "copy")
    assert len(compare(tmp_path, original, original)[0]) == 1
    with pytest.raises(InputError, match=r"original and .*copy are the same run \(seed 0\): leave one of them out"):
        compare_results.main(Args((original, copy), tmp_path / "out"))


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    done = run_forked(SCRIPT, "absent", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "error: there is no absent: give the folder of a run\n",
    )
