"""Construct the network of Theorem 1: one neuron per layer and sparse shortcuts approximate a continuous function.

    python expressibility/one_neuron_approximation.py
    python expressibility/one_neuron_approximation.py --function "exp(-x**2)*cos(4*x)" --interval -2 2 --depth 64

The network is a chain of layers with one ReLU neuron each. A shortcut leads from every neuron to the end, where the
outputs are summed. The weights are constructed, not trained: the network is the linear interpolation of the function
between equally spaced knots. How fast its error falls depends on the function and, if the function has a kink, on
whether the kink lies on a knot. So the order is measured at even and at odd depths, and for three functions whose
orders are known. The same chain without shortcuts is monotone at any
depth; its best approximation is computed for comparison. Writes one_neuron.json, with the weights, and
one_neuron.png.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from s3net_common.command_line import OVERWRITE, THREADS, answer_flags, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import claim_folder, default_out, run_record, save_figure, write_json

MAX_DEPTH = 4096
EVEN_DEPTHS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
ODD_DEPTHS = (1, 3, 7, 15, 31, 63, 127, 255, 511, 1023)
ASYMPTOTIC_DEPTH = 100  # the order is fitted to larger depths
# Orders of linear interpolation on an interval that is symmetric about 0, with n pieces of length h. A smooth function
# has the error h^2 / 8 max |f''|. If n is odd, the kink of |x| lies in the middle of a piece, with the error h / 2.
# sqrt|x| has the error sqrt(h) / 4 next to a knot at 0, and sqrt(h / 2) in the middle of a piece.
KNOWN_ORDERS = {"sin(2*x)": (2.0, 2.0), "sin(2*x)+abs(x)": (2.0, 1.0), "sqrt(abs(x))": (0.5, 0.5)}  # even, odd depths
POINTS = 4096
ROUNDING = 1e-12


@dataclass
class Args:
    """Flags of the construction."""

    function: str = "sin(2*x)+abs(x)"
    """Function of x to approximate.
    Allowed: numbers, pi, e, + - * / **, brackets, abs, arctan, cos, cosh, exp, log, sin, sinh, sqrt, tanh.
    If it starts with a minus, use an equals sign: --function=-x."""
    interval: tuple[float, float] = (-3.0, 3.0)
    """Ends of the interval on which to approximate the function."""
    depth: int = 32
    """Number of layers with one neuron each, from 1 to 4096."""
    out: Path = field(default_factory=lambda: default_out("one_neuron"))
    """Folder for one_neuron.json and one_neuron.png, created if missing. Those of an earlier run are replaced."""
    overwrite: OVERWRITE = False
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import expressions
from jax_backend import jax_backend
from scaling_fit import fitted_order

jax.config.update("jax_enable_x64", True)  # in float32, rounding exceeds the error beyond a hundred layers
Function = Callable[[np.ndarray], np.ndarray]


class Chain(NamedTuple):
    """Weights of a network with one neuron per layer.

    It computes h_0 = x, h_i = ReLU(weight_i h_{i-1} + bias_i) and outputs offset + the sum of all shortcut_i h_i.
    """

    weight: np.ndarray
    """(depth,) weight of the previous layer's output."""
    bias: np.ndarray
    """(depth,)"""
    shortcut: np.ndarray
    """(depth,) weight in the final sum. Without shortcuts, all but the last are 0."""
    offset: float


