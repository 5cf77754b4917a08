"""Measure speed and memory of the closed-form kernels.

    python expressibility/benchmark.py

1. Figure 3 (14 networks, kernels and predictions) in closed form and with neural-tangents, formulated as in the
   published notebook. Both run in one process. The first call and the following ones are timed separately.
2. One kernel matrix for increasing numbers of points: the whole matrix in memory ("stored"), or only one block
   of rows at a time ("streamed").

Writes benchmark.json and benchmark.png, and prints the tables.
"""

import statistics
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from figure_3 import FIGURE_3_DEPTHS, check_depths
from s3net_common.command_line import OVERWRITE, THREADS, answer_flags, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import claim_folder, default_out, run_record, save_figure, write_json

SCALING_DEPTH = 8  # Figure 3's K = 10
SCALING_FEATURES = 13
MODES = ("stored", "streamed")


@dataclass
class Args:
    """Flags of the benchmark."""

    out: Path = field(default_factory=lambda: default_out("expressibility_benchmark"))
    """Folder for benchmark.json and benchmark.png, created if missing. Those of an earlier run are replaced."""
    overwrite: OVERWRITE = False
    depths: tuple[int, ...] = FIGURE_3_DEPTHS
    """Numbers of blocks of the compared networks, each at least 1."""
    repeats: int = 5
    """Timed calls after the first one, at least 1. Their median is reported."""
    points: tuple[int, ...] = (500, 1000, 2000, 4000, 8000, 16000)
    """Numbers of points for the scaling of time and memory, each at least 1. 16000 points need 2 GB."""
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import matplotlib.pyplot as plt
import numpy as np

import tabular
from jax_backend import jax_backend
from kernel_regression import mean_squared_error
from kernels import B_STD, PAPER_TOPOLOGIES, W_STD, Topology, kernel_row_blocks
from ntk_comparison import DIAG_REG, compare
from s3net_common.log_ticks import plain_ticks
from s3net_common.progress import ProgressBar
from scaling_fit import fitted_order

# ---- Figure 3 -----------------------------------------------------------------------------------------------------


def notebook_network(topology: Topology, depth: int) -> tuple[Callable, Callable, Callable]:
    """Build the network as the published notebook does; return neural-tangents' (init_fn, apply_fn, kernel_fn).

    The notebook builds the proposed topology from separate branches. Branch i has i + 1 Dense layers and shares none
    with the others, so the number of layers grows with the square of the depth.
    """
    from neural_tangents_compat import stax

    # neural-tangents cannot check this assumption. It holds: no two branches share a Dense layer.
    warnings.filterwarnings("ignore", message="`FanIn` layers assume independent inputs")
    dense = partial(stax.Dense, 512, W_STD, B_STD)
    layer = stax.serial(stax.Relu(), dense())
    if topology == "residual":
        block = stax.serial(stax.FanOut(2), stax.parallel(stax.Identity(), layer), stax.FanInSum())
        body = stax.serial(dense(), *[block] * depth)
    else:
        branches = [stax.serial(dense(), *[layer] * i) for i in range(1, depth + 1)]
        body = stax.serial(stax.FanOut(depth), stax.parallel(*branches), stax.FanInSum())
    return stax.serial(body, stax.Relu(), stax.Dense(1, W_STD, B_STD))


def notebook_errors(data: tabular.Split, depths: tuple[int, ...]) -> dict[Topology, list[float]]:
    """Compute Figure 3's mean squared errors as the published notebook does."""
    from neural_tangents_compat import neural_tangents as nt

    mse: dict[Topology, list[float]] = {}
    for topology in PAPER_TOPOLOGIES:
        mse[topology] = []
        for depth in depths:
            _, _, kernel_fn = notebook_network(topology, depth)
            predict_fn = nt.predict.gradient_descent_mse_ensemble(
                kernel_fn, data.x_train, data.y_train[:, None], diag_reg=DIAG_REG
            )
            prediction = np.asarray(predict_fn(x_test=data.x_test, get="ntk"))[:, 0]
            mse[topology].append(mean_squared_error(prediction, data.y_test))
    return mse


def time_calls(function: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    """Call `function` 1 + `repeats` times.

    Returns:
        Seconds of the first call, median seconds of the others, and the result of the last.
    """
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:]), result


