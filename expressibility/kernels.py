"""NNGP and neural tangent kernels of the residual and the proposed topology and a chain, at infinite width.

The kernels are computed in two independent ways:

- `closed_form_kernels` evaluates the arc-cosine recursion, all depths in one pass, on CPU or GPU.
- `stax_network` builds the network in `neural_tangents.stax`, which derives the kernels from it. The same network
  also exists at finite width.

The topologies (Figure 2 of the paper, and a control without shortcuts). All Dense layers have W_std 1.5, unless
another value is given, and b_std 0.05:

    residual, depth d:  h = Dense(x);  d times  h <- h + Dense(ReLU(h));  out = Dense_1(ReLU(h))
    proposed, depth d:  h_0 = Dense(x);  h_i = Dense(ReLU(h_{i-1}));  out = Dense_1(ReLU(h_1 + ... + h_d))
    chain, depth d:     h_0 = Dense(x);  h_i = Dense(ReLU(h_{i-1}));  out = Dense_1(ReLU(h_d))

All have d + 2 Dense layers. Figure 3 calls this number K. Importing this module switches JAX to float64: the
kernel matrices are close to singular, and in float32 the two computations agree to only three or four digits.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from figure_3 import B_STD, W_STD
from jax_backend import jax_backend

jax.config.update("jax_enable_x64", True)

DENSE_LAYERS_BESIDE_DEPTH = 2  # the first and the last layer: Figure 3's K = depth + 2

Topology = Literal["residual", "proposed", "chain"]
TOPOLOGIES: tuple[Topology, ...] = get_args(Topology)
PAPER_TOPOLOGIES: tuple[Topology, ...] = ("residual", "proposed")  # those of Figure 3
Backend = Literal["numpy", "jax"]


class Kernel(NamedTuple):
    """NNGP and neural tangent kernel of a network between n1 and n2 points, each of shape (n1, n2)."""

    nngp: np.ndarray
    """Covariance of the network's output over random weights."""
    ntk: np.ndarray
    """Expected inner product of the output's gradients with respect to the weights."""


class _Signal(NamedTuple):
    """Covariance and NTK of a layer's pre-activation, a Gaussian process at infinite width, at two sets of points."""

    cov: Any  # (n1, n2) covariance between the sets
    var1: Any  # (n1,) variance at the first set
    var2: Any  # (n2,) variance at the second set
    ntk: Any  # (n1, n2)

    def __add__(self, other: "_Signal") -> "_Signal":
        """Add the outputs of two different Dense layers. They are uncorrelated in the limit, so the kernels add."""
        return _Signal(*(a + b for a, b in zip(self, other, strict=True)))


def _first_dense(x1: Any, x2: Any, w_std: float) -> _Signal:
    features = x1.shape[1]
    cov, var1, var2 = (
        inner * (w_std**2 / features) + B_STD**2 for inner in (x1 @ x2.T, (x1 * x1).sum(axis=1), (x2 * x2).sum(axis=1))
    )
    return _Signal(cov, var1, var2, ntk=cov)


def _dense_of_relu(h: _Signal, w_std: float, xp: Any) -> _Signal:
    """Return Dense(ReLU(h)), by the arc-cosine kernels of order 1 and 0 (Cho and Saul 2009)."""
    scale = xp.sqrt(h.var1)[:, None] * xp.sqrt(h.var2)
    cos = xp.clip(h.cov / scale, -1.0, 1.0)
    sin = xp.sqrt(1.0 - cos * cos)
    weight = (xp.pi - xp.arccos(cos)) * (w_std**2 / (2 * xp.pi))  # W_std^2 times the kernel of ReLU's derivative
    cov = scale * (sin * (w_std**2 / (2 * xp.pi)) + weight * cos) + B_STD**2
    var1, var2 = (var * (w_std**2 / 2) + B_STD**2 for var in (h.var1, h.var2))
    return _Signal(cov, var1, var2, ntk=cov + weight * h.ntk)


# On a CPU, NumPy is faster than XLA: it needs no compilation, and its arc-cosine is vectorised.
_BACKENDS: dict[str, tuple[Callable, Callable, int]] = {  # conversion of arrays, Dense(ReLU(h)), elements per block
    "numpy": (np.asarray, partial(_dense_of_relu, xp=np), 2**15),
    "jax": (jnp.asarray, jax.jit(partial(_dense_of_relu, xp=jnp)), 2**24),
}


