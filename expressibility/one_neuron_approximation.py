"""The paper's first theorem, built: one neuron a layer and sparse shortcuts approximate continuous functions.

    python expressibility/one_neuron_approximation.py
    python expressibility/one_neuron_approximation.py --function "exp(-x**2)*cos(4*x)" --interval -2 2 --depth
    64

A chain of layers, each a single ReLU neuron, whose outputs all take one shortcut to the end, where they are
summed. Its weights are constructed, not trained. The same chain without the shortcuts can only clip: however
deep, it stays monotone. Writes one_neuron.json, with the weights, and one_neuron.png.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import expressions
from s3net_common.command_line import run_script
from s3net_common.errors import InputError
from s3net_common.output_files import default_out, make_folder, run_record, save_figure, write_json
from scaling_fit import fitted_order

jax.config.update("jax_enable_x64", True)  # float32 would hide the error beyond a hundred layers

MAX_DEPTH = 4096
CURVE_DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ASYMPTOTIC_DEPTH = 16  # the order is fitted from here on
POINTS = 4096
ROUNDING = 1e-12

Function = Callable[[np.ndarray], np.ndarray]


@dataclass
class Arguments:
    """Options of the construction."""

    function: str = "sin(2*x)+abs(x)"
    """The function of x: numbers, pi, e, + - * / **, brackets, abs, arctan, cos, cosh, exp, log, sin, sinh,
    sqrt and tanh. One that starts with a minus is written --function=-x."""
    interval: tuple[float, float] = (-3.0, 3.0)
    """Where to approximate it: from, to."""
    depth: int = 32
    """Layers of one neuron each, from 1 to 4096."""
    out: Path = field(default_factory=lambda: default_out("one_neuron"))
    """Folder for one_neuron.json and one_neuron.png; created if it isn't there."""


class Chain(NamedTuple):
    """One neuron wide: h_0 = x, h_i = ReLU(weight_i h_{i-1} + bias_i), offset + sum of shortcut_i h_i."""

    weight: np.ndarray
    """(depth,) each layer's weight on the layer before."""
    bias: np.ndarray
    """(depth,)."""
    shortcut: np.ndarray
    """(depth,) each layer's weight in the final sum; without shortcuts only the last is not 0."""
    offset: float


