"""The paper's two topologies as infinitely wide networks: their NNGP and neural tangent kernels, in two ways.

`closed_form_kernels` is the arc-cosine recursion written out: every depth in one pass, rows in blocks, on CPU
or GPU. `stax_network` is the same network in `neural_tangents.stax`, which also gives it a finite width.

Figure 2 of arXiv 1811.09003; every Dense layer has W_std 1.5 and b_std 0.05 and the activation is ReLU:

    residual, depth d:  h = Dense(x);   d times  h <- h + Dense(ReLU(h));         out = Dense_1(ReLU(h))
    proposed, depth d:  h_0 = Dense(x);  h_i = Dense(ReLU(h_{i-1}));  out = Dense_1(ReLU(h_1 + ... + h_d))

Both have d + 2 Dense layers, which is what Figure 3 calls K. Importing this file switches JAX to float64: the
kernel matrices are close to singular, and in float32 the two ways agree to three or four digits only.
"""

import warnings
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)

W_STD = 1.5
B_STD = 0.05
DENSE_LAYERS_BESIDE_DEPTH = 2  # the first and the last: Figure 3's K = depth + 2

Topology = Literal["residual", "proposed"]
TOPOLOGIES: tuple[Topology, ...] = get_args(Topology)
Backend = Literal["numpy", "jax"]


class Kernel(NamedTuple):
    """The two kernels of one network between two sets of points, each of shape (n1, n2)."""

    nngp: np.ndarray
    """Covariance of the network's output over random weights."""
    ntk: np.ndarray
    """Neural tangent kernel: expected inner product of the output's gradients by the weights."""


class _Signal(NamedTuple):
    """A layer's pre-activation between points 1 and 2: a Gaussian process in the limit of infinite width."""

    cov: Any  # (n1, n2)
    var1: Any  # (n1,)
    var2: Any  # (n2,)
    ntk: Any  # (n1, n2)

    def __add__(self, other: "_Signal") -> "_Signal":
        """The sum of the outputs of two different Dense layers: uncorrelated in the limit, so kernels add."""
        return _Signal(*(a + b for a, b in zip(self, other, strict=True)))


def _first_dense(x1: Any, x2: Any) -> _Signal:
    features = x1.shape[1]
    cov, var1, var2 = (
        inner * (W_STD**2 / features) + B_STD**2 for inner in (x1 @ x2.T, (x1 * x1).sum(axis=1), (x2 * x2).sum(axis=1))
    )
    return _Signal(cov, var1, var2, ntk=cov)


def _dense_of_relu(h: _Signal, xp: Any) -> _Signal:
    """Dense(ReLU(h)): the arc-cosine kernels of order 1 and 0 (Cho and Saul 2009), then the weights."""
    scale = xp.sqrt(h.var1)[:, None] * xp.sqrt(h.var2)
    cos = xp.clip(h.cov / scale, -1.0, 1.0)
    sin = xp.sqrt(1.0 - cos * cos)
    weight = (xp.pi - xp.arccos(cos)) * (W_STD**2 / (2 * xp.pi))  # W_std^2 times the kernel of ReLU's derivative
    cov = scale * (sin * (W_STD**2 / (2 * xp.pi)) + weight * cos) + B_STD**2
    var1, var2 = (var * (W_STD**2 / 2) + B_STD**2 for var in (h.var1, h.var2))
    return _Signal(cov, var1, var2, ntk=cov + weight * h.ntk)


# NumPy needs no compilation and its arc-cosine is vectorised, so on a CPU it beats XLA; on a GPU it is XLA's
# turn.
_BACKENDS: dict[str, tuple[Callable, Callable, int]] = {  # conversion, Dense(ReLU(h)), elements in a block
    "numpy": (np.asarray, partial(_dense_of_relu, xp=np), 2**15),
    "jax": (jnp.asarray, jax.jit(partial(_dense_of_relu, xp=jnp)), 2**24),
}