def _outputs(
    h: _Signal, topology: Topology, depths: Collection[int], h0_shortcut: bool, dense_of_relu: Callable
) -> Iterator[tuple[int, _Signal]]:
    """Yield the output signal of the network of each requested depth, in one pass over the layers from h_0."""
    if topology == "residual":
        branch = dense_of_relu(h)
        for depth in range(1, max(depths) + 1):
            h = h + branch
            branch = dense_of_relu(h)  # added by the next block; also the output, if the network ends here
            if depth in depths:
                yield depth, branch
    elif topology == "chain":
        for depth in range(1, max(depths) + 1):
            h = dense_of_relu(h)
            if depth in depths:
                yield depth, dense_of_relu(h)
    else:
        total = h if h0_shortcut else None
        for depth in range(1, max(depths) + 1):
            h = dense_of_relu(h)
            total = h if total is None else total + h
            if depth in depths:
                yield depth, dense_of_relu(total)


def _check(topology: str, depths: Collection[int], w_std: float) -> None:
    if topology not in TOPOLOGIES:
        raise ValueError(f"topology is {topology!r}: choose one of {', '.join(TOPOLOGIES)}")
    for depth in depths:
        if depth < 1:
            raise ValueError(f"depth is {depth}: it must be at least 1, since it counts the blocks")
    if not 0 < w_std < math.inf:
        raise ValueError(f"w_std is {w_std:g}: it must be above 0 and finite")


def _points(x: np.ndarray, name: str) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} has shape {x.shape}: it must be (points, features), both at least 1")
    return x


