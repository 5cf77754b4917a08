"""same_budget.py --adopt: finished runs from elsewhere, after a check of their flags."""

import json
from pathlib import Path

import pytest
from run_folders import write_run

from comparison.budget_report import RECORDED
from comparison.jobs import Job
from s3net_common.errors import InputError
from same_budget import Args, main

COMMITTED = Path(__file__).resolve().parents[3] / "generalizability" / "results" / "full_search"
NETWORKS = {
    "s3net_cifar": {"growth_rate": 12, "depth": 40},
    "resnet20_cifar": {},
    "densenet_cifar": {"growth_rate": 12, "depth": 22},
}
FLAGS = {"search_epochs": 3, "epochs": 3, "search_images": None, "peaks": (0.2, 0.4, 0.8), "seeds": 2}


def write(folder, model, error, lr, seed=1000, torch="2.14.1", epochs=3, done=None, **config):
    """Write a run of the search, or with another seed than 1000 of the comparison."""
    config = {"schedule": "onecycle", "batch_size": 128, "hold_out": 5000 if seed == 1000 else None} | config
    errors = [error + 2, error + 1, error][: done or epochs]
    options = NETWORKS[model] | config.pop("options", {})
    run = write_run(folder, errors, seed, epochs=epochs, model=model, model_options=options, lr=lr, **config)
    if done is None:
        summary = dict.fromkeys(RECORDED, 1) | {"last_val_error": error, "last_val_top5_error": 9.0, "seed": seed}
        summary |= {"parameters": 272_836, "multiply_adds": 4e7, "versions": {"torch": torch}, "epochs": epochs}
        (run / "summary.json").write_text(json.dumps(summary))
    return run