@jax.jit
def apply(chain: Chain, x: jax.Array) -> jax.Array:
    """Compute the network's (n,) outputs for (n,) inputs, layer by layer."""

    def layer(state: tuple[jax.Array, jax.Array], weights: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
        h, total = state
        weight, bias, shortcut = weights
        h = jax.nn.relu(weight * h + bias)
        return (h, total + shortcut * h), None

    start = (x, jnp.full_like(x, chain.offset))
    (_, total), _ = jax.lax.scan(layer, start, (chain.weight, chain.bias, chain.shortcut))
    return total


def sparse_chain(function: Function, low: float, high: float, depth: int) -> Chain:
    """Construct Theorem 1's network: the linear interpolation of the function on `depth` equal pieces.

    Layer 1 computes the ramp that starts at `low`. Each further layer subtracts one step from the previous ramp, so
    its ramp starts one knot later: ReLU(ReLU(x - t) - step) = ReLU(x - (t + step)). A shortcut's weight is the change
    of slope at the knot where the layer's ramp starts.
    """
    knots = np.linspace(low, high, depth + 1)
    values = function(knots)
    slopes = np.diff(values) / np.diff(knots)
    bias = np.concatenate([[-low], -np.diff(knots)[:-1]])
    return Chain(np.ones(depth), bias, np.diff(slopes, prepend=0.0), float(values[0]))


def plain_chain(function: Function, low: float, high: float, depth: int) -> Chain:
    """Construct the chain without shortcuts that has the smallest maximum error.

    A chain of single ReLU neurons computes, at any depth, a function that is constant, then linear, then constant. The
    best one is found by a search over its two corners, on a grid, and its height.
    """
    x = np.linspace(low, high, 401)
    y = function(x)
    starts, stops = (corners.ravel() for corners in np.meshgrid(x[::10], x[::10], indexing="ij"))
    valid = starts < stops
    if depth == 1:  # a single neuron has one corner
        valid &= (starts == low) | (stops == high)
    starts, stops = starts[valid], stops[valid]
    ramps = np.clip((x - starts[:, None]) / (stops - starts)[:, None], 0.0, 1.0)
    heights, middles, errors = _best_heights(ramps, y)
    best = int(np.argmin(errors))
    start, stop, height, middle = starts[best], stops[best], heights[best], middles[best]
    shortcut = np.zeros(depth)
    weight, bias = np.ones(depth), np.zeros(depth)  # further layers leave a positive value unchanged
    if depth == 1 and stop < high:
        weight[0], bias[0] = -1.0, stop
        offset, shortcut[-1] = middle + height, -height / (stop - start)
    elif depth == 1:
        bias[0] = -start
        offset, shortcut[-1] = middle, height / (stop - start)
    else:
        weight[1] = -1.0
        bias[:2] = -start, stop - start
        offset, shortcut[-1] = middle + height, -height / (stop - start)
    return Chain(weight, bias, shortcut, float(offset))


def _best_heights(ramps: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimise the maximum of |y - offset - height * ramp| for each ramp (rows of `ramps`).

    The maximum is convex in the height, so a ternary search finds its minimum.

    Returns:
        Heights, offsets and maximum errors, each (number of ramps,).
    """

    def residual_range(heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        residuals = y - heights[:, None] * ramps
        return residuals.max(axis=1), residuals.min(axis=1)

    bound = 2 * np.ptp(y)  # a larger height is worse than height 0
    lower, upper = np.full(len(ramps), -bound), np.full(len(ramps), bound)
    for _ in range(60):
        third = (upper - lower) / 3
        (top1, bottom1), (top2, bottom2) = residual_range(lower + third), residual_range(upper - third)
        decreasing = top1 - bottom1 > top2 - bottom2
        lower, upper = np.where(decreasing, lower + third, lower), np.where(decreasing, upper, upper - third)
    heights = (lower + upper) / 2
    top, bottom = residual_range(heights)
    return heights, (top + bottom) / 2, (top - bottom) / 2


def monotone_bound(y: np.ndarray) -> float:
    """Return a lower bound of the maximum error of all monotone functions, and so of chains without shortcuts.

    An increasing function has at least half of the largest decrease of y as its error, a decreasing function at least
    half of the largest increase.

    Args:
        y: (n,) values in ascending order of x.
    """
    decrease = np.max(np.maximum.accumulate(y) - y)
    increase = np.max(y - np.minimum.accumulate(y))
    return float(min(decrease, increase) / 2)


def max_error(chain: Chain, function: Function, low: float, high: float) -> float:
    """Return the maximum of |network - function| on a grid that divides each piece into a multiple of 8 parts."""
    depth = len(chain.weight)
    x = np.linspace(low, high, depth * max(8, POINTS // depth // 8 * 8) + 1)
    return float(np.max(np.abs(np.asarray(apply(chain, x)) - function(x))))


def error_curve(function: Function, low: float, high: float, depths: Sequence[int]) -> dict[str, Any]:
    """Measure the maximum error by depth.

    Returns:
        `depths`, `errors`, and the `order`: the power of 1 / depth fitted to the depths above `ASYMPTOTIC_DEPTH`. It is
        None if fewer than three of these errors exceed rounding.
    """
    errors = [max_error(sparse_chain(function, low, high, depth), function, low, high) for depth in depths]
    floor = ROUNDING * max(1.0, float(np.abs(function(np.linspace(low, high, POINTS + 1))).max()))
    fit = [(d, e) for d, e in zip(depths, errors, strict=True) if d > ASYMPTOTIC_DEPTH and e > floor]
    order = -fitted_order(*np.transpose(fit)) if len(fit) > 2 else None
    return {"depths": list(depths), "errors": errors, "order": order}


def known_orders(low: float, high: float) -> list[dict[str, Any]]:
    """Measure the orders of the functions of `KNOWN_ORDERS` at even and odd depths."""
    rows = []
    for text, expected in KNOWN_ORDERS.items():
        row: dict[str, Any] = {"function": text}
        for parity, depths, value in zip(("even", "odd"), (EVEN_DEPTHS, ODD_DEPTHS), expected, strict=True):
            large = [depth for depth in depths if depth > ASYMPTOTIC_DEPTH]
            row[parity] = {"order": error_curve(expressions.parse(text), low, high, large)["order"], "theory": value}
        rows.append(row)
    return rows


def study(function: Function, low: float, high: float, depth: int) -> tuple[dict[str, Any], Chain, Chain]:
    """Construct both chains and measure the error by depth.

    Returns:
        The content of one_neuron.json, the chain with shortcuts and the chain without.
    """
    sparse = sparse_chain(function, low, high, depth)
    plain = plain_chain(function, low, high, depth)
    y = function(np.linspace(low, high, POINTS + 1))
    half_width = (high - low) / 2
    results = {
        "interval": [low, high],
        "depth": depth,
        "greatest_error": max_error(sparse, function, low, high),
        **error_curve(function, low, high, EVEN_DEPTHS),
        "odd": error_curve(function, low, high, ODD_DEPTHS),
        "known_orders": {"interval": [-half_width, half_width], "rows": known_orders(-half_width, half_width)},
        "without_shortcuts": {
            "greatest_error": max_error(plain, function, low, high),
            "bound_at_any_depth": monotone_bound(y),
        },
        "weights": {name: np.asarray(value).tolist() for name, value in sparse._asdict().items()},
    }
    return results, sparse, plain


def draw(results: dict[str, Any], function: Function, sparse: Chain, plain: Chain) -> plt.Figure:
    """Draw the neurons' outputs, the two networks together with the function, and the error against the depth."""
    low, high = results["interval"]
    x = np.linspace(low, high, POINTS + 1)
    figure, (neurons, graphs, decay) = plt.subplots(1, 3, figsize=(14.5, 4.3), layout="constrained")

    h = x
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, results["depth"]))
    for i, shade in enumerate(shades):
        h = np.maximum(sparse.weight[i] * h + sparse.bias[i], 0.0)
        neurons.plot(x, h, color=shade, lw=1)
    neurons.set(
        title=f"Outputs of the {results['depth']} neurons",
        xlabel="x",
        ylabel="output, from the first layer (dark) to the last",
    )

    graphs.plot(x, function(x), color="0.75", lw=5, label=results["function"])
    graphs.plot(x, apply(sparse, x), color="#1f5fa8", lw=1.5, label=f"with shortcuts, {results['depth']} layers")
    graphs.plot(x, apply(plain, x), "--", color="#c0392b", lw=1.5, label="without shortcuts, best approximation")
    graphs.set(title="Networks with one neuron per layer", xlabel="x")
    graphs.legend(frameon=False, fontsize=9, loc="best")

    plain_errors = results["without_shortcuts"]
    for parity, curve, style in (("even", results, "o-"), ("odd", results["odd"], "s--")):
        order = "" if curve["order"] is None else f": depth^(-{curve['order']:.2f})"
        errors = np.maximum(curve["errors"], 1e-17)
        decay.plot(curve["depths"], errors, style, color="#1f5fa8", label=f"with shortcuts, {parity} depths{order}")
    decay.axhline(plain_errors["greatest_error"], color="#c0392b", label="without shortcuts, best approximation")
    if plain_errors["bound_at_any_depth"] > 0:
        decay.axhline(
            plain_errors["bound_at_any_depth"],
            color="#c0392b",
            ls=":",
            label="without shortcuts, lower bound at any depth",
        )
    decay.set(xscale="log", yscale="log", title="Maximum error", xlabel="depth, number of layers")
    decay.grid(alpha=0.25, which="both")
    decay.legend(frameon=False, fontsize=9)
    return figure


