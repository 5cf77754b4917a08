"""fast_recipes.py: the runs of each recipe, and when one wins."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image
from run_folders import write_run

import compare_results
from comparison.budget_report import RECORDED, undisturbed_seconds
from fast_recipes import Args, main, recipe_jobs
from s3net_common.errors import InputError
from train_s3net import Args as TrainerArgs

COMMITTED = Path(__file__).resolve().parents[2] / "generalizability" / "results" / "fast_recipes"


def write_runs(args, errors):
    """Write finished runs with the errors of each recipe, one for each seed."""
    for (name, seed), job in recipe_jobs(args).items():
        error = errors[name][seed]
        settings = {key: value for key, value in job.settings.items() if value is not None and key != "device"}
        options = {key: settings.pop(key) for key in ("growth_rate", "depth")}
        settings |= {"model_options": options}
        del settings["seed"], settings["epochs"]
        job.folder.parent.mkdir(exist_ok=True)
        write_run(job.folder, [error + 1] * (args.epochs - 1) + [error], seed, epochs=args.epochs, **settings)
        summary = dict.fromkeys(RECORDED, 1) | {"last_val_error": error, "last_val_top5_error": 9.0, "seed": seed}
        summary |= {"parameters": 272_836, "multiply_adds": 4e7, "versions": {"torch": "2.14.1"}}
        (job.folder / "summary.json").write_text(json.dumps(summary))


def test_the_settings_of_the_recipes_are_flags_of_the_trainer():
    jobs = recipe_jobs(Args())
    assert len(jobs) == 9
    known = {field.name for field in fields(TrainerArgs)}
    assert all(job.settings.keys() <= known for job in jobs.values())
    words = jobs["progressive", 2].flags()
    assert "--no-norm-decay" in words and "--nesterov" in words and "True" not in words
    for flag, value in (("--early-size", "24"), ("--early-epochs", "7"), ("--average-epochs", "3"), ("--seed", "2")):
        assert words[words.index(flag) + 1] == value
    assert jobs["plain", 0].flags().count("--weight-decay") == 0


@pytest.mark.parametrize(
    ("regularised", "wins"),
    [((37.0, 38.0, 37.5), True), ((39.4, 40.4, 39.9), False), ((30.0, 45.0, 36.0), False), ((42.0, 43.0, 42.5), False)],
)
def test_a_recipe_wins_with_a_point_and_an_interval_below_zero(tmp_path, capsys, regularised, wins):
    args = Args(out=tmp_path, epochs=3)
    plain = (40.0, 41.0, 40.6)
    write_runs(args, {"plain": plain, "regularised": regularised, "progressive": plain})
    main(args)
    results = json.loads((tmp_path / "results.json").read_text())
    first, second = results["differences"]
    assert (first["recipe"], first["wins"], second["wins"]) == ("regularised", wins, False)
    assert first["mean"] == pytest.approx((sum(regularised) - sum(plain)) / 3)
    assert first["interval"][0] < first["mean"] < first["interval"][1]
    assert second["interval"] == [0.0, 0.0]
    printed = capsys.readouterr().out
    assert f"over 3 seeds (95% interval {first['interval'][0]:+.2f} to" in printed
    low, high = first["corrected_interval"]  # Student's t with 2 degrees of freedom: 4.303 and, for 2 of them, 6.205
    assert (high - low) / (first["interval"][1] - first["interval"][0]) == pytest.approx(6.2053 / 4.3027, rel=1e-4)
    assert f"with Bonferroni's correction for 2 differences {low:+.2f} to {high:+.2f})" in printed
    assert printed.count(": it wins") == wins and "| regularised | 0.4 | 3 | " in printed
    assert Image.open(tmp_path / "curves.png").width > 500
    adopted = tmp_path / "adopted"
    main(Args(out=adopted, epochs=3, adopt=(tmp_path,)))
    assert json.loads((adopted / "results.json").read_text())["differences"] == results["differences"]


def test_the_undisturbed_time_has_the_fastest_epoch_of_each_image_size():
    history = [{"seconds": seconds} for seconds in (5.0, 4.0, 9.0, 7.0, 8.0)]
    assert undisturbed_seconds(history, 2) == 2 * 4.0 + 3 * 7.0
    assert undisturbed_seconds(history, 0) == 5 * 4.0
    assert undisturbed_seconds(history, 5) == 5 * 4.0


def test_flags_out_of_range_are_errors(tmp_path):
    with pytest.raises(InputError, match="--seeds 0 is not possible"):
        main(Args(out=tmp_path / "new", seeds=0))
    with pytest.raises(InputError, match="--epochs 1 is not possible: give 2 or more"):
        main(Args(out=tmp_path / "new", epochs=1))
    assert not (tmp_path / "new").exists()


def test_the_committed_results_follow_from_their_runs(tmp_path):
    main(Args(out=tmp_path, adopt=(COMMITTED / "runs",)))
    made, committed = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, COMMITTED))
    del made["command"], committed["command"]
    assert made == committed
    assert (tmp_path / "tables.md").read_text() == (COMMITTED / "tables.md").read_text()


def test_the_committed_comparison_with_the_paper_follows_from_its_runs(tmp_path):
    results = COMMITTED.parent
    runs = sorted((results / "full_search" / "runs").glob("s3net_e30_s?"))
    runs += [COMMITTED / "test_error" / "fast_recipe_s0", results / "cifar100_200_epochs" / "s3net_k12_paper_s0"]
    compare_results.main(compare_results.Args(tuple(runs), tmp_path / "comparison"))
    assert (tmp_path / "comparison" / "table.md").read_text() == (COMMITTED / "comparison" / "table.md").read_text()
