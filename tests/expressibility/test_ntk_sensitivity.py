import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from processes import run_python, started_python
from scipy import stats

import ntk_sensitivity
import tabular
from baseline_regressors import BASELINES
from kernel_regression import mean_squared_error
from s3net_common.errors import InputError

SMALL = ["--splits", "2", "--depths", "1", "2", "--diag-regs", "0.1", "0.01", "--w-stds", "1.5"]


@pytest.fixture
def houses(tmp_path):
    """A CSV file of 60 rows. The target is a smooth function of two features."""
    rng = np.random.default_rng(0)
    sizes, ages = rng.normal(size=(2, 60))
    path = tmp_path / "houses.csv"
    rows = [f"{size:.6f},{age:.6f},{np.sin(size) + age**2 + 5:.6f}" for size, age in zip(sizes, ages, strict=True)]
    path.write_text("\n".join(["size,age,price", *rows]) + "\n")
    return path


def test_the_script_studies_a_csv_file(run_script, houses, tmp_path):
    process = run_script("ntk_sensitivity.py", "--csv", houses, "--target", "price", *SMALL, "--out", "o")
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "o" / "sensitivity.json").read_text())
    assert results["settings"]["datasets"]["houses"]["rows"] == 60
    assert len(results["cells"]) == 2 * 2 * 2
    assert {(cell["K"], cell["diag_reg"]) for cell in results["cells"]} == {(3, 0.1), (3, 0.01), (4, 0.1), (4, 0.01)}
    assert [verdict["settings"] for verdict in results["verdicts"]] == [4, 4]
    predictors = [row["predictor"] for row in results["baselines"]]
    assert predictors[:3] == ["mean", "ridge", "gaussian process"]
    assert "proposed NTK, as in Figure 3" in predictors
    assert "houses, raw, W_std 1.5: of 4 settings proposed surely better in" in process.stdout
    names = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert names == ["baselines.png", "sensitivity.json", "sensitivity.png", "sensitivity_chain.png"]


def test_a_cell_contains_the_mean_errors_of_the_splits(tmp_path):
    args = ntk_sensitivity.Args(out=tmp_path, splits=2, depths=(2,), diag_regs=(0.1,), w_stds=(2.0, 1.0))
    tables, settings = ntk_sensitivity.check_args(args)
    records = list(ntk_sensitivity.evaluate_splits(tables, settings, tmp_path / "partial"))
    assert [(record["dataset"], record["scaling"], record["seed"]) for record in records[:3]] == [
        ("boston", "raw", 0), ("boston", "raw", 1), ("boston", "standardised", 0),
    ]  # fmt: skip
    assert len(records) == 8
    cell = ntk_sensitivity.compare_topologies(records, settings)[3]
    splits = [tabular.split(tabular.boston(), seed).standardised() for seed in (0, 1)]
    errors = [ntk_sensitivity.evaluate(split, [2], [0.1], [2.0]) for split in splits]
    assert (cell["dataset"], cell["scaling"], cell["w_std"], cell["K"]) == ("boston", "standardised", 2.0, 4)
    means = {topology: np.mean([error[topology][0][0][0] for error in errors]) for topology in errors[0]}
    assert cell["proposed_mse"] == pytest.approx(means["proposed"])
    assert cell["difference"] == pytest.approx(means["residual"] - means["proposed"])
    assert cell["chain"]["difference"] == pytest.approx(means["chain"] - means["proposed"])


def test_the_papers_split_gives_the_errors_of_figure_3():
    data = tabular.split(tabular.boston(), tabular.PAPER_SEED)
    errors = ntk_sensitivity.evaluate(data, [2], [0.1])
    for topology, score in (("residual", 0.78061), ("proposed", 0.76731), ("chain", 0.75534)):
        assert errors[topology][0][0][0] / 51 == pytest.approx(score, abs=6e-6)


def test_for_independent_splits_the_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(3)
    first = 5 + rng.normal(size=40)
    second = first - 0.3 + 0.5 * rng.normal(size=40)
    comparison = ntk_sensitivity.paired_difference(first, second, test_share=0.0)
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert comparison["ci95"] == pytest.approx([interval.low, interval.high])
    assert comparison["p_value"] == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert comparison["difference"] == pytest.approx(np.mean(first - second))
    assert comparison["win_rate"] == np.mean(second < first)
    assert comparison["percent"] == pytest.approx(100 * comparison["difference"] / first.mean())


def test_overlapping_splits_widen_the_interval():
    first, second = np.arange(100.0) % 7, np.arange(100.0) % 5
    overlapping, independent = (
        np.diff(ntk_sensitivity.paired_difference(first, second, test_share)["ci95"])[0] for test_share in (0.1, 0.0)
    )
    assert overlapping / independent == pytest.approx(np.sqrt((1 / 100 + 1 / 9) / (1 / 100)))


def make_cell(low, high, win_rate, holm_p_value, **settings):
    mean = (low + high) / 2
    comparison = {"difference": mean, "percent": mean, "ci95": [low, high], "win_rate": win_rate}
    comparison |= {"p_value": holm_p_value / 3, "holm_p_value": holm_p_value}
    return {"dataset": "d", "scaling": "raw", "w_std": 1.5, "K": 4, "diag_reg": 0.1, **settings, **comparison}


