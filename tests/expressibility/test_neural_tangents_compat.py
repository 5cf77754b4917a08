import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neural_tangents_compat import neural_tangents as nt
from neural_tangents_compat import stax


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
    assert "JAX 0.4.30 to 0.12" in first
    assert 'pip install "jax>=0.4.30,<0.13"' in first
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
    assert "JAX 0.4.30 to 0.12" in error_line(process)


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
    init_fn, apply_fn, kernel_fn = stax.serial(stax.Dense(64), stax.Relu(), stax.Dense(1))
    x = np.random.default_rng(0).normal(size=(6, 3))
    predict_fn = nt.predict.gradient_descent_mse_ensemble(kernel_fn, x[:4], x[:4, :1], diag_reg=0.1)
    assert predict_fn(x_test=x[4:], get="ntk").shape == (2, 1)
    _, params = init_fn(jax.random.PRNGKey(0), (-1, 3))
    assert nt.empirical_ntk_fn(apply_fn)(x, None, params).shape == (6, 6)


FULLY_CONNECTED = (stax.Dense(8), stax.Relu(), stax.Dense(2)), (4, 3)
CONVOLUTIONAL = (
    (stax.Conv(3, (2, 2)), stax.Relu(), stax.Flatten(), stax.Dense(2)),
    (2, 4, 4, 2),
)


@pytest.mark.parametrize(
    ("implementation", "layers", "shape"),
    [
        ("NTK_VECTOR_PRODUCTS", *FULLY_CONNECTED),
        ("AUTO", (stax.Dense(2),), (4, 3)),
        ("STRUCTURED_DERIVATIVES", *FULLY_CONNECTED),
        ("STRUCTURED_DERIVATIVES", *CONVOLUTIONAL),
    ],
)
def test_all_implementations_compute_the_same_empirical_ntk(implementation, layers, shape):
    init_fn, apply_fn, _ = stax.serial(*layers)
    x = np.random.default_rng(0).normal(size=shape)
    _, params = init_fn(jax.random.PRNGKey(0), shape)
    ntk, expected = (
        nt.empirical_ntk_fn(apply_fn, implementation=nt.NtkImplementation[name])(x, None, params)
        for name in (implementation, "JACOBIAN_CONTRACTION")
    )
    np.testing.assert_allclose(ntk, expected, rtol=1e-5, atol=1e-5)


def test_structured_derivatives_of_an_output_that_ignores_some_weights():
    def apply_fn(params, x):
        return jnp.stack([x @ params["used"], jnp.ones(len(x))], axis=1)

    x, params = np.eye(3), {"used": np.ones(3), "unused": np.ones(2)}
    ntk_fn = nt.empirical_ntk_fn(apply_fn, trace_axes=(), implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES)
    ntk = ntk_fn(x, None, params)  # (3, 3, 2, 2)
    np.testing.assert_allclose(ntk[:, :, 0, 0], np.eye(3))
    assert not ntk[:, :, 1].any() and not ntk[:, :, 0, 1].any()


def test_the_largest_learning_rate_is_two_over_the_largest_eigenvalue():
    kernel = np.diag([1.0, 4.0, 2.0])
    assert nt.predict.max_learning_rate(jnp.asarray(kernel), y_train_size=3) == pytest.approx(2 * 3 / 4)


@pytest.mark.parametrize("time", [None, 2.0])
def test_predict_works_under_vmap_and_jit(time):
    rng = np.random.default_rng(0)
    factors, y = rng.normal(size=(2, 4, 6)), rng.normal(size=(4, 1))

    def prediction(factor):
        kernel = factor @ factor.T
        predict_fn = nt.predict.gradient_descent_mse(kernel, y, diag_reg=0.1)
        return predict_fn(time, jnp.zeros((4, 1)), jnp.zeros((4, 1)), kernel)[1]

    expected = np.stack([prediction(jnp.asarray(factor)) for factor in factors])
    np.testing.assert_allclose(jax.jit(jax.vmap(prediction))(factors), expected, rtol=1e-5, atol=1e-6)


def test_a_cached_prediction_made_inside_jit_serves_outside_of_it():
    kernel, y = jnp.asarray(np.diag([1.0, 2.0])), jnp.ones((2, 1))
    predict_fn = nt.predict.gradient_descent_mse(kernel, y, diag_reg=0.0)
    inside = jax.jit(lambda: predict_fn(None, jnp.zeros((2, 1)), jnp.zeros((2, 1)), kernel)[1])()
    outside = predict_fn(None, jnp.zeros((2, 1)), jnp.zeros((2, 1)), kernel)[1]
    np.testing.assert_allclose(inside, outside)
