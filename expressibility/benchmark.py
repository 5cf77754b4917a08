"""Speed and memory of the closed-form kernels.

    python expressibility/benchmark.py

First, the whole of Figure 3 (14 networks, kernels and predictions) by closed form against the published
notebook's formulation in neural-tangents, in one process, the first time and again. Then one kernel matrix
against the number of points, stored whole and streamed in blocks of rows. Writes benchmark.json and
benchmark.png, and prints the tables.
"""

import os
import platform
import statistics
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import tabular
from kernel_regression import mean_squared_error
from kernels import B_STD, TOPOLOGIES, W_STD, Topology, kernel_row_blocks
from ntk_comparison import DIAG_REG, FIGURE_3_DEPTHS, check_depths, compare
from s3net_common.command_line import run_script
from s3net_common.errors import InputError
from s3net_common.output_files import default_out, make_folder, run_record, save_figure, write_json
from scaling_fit import fitted_order

SCALING_DEPTH = 8  # Figure 3's K = 10
SCALING_FEATURES = 13
WAYS = ("stored", "streamed")


@dataclass
class Arguments:
    """Options of the benchmark."""

    out: Path = field(default_factory=lambda: default_out("expressibility_benchmark"))
    """Folder for benchmark.json and benchmark.png; created if it isn't there."""
    depths: tuple[int, ...] = FIGURE_3_DEPTHS
    """Numbers of blocks, each at least 1, of the networks in the comparison."""
    repeats: int = 5
    """Warm runs of each side, at least 1; their median is reported."""
    points: tuple[int, ...] = (500, 1000, 2000, 4000, 8000, 16000)
    """Numbers of points for time and memory, each at least 1; 16000 need 2 GB."""


def notebook_network(topology: Topology, depth: int) -> tuple[Callable, Callable, Callable]:
    """The published notebook's formulation: the proposed topology as separate branches, which share no layer.

    Branch i holds i + 1 Dense layers of its own, so that the network grows with the square of the depth.
    """
    from neural_tangents_compat import stax

    warnings.filterwarnings("ignore", message="`FanIn` layers assume independent inputs")  # each has its Dense
    dense = partial(stax.Dense, 512, W_STD, B_STD)
    layer = stax.serial(stax.Relu(), dense())
    if topology == "residual":
        block = stax.serial(stax.FanOut(2), stax.parallel(stax.Identity(), layer), stax.FanInSum())
        body = stax.serial(dense(), *[block] * depth)
    else:
        branches = [stax.serial(dense(), *[layer] * i) for i in range(1, depth + 1)]
        body = stax.serial(stax.FanOut(depth), stax.parallel(*branches), stax.FanInSum())
    return stax.serial(body, stax.Relu(), stax.Dense(1, W_STD, B_STD))


def notebook_figure(data: tabular.Split, depths: tuple[int, ...]) -> dict[Topology, list[float]]:
    """Figure 3's mean squared errors as the published notebook computes them."""
    from neural_tangents_compat import neural_tangents as nt

    mse: dict[Topology, list[float]] = {}
    for topology in TOPOLOGIES:
        mse[topology] = []
        for depth in depths:
            _, _, kernel_fn = notebook_network(topology, depth)
            predict_fn = nt.predict.gradient_descent_mse_ensemble(
                kernel_fn, data.x_train, data.y_train[:, None], diag_reg=DIAG_REG
            )
            prediction = np.asarray(predict_fn(x_test=data.x_test, get="ntk"))[:, 0]
            mse[topology].append(mean_squared_error(prediction, data.y_test))
    return mse


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    """Seconds of the first call, median seconds of the `repeats` calls after it, the last one's result."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:]), result


def figure_3(depths: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Times both ways to Figure 3 and compares what they give."""
    data = tabular.split(tabular.boston(), tabular.PAPER_SEED)
    closed_first, closed_warm, ours = timed(lambda: compare(data, depths, check=False).mse, repeats)
    stax_first, stax_warm, theirs = timed(lambda: notebook_figure(data, depths), repeats)
    difference = max(
        float(np.max(np.abs(np.array(ours[topology]) / np.array(theirs[topology]) - 1))) for topology in TOPOLOGIES
    )
    return {
        "depths": list(depths),
        "repeats": repeats,
        "closed_form_seconds": {"first": closed_first, "warm": closed_warm},
        "neural_tangents_seconds": {"first": stax_first, "warm": stax_warm},
        "ratio": {"first": stax_first / closed_first, "warm": stax_warm / closed_warm},
        "largest_relative_difference": difference,
    }


