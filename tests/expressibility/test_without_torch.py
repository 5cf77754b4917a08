import pytest

# Importing torch fails as if it was not installed. sys.modules["torch"] = None would not do: SciPy and tyro take
# the key's presence to mean that torch is loaded.
WITHOUT_TORCH = """
import importlib.abc, runpy
class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
"""
COMMANDS = [
    ["benchmark.py", "--depths", "1", "--repeats", "1", "--points", "30"],
    ["ntk_comparison.py", "--depths", "1"],
    ["ntk_sensitivity.py", "--splits", "2", "--depths", "1", "--diag-regs", "0.1"],
    ["one_neuron_approximation.py", "--depth", "4"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_script_runs_without_torch(run_python, tmp_path, command):
    process = run_python(
        f"""{WITHOUT_TORCH}
script = sys.path[0] + "/{command[0]}"
sys.argv = [script, *{command[1:]!r}, "--out", "results"]
runpy.run_path(script, run_name="__main__")
"""
    )
    assert process.returncode == 0, process.stderr
    assert list((tmp_path / "results").glob("*.json"))