def kernel_row_blocks(
    x1: np.ndarray,
    x2: np.ndarray | None,
    topology: Topology,
    depths: Collection[int],
    *,
    h0_shortcut: bool = False,
    w_std: float = W_STD,
    backend: Backend | None = None,
    lower_triangle: bool = False,
    block_rows: int | None = None,
) -> Iterator[tuple[slice, dict[int, Kernel]]]:
    """Compute the kernels in blocks of rows. Memory grows with `block_rows * n2` instead of `n1 * n2`.

    Args:
        x1: (n1, features) points, any real numbers.
        x2: (n2, features) points, or None for x1.
        topology: "residual", "proposed" or "chain".
        depths: numbers of blocks, each at least 1.
        h0_shortcut: whether h_0 of the proposed topology also has a shortcut to the sum, as Figure 2(a) shows. The
            published notebook omits it. The residual topology always has it, and the chain never.
        w_std: standard deviation of the weights times the square root of the layer's inputs, above 0.
        backend: "numpy" or "jax". The default is jax if JAX has a GPU, else numpy.
        lower_triangle: skip entries that symmetry makes redundant: the block of rows a to b gets the columns 0 to b
            only. Requires x2 to be None.
        block_rows: rows of x1 per block. The default fits the processor's cache, or fills a GPU.

    Yields:
        The rows as a slice of x1, and their kernels by depth, (rows, n2) in float64.

    Raises:
        ValueError: the topology is unknown, a depth is below 1, w_std is not above 0, a set of points is empty, the
            numbers of features differ, or `lower_triangle` is used with two sets of points.
        InputError: JAX cannot use the devices that JAX_PLATFORMS names.
    """
    _check(topology, depths, w_std)
    x1 = _points(x1, "x1")
    x2 = x1 if x2 is None else _points(x2, "x2")
    if x1.shape[1] != x2.shape[1]:
        raise ValueError(f"x1 has {x1.shape[1]} features and x2 has {x2.shape[1]}: they must be equal")
    if lower_triangle and x2 is not x1:
        raise ValueError("lower_triangle needs the kernel of one set of points with itself: leave x2 None")
    backend = backend or ("numpy" if jax_backend() == "cpu" else "jax")
    convert, dense_of_relu, block_elements = _BACKENDS[backend]
    dense_of_relu = partial(dense_of_relu, w_std=w_std)
    block_rows = block_rows or max(1, block_elements // len(x2))
    x1, x2 = convert(x1), convert(x2)
    for start in range(0, len(x1), block_rows):
        rows = slice(start, min(start + block_rows, len(x1)))
        columns = x2[: rows.stop] if lower_triangle else x2
        h_0 = _first_dense(x1[rows], columns, w_std)
        outputs = _outputs(h_0, topology, depths, h0_shortcut, dense_of_relu)
        yield rows, {depth: Kernel(np.asarray(output.cov), np.asarray(output.ntk)) for depth, output in outputs}


def closed_form_kernels(
    x1: np.ndarray,
    x2: np.ndarray | None,
    topology: Topology,
    max_depth: int,
    *,
    h0_shortcut: bool = False,
    w_std: float = W_STD,
    backend: Backend | None = None,
    block_rows: int | None = None,
) -> dict[int, Kernel]:
    """Compute the kernels of all depths from 1 to `max_depth` in one pass (Figures 2 and 3).

    Needs 16 * n1 * n2 * max_depth bytes of memory. For more points use `kernel_row_blocks`, which has the same
    arguments and errors.

    Returns:
        Kernels (n1, n2) in float64, by depth.
    """
    _check(topology, [max_depth], w_std)
    depths = range(1, max_depth + 1)
    shape = (len(x1), len(x1 if x2 is None else x2))
    matrices = {depth: Kernel(np.empty(shape), np.empty(shape)) for depth in depths}
    for rows, kernels in kernel_row_blocks(
        x1, x2, topology, depths, h0_shortcut=h0_shortcut, w_std=w_std, backend=backend, block_rows=block_rows
    ):
        for depth, kernel in kernels.items():
            matrices[depth].nngp[rows] = kernel.nngp
            matrices[depth].ntk[rows] = kernel.ntk
    return matrices


def stax_network(
    topology: Topology, depth: int, width: int = 512, *, h0_shortcut: bool = False, w_std: float = W_STD
) -> tuple[Callable, Callable, Callable]:
    """Build the network in `neural_tangents.stax`, as one chain of depth + 2 different Dense layers.

    Args:
        topology: "residual", "proposed" or "chain".
        depth: number of blocks, at least 1.
        width: neurons of every hidden layer, at least 1. The kernel function is always that of infinite width.
        h0_shortcut: see `kernel_row_blocks`.
        w_std: see `kernel_row_blocks`.

    Returns:
        `(init_fn, apply_fn, kernel_fn)` with neural-tangents' usual signatures: `init_fn(key, (-1, features)) ->
        (shape, params)`, `apply_fn(params, x) -> (n, 1)` and `kernel_fn(x1, x2, "ntk")`.

    Raises:
        ValueError: the topology is unknown, a depth or width is below 1, or w_std is not above 0.
        ImportError: neural-tangents is not installed, or cannot run on the installed JAX.
    """
    from neural_tangents_compat import stax  # not at the top: the closed form works without neural-tangents

    _check(topology, [depth], w_std)
    if width < 1:
        raise ValueError(f"width is {width}: it must be at least 1")
    dense = partial(stax.Dense, W_std=w_std, b_std=B_STD)

    # FanInSum requires that no two summed branches end in the same Dense layer. It cannot check this; it holds here.
    warnings.filterwarnings("ignore", message="`FanIn` layers assume independent inputs")
    layer, carry = stax.serial(stax.Relu(), dense(width)), stax.Identity()
    if topology == "residual":
        block = stax.serial(stax.FanOut(2), stax.parallel(carry, layer), stax.FanInSum())
        return stax.serial(dense(width), *[block] * depth, stax.Relu(), dense(1))
    if topology == "chain":
        return stax.serial(dense(width), *[layer] * depth, stax.Relu(), dense(1))
    # Each step passes on two values: the last layer's output h, and the sum of all outputs so far.
    start = stax.FanOut(2) if h0_shortcut else stax.serial(layer, stax.FanOut(2))
    step = stax.serial(
        stax.parallel(stax.serial(layer, stax.FanOut(2)), carry),  # ((h, h), sum)
        _regroup(lambda pair: [pair[0][0], [pair[0][1], pair[1]]]),  # (h, (h, sum))
        stax.parallel(carry, stax.FanInSum()),
    )
    steps = [step] * (depth if h0_shortcut else depth - 1)
    return stax.serial(dense(width), start, *steps, _regroup(lambda pair: pair[1]), stax.Relu(), dense(1))


def _regroup(order: Callable[[Any], Any]) -> tuple[Callable, Callable, Callable]:
    """Build a layer without weights that rearranges its input's branches (shapes, values and kernels)."""
    return (
        lambda rng, shape: (order(shape), ()),
        lambda params, inputs, **_: order(inputs),
        lambda kernels, **_: order(kernels),
    )


def empirical_ntk(apply_fn: Callable, params: Any, x1: np.ndarray, x2: np.ndarray | None = None) -> jax.Array:
    """Compute the neural tangent kernel J(x1) J(x2)^T of a finite network with one output and Jacobian J.

    Needs 8 bytes of memory per weight and point.

    Args:
        apply_fn: `apply_fn(params, x) -> (n, 1)`.
        params: the network's weights, any tree of arrays.
        x1: (n1, features).
        x2: (n2, features), or None for x1.

    Returns:
        (n1, n2).
    """
    jacobian = jax.jacobian(lambda weights, x: apply_fn(weights, x)[:, 0])

    def gradients(x: np.ndarray) -> list[jax.Array]:  # a (n, weights) matrix per array of weights
        return [leaf.reshape(len(x), -1) for leaf in jax.tree.leaves(jacobian(params, x))]

    j1 = gradients(x1)
    j2 = j1 if x2 is None else gradients(x2)
    return sum(a @ b.T for a, b in zip(j1, j2, strict=True))
