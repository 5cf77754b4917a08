import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import baseline_regressors
import ntk_sensitivity as study
import tabular
from kernel_regression import mean_squared_error

TINY = ["--splits", "2", "--depths", "1", "2", "--diag-regs", "0.1", "0.01"]


@pytest.fixture
def houses(tmp_path):
    """A CSV of 60 rows in which the target is a smooth function of two features."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 60))
    path = tmp_path / "houses.csv"
    rows = [f"{p:.6f},{q:.6f},{np.sin(p) + q**2 + 5:.6f}" for p, q in zip(a, b, strict=True)]
    path.write_text("\n".join(["size,age,price", *rows]) + "\n")
    return path


def test_the_command_line_on_a_file_of_ones_own(script, houses, tmp_path):
    done = script("ntk_sensitivity.py", "--csv", houses, "--target", "price", *TINY, "--out", "o")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "o" / "sensitivity.json").read_text())
    assert found["settings"]["datasets"]["houses"]["rows"] == 60
    assert len(found["cells"]) == 2 * 2 * 2
    assert {(cell["K"], cell["diag_reg"]) for cell in found["cells"]} == {
        (3, 0.1),
        (3, 0.01),
        (4, 0.1),
        (4, 0.01),
    }
    assert [verdict["settings"] for verdict in found["verdicts"]] == [4, 4]
    predictors = [row["predictor"] for row in found["baselines"]]
    assert predictors[:3] == ["mean", "ridge", "gaussian process"]
    assert "proposed NTK, as in Figure 3" in predictors
    assert "houses, raw: proposed surely better in" in done.stdout
    names = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert names == ["baselines.png", "sensitivity.json", "sensitivity.png"]


def test_a_cell_is_what_the_split_gives(tmp_path):
    arguments = study.Arguments(out=tmp_path, splits=2, depths=(2,), diag_regs=(0.1,))
    tables, settings = study.checked(arguments)
    found = list(study.records(tables, settings, tmp_path / "partial"))
    assert [(r["dataset"], r["scaling"], r["seed"]) for r in found[:3]] == [
        ("boston", "raw", 0), ("boston", "raw", 1), ("boston", "standardised", 0),
    ]  # fmt: skip
    assert len(found) == 8
    cell = study.cells(found, settings)[1]
    expected = [study.evaluate(tabular.split(tabular.boston(), seed).standardised(), [2], [0.1]) for seed in (0, 1)]
    assert (cell["dataset"], cell["scaling"], cell["K"]) == ("boston", "standardised", 4)
    assert cell["proposed_mse"] == pytest.approx(np.mean([e["proposed"][0][0] for e in expected]))
    difference = np.mean([e["residual"][0][0] - e["proposed"][0][0] for e in expected])
    assert cell["difference"] == pytest.approx(difference)


def test_the_paper_split_gives_the_figure():
    data = tabular.split(tabular.boston(), tabular.PAPER_SEED)
    errors = study.evaluate(data, [2], [0.1])
    assert errors["residual"][0][0] / 51 == pytest.approx(0.78061, abs=6e-6)
    assert errors["proposed"][0][0] / 51 == pytest.approx(0.76731, abs=6e-6)


def test_paired_difference_is_the_ordinary_t_interval_for_independent_tests():
    rng = np.random.default_rng(3)
    first = 5 + rng.normal(size=40)
    second = first - 0.3 + 0.5 * rng.normal(size=40)
    found = study.paired_difference(first, second, test_share=0.0)
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert found["ci95"] == pytest.approx([interval.low, interval.high])
    assert found["difference"] == pytest.approx(np.mean(first - second))
    assert found["win_rate"] == np.mean(second < first)
    assert found["percent"] == pytest.approx(100 * found["difference"] / first.mean())


def test_overlapping_splits_widen_the_interval():
    first, second = np.arange(100.0) % 7, np.arange(100.0) % 5
    (low, high), (low0, high0) = (study.paired_difference(first, second, s)["ci95"] for s in (0.1, 0.0))
    assert (high - low) / (high0 - low0) == pytest.approx(np.sqrt((1 / 100 + 1 / 9) / (1 / 100)))


def test_verdicts_count_what_is_sure():
    def cell(low, high, win_rate):
        middle = (low + high) / 2
        same = {"dataset": "d", "scaling": "raw", "difference": middle, "percent": middle}
        return {**same, "ci95": [low, high], "win_rate": win_rate}

    [verdict] = study.verdicts([cell(1, 3, 0.9), cell(-1, 3, 0.6), cell(-5, -1, 0.1)])
    assert verdict["settings"] == 3
    assert verdict["proposed_better"] == 2
    assert verdict["proposed_surely_better"] == verdict["residual_surely_better"] == 1
    assert verdict["percent_range"] == [-3, 2]
    assert verdict["win_rate_range"] == [0.1, 0.9]


def test_a_killed_run_goes_on_where_it_was(houses, tmp_path):
    options = ["--csv", str(houses), "--target", "price", "--depths", "1", "--diag-regs", "0.1"]
    script = Path(study.__file__)

    def command(out):
        return [sys.executable, str(script), *options, "--splits", "40", "--out", str(tmp_path / out)]

    partial = tmp_path / "killed" / "sensitivity.partial.jsonl"
    with subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not (partial.exists() and partial.read_text().count("\n") > 3):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    kept = partial.read_text().splitlines()
    with partial.open("a") as file:
        file.write('{"dataset": "houses", "sca')  # as a kill in the middle of a line leaves it
    marked = json.loads(kept[1])
    marked["residual"][0][0] += 1e6  # shows in the result only if the kept record was used
    lines = partial.read_text().splitlines()
    partial.write_text("\n".join([lines[0], json.dumps(marked), *lines[2:]]))
    subprocess.run(command("killed"), check=True, capture_output=True)
    subprocess.run(command("whole"), check=True, capture_output=True)
    resumed, whole = (
        json.loads((tmp_path / out / "sensitivity.json").read_text())["cells"] for out in ("killed", "whole")
    )
    assert resumed[0]["residual_mse"] == pytest.approx(whole[0]["residual_mse"] + 1e6 / 40)
    assert resumed[0]["proposed_mse"] == pytest.approx(whole[0]["proposed_mse"])
    assert resumed[1] == whole[1]
    assert not partial.exists()


def test_other_settings_do_not_take_over_a_partial_run(houses, tmp_path):
    partial = tmp_path / "partial.jsonl"
    for splits in (2, 3):
        arguments = study.Arguments(csv=houses, target="price", splits=splits, depths=(1,), diag_regs=(0.1,))
        found = list(study.records(*study.checked(arguments), partial))
        assert len(found) == 2 * splits
        assert len(partial.read_text().splitlines()) == 1 + 2 * splits


def test_the_baselines_predict_a_linear_target():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 3))
    y = x @ [1.0, -2.0, 0.5] + 7
    data = tabular.Split(x[:60], y[:60], x[60:], y[60:])
    errors = {name: mean_squared_error(fit(data), data.y_test) for name, fit in baseline_regressors.BASELINES.items()}
    assert errors["mean"] == pytest.approx(np.mean((y[60:] - y[:60].mean()) ** 2))
    assert errors["ridge"] < 1e-4
    assert errors["gaussian process"] < 1e-2 * errors["mean"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"splits": 1}, "--splits is 1"),
        ({"depths": (2, 0)}, "--depths has 0"),
        ({"depths": ()}, "--depths is empty"),
        ({"diag_regs": (0.0,)}, "--diag-regs must be"),
        ({"diag_regs": (float("nan"),)}, "--diag-regs must be"),
        ({"target": "price"}, "--csv and --target go together"),
        ({"csv": Path("absent.csv"), "target": "price"}, "cannot read absent.csv"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(study.InputError, match=text):
        study.checked(study.Arguments(**options))


def test_bad_input_is_one_line(script, refused, houses):
    line = refused(script("ntk_sensitivity.py", "--csv", houses, "--target", "cost", *TINY))
    assert "has no column 'cost': choose --target from size, age, price" in line
