import importlib.util
import json
import sys

import numpy as np
import pytest

from kernels import TOPOLOGIES, closed_form_kernels
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT


@pytest.fixture(scope="module")
def benchmark_script():
    """The script as a module under a name of its own: every experiment has a benchmark.py."""
    path = ROOT / "expressibility" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("expressibility_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_small_benchmark(script, tmp_path):
    done = script("benchmark.py", "--depths", 1, "--repeats", 1, "--points", 60, 120, "--out", "o")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "o" / "benchmark.json").read_text())
    speed = found["figure_3"]
    assert speed["largest_relative_difference"] < 1e-6
    for call in ("first", "warm"):
        ours, theirs = speed["closed_form_seconds"][call], speed["neural_tangents_seconds"][call]
        assert speed["ratio"][call] == pytest.approx(theirs / ours)
    scaling = found["scaling"]
    assert scaling["points"] == [60, 120]
    stored, streamed = scaling["stored"]["megabytes"], scaling["streamed"]["megabytes"]
    assert stored[1] - stored[0] >= (120**2 - 60**2) * 8 / 1e6
    assert streamed[1] < stored[1]
    assert "| Figure 3 | closed form | neural-tangents | ratio |" in done.stdout
    assert (tmp_path / "o" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"points": (100, 0)}, "--points must be one or more numbers of at least 1"),
        ({"repeats": 0}, "--repeats is 0: it must be at least 1"),
        ({"depths": (0,)}, "--depths has 0: every depth must be at least 1"),
    ],
)
def test_bad_options(benchmark_script, tmp_path, options, text):
    with pytest.raises(InputError, match=text):
        benchmark_script.main(benchmark_script.Arguments(out=tmp_path, **options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_notebooks_branches_have_the_kernel_of_the_chain(benchmark_script, topology):
    x = np.random.default_rng(0).normal(size=(6, 3))
    _, _, kernel_fn = benchmark_script.notebook_network(topology, 3)
    ours = closed_form_kernels(x, None, topology, 3)[3].ntk
    np.testing.assert_allclose(kernel_fn(x, None, "ntk"), ours, rtol=1e-6)
