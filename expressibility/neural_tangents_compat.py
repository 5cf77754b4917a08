"""Makes neural-tangents 0.6.5, its last release, import on current JAX and without TensorFlow.

    from neural_tangents_compat import neural_tangents as nt, stax

or `import neural_tangents_compat` once, before the first `import neural_tangents`. The installed package is
not edited. While it is being imported, JAX gets back the names that it has dropped since and that the package
reads (`_DROPPED` below says of each one why); afterwards JAX is as it was. A release after 0.6.5 is imported
as it is.

The kernels were tried with JAX 0.4.38 and every minor release from 0.5 to 0.12, `predict` and the Jacobian
contraction of `empirical_ntk_fn` with 0.6, 0.10 and 0.12. Its "structured derivatives" read JAX's internals
as they were in 2023 and are not restored.
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

LAST_RELEASE = (0, 6, 5)
WORKING_JAX = "JAX 0.6 to 0.12"
INSTALL_JAX = 'pip install "jax>=0.6,<0.13"'


class UnsupportedJaxError(ImportError):
    """neural-tangents can't be imported on the installed JAX; the message names versions that work."""


def _safe_zip(*columns: Any) -> list[tuple]:
    return list(zip(*columns, strict=True))


def _safe_map(function: Callable, *columns: Any) -> list:
    return [function(*row) for row in _safe_zip(*columns)]


def _from_extend(name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module("jax.extend.core"), name)


# (module, name, what stands in for it, why it is needed)
_DROPPED: tuple[tuple[str, str, Callable[[], Any], str], ...] = (
    # Moved to jax.extend.core, dropped from jax.core. They annotate the rules of the structured derivatives,
    # and annotations are evaluated on import.
    ("jax.core", "Jaxpr", _from_extend("Jaxpr"), "type annotation in empirical.py and rules.py"),
    ("jax.core", "JaxprEqn", _from_extend("JaxprEqn"), "type annotation in empirical.py and rules.py"),
    ("jax.core", "Literal", _from_extend("Literal"), "type annotation in empirical.py and rules.py"),
    ("jax.core", "Primitive", _from_extend("Primitive"), "type annotation, and keys of the table of rules"),
    ("jax.core", "Var", _from_extend("Var"), "type annotation in empirical.py and rules.py"),
    # The module is gone as a whole; both are ordinary map and zip that insist on equal lengths.
    ("jax.util", "safe_map", lambda: _safe_map, "used in empirical.py under the name map"),
    ("jax.util", "safe_zip", lambda: _safe_zip, "used in empirical.py under the name zip"),
    # JAX no longer has this primitive, so no program holds it: any new primitive will do as the key of its
    # rule.
    (
        "jax.interpreters.ad",
        "zeros_like_p",
        lambda: _from_extend("Primitive")()("zeros_like"),
        "key of a rule in rules.py",
    ),
)


@contextlib.contextmanager
def _dropped_names() -> Iterator[None]:
    """Gives JAX the names of `_DROPPED` that it lacks, and takes them away again."""
    with contextlib.ExitStack() as undo, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # JAX 0.6 still has jax.util, and warns of its end
        for module_name, name, stand_in, _ in _DROPPED:
            try:
                module = importlib.import_module(module_name)
            except ModuleNotFoundError:
                module = sys.modules[module_name] = types.ModuleType(module_name)
                undo.callback(sys.modules.pop, module_name)
            if not hasattr(module, name):
                setattr(module, name, stand_in())
                undo.callback(delattr, module, name)
        yield


class _WithoutTensorFlow(types.ModuleType):
    """Stands in for `neural_tangents.experimental`, which imports TensorFlow and which nothing here uses."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"neural_tangents.experimental.{name} needs TensorFlow and is left out by neural_tangents_compat"
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
    """Imports neural-tangents and returns it; a second call returns the same module.

    Raises:
        UnsupportedJaxError: the installed JAX lacks more than is restored here.
        ModuleNotFoundError: neural-tangents is not installed.
    """
    if "neural_tangents" in sys.modules:
        return sys.modules["neural_tangents"]
    if _installed_release() > LAST_RELEASE:
        return importlib.import_module("neural_tangents")
    sys.modules["neural_tangents.experimental"] = _WithoutTensorFlow("neural_tangents.experimental")
    try:
        with _dropped_names():
            return importlib.import_module("neural_tangents")
    except (ImportError, AttributeError) as error:
        for name in [name for name in sys.modules if name.split(".")[0] == "neural_tangents"]:
            del sys.modules[name]  # what a failed import leaves behind would hide the cause from the next one
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] not in (
            "jax",
            "jaxlib",
        ):
            raise
        raise UnsupportedJaxError(
            f"neural-tangents 0.6.5 cannot run on JAX {jax.__version__} ({error}); use {WORKING_JAX}: {INSTALL_JAX}"
        ) from error


neural_tangents = load()
stax = neural_tangents.stax
