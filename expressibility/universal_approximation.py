"""Construct the network of Theorem 2: width D + 1 and sparse shortcuts suffice on [0, 1]^D.

    python expressibility/universal_approximation.py
    python expressibility/universal_approximation.py --function "exp(-8*((x-0.5)**2+(y-0.5)**2))" --depths 16 64 256

A network with one hidden layer of N ReLU neurons approximates every continuous function on [0, 1]^D if N is large.
It equals a network with sparse shortcuts that has N layers of D + 1 neurons: in each layer, D neurons pass on the
input, which ReLU leaves unchanged because it is not negative, and one computes the hidden neuron of that layer. The
shortcuts lead the hidden neurons to the output. So depth replaces width.

The script takes a function of x and y (D = 2). It draws N random hidden neurons, fits their output weights by least
squares, copies all weights into the deep network, and compares the two. Needs torch. Writes
universal_approximation.json and universal_approximation.png.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from s3net_common.command_line import OVERWRITE, THREADS, answer_flags, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import claim_folder, default_out, run_record, save_figure, write_json

FIT_POINTS, TEST_POINTS = 65, 129  # points a side of the grids; the second contains the first
MAX_DEPTH = 2048
INTERVAL = 1.96  # standard errors


@dataclass
class Args:
    """Flags of the construction."""

    function: str = "sin(2*pi*x)*cos(2*pi*y)+abs(x-y)"
    """Function of x and y to approximate on the unit square.
    Allowed: numbers, pi, e, + - * / **, brackets, abs, arctan, cos, cosh, exp, log, sin, sinh, sqrt, tanh."""
    depths: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    """Numbers of layers, which are the numbers of hidden neurons of the shallow network, from 1 to 2048."""
    seeds: int = 3
    """Draws of the hidden neurons for each depth, at least 2."""
    out: Path = field(default_factory=lambda: default_out("universal_approximation"))
    """Folder for the results, created if missing. Those of an earlier run are replaced."""
    overwrite: OVERWRITE = False
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import expressions
from s3net_networks.shortcut_block import ShortcutBlock

Function = Callable[[np.ndarray], np.ndarray]


class Shallow(NamedTuple):
    """Weights of a network with one hidden layer: offset + sum of output_n ReLU(weight_n . x + bias_n)."""

    weight: np.ndarray
    """(N, D)"""
    bias: np.ndarray
    """(N,)"""
    output: np.ndarray
    """(N,)"""
    offset: float


def fit_shallow(points: np.ndarray, values: np.ndarray, neurons: int, seed: int) -> Shallow:
    """Draw the hidden neurons and fit the output weights by least squares.

    The weights of a neuron are a random direction. Its bias is such that its kink goes through a random point of the
    unit cube.

    Args:
        points: (n, D) in [0, 1].
        values: (n,)
        neurons: N, at least 1.
        seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(neurons, points.shape[1]))
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    bias = -np.sum(weight * rng.uniform(size=weight.shape), axis=1)
    hidden = np.maximum(points @ weight.T + bias, 0.0)
    design = np.column_stack([hidden, np.ones(len(points))])
    solution, *_ = np.linalg.lstsq(design, values, rcond=1e-10)
    return Shallow(weight, bias, solution[:-1], float(solution[-1]))


def apply_shallow(network: Shallow, points: np.ndarray) -> np.ndarray:
    """Compute the (n,) outputs of the shallow network for (n, D) points."""
    return np.maximum(points @ network.weight.T + network.bias, 0.0) @ network.output + network.offset


def deep_network(shallow: Shallow) -> nn.Sequential:
    """Construct the network of width D + 1 with sparse shortcuts that equals the shallow network on [0, 1]^D.

    It maps (n, D) points in float64 to (n, 1). Its modules are a `ShortcutBlock` that concatenates the outputs of the
    layers, and the output layer.
    """
    neurons, dimensions = shallow.weight.shape
    width = dimensions + 1
    layers, output = [], torch.zeros(1, neurons * width, dtype=torch.float64)
    for n in range(neurons):
        layer = nn.Linear(width if n else dimensions, width, dtype=torch.float64)
        weight, bias = torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)
        weight[:dimensions, :dimensions] = torch.eye(dimensions)  # these neurons pass on the input
        weight[dimensions, :dimensions] = torch.tensor(shallow.weight[n])
        bias[dimensions] = shallow.bias[n]
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        layers.append(nn.Sequential(layer, nn.ReLU()))
        output[0, n * width + dimensions] = shallow.output[n]
    last = nn.Linear(neurons * width, 1, dtype=torch.float64)
    last.weight, last.bias = nn.Parameter(output), nn.Parameter(torch.tensor([shallow.offset], dtype=torch.float64))
    return nn.Sequential(ShortcutBlock(layers, "concatenate", input_shortcut=False), last)


@torch.inference_mode()
def apply_deep(network: nn.Sequential, points: np.ndarray, batch: int = 1024) -> np.ndarray:
    """Compute the (n,) outputs of the deep network for (n, D) points in [0, 1], `batch` points at a time."""
    return torch.cat([network(part)[:, 0] for part in torch.tensor(points).split(batch)]).numpy()


def grid(points: int) -> np.ndarray:
    """Return the (points^2, 2) points of a grid on the unit square."""
    ticks = np.linspace(0.0, 1.0, points)
    return np.column_stack([axis.ravel() for axis in np.meshgrid(ticks, ticks)])


