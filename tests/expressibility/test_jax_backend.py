"""Environment variables that name a device that JAX does not have, or that JAX cannot read: one line, exit code 2."""

import importlib.util
from pathlib import Path

import pytest
from processes import run_python

FOLDER = Path(__file__).resolve().parents[2] / "expressibility"
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if '\nif __name__ == "__main__":' in path.read_text()]

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")), reason="JAX has CUDA"
)


def imports_jax(path: Path) -> bool:
    """Whether a file, or a module of this folder that it imports, imports JAX."""
    lines = [line.split() for line in path.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
    modules = {line[1] for line in lines}
    return "jax" in modules or any(imports_jax(FOLDER / f"{m}.py") for m in modules if (FOLDER / f"{m}.py").exists())


def test_the_scripts_that_import_jax_are_found():
    names = {path.name for path in SCRIPTS if imports_jax(path)}
    assert names >= {"benchmark.py", "ntk_comparison.py", "ntk_sensitivity.py", "one_neuron_approximation.py"}


@pytest.mark.parametrize("script", [path for path in SCRIPTS if imports_jax(path)], ids=lambda path: path.name)
def test_a_device_that_jax_lacks_is_one_line(tmp_path, script):
    done = run_python(script, "--out", "results", cwd=tmp_path, env={"JAX_PLATFORMS": "cuda", "JAX_PLATFORM_NAME": ""})
    assert done.returncode == 2
    assert done.stderr == (
        "error: JAX cannot use the device that JAX_PLATFORMS=cuda asks for (JAX was installed without it): unset the "
        'variable, or install JAX for that device, such as with pip install "jax[cuda12]"\n'
    )
    assert not list(tmp_path.iterdir())


PROGRAM = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
from dataclasses import dataclass
from s3net_common.command_line import answer_flags, run_script

@dataclass
class Args:
    pass

answer_flags(Args, "")
import jax
from jax_backend import jax_backend
run_script(lambda args: print(jax_backend()), Args, "")
"""


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("JAX_PLATFORMS", "tpu", "Unable to initialize backend 'tpu'"),
        ("JAX_PLATFORMS", "nonsense", "Unable to initialize backend 'nonsense'"),
        ("JAX_PLATFORM_NAME", "gpu", "Unknown backend: 'gpu' requested"),
        ("JAX_DEFAULT_DEVICE", "gpu", "Unknown backend: 'gpu' requested"),
        ("JAX_PLATFORMS", "", None),
        ("JAX_PLATFORMS", "cuda,cpu", None),
        ("JAX_ENABLE_X64", "maybe", "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
        ("JAX_NUM_CPU_DEVICES", "many", 'Invalid value "many" for JAX flag jax_num_cpu_devices'),
    ],
)
def test_other_values(variable, value, reason):
    done = run_python("-c", PROGRAM, env={"PYTHONPATH": str(FOLDER.parent), variable: value})
    if reason is None:
        assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")
    else:
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith("error: ") and reason in done.stderr
        assert f"{variable}={value} asks for" in done.stderr or variable.lower() in done.stderr.lower()
