import jax


def test_the_import_neither_changes_jax_nor_loads_tensorflow(run_python):
    process = run_python(
        """
import warnings
warnings.simplefilter("error")
import jax, jax.core, jax.interpreters.ad
before = set(dir(jax.core)), set(dir(jax.interpreters.ad))
import neural_tangents_compat
import neural_tangents
assert neural_tangents is neural_tangents_compat.neural_tangents is neural_tangents_compat.load()
assert (set(dir(jax.core)), set(dir(jax.interpreters.ad))) == before
print(neural_tangents.__version__, "tensorflow" in sys.modules, "tf2jax" in sys.modules)
try:
    neural_tangents.experimental.empirical_ntk_fn_tf
except AttributeError as error:
    print(error)
"""
    )
    assert process.returncode == 0, process.stderr
    first, second = process.stdout.splitlines()
    assert first == "0.6.5 False False"
    assert "empirical_ntk_fn_tf needs TensorFlow" in second


BROKEN_JAX = "import jax, types; sys.modules['jax.extend.core'] = types.ModuleType('jax.extend.core')\n"


def test_every_import_on_an_unsupported_jax_gives_the_same_error(run_python):
    process = run_python(
        BROKEN_JAX
        + """
for _ in range(2):
    try:
        import neural_tangents_compat
    except ImportError as error:
        print(type(error).__name__, error)
print([name for name in sys.modules if name.startswith("neural_tangents.")])
"""
    )
    first, second, modules = process.stdout.splitlines()
    assert first == second
    assert first.startswith(f"UnsupportedJaxError neural-tangents 0.6.5 cannot run on JAX {jax.__version__}")
    assert "JAX 0.6 to 0.12" in first
    assert 'pip install "jax>=0.6,<0.13"' in first
    assert modules == "[]"


def test_a_script_on_an_unsupported_jax_ends_with_one_line(run_python, error_line, tmp_path):
    process = run_python(
        BROKEN_JAX
        + f"""
import runpy
sys.argv = ["ntk_comparison.py", "--depths", "1", "--out", {str(tmp_path)!r}]
from pathlib import Path
runpy.run_path(str(Path(sys.path[0]) / "ntk_comparison.py"), run_name="__main__")
"""
    )
    assert "JAX 0.6 to 0.12" in error_line(process)


def test_the_error_for_missing_neural_tangents_says_how_to_install_it(run_python):
    process = run_python(
        """
import importlib.metadata
def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = missing
try:
    import neural_tangents_compat
except ModuleNotFoundError as error:
    print(error)
"""
    )
    assert process.stdout.strip() == "neural-tangents is not installed: pip install -r expressibility/requirements.txt"


def test_a_later_release_is_imported_without_changes(run_python, tmp_path):
    package = tmp_path / "neural_tangents"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import jax.core\nfrom . import experimental, stax\npatched = hasattr(jax.core, 'Jaxpr')\n"
    )
    (package / "experimental.py").write_text("real = True\n")
    (package / "stax.py").write_text("")
    process = run_python(
        f"""
sys.path.insert(0, {str(tmp_path)!r})
import importlib.metadata, jax.core
importlib.metadata.version = lambda name: "0.7.0"
from neural_tangents_compat import neural_tangents
print(neural_tangents.patched == hasattr(jax.core, "Jaxpr"), neural_tangents.experimental.real)
"""
    )
    assert process.stdout.strip() == "True True", process.stderr


def test_predict_and_empirical_kernels_work():
    import numpy as np

    from neural_tangents_compat import neural_tangents as nt
    from neural_tangents_compat import stax

    init_fn, apply_fn, kernel_fn = stax.serial(stax.Dense(64), stax.Relu(), stax.Dense(1))
    x = np.random.default_rng(0).normal(size=(6, 3))
    predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, x[:4], x[:4, :1], diag_reg=0.1)
    assert predict_fn(x_test=x[4:], get="ntk").shape == (2, 1)
    _, params = init_fn(jax.random.PRNGKey(0), (-1, 3))
    assert nt.empirical_ntk_fn(apply_fn)(x, None, params).shape == (6, 6)