@jax.jit
def apply(chain: Chain, x: jax.Array) -> jax.Array:
    """The network's output: one neuron after another, whatever the weights mean.

    Args:
        chain: the weights.
        x: (n,) inputs.

    Returns:
        (n,) outputs.
    """

    def layer(state: tuple[jax.Array, jax.Array], weights: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
        h, total = state
        weight, bias, shortcut = weights
        h = jax.nn.relu(weight * h + bias)
        return (h, total + shortcut * h), None

    start = (x, jnp.full_like(x, chain.offset))
    (_, total), _ = jax.lax.scan(layer, start, (chain.weight, chain.bias, chain.shortcut))
    return total


def with_shortcuts(function: Function, low: float, high: float, depth: int) -> Chain:
    """Theorem 1's network: the function's linear interpolation on `depth` equal pieces, as weights.

    Layer 1 is the ramp that starts at `low`. Every further layer takes one step off the ramp before it, and
    so starts one knot later: ReLU(ReLU(x - t) - step) = ReLU(x - (t + step)). The shortcuts weigh each ramp
    by the change of slope at its knot.
    """
    knots = np.linspace(low, high, depth + 1)
    values = function(knots)
    slopes = np.diff(values) / np.diff(knots)
    bias = np.concatenate([[-low], -np.diff(knots)[:-1]])
    return Chain(np.ones(depth), bias, np.diff(slopes, prepend=0.0), float(values[0]))


def without_shortcuts(function: Function, low: float, high: float, depth: int) -> Chain:
    """The chain's best approximation (least greatest error) when only its last layer reaches the output.

    A ReLU of one variable clips, and a chain of them clips on at most two sides: whatever its depth, it is
    constant, then linear, then constant. So a search over the two corners, on a grid, and the height finds
    the best one.
    """
    x = np.linspace(low, high, 401)
    y = function(x)
    starts, stops = (corner.ravel() for corner in np.meshgrid(x[::10], x[::10], indexing="ij"))
    possible = starts < stops
    if depth == 1:  # a single neuron clips on one side only
        possible &= (starts == low) | (stops == high)
    starts, stops = starts[possible], stops[possible]
    ramps = np.clip((x - starts[:, None]) / (stops - starts)[:, None], 0.0, 1.0)
    heights, middles, errors = _best_heights(ramps, y)
    best = int(np.argmin(errors))
    start, stop, height, middle = starts[best], stops[best], heights[best], middles[best]
    shortcut = np.zeros(depth)
    weight, bias = np.ones(depth), np.zeros(depth)  # further layers pass a positive value on
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
    """For each ramp (rows), the height and offset with the least greatest |y - offset - height * ramp|.

    The error is convex in the height, so that a search by thirds finds its minimum.
    """

    def spread(heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left = y - heights[:, None] * ramps
        return left.max(axis=1), left.min(axis=1)

    reach = 2 * np.ptp(y)  # a higher ramp is worse than none
    below, above = np.full(len(ramps), -reach), np.full(len(ramps), reach)
    for _ in range(60):
        third = (above - below) / 3
        (top1, bottom1), (top2, bottom2) = spread(below + third), spread(above - third)
        falls = top1 - bottom1 > top2 - bottom2
        below, above = np.where(falls, below + third, below), np.where(falls, above, above - third)
    heights = (below + above) / 2
    top, bottom = spread(heights)
    return heights, (top + bottom) / 2, (top - bottom) / 2


def monotone_bound(y: np.ndarray) -> float:
    """What no chain without shortcuts can go below, of any depth: the least error of a monotone function.

    Half of the greatest fall for a rising one, half of the greatest rise for a falling one; the lesser of the
    two.

    Args:
        y: (n,) values in order of x.
    """
    fall = np.max(np.maximum.accumulate(y) - y)
    rise = np.max(y - np.minimum.accumulate(y))
    return float(min(fall, rise) / 2)


def greatest_error(chain: Chain, function: Function, low: float, high: float) -> float:
    """Greatest |network - function| over the interval, on a grid with at least 8 points a piece."""
    depth = len(chain.weight)
    x = np.linspace(low, high, depth * max(8, POINTS // depth) + 1)
    return float(np.max(np.abs(np.asarray(apply(chain, x)) - function(x))))


def study(function: Function, low: float, high: float, depth: int) -> tuple[dict[str, Any], Chain, Chain]:
    """Builds both chains and measures the error against the depth.

    Returns:
        What one_neuron.json holds, the chain with and the chain without shortcuts.
    """
    chain = with_shortcuts(function, low, high, depth)
    clipping = without_shortcuts(function, low, high, depth)
    depths = sorted({*CURVE_DEPTHS, depth})
    errors = [greatest_error(with_shortcuts(function, low, high, d), function, low, high) for d in depths]
    y = function(np.linspace(low, high, POINTS + 1))
    floor = ROUNDING * max(1.0, float(np.abs(y).max()))
    fit = [(d, e) for d, e in zip(depths, errors, strict=True) if d >= ASYMPTOTIC_DEPTH and e > floor]
    found = {
        "interval": [low, high],
        "depth": depth,
        "greatest_error": errors[depths.index(depth)],
        "depths": depths,
        "errors": errors,
        "order": -fitted_order(*np.transpose(fit)) if len(fit) > 2 else None,
        "without_shortcuts": {
            "greatest_error": greatest_error(clipping, function, low, high),
            "bound_at_any_depth": monotone_bound(y),
        },
        "weights": {name: np.asarray(value).tolist() for name, value in chain._asdict().items()},
    }
    return found, chain, clipping


def draw(found: dict[str, Any], function: Function, chain: Chain, clipping: Chain) -> plt.Figure:
    """What the neurons put out, what the two networks make of it, and the error against the depth."""
    low, high = found["interval"]
    x = np.linspace(low, high, POINTS + 1)
    figure, (neurons, graphs, decay) = plt.subplots(1, 3, figsize=(14.5, 4.3), layout="constrained")

    h = x
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, found["depth"]))
    for i, shade in enumerate(shades):
        h = np.maximum(chain.weight[i] * h + chain.bias[i], 0.0)
        neurons.plot(x, h, color=shade, lw=1)
    neurons.set(
        title=f"What the {found['depth']} neurons put out",
        xlabel="x",
        ylabel="output of layer 1 (dark) to the last",
    )

    graphs.plot(x, function(x), color="0.75", lw=5, label=found["function"])
    graphs.plot(x, apply(chain, x), color="#1f5fa8", lw=1.5, label=f"with shortcuts, {found['depth']} layers")
    graphs.plot(x, apply(clipping, x), color="#c0392b", lw=1.5, label="without shortcuts, at its best")
    graphs.set(title="One neuron wide", xlabel="x")
    graphs.legend(frameon=False, fontsize=9, loc="best")

    order, chained = found["order"], found["without_shortcuts"]
    label = "with shortcuts" + (f": depth^(-{order:.2f})" if order is not None else "")
    decay.plot(found["depths"], np.maximum(found["errors"], 1e-17), "o-", color="#1f5fa8", label=label)
    decay.axhline(chained["greatest_error"], color="#c0392b", label="without shortcuts, at its best")
    if chained["bound_at_any_depth"] > 0:
        decay.axhline(chained["bound_at_any_depth"], color="#c0392b", ls=":", label="bound for it at any depth")
    decay.set(xscale="log", yscale="log", title="Greatest error", xlabel="depth, number of layers")
    decay.grid(alpha=0.25, which="both")
    decay.legend(frameon=False, fontsize=9)
    return figure


def check(arguments: Arguments) -> None:
    """Raises InputError for a depth or an interval that makes no sense."""
    low, high = arguments.interval
    if not 1 <= arguments.depth <= MAX_DEPTH:
        raise InputError(f"--depth is {arguments.depth}: it must be from 1 to {MAX_DEPTH}")
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise InputError(f"--interval is {low:g} {high:g}: give two finite numbers, the lesser first")


def main(arguments: Arguments) -> None:
    """Builds, measures, draws and writes."""
    check(arguments)
    function = expressions.parse(arguments.function)
    low, high = arguments.interval
    function(np.linspace(low, high, POINTS + 1))
    out = make_folder(arguments.out)
    found, chain, clipping = study(function, low, high, arguments.depth)
    found = {"function": arguments.function, **found}
    write_json(out / "one_neuron.json", run_record() | found)
    save_figure(out / "one_neuron.png", draw(found, function, chain, clipping))
    chained = found["without_shortcuts"]
    order = found["order"]
    print(f"With shortcuts, {arguments.depth} layers: greatest error {found['greatest_error']:.3g}")
    print("Its order in the depth: " + ("none, it is exact" if order is None else f"{order:.2f}"))
    print(
        f"Without shortcuts, at any depth: {chained['greatest_error']:.3g} at best, "
        f"and never below {chained['bound_at_any_depth']:.3g}"
    )
    print(f"Wrote {out / 'one_neuron.json'} and {out / 'one_neuron.png'}")


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
