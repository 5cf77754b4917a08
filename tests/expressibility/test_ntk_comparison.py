import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ntk_comparison
from s3net_common.output_files import ROOT

PNG = b"\x89PNG\r\n\x1a\n"
# Measured once with neural-tangents alone, in float64.
MEASURED = {"residual": [0.78061, 0.76134], "proposed": [0.76731, 0.74947]}


OPTIONS = ["--depths", "3", "2", "2", "--out", "here"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The script, run from a folder that isn't the repository, and the folder of its results."""
    where = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, ntk_comparison.__file__, *OPTIONS]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done, where / "here"


@pytest.fixture(scope="module")
def results(run):
    return run[1], json.loads((run[1] / "ntk_results.json").read_text())


def test_the_figures_first_two_depths(results):
    _, found = results
    assert found["K"] == [4, 5]
    for topology in ("residual", "proposed"):
        assert found[topology] == pytest.approx(MEASURED[topology], abs=6e-6)
        assert found[topology] == pytest.approx(ntk_comparison.NOTEBOOK[topology], rel=2e-4)
        assert found[f"{topology}_mse"] == pytest.approx([51 * score for score in found[topology]])
    assert 0 < found["engine_disagreement"] < 1e-6


def test_the_paper_is_quoted_beside_it(results):
    out, found = results
    assert found["paper"]["K"] == list(range(4, 11))
    assert found["paper"]["residual"][0] == 0.7708
    assert found["paper"]["proposed"][-1] == 0.6512
    assert "older run" in found["why_the_paper_differs"]
    assert (out / "ntk_results.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in out.iterdir()) == ["ntk_results.json", "ntk_results.png"]


def test_the_table(results):
    lines = ntk_comparison.table(results[1]).splitlines()
    assert lines[2] == "| 4 | 0.78061 | 0.76731 | 0.7708 | 0.7514 | 39.811 | 39.133 |"
    assert len(lines) == 4


def test_the_run_is_on_record(run, results):
    done, (_, found) = run[0], results
    assert found["command"] == "python expressibility/ntk_comparison.py --depths 3 2 2 --out here"
    assert found["versions"]["neural-tangents"] == "0.6.5"
    assert f"disagreement of closed form and neural-tangents: {found['engine_disagreement']:.1e}" in done.stdout
    assert ntk_comparison.WHY_THEY_DIFFER in done.stdout


def test_the_shortcut_from_h0_changes_the_proposed_topology_alone():
    data = ntk_comparison.tabular.split(ntk_comparison.tabular.boston(), 13)
    without = ntk_comparison.compare(data, (2,), check=False).mse
    with_it = ntk_comparison.compare(data, (2,), check=False, h0_shortcut=True).mse
    assert without["residual"] == with_it["residual"]
    assert abs(without["proposed"][0] - with_it["proposed"][0]) > 0.1


def test_finite_widths_are_measured_on_request(tmp_path, monkeypatch):
    instant = ntk_comparison.Comparison((1,), {"residual": [2.0], "proposed": [1.0]}, 0.0)
    monkeypatch.setattr(ntk_comparison, "compare", lambda *_, **__: instant)
    monkeypatch.setattr(ntk_comparison.finite_width.measure, "__defaults__", ((16, 64), 3, False))
    ntk_comparison.main(ntk_comparison.Arguments(out=tmp_path, depths=(1,), finite_width=True))
    found = json.loads((tmp_path / "finite_width.json").read_text())
    assert found["widths"] == [16, 64]
    assert len(found["residual"]["mean"]) == len(found["proposed"]["standard_error"]) == 2
    slope = np.diff(np.log(found["proposed"]["mean"])) / np.log(64 / 16)
    assert found["proposed"]["order"] == pytest.approx(slope[0])
    assert (tmp_path / "finite_width.png").read_bytes().startswith(PNG)


def test_results_go_to_the_ignored_folder_by_default():
    assert ntk_comparison.Arguments().out == ROOT / "runs" / "ntk_comparison"
    assert Path(ntk_comparison.__file__).parents[1] == ROOT


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--depths", 2, 0], "--depths has 0: every depth must be at least 1"),
        (["--depths", 101], "--depths has 101: at most 100"),
        (["--depths", "two", "--nonsense"], "--nonsense"),
        (["--out", "taken"], "taken cannot be written"),
    ],
)
def test_bad_input_is_one_line(script, refused, tmp_path, options, text):
    (tmp_path / "taken").write_text("a file")
    assert text in refused(script("ntk_comparison.py", *options))


def test_the_committed_figure_is_what_the_code_computes():
    committed = json.loads((ROOT / "expressibility/results/ntk_results.json").read_text())
    data = ntk_comparison.tabular.split(ntk_comparison.tabular.boston(), 13)
    mse = ntk_comparison.compare(data, check=False).mse
    assert committed["K"] == list(range(4, 11))
    for topology in ("residual", "proposed"):
        assert committed[f"{topology}_mse"] == pytest.approx(mse[topology], rel=1e-6)
    assert committed["engine_disagreement"] < 1e-6