@pytest.fixture
def elsewhere(tmp_path):
    """A search. The best peaks: 0.4 for S3-Net, 0.8 for ResNet-20 (the largest), 0.2 for DenseNet (the smallest)."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for model, best in (("s3net_cifar", 0.4), ("resnet20_cifar", 0.8), ("densenet_cifar", 0.2)):
        for lr in (0.2, 0.4, 0.8):
            write(folder / f"{model}_{lr}", model, 40 + 10 * abs(lr - best), lr)
    return folder


def adopt(tmp_path, *paths, **flags):
    main(Args(out=tmp_path / "out", adopt=paths, **FLAGS | flags))
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_the_search_is_adopted_and_says_which_peaks_to_add(elsewhere, tmp_path, capsys):
    results = adopt(tmp_path, elsewhere)
    s3net, resnet, densenet = "S3-Net k=12, depth=40", "ResNet-20", "DenseNet k=12, depth=22"
    assert results["peaks"] == {s3net: 0.4, resnet: 0.8, densenet: 0.2}
    assert results["peaks_to_add"] == {resnet: 1.6, densenet: 0.1}
    assert len(results["search"]) == 9 and results["torch"]["search"] == ["2.14"]
    assert f"{resnet}: the best peak is at the edge of those that were tried; add 1.6." in capsys.readouterr().out
    copied = tmp_path / "out" / "search" / "model-s3net_cifar-growth-rate-12-depth-40-lr-0.4"
    assert (copied / "config.json").is_file() and not list((tmp_path / "out" / "search").glob(".*"))
    assert adopt(tmp_path, elsewhere)["search"] == results["search"]  # again: nothing changes


def test_a_run_with_default_options_has_the_flags_that_name_them(tmp_path):
    run = write_run(tmp_path / "run", (40.0,), 1000, epochs=1, model_options={})
    settings = {"dataset": "cifar100", "growth_rate": 12, "depth": 40, "seed": 1000, "epochs": 1}
    assert Job(tmp_path / "run", settings).finished()
    assert Job(tmp_path / "run", settings | {"growth_rate": None}).finished()
    with pytest.raises(InputError, match="a finished run with --depth 40 instead of 22: pass another --out"):
        Job(run, settings | {"depth": 22}).finished()
    assert Job(run, {"seed": 1000}).finished()  # with the run's data set, network and options, whatever they are
    blocks = write_run(tmp_path / "blocks", (40.0,), 1000, epochs=1, model_options={"block_config": [2, 2, 2]})
    with pytest.raises(InputError, match="a finished run with --depth None instead of 40: pass another --out"):
        Job(blocks, settings).finished()


def test_the_comparison_is_paired_by_seed(elsewhere, tmp_path):
    for seed, s3net, resnet in ((0, 33.0, 32.0), (1, 34.0, 32.0)):
        write(elsewhere / f"s3net_s{seed}", "s3net_cifar", s3net, 0.4, seed)
        write(elsewhere / f"resnet_s{seed}", "resnet20_cifar", resnet, 0.8, seed)
    results = adopt(tmp_path, elsewhere)
    (row,) = results["differences"]
    assert (row["first"], row["second"], row["seeds"]) == ("S3-Net k=12, depth=40", "ResNet-20", [0, 1])
    margin = 12.7062 * 0.5  # Student, one degree of freedom; the standard error of 1 and 2 is 0.5
    assert row["mean"] == 1.5 and row["interval"] == pytest.approx([1.5 - margin, 1.5 + margin], abs=1e-3)
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "| S3-Net k=12, depth=40 minus ResNet-20 | 2 | +1.50 | -4.85 to +7.85 |\n" in tables
    assert [run["undisturbed_seconds"] for run in results["comparison"]] == 4 * [3 * 3600.0]


def test_several_differences_are_also_given_with_a_correction_for_their_number(elsewhere, tmp_path):
    for seed, s3net, resnet, densenet in ((0, 33.0, 32.0, 31.0), (1, 34.0, 32.0, 31.0)):
        write(elsewhere / f"s3net_s{seed}", "s3net_cifar", s3net, 0.4, seed)
        write(elsewhere / f"resnet_s{seed}", "resnet20_cifar", resnet, 0.8, seed)
        write(elsewhere / f"densenet_s{seed}", "densenet_cifar", densenet, 0.2, seed)
    rows = adopt(tmp_path, elsewhere)["differences"]
    margin = 38.1885 * 0.5  # Student at 1 - 0.05/6, one degree of freedom
    assert len(rows) == 3 and rows[0]["corrected_interval"] == pytest.approx([1.5 - margin, 1.5 + margin], abs=1e-3)
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "| S3-Net k=12, depth=40 minus ResNet-20 | 2 | +1.50 | -4.85 to +7.85 | -17.59 to +20.59 |\n" in tables
    assert "with Bonferroni's correction for 3 differences |" in tables


def test_networks_whose_search_has_not_begun_are_left_out(tmp_path):
    results = adopt(tmp_path, write(tmp_path / "run", "resnet20_cifar", 40.0, 0.4))
    assert results["peaks"] == {"ResNet-20": 0.4} and results["peaks_to_add"] == {"ResNet-20": 0.8}
    assert len(results["search"]) == 1


def test_what_does_not_fit_is_left_out_of_a_folder_and_refused_by_name(elsewhere, tmp_path, capsys):
    other = write(elsewhere / "other", "s3net_cifar", 1.0, 0.4, weight_decay=5e-4, augment=False)
    started = write(elsewhere / "started", "s3net_cifar", 30.0, 0.4, seed=1, done=2)
    wide = write(elsewhere / "wide", "s3net_cifar", 1.0, 0.4, options={"drop_rate": 0.2})
    assert len(adopt(tmp_path, elsewhere)["search"]) == 9
    printed = capsys.readouterr().out
    different = "--augment False instead of True, --weight-decay 0.0005 instead of 0.0001"
    assert f"not adopted: other: {different}" in printed
    assert "not adopted: started: it has reached epoch 2 of 3" in printed
    assert "not adopted: wide: --drop-rate 0.2 instead of 0.0" in printed
    for run, message in ((other, different), (started, "it has reached epoch 2 of 3"), (wide, "--drop-rate 0.2")):
        with pytest.raises(InputError, match=f"{run} cannot be adopted: {message}"):
            adopt(tmp_path, run)


def test_a_flag_that_the_run_of_an_earlier_version_lacks_is_named_with_its_default(tmp_path):
    config = {"dataset": "cifar100", "model": "s3net_cifar", "epochs": 3}
    job = Job(tmp_path, config | {"nesterov": True})
    assert job.differences(config) == ["--nesterov False instead of True"]


def test_runs_of_two_versions_of_pytorch_are_not_mixed(elsewhere, tmp_path):
    adopt(tmp_path, elsewhere)
    run = write(tmp_path / "s0", "s3net_cifar", 33.0, 0.4, seed=0)
    newer = write(tmp_path / "s1", "s3net_cifar", 33.0, 0.4, seed=1, torch="2.15.0")
    with pytest.raises(InputError, match=r"different versions of PyTorch \(2\.14 in .*s0, 2\.15 in .*s1\)"):
        adopt(tmp_path, run, newer)
    assert not (tmp_path / "out" / "comparison").exists()


def test_runs_of_two_number_formats_are_not_mixed(elsewhere, tmp_path):
    run = write(tmp_path / "s0", "s3net_cifar", 33.0, 0.4, seed=0)
    other = write(tmp_path / "s1", "s3net_cifar", 33.0, 0.4, seed=1, amp=False)
    with pytest.raises(InputError, match=r"different number formats \(float32 in .*s1, mixed precision in .*s0\)"):
        adopt(tmp_path, elsewhere, run, other)
    assert not (tmp_path / "out" / "comparison").exists()


def test_the_report_names_the_number_formats_of_runs_that_were_trained_on_different_processors(elsewhere, tmp_path):
    for seed, precision in ((0, "bfloat16"), (1, "float32")):
        run = write(elsewhere / f"s{seed}", "s3net_cifar", 33.0, 0.4, seed)
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"precision": precision}))
    assert adopt(tmp_path, elsewhere)["precision"]["comparison"] == ["bfloat16", "float32"]
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "The runs of the comparison have different number formats: bfloat16, float32." in tables


def test_errors_of_paths(elsewhere, tmp_path):
    with pytest.raises(InputError, match="holds no run of"):
        adopt(tmp_path, tmp_path / "missing")
    assert not (tmp_path / "out").exists()
    write(elsewhere / "twice", "s3net_cifar", 40.0, 0.4)
    with pytest.raises(InputError, match="have the same flags: leave one of them out"):
        adopt(tmp_path, elsewhere)
    with pytest.raises(InputError, match="there is no finished run with these flags to report on"):
        adopt(tmp_path / "new", elsewhere, hold_out=4000)


def test_the_committed_results_follow_from_their_runs(tmp_path):
    searched = {"search_epochs": 30, "search_images": None}
    ablated = {"ablation_images": None, "ablation_peaks": (0.4,)}
    main(Args(out=tmp_path, adopt=(COMMITTED / "runs",), **searched, **ablated))
    made, committed = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, COMMITTED))
    del made["command"], committed["command"]
    assert made == committed
    assert (tmp_path / "tables.md").read_text() == (COMMITTED / "tables.md").read_text()