def _outputs(
    x1: Any, x2: Any, topology: Topology, depths: Collection[int], h0_shortcut: bool, dense_of_relu: Callable
) -> Iterator[tuple[int, _Signal]]:
    """Walks down the network once and yields its output signal at every depth wanted."""
    h = _first_dense(x1, x2)
    if topology == "residual":
        branch = dense_of_relu(h)
        for depth in range(1, max(depths) + 1):
            h = h + branch
            branch = dense_of_relu(h)  # what the next block adds is what the last layer would give here
            if depth in depths:
                yield depth, branch
    else:
        total = h if h0_shortcut else None
        for depth in range(1, max(depths) + 1):
            h = dense_of_relu(h)
            total = h if total is None else total + h
            if depth in depths:
                yield depth, dense_of_relu(total)


def _check(topology: str, depths: Collection[int]) -> None:
    if topology not in TOPOLOGIES:
        raise ValueError(f"topology is {topology!r}: choose one of {', '.join(TOPOLOGIES)}")
    for depth in depths:
        if depth < 1:
            raise ValueError(
                f"depth is {depth}: it must be at least 1, the number of blocks between first and last layer"
            )


def _points(x: np.ndarray, name: str) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} has shape {x.shape}: it must be (points, features), neither of them 0")
    return x