def test_a_topology_is_surely_better_if_the_interval_excludes_0():
    cells = [make_cell(1, 3, 0.9, 0.04), make_cell(-1, 3, 0.6, 0.3), make_cell(-5, -1, 0.1, 0.06)]
    for cell in cells:
        cell["chain"] = make_cell(-4, -2, 0.0, 0.01)
    [verdict] = ntk_sensitivity.summarise(cells)
    assert (verdict["name"], verdict["settings"]) == ("D, raw, W_std 1.5", 3)
    assert verdict["proposed_better"] == 2
    assert verdict["proposed_surely_better"] == verdict["residual_surely_better"] == 1
    assert (verdict["proposed_better_after_holm"], verdict["residual_better_after_holm"]) == (1, 0)
    assert (verdict["chain"]["chain_better_after_holm"], verdict["chain"]["proposed_better_after_holm"]) == (3, 0)
    assert verdict["percent_range"] == [-3, 2]
    assert verdict["win_rate_range"] == [0.1, 0.9]


def test_holm_multiplies_the_smallest_p_value_by_their_number_and_is_monotone():
    adjusted = ntk_sensitivity.holm([0.04, 0.01, 0.5, 0.012])
    assert adjusted.tolist() == pytest.approx([0.08, 0.04, 0.5, 0.04])  # 0.012 * 3 is below its predecessor's 0.04
    assert ntk_sensitivity.holm([0.6, 0.7]).tolist() == [1.0, 1.0]


def test_a_smaller_grid_corrects_for_fewer_comparisons():
    cells = [make_cell(1, 3, 0.9, 0.06), make_cell(1, 3, 0.9, 0.06, w_std=1.0), make_cell(1, 3, 0.9, 3, w_std=1.0)]
    cells = [cell | {"chain": make_cell(-3, -1, 0.1, 0.06)} for cell in cells]
    counts = {row["grid"]: row for row in ntk_sensitivity.count_by_grid(cells)}
    assert counts["W_std 1.5"]["chain"]["chain_better_after_holm"] == 1
    assert counts["all settings"]["proposed_better_after_holm"] == 0
    assert counts["W_std 1.5"]["proposed_better_after_holm"] == counts["W_std 1.5"]["settings"] == 1


def test_a_killed_run_continues_with_its_records(houses, tmp_path):
    flags = ["--csv", str(houses), "--target", "price", "--depths", "1", "--diag-regs", "0.1", "--w-stds", "1"]

    def command(out):
        return [ntk_sensitivity.__file__, *flags, "--splits", 40, "--out", tmp_path / out]

    partial = tmp_path / "killed" / "sensitivity.partial.jsonl"
    with started_python(*command("killed"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not (partial.exists() and partial.read_text().count("\n") > 3):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    settings, first, *others = partial.read_text().splitlines()
    marked = json.loads(first)
    marked["residual"][0][0][0] += 1e6  # visible in the result only if the record is used
    incomplete = '{"dataset": "houses", "sca'  # the last line of a process that was killed while writing
    partial.write_text("\n".join([settings, json.dumps(marked), *others, incomplete]))
    run_python(*command("killed"), check=True)
    run_python(*command("complete"), check=True)
    resumed, complete = (
        json.loads((tmp_path / out / "sensitivity.json").read_text())["cells"] for out in ("killed", "complete")
    )
    assert resumed[0]["residual_mse"] == pytest.approx(complete[0]["residual_mse"] + 1e6 / 40)
    assert resumed[0]["proposed_mse"] == pytest.approx(complete[0]["proposed_mse"])
    for cell in (resumed[1], complete[1]):
        cell.pop("holm_p_value")  # it also depends on the first cell
    assert resumed[1] == complete[1]
    assert not partial.exists()


def test_records_of_other_settings_are_not_used_and_not_replaced_unasked(houses, tmp_path):
    partial = tmp_path / "partial.jsonl"
    partial.write_text("another file")
    for splits in (2, 3):
        args = ntk_sensitivity.Args(
            csv=houses, target="price", splits=splits, depths=(1,), diag_regs=(0.1,), w_stds=(1,)
        )
        study, before = ntk_sensitivity.check_args(args), partial.read_text()
        with pytest.raises(InputError, match="belongs to an interrupted study with other flags"):
            list(ntk_sensitivity.evaluate_splits(*study, partial))
        assert partial.read_text() == before
        records = list(ntk_sensitivity.evaluate_splits(*study, partial, overwrite=True))
        assert len(records) == 2 * splits
        assert len(partial.read_text().splitlines()) == 1 + 2 * splits


def test_the_baselines_predict_a_linear_target():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 3))
    y = x @ [1.0, -2.0, 0.5] + 7
    data = tabular.Split(x[:60], y[:60], x[60:], y[60:])
    errors = {name: mean_squared_error(predict_test(data), data.y_test) for name, predict_test in BASELINES.items()}
    assert errors["mean"] == pytest.approx(np.mean((y[60:] - y[:60].mean()) ** 2))
    assert errors["ridge"] < 1e-4
    assert errors["gaussian process"] < 1e-2 * errors["mean"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"splits": 1}, "--splits is 1"),
        ({"depths": (2, 0)}, "--depths has 0"),
        ({"depths": ()}, "--depths is empty"),
        ({"diag_regs": (0.0,)}, "--diag-regs must be"),
        ({"diag_regs": (float("nan"),)}, "--diag-regs must be"),
        ({"w_stds": (1.0, 0.0)}, "--w-stds must be one or more numbers above 0"),
        ({"w_stds": ()}, "--w-stds must be"),
        ({"target": "price"}, "--csv and --target must be given together"),
        ({"csv": Path("absent.csv"), "target": "price"}, "cannot read absent.csv"),
    ],
)
def test_invalid_flags_are_an_input_error(flags, text):
    with pytest.raises(InputError, match=text):
        ntk_sensitivity.check_args(ntk_sensitivity.Args(**flags))


def test_a_missing_column_is_reported_in_one_line(run_script, error_line, houses):
    line = error_line(run_script("ntk_sensitivity.py", "--csv", houses, "--target", "cost", *SMALL))
    assert "has no column 'cost', only size, age, price: choose another --target" in line
