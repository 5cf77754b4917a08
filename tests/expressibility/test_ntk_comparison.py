import json
from pathlib import Path

import numpy as np
import pytest
from processes import run_python

import ntk_comparison
from s3net_common.output_files import ROOT

PNG = b"\x89PNG\r\n\x1a\n"
# Measured with neural-tangents in float64.
EXPECTED = {"residual": [0.78061, 0.76134], "proposed": [0.76731, 0.74947], "chain": [0.75534, 0.73256]}

FLAGS = ["--depths", "3", "2", "--out", "out"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the script from a folder outside the repository; return the process and the folder of its results."""
    folder = tmp_path_factory.mktemp("folder")
    return run_python(ntk_comparison.__file__, *FLAGS, cwd=folder, check=True), folder / "out"


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run[1] / "ntk_results.json").read_text())


def test_the_first_two_depths_of_figure_3(results):
    assert results["K"] == [4, 5]
    for topology, expected in EXPECTED.items():
        assert results[topology] == pytest.approx(expected, abs=6e-6)
        if topology != "chain":
            assert results[topology] == pytest.approx(ntk_comparison.NOTEBOOK[topology], rel=2e-4)
        assert results[f"{topology}_mse"] == pytest.approx([51 * score for score in results[topology]])
    assert 0 < results["engine_disagreement"] < 1e-6
    assert results["smallest_error"] == ["chain", "chain"]


def test_the_results_contain_the_papers_numbers(run, results):
    assert results["paper"]["K"] == list(range(4, 11))
    assert results["paper"]["residual"][0] == 0.7708
    assert results["paper"]["proposed"][-1] == 0.6512
    assert "older run" in results["why_the_paper_differs"]
    assert (run[1] / "ntk_results.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in run[1].iterdir()) == ["ntk_results.json", "ntk_results.png"]


def test_the_table_of_errors(results):
    lines = ntk_comparison.format_table(results).splitlines()
    assert lines[2] == "| 4 | 0.78061 | 0.76731 | 0.75534 | 0.7708 | 0.7514 | 39.811 | 39.133 | 38.522 |"
    assert len(lines) == 4


def test_the_results_record_command_and_versions(run, results):
    assert results["command"] == "python expressibility/ntk_comparison.py --depths 3 2 2 --out out"
    assert results["versions"]["neural-tangents"] == "0.6.5"
    difference = f"difference between closed form and neural-tangents: {results['engine_disagreement']:.1e}"
    assert difference in run[0].stdout
    assert results["why_the_paper_differs"] in run[0].stdout
    assert "chain has the smallest error at 2 of 2 depths" in run[0].stdout


def results_of(depths, mse, h0_shortcut=False):
    return ntk_comparison.results_dict(ntk_comparison.Comparison(depths, mse, 0.0), 51, h0_shortcut)


def test_the_text_says_what_was_computed():
    mse = {"residual": [51 * 0.78054477, 40.0], "proposed": [51 * 0.76725888 * 1.001, 39.0], "chain": [38.0, 37.0]}
    figure_3 = results_of((2, 6), mse)
    assert "reproduce to within 0.10% at K = 4." in figure_3["why_the_paper_differs"]
    assert "which were not computed here" in results_of((5, 6), mse)["why_the_paper_differs"]
    variant = results_of((2, 6), mse, h0_shortcut=True)
    assert "reproduces neither the notebook's outputs nor the printed" in variant["why_the_paper_differs"]
    assert "| proposed with h_0 |" in ntk_comparison.format_table(variant)
    for results, named in ((figure_3, False), (variant, True)):
        axes = ntk_comparison.draw(results).axes[0]
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert ("proposed, with the shortcut from h_0, computed here" in labels) == named
        assert ("with the shortcut from h_0" in axes.get_title()) == named
        assert "chain without shortcuts, computed here" in labels


def test_the_shortcut_from_h0_changes_only_the_proposed_topology():
    data = ntk_comparison.tabular.split(ntk_comparison.tabular.boston(), 13)
    default = ntk_comparison.compare(data, (2,), check=False).mse
    h0_shortcut = ntk_comparison.compare(data, (2,), check=False, h0_shortcut=True).mse
    assert default["residual"] == h0_shortcut["residual"]
    assert abs(default["proposed"][0] - h0_shortcut["proposed"][0]) > 0.1


def test_finite_width_measures_the_convergence(tmp_path, monkeypatch):
    comparison = ntk_comparison.Comparison((1,), {"residual": [2.0], "proposed": [1.0], "chain": [1.5]}, 0.0)
    monkeypatch.setattr(ntk_comparison, "compare", lambda *_, **__: comparison)
    monkeypatch.setattr(ntk_comparison.finite_width.measure, "__defaults__", ((16, 64), 3, False))
    ntk_comparison.main(ntk_comparison.Args(out=tmp_path, depths=(1,), finite_width=True))
    results = json.loads((tmp_path / "finite_width.json").read_text())
    assert results["widths"] == [16, 64]
    assert len(results["residual"]["mean"]) == len(results["proposed"]["standard_error"]) == 2
    slope = np.diff(np.log(results["proposed"]["mean"])) / np.log(64 / 16)
    assert results["proposed"]["order"] == pytest.approx(slope[0])
    assert (tmp_path / "finite_width.png").read_bytes().startswith(PNG)


def test_the_default_output_folder_is_in_runs():
    assert ntk_comparison.Args().out == ROOT / "runs" / "ntk_comparison"
    assert Path(ntk_comparison.__file__).parents[1] == ROOT


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--depths", 2, 0], "--depths has 0: every depth must be at least 1"),
        (["--depths", 2, 3, 2], "--depths has 2 more than once: give each depth once"),
        (["--depths", 101], "--depths has 101: it must be at most 100"),
        (["--depths", "two", "--nonsense"], "--nonsense"),
        (["--out", "file"], "file cannot be written"),
    ],
)
def test_an_invalid_flag_is_reported_in_one_line(run_script, error_line, tmp_path, flags, text):
    (tmp_path / "file").write_text("")
    assert text in error_line(run_script("ntk_comparison.py", *flags))


def test_the_code_reproduces_the_committed_results():
    committed = json.loads((ROOT / "expressibility/results/ntk_results.json").read_text())
    data = ntk_comparison.tabular.split(ntk_comparison.tabular.boston(), 13)
    mse = ntk_comparison.compare(data, check=False).mse
    assert committed["K"] == list(range(4, 11))
    for topology in EXPECTED:
        assert committed[f"{topology}_mse"] == pytest.approx(mse[topology], rel=1e-6)
    assert committed["engine_disagreement"] < 1e-6


def test_without_neural_tangents_the_closed_form_serves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ntk_comparison, "find_spec", lambda name: None)
    ntk_comparison.main(ntk_comparison.Args(out=tmp_path, depths=(2,)))
    results = json.loads((tmp_path / "ntk_results.json").read_text())
    assert results["engine_disagreement"] is None
    assert results["proposed"] == pytest.approx([0.76731], abs=6e-6)
    assert "neural-tangents is not installed: the numbers are computed in closed form only" in capsys.readouterr().out