def kernel_row_blocks(
    x1: np.ndarray,
    x2: np.ndarray | None,
    topology: Topology,
    depths: Collection[int],
    *,
    h0_shortcut: bool = False,
    backend: Backend | None = None,
    lower_triangle: bool = False,
    block_rows: int | None = None,
) -> Iterator[tuple[slice, dict[int, Kernel]]]:
    """Yields the kernels' rows block by block: memory grows with `block_rows * n2` and not with `n1 * n2`.

    Args:
        x1: (n1, features) points, any real numbers.
        x2: (n2, features) points; None stands for x1.
        topology: "residual" or "proposed".
        depths: the numbers of blocks wanted, each at least 1.
        h0_shortcut: for the proposed topology, whether h_0 too has a shortcut to the sum (Figure 2(a) draws
            it, the published notebook leaves it out). The residual topology has it in any case.
        backend: "numpy" or "jax"; by default numpy, unless JAX has a GPU.
        lower_triangle: with x2 None, leave out the columns right of a block, which symmetry makes redundant:
            the block of rows a to b has the columns 0 to b.
        block_rows: rows of x1 in a block; by default as many as keep a block in cache, or fill a GPU.

    Yields:
        The rows as a slice of x1, and by depth their kernels, (rows, n2) in float64.

    Raises:
        ValueError: unknown topology, a depth below 1, no points, or different numbers of features.
    """
    _check(topology, depths)
    x1 = _points(x1, "x1")
    x2 = x1 if x2 is None else _points(x2, "x2")
    if x1.shape[1] != x2.shape[1]:
        raise ValueError(f"x1 has {x1.shape[1]} features and x2 has {x2.shape[1]}: they must agree")
    if lower_triangle and x2 is not x1:
        raise ValueError("lower_triangle is for the kernel of one set of points with itself: leave x2 None")
    backend = backend or ("numpy" if jax.default_backend() == "cpu" else "jax")
    convert, dense_of_relu, block_elements = _BACKENDS[backend]
    block_rows = block_rows or max(1, block_elements // len(x2))
    x1, x2 = convert(x1), convert(x2)
    for start in range(0, len(x1), block_rows):
        rows = slice(start, min(start + block_rows, len(x1)))
        columns = x2[: rows.stop] if lower_triangle else x2
        outputs = _outputs(x1[rows], columns, topology, depths, h0_shortcut, dense_of_relu)
        yield rows, {depth: Kernel(np.asarray(out.cov), np.asarray(out.ntk)) for depth, out in outputs}


def closed_form_kernels(
    x1: np.ndarray,
    x2: np.ndarray | None,
    topology: Topology,
    max_depth: int,
    *,
    h0_shortcut: bool = False,
    backend: Backend | None = None,
    block_rows: int | None = None,
) -> dict[int, Kernel]:
    """The kernels of every depth from 1 to `max_depth`, in one pass over the depths (Figures 2 and 3).

    Takes 16 * n1 * n2 * max_depth bytes in main memory; `kernel_row_blocks` is for sets of points where that
    is too much. Arguments and errors are those of `kernel_row_blocks`.

    Returns:
        By depth, the kernels (n1, n2) in float64.
    """
    _check(topology, [max_depth])
    depths = range(1, max_depth + 1)
    shape = (len(x1), len(x1 if x2 is None else x2))
    whole = {depth: Kernel(np.empty(shape), np.empty(shape)) for depth in depths}
    for rows, kernels in kernel_row_blocks(
        x1, x2, topology, depths, h0_shortcut=h0_shortcut, backend=backend, block_rows=block_rows
    ):
        for depth, kernel in kernels.items():
            whole[depth].nngp[rows] = kernel.nngp
            whole[depth].ntk[rows] = kernel.ntk
    return whole


def stax_network(
    topology: Topology, depth: int, width: int = 512, *, h0_shortcut: bool = False
) -> tuple[Callable, Callable, Callable]:
    """The network in `neural_tangents.stax`: one chain of depth + 2 Dense layers, each of which exists once.

    Args:
        topology: "residual" or "proposed".
        depth: number of blocks, at least 1.
        width: neurons of every hidden layer; the kernel function is that of infinite width whatever it is.
        h0_shortcut: see `kernel_row_blocks`.

    Returns:
        `(init_fn, apply_fn, kernel_fn)`: `init_fn(key, (-1, features)) -> (shape, params)`,
        `apply_fn(params, x) -> (n, 1)` and `kernel_fn(x1, x2, "ntk")`, as everywhere in neural-tangents.

    Raises:
        ValueError: unknown topology, or a depth or width below 1.
        ImportError: neural-tangents is not installed, or can't run on the installed JAX.
    """
    from neural_tangents_compat import stax  # here, so that the closed form runs where neural-tangents can't

    _check(topology, [depth])
    if width < 1:
        raise ValueError(f"width is {width}: it must be at least 1")
    dense = partial(stax.Dense, W_std=W_STD, b_std=B_STD)

    # Every branch has a Dense of its own, which is what FanInSum asks for without being able to check it.
    warnings.filterwarnings("ignore", message="`FanIn` layers assume independent inputs")
    layer, carry = stax.serial(stax.Relu(), dense(width)), stax.Identity()
    if topology == "residual":
        block = stax.serial(stax.FanOut(2), stax.parallel(carry, layer), stax.FanInSum())
        return stax.serial(dense(width), *[block] * depth, stax.Relu(), dense(1))
    # Two values go down the chain: the last layer's output h, and the sum of all so far.
    start = stax.FanOut(2) if h0_shortcut else stax.serial(layer, stax.FanOut(2))
    step = stax.serial(
        stax.parallel(stax.serial(layer, stax.FanOut(2)), carry),  # ((h, h), sum)
        _regroup(lambda pair: [pair[0][0], [pair[0][1], pair[1]]]),  # (h, (h, sum))
        stax.parallel(carry, stax.FanInSum()),
    )
    steps = [step] * (depth if h0_shortcut else depth - 1)
    return stax.serial(dense(width), start, *steps, _regroup(lambda pair: pair[1]), stax.Relu(), dense(1))


def _regroup(order: Callable[[Any], Any]) -> tuple[Callable, Callable, Callable]:
    """A layer without weights that rearranges its input's branches: shapes, values and kernels alike."""
    return (
        lambda rng, shape: (order(shape), ()),
        lambda params, inputs, **_: order(inputs),
        lambda kernels, **_: order(kernels),
    )


def empirical_ntk(apply_fn: Callable, params: Any, x1: np.ndarray, x2: np.ndarray | None = None) -> jax.Array:
    """The neural tangent kernel of one finite network with one output: J(x1) J(x2)^T with J its Jacobian.

    Args:
        apply_fn: `apply_fn(params, x) -> (n, 1)`.
        params: the network's weights, any tree of arrays.
        x1: (n1, features).
        x2: (n2, features); None stands for x1.

    Returns:
        (n1, n2). Memory: 8 bytes for every weight and point.
    """
    jacobian = jax.jacobian(lambda weights, x: apply_fn(weights, x)[:, 0])

    def rows(x: np.ndarray) -> list[jax.Array]:
        return [leaf.reshape(len(x), -1) for leaf in jax.tree.leaves(jacobian(params, x))]

    j1 = rows(x1)
    j2 = j1 if x2 is None else rows(x2)
    return sum(a @ b.T for a, b in zip(j1, j2, strict=True))