def kernel_of_points(points: int, stored: bool) -> None:
    """The proposed topology's kernel of random points; kept, or summed block by block of rows and let go."""
    x = np.random.default_rng(0).normal(size=(points, SCALING_FEATURES))
    matrix = np.empty((points, points)) if stored else None
    total = 0.0
    for rows, kernels in kernel_row_blocks(x, None, "proposed", [SCALING_DEPTH]):
        block = kernels[SCALING_DEPTH].ntk
        if matrix is not None:
            matrix[rows] = block
        total += float(block.sum())


def seconds_and_megabytes(call: Callable[[], None]) -> tuple[float, float]:
    """Time of one call, and the peak of the arrays allocated in another: tracing takes time of its own."""
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, peak / 1e6


def scaling(points: tuple[int, ...]) -> dict[str, Any]:
    """Time and memory against the number of points, with the fitted orders."""
    found: dict[str, Any] = {"points": list(points), "topology": "proposed", "depth": SCALING_DEPTH}
    bar = tqdm(total=len(WAYS) * len(points), desc="kernel matrices", disable=None)
    for way in WAYS:
        measured = []
        for n in points:
            measured.append(seconds_and_megabytes(partial(kernel_of_points, n, way == "stored")))
            bar.update()
        seconds, megabytes = np.transpose(measured)
        found[way] = {"seconds": seconds.tolist(), "megabytes": megabytes.tolist()}
        if len(points) > 1:
            found[way]["order_of_time"] = fitted_order(np.array(points), seconds)
            found[way]["order_of_memory"] = fitted_order(np.array(points), megabytes)
    bar.close()
    return found


def draw(found: dict[str, Any]) -> plt.Figure:
    """Time and memory against the number of points."""
    curves = found["scaling"]
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.9), layout="constrained")
    for axes, quantity, unit in zip(panels, ("time", "memory"), ("seconds", "megabytes"), strict=True):
        for way, marker in (("stored", "o"), ("streamed", "s")):
            order = curves[way].get(f"order_of_{quantity}")
            label = way if order is None else f"{way}: points^({order:.2f})"
            axes.plot(curves["points"], curves[way][unit], marker=marker, label=label)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="points",
            ylabel=unit,
            title=f"{quantity}, one kernel matrix, K = 10",
        )
        axes.set_xticks(curves["points"], [str(n) for n in curves["points"]], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return figure


def tables(found: dict[str, Any]) -> str:
    """Both measurements as Markdown."""
    speed, curves = found["figure_3"], found["scaling"]
    ours, theirs, ratio = speed["closed_form_seconds"], speed["neural_tangents_seconds"], speed["ratio"]
    lines = ["| Figure 3 | closed form | neural-tangents | ratio |", "|---|--:|--:|--:|"]
    for call in ("first", "warm"):
        lines.append(f"| {call} | {1000 * ours[call]:.0f} ms | {theirs[call]:.2f} s | {ratio[call]:.0f} |")
    lines += ["", "| points | stored | | streamed | |", "|--:|--:|--:|--:|--:|"]
    for i, n in enumerate(curves["points"]):
        cells = [f"{curves[way]['seconds'][i]:.2f} s | {curves[way]['megabytes'][i]:,.1f} MB" for way in WAYS]
        lines.append(f"| {n} | {' | '.join(cells)} |")
    if "order_of_time" in curves["stored"]:
        orders = [f"{curves[w]['order_of_time']:.2f} | {curves[w]['order_of_memory']:.2f}" for w in WAYS]
        lines.append(f"| order | {' | '.join(orders)} |")
    return "\n".join(lines)


def main(arguments: Arguments) -> None:
    """Measures, prints and writes."""
    depths = check_depths(arguments.depths)
    if arguments.repeats < 1:
        raise InputError(f"--repeats is {arguments.repeats}: it must be at least 1")
    if not arguments.points or min(arguments.points) < 1:
        raise InputError("--points must be one or more numbers of at least 1, such as --points 500 1000")
    out = make_folder(arguments.out)
    found = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "figure_3": figure_3(depths, arguments.repeats),
        "scaling": scaling(tuple(sorted(set(arguments.points)))),
    }
    write_json(out / "benchmark.json", run_record() | found)
    save_figure(out / "benchmark.png", draw(found))
    print(tables(found))
    print(f"Wrote {out / 'benchmark.json'} and {out / 'benchmark.png'}")


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
