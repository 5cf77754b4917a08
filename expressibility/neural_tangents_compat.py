"""Use neural-tangents 0.6.5, its last release, with current JAX and SciPy, and without TensorFlow.

    from neural_tangents_compat import neural_tangents as nt, stax

Alternatively, `import neural_tangents_compat` once before the first `import neural_tangents`. This file needs no other
file of the repository, so it can be copied into another project, beside
`pip install "jax>=0.4.30" scipy` and `pip install --no-deps neural-tangents frozendict`.

neural-tangents 0.6.5 was written for JAX 0.4.16. The installed packages are not edited. During the import, names that
JAX has removed are added to JAX (see `_REMOVED_NAMES`), and removed afterwards. After it, functions in neural-tangents'
own modules are replaced, which repairs:

- `empirical_ntk_fn` with STRUCTURED_DERIVATIVES and AUTO, which read the inside of JAX of 2023;
- `predict.max_learning_rate`, which used an argument that SciPy 1.14 has removed;
- `predict.gradient_descent_mse` under `vmap` and `grad`, where tracers leaked.

Not repaired:

- `neural_tangents.experimental`, which needs TensorFlow.
- STRUCTURED_DERIVATIVES of a function with an operation of several outputs: neural-tangents refuses it. `jnp.split` is
  such an operation now.
- Functions that neural-tangents' examples and tests take from JAX themselves, such as `jax.tree_map`.

Tested with JAX 0.4.30, 0.5.3, 0.7.2, 0.10.2 and 0.12.0. A release of neural-tangents after 0.6.5 is imported without
changes.
"""

import contextlib
import importlib
import importlib.metadata
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy
import numpy as np
import scipy.linalg

LAST_RELEASE = (0, 6, 5)
WORKING_JAX = "JAX 0.4.30 to 0.12"
INSTALL_JAX = 'pip install "jax>=0.4.30,<0.13"'


class UnsupportedJaxError(ImportError):
    """neural-tangents cannot be imported with the installed JAX. The message names versions that work."""


def _safe_zip(*columns: Any) -> list[tuple]:
    return list(zip(*columns, strict=True))


def _safe_map(function: Callable, *columns: Any) -> list:
    return [function(*row) for row in _safe_zip(*columns)]


def _from_extend(name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module("jax.extend.core"), name)


# (module, name, function that returns a replacement, where neural-tangents uses it)
_REMOVED_NAMES: tuple[tuple[str, str, Callable[[], Any], str], ...] = (
    # Moved from jax.core to jax.extend.core. neural-tangents uses them in type annotations of its structured
    # derivatives, which Python evaluates during the import.
    ("jax.core", "Jaxpr", _from_extend("Jaxpr"), "type annotation in empirical.py and rules.py"),
    ("jax.core", "JaxprEqn", _from_extend("JaxprEqn"), "type annotation in empirical.py and rules.py"),
    ("jax.core", "Literal", _from_extend("Literal"), "type annotation in empirical.py and rules.py"),
    ("jax.core", "Primitive", _from_extend("Primitive"), "type annotation, and keys of the table of rules"),
    ("jax.core", "Var", _from_extend("Var"), "type annotation in empirical.py and rules.py"),
    # JAX has removed the whole module. These are map and zip that require equal lengths.
    ("jax.util", "safe_map", lambda: _safe_map, "used in empirical.py under the name map"),
    ("jax.util", "safe_zip", lambda: _safe_zip, "used in empirical.py under the name zip"),
    # No program contains this removed primitive, so any new primitive can be the key of its rule.
    (
        "jax.interpreters.ad",
        "zeros_like_p",
        lambda: _from_extend("Primitive")()("zeros_like"),
        "key of a rule in rules.py",
    ),
)


@contextlib.contextmanager
def _removed_names_restored() -> Iterator[None]:
    """Add the missing names of `_REMOVED_NAMES` to JAX inside the context."""
    with contextlib.ExitStack() as undo, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # JAX 0.6 still has jax.util, with a warning
        for module_name, name, replacement, _ in _REMOVED_NAMES:
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError:
                module = sys.modules[module_name] = types.ModuleType(module_name)
                undo.callback(sys.modules.pop, module_name)
            if not hasattr(module, name):
                setattr(module, name, replacement())
                undo.callback(delattr, module, name)
        yield


# ---- Repairs of neural-tangents' own modules -----------------------------------------------------------------------