def check_args(args: Args) -> None:
    """Raise InputError if the depth or the interval is invalid."""
    low, high = args.interval
    if not 1 <= args.depth <= MAX_DEPTH:
        raise InputError(f"--depth is {args.depth}: it must be from 1 to {MAX_DEPTH}")
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise InputError(f"--interval is {low:g} {high:g}: give two finite numbers, the smaller one first")


def main(args: Args) -> None:
    """Construct both networks, print their errors and write the results."""
    check_args(args)
    function = expressions.parse(args.function)
    low, high = args.interval
    function(np.linspace(low, high, POINTS + 1))  # raises InputError before the folder is made
    jax_backend()  # as above
    out = claim_folder(args.out, "one_neuron.json", "one_neuron.png", overwrite=args.overwrite)
    results, sparse, plain = study(function, low, high, args.depth)
    results = {"function": args.function, **results}
    write_json(out / "one_neuron.json", run_record() | results)
    save_figure(out / "one_neuron.png", draw(results, function, sparse, plain))
    plain_errors = results["without_shortcuts"]
    print(f"With shortcuts, {args.depth} layers: maximum error {results['greatest_error']:.3g}")
    for parity, curve in (("even", results), ("odd", results["odd"])):
        order = "none, the network is exact" if curve["order"] is None else f"{curve['order']:.2f}"
        print(f"Order in the depth, {parity} depths: {order}")
    print(
        f"Without shortcuts: maximum error {plain_errors['greatest_error']:.3g}, "
        f"and at least {plain_errors['bound_at_any_depth']:.3g} at any depth"
    )
    print(f"Wrote {out / 'one_neuron.json'} and {out / 'one_neuron.png'}")


if __name__ == "__main__":
    run_script(main, Args, __doc__)
