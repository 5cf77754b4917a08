import importlib.util
import json
import sys

import numpy as np
import pytest

from kernels import PAPER_TOPOLOGIES, closed_form_kernels
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module, under another name since every experiment has a benchmark.py."""
    path = ROOT / "expressibility" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("expressibility_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # needed by dataclasses
    spec.loader.exec_module(module)
    return module


def test_a_small_benchmark_writes_its_results(run_script, tmp_path):
    process = run_script("benchmark.py", "--depths", 1, "--repeats", 1, "--points", 60, 120, "--out", "o")
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "o" / "benchmark.json").read_text())
    figure_3 = results["figure_3"]
    assert figure_3["largest_relative_difference"] < 1e-6
    for call in ("first", "warm"):
        seconds = figure_3["closed_form_seconds"][call], figure_3["neural_tangents_seconds"][call]
        assert figure_3["ratio"][call] == pytest.approx(seconds[1] / seconds[0])
    scaling = results["scaling"]
    assert scaling["points"] == [60, 120]
    stored, streamed = scaling["stored"]["megabytes"], scaling["streamed"]["megabytes"]
    assert stored[1] - stored[0] >= (120**2 - 60**2) * 8 / 1e6
    assert streamed[1] < stored[1]
    assert "cores" in results["machine"]
    assert "| Figure 3 | closed form | neural-tangents | ratio |" in process.stdout
    assert (tmp_path / "o" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"points": (100, 0)}, "--points must be one or more numbers of at least 1"),
        ({"repeats": 0}, "--repeats is 0: it must be at least 1"),
        ({"depths": (0,)}, "--depths has 0: every depth must be at least 1"),
    ],
)
def test_invalid_flags_are_an_input_error(benchmark, tmp_path, flags, text):
    with pytest.raises(InputError, match=text):
        benchmark.main(benchmark.Args(out=tmp_path, **flags))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("topology", PAPER_TOPOLOGIES)
def test_the_notebooks_branches_have_the_same_kernel_as_the_chain(benchmark, topology):
    x = np.random.default_rng(0).normal(size=(6, 3))
    _, _, kernel_fn = benchmark.notebook_network(topology, 3)
    closed_form = closed_form_kernels(x, None, topology, 3)[3].ntk
    np.testing.assert_allclose(kernel_fn(x, None, "ntk"), closed_form, rtol=1e-6)