def measure_figure_3(depths: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Time both computations of Figure 3 and compare their errors."""
    data = tabular.split(tabular.boston(), tabular.PAPER_SEED)
    closed_first, closed_warm, closed_form = time_calls(
        lambda: compare(data, depths, PAPER_TOPOLOGIES, check=False).mse, repeats
    )
    stax_first, stax_warm, notebook = time_calls(lambda: notebook_errors(data, depths), repeats)
    difference = max(
        float(np.max(np.abs(np.array(closed_form[topology]) / np.array(notebook[topology]) - 1)))
        for topology in PAPER_TOPOLOGIES
    )
    return {
        "depths": list(depths),
        "repeats": repeats,
        "closed_form_seconds": {"first": closed_first, "warm": closed_warm},
        "neural_tangents_seconds": {"first": stax_first, "warm": stax_warm},
        "ratio": {"first": stax_first / closed_first, "warm": stax_warm / closed_warm},
        "largest_relative_difference": difference,
    }


# ---- Scaling with the number of points ----------------------------------------------------------------------------


def compute_kernel(points: int, stored: bool) -> np.ndarray | float:
    """Compute the proposed topology's kernel of random points in blocks of rows.

    Returns:
        The (points, points) matrix if `stored`, else only the sum of its entries, to save memory.
    """
    x = np.random.default_rng(0).normal(size=(points, SCALING_FEATURES))
    matrix = np.empty((points, points)) if stored else None
    total = 0.0
    for rows, kernels in kernel_row_blocks(x, None, "proposed", [SCALING_DEPTH]):
        block = kernels[SCALING_DEPTH].ntk
        if matrix is not None:
            matrix[rows] = block
        total += float(block.sum())
    return total if matrix is None else matrix


def seconds_and_megabytes(function: Callable[[], object]) -> tuple[float, float]:
    """Return the time of one call, and the peak of allocated memory during a second one.

    The second call is needed because tracing the memory slows the call down.
    """
    start = time.perf_counter()
    function()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, peak / 1e6


def measure_scaling(points: tuple[int, ...]) -> dict[str, Any]:
    """Measure time and memory of one kernel matrix by number of points, and fit the orders of growth."""
    scaling: dict[str, Any] = {"points": list(points), "topology": "proposed", "depth": SCALING_DEPTH}
    bar = ProgressBar(total=len(MODES) * len(points), desc="kernel matrices")
    for mode in MODES:
        measurements = []
        for n in points:
            measurements.append(seconds_and_megabytes(partial(compute_kernel, n, mode == "stored")))
            bar.update()
        seconds, megabytes = np.transpose(measurements)
        scaling[mode] = {"seconds": seconds.tolist(), "megabytes": megabytes.tolist()}
        if len(points) > 1:
            scaling[mode]["order_of_time"] = fitted_order(np.array(points), seconds)
            scaling[mode]["order_of_memory"] = fitted_order(np.array(points), megabytes)
    bar.close()
    return scaling


# ---- Results ------------------------------------------------------------------------------------------------------


def draw(results: dict[str, Any]) -> plt.Figure:
    """Draw time and memory against the number of points."""
    scaling = results["scaling"]
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.9), layout="constrained")
    for axes, quantity, unit in zip(panels, ("time", "memory"), ("seconds", "megabytes"), strict=True):
        for mode, marker in (("stored", "o"), ("streamed", "s")):
            order = scaling[mode].get(f"order_of_{quantity}")
            label = mode if order is None else f"{mode}: points^({order:.2f})"
            axes.plot(scaling["points"], scaling[mode][unit], marker=marker, label=label)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="points",
            ylabel=unit,
            title=f"{quantity}, one kernel matrix, K = 10",
        )
        axes.set_xticks(scaling["points"], [str(n) for n in scaling["points"]], minor=False)
        axes.minorticks_off()
        plain_ticks(axes.yaxis)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return figure


def format_tables(results: dict[str, Any]) -> str:
    """Return both measurements as Markdown tables."""
    figure_3, scaling = results["figure_3"], results["scaling"]
    closed_form, neural_tangents = figure_3["closed_form_seconds"], figure_3["neural_tangents_seconds"]
    lines = ["| Figure 3 | closed form | neural-tangents | ratio |", "|---|--:|--:|--:|"]
    for call in ("first", "warm"):
        lines.append(
            f"| {call} | {1000 * closed_form[call]:.0f} ms | {neural_tangents[call]:.2f} s "
            f"| {figure_3['ratio'][call]:.0f} |"
        )
    lines += ["", "| points | stored | | streamed | |", "|--:|--:|--:|--:|--:|"]
    for i, n in enumerate(scaling["points"]):
        cells = [f"{scaling[mode]['seconds'][i]:.2f} s | {scaling[mode]['megabytes'][i]:,.1f} MB" for mode in MODES]
        lines.append(f"| {n} | {' | '.join(cells)} |")
    if "order_of_time" in scaling["stored"]:
        orders = [f"{scaling[mode]['order_of_time']:.2f} | {scaling[mode]['order_of_memory']:.2f}" for mode in MODES]
        lines.append(f"| order | {' | '.join(orders)} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    """Run the benchmark, print the tables and write the results."""
    depths = check_depths(args.depths)
    if args.repeats < 1:
        raise InputError(f"--repeats is {args.repeats}: it must be at least 1")
    if not args.points or min(args.points) < 1:
        raise InputError("--points must be one or more numbers of at least 1, such as --points 500 1000")
    jax_backend()  # raises InputError before the folder is made
    out = claim_folder(args.out, "benchmark.json", "benchmark.png", overwrite=args.overwrite)
    results = {
        "figure_3": measure_figure_3(depths, args.repeats),
        "scaling": measure_scaling(tuple(sorted(set(args.points)))),
    }
    write_json(out / "benchmark.json", run_record() | results)
    save_figure(out / "benchmark.png", draw(results))
    print(format_tables(results))
    print(f"Wrote {out / 'benchmark.json'} and {out / 'benchmark.png'}")


if __name__ == "__main__":
    run_script(main, Args, __doc__)