def study(function: Function, depths: list[int], seeds: int) -> tuple[dict[str, Any], np.ndarray]:
    """Construct the networks of all depths and seeds.

    Returns:
        The content of universal_approximation.json, and the outputs of the deepest network of the first seed on the
        grid of `TEST_POINTS`.
    """
    fit_points, test_points = grid(FIT_POINTS), grid(TEST_POINTS)
    fit_values, test_values = function(fit_points), function(test_points)
    rows, surface = [], test_values
    for depth in depths:
        errors, differences, parameters = [], [], 0
        for seed in range(seeds):
            shallow = fit_shallow(fit_points, fit_values, depth, seed)
            deep = deep_network(shallow)
            outputs = apply_deep(deep, test_points)
            errors.append(float(np.abs(outputs - test_values).max()))
            differences.append(float(np.abs(outputs - apply_shallow(shallow, test_points)).max()))
            parameters = sum(p.numel() for p in deep.parameters())
            surface = outputs if seed == 0 else surface
        rows.append(
            {
                "depth": depth,
                "parameters": parameters,
                "mean_error": float(np.mean(errors)),
                "standard_error": float(np.std(errors, ddof=1) / np.sqrt(seeds)),
                "errors": errors,
                "largest_difference_from_shallow": max(differences),
            }
        )
    results = {
        "width": 3,
        "seeds": seeds,
        "function_range": [float(test_values.min()), float(test_values.max())],
        "rows": rows,
        "largest_difference_from_shallow": max(row["largest_difference_from_shallow"] for row in rows),
    }
    return results, surface


def draw(results: dict[str, Any], function: Function, surface: np.ndarray) -> plt.Figure:
    """Draw the function, the deepest network and its error as surfaces, and the error against the depth."""
    ticks = np.linspace(0.0, 1.0, TEST_POINTS)
    values = function(grid(TEST_POINTS))
    deepest = results["rows"][-1]
    figure = plt.figure(figsize=(15.5, 4.2), layout="constrained")
    limits, largest = {"vmin": values.min(), "vmax": values.max()}, np.abs(surface - values).max()
    panels = [
        (results["function"], values, {"cmap": "viridis", **limits}),
        (f"network of width 3, {deepest['depth']} layers", surface, {"cmap": "viridis", **limits}),
        ("network minus function", surface - values, {"cmap": "RdBu", "vmin": -largest, "vmax": largest}),
    ]
    for column, (title, heights, colours) in enumerate(panels):
        axes = figure.add_subplot(1, 4, column + 1, projection="3d")
        shape = (TEST_POINTS, TEST_POINTS)
        axes.plot_surface(*np.meshgrid(ticks, ticks), heights.reshape(shape), rcount=65, ccount=65, **colours)
        axes.set(xlabel="x", ylabel="y")
        axes.set_title(title, fontsize=10, parse_math=False)
        if column == 2:  # on the same scale as the function
            axes.set_zlim(-np.ptp(values) / 2, np.ptp(values) / 2)
    axes = figure.add_subplot(1, 4, 4)
    depths = [row["depth"] for row in results["rows"]]
    half = [INTERVAL * row["standard_error"] for row in results["rows"]]
    means = [row["mean_error"] for row in results["rows"]]
    axes.errorbar(depths, means, yerr=half, fmt="o-", color="#1f5fa8", capsize=3, label="error of the network")
    differences = [max(row["largest_difference_from_shallow"], 1e-17) for row in results["rows"]]
    axes.plot(depths, differences, "s-", color="#7f8c8d", label="difference from the shallow network")
    axes.set(xscale="log", yscale="log", xlabel="depth, number of layers", title="Maximum error")
    axes.set_xticks(depths, [str(depth) for depth in depths], fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return figure


def check_args(args: Args) -> list[int]:
    """Return the depths in ascending order without duplicates.

    Raises:
        InputError: a flag is out of range.
    """
    if not args.depths or not 1 <= min(args.depths) <= max(args.depths) <= MAX_DEPTH:
        raise InputError(f"--depths must be one or more whole numbers from 1 to {MAX_DEPTH}")
    if args.seeds < 2:
        raise InputError(f"--seeds is {args.seeds}: give 2 or more")
    return sorted(set(args.depths))


def main(args: Args) -> None:
    """Construct the networks, print their errors and write the results."""
    depths = check_args(args)
    expression = expressions.parse(args.function, ("x", "y"))

    def function(points: np.ndarray) -> np.ndarray:
        return expression(points[:, 0], points[:, 1])

    function(grid(TEST_POINTS))  # raises InputError before the folder is made
    names = ("universal_approximation.json", "universal_approximation.png")
    out = claim_folder(args.out, *names, overwrite=args.overwrite)
    results, surface = study(function, depths, args.seeds)
    results = {"function": args.function, **results}
    write_json(out / names[0], run_record() | results)
    save_figure(out / names[1], draw(results, function, surface))
    for row in results["rows"]:
        print(
            f"{row['depth']} layers of 3 neurons: maximum error {row['mean_error']:.3g} ± {row['standard_error']:.2g}, "
            f"difference from the shallow network {row['largest_difference_from_shallow']:.1e}"
        )
    print(f"Wrote {out / names[0]} and {out / names[1]}")


if __name__ == "__main__":
    run_script(main, Args, __doc__)