class _Overlay:
    """A module with some names replaced, for use inside one of neural-tangents' modules."""

    def __init__(self, module: types.ModuleType, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _repair_structured_derivatives(empirical: types.ModuleType) -> None:
    """Replace what `empirical_ntk_fn` reads from inside JAX by public functions of JAX."""

    def primals_out_and_pullback(
        function: Callable, mode: Any, _j_rules: bool, _s_rules: bool, _fwd: bool | None, *primals: Any
    ) -> tuple[Any, Callable]:
        flat, tree = jax.tree.flatten(primals)
        with jax.disable_jit():  # so that the program of the tangents has no functions inside
            outputs, linear = jax.linearize(lambda *flat: function(*jax.tree.unflatten(tree, flat)), *flat)
            program = jax.make_jaxpr(lambda *tangents: jax.tree.leaves(linear(*tangents)))(*flat)

        def pullback(*cotangents: Any) -> Any:
            unknown = [empirical.UndefinedPrimal(variable.aval) for variable in program.jaxpr.invars]
            flat_cotangents = tuple(jax.tree.leaves(cotangents))
            results = empirical._backward_pass(
                program.jaxpr, mode, program.consts, unknown, flat_cotangents, _j_rules, _s_rules, _fwd
            )
            return jax.tree.unflatten(tree, results)

        return outputs, pullback

    def equation_vjp(equation: Any, cotangents: Any, *inputs: Any) -> tuple:
        if equation is None:  # the identity
            return (cotangents,)
        transpose = empirical.ad.get_primitive_transpose(equation.primitive)
        return transpose(cotangents, *inputs, **equation.params)

    def read_primal(values: dict, variable: Any) -> Any:
        return (
            variable.val if hasattr(variable, "val") else values.get(variable, empirical.UndefinedPrimal(variable.aval))
        )

    def get_flops(function: Callable, optimize: bool, *args: Any, **options: Any) -> float:
        lowered = jax.jit(function).lower(*args, **options)
        analysis = (lowered.compile() if optimize else lowered).cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]  # a dict since JAX 0.5

    empirical._get_primals_out_and_pullback = primals_out_and_pullback
    empirical._eqn_vjp_fn = equation_vjp
    empirical._read_primal = read_primal
    empirical._get_flops = get_flops
    empirical.ad = _Overlay(
        empirical.ad,
        config=types.SimpleNamespace(jax_enable_checks=False),
        source_info_util=types.SimpleNamespace(transform_name_stack=contextlib.nullcontext),
    )
    # jax.numpy's own functions refuse, or will refuse, shapes without values and arrays in place of dtypes.
    empirical.jnp = _Overlay(jax.numpy, size=np.size, shape=np.shape, dtype=jax.numpy.result_type)


def _repair_predict(predict: types.ModuleType) -> None:
    def eigvalsh(matrix: Any, eigvals: tuple[int, int]) -> Any:
        return scipy.linalg.eigvalsh(matrix, subset_by_index=eigvals)  # the argument's name since SciPy 1.14

    def at_once_unless_traced(solver: Callable) -> Callable:
        def solve(kernel: Any, *args: Any, **options: Any) -> Any:
            traced = isinstance(kernel, jax.core.Tracer)
            with contextlib.nullcontext() if traced else jax.ensure_compile_time_eval():
                return solver(kernel, *args, **options)

        return solve

    predict.sp = _Overlay(scipy, linalg=_Overlay(scipy.linalg, eigvalsh=eigvalsh))
    # Its `eval_context` around these two functions lets tracers of `vmap` and `grad` leak since JAX 0.4.36.
    predict.jax = _Overlay(jax, core=_Overlay(jax.core, eval_context=contextlib.nullcontext))
    for name in ("_get_cho_solve", "_get_fns_in_eigenbasis"):
        setattr(predict, name, at_once_unless_traced(getattr(predict, name)))


# ---- The import ----------------------------------------------------------------------------------------------------


class _WithoutTensorFlow(types.ModuleType):
    """Replacement of `neural_tangents.experimental`, which would import TensorFlow and is not used here."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"neural_tangents.experimental.{name} needs TensorFlow; neural_tangents_compat does not load it"
        )


def _installed_release() -> tuple[int, ...]:
    try:
        version = importlib.metadata.version("neural-tangents")
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            "neural-tangents is not installed: pip install -r expressibility/requirements.txt",
            name="neural_tangents",
        ) from None
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def load() -> types.ModuleType:
    """Import neural-tangents and return the module.

    Raises:
        UnsupportedJaxError: the installed JAX lacks other names, too.
        ModuleNotFoundError: neural-tangents is not installed.
    """
    if "neural_tangents" in sys.modules:
        return sys.modules["neural_tangents"]
    if _installed_release() > LAST_RELEASE:
        return importlib.import_module("neural_tangents")
    sys.modules["neural_tangents.experimental"] = _WithoutTensorFlow("neural_tangents.experimental")
    try:
        with _removed_names_restored():
            module = importlib.import_module("neural_tangents")
        _repair_structured_derivatives(importlib.import_module("neural_tangents._src.empirical"))
        _repair_predict(importlib.import_module("neural_tangents._src.predict"))
        return module
    except (ImportError, AttributeError) as error:
        for name in [name for name in sys.modules if name.split(".")[0] == "neural_tangents"]:
            del sys.modules[name]  # so that the next import fails with the same message
        is_module_missing = isinstance(error, ModuleNotFoundError)
        if is_module_missing and (error.name or "").split(".")[0] not in ("jax", "jaxlib"):
            raise
        raise UnsupportedJaxError(
            f"neural-tangents 0.6.5 cannot run on JAX {jax.__version__} ({error}); use {WORKING_JAX}: {INSTALL_JAX}"
        ) from error


neural_tangents = load()
stax = neural_tangents.stax
