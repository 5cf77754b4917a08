"""Measure how the empirical NTK of finite networks approaches the infinite-width limit, as 1 / sqrt(width).

Called by `ntk_comparison.py --finite-width`. The networks are those of `kernels.stax_network`: a chain in which
every layer exists once. Convergence confirms that their limit is the closed-form kernel, although the branches of
the proposed topology share the chain's weights.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from kernels import TOPOLOGIES, Topology, closed_form_kernels, empirical_ntk, stax_network
from s3net_common.log_ticks import plain_ticks
from s3net_common.output_files import run_record, save_figure, write_json
from s3net_common.progress import ProgressBar
from scaling_fit import fitted_order

WIDTHS = (32, 64, 128, 256, 512, 1024)
DEPTH = 3
POINTS = 6
FEATURES = 8
FILES = ("finite_width.json", "finite_width.png")


def _relative_error(apply_fn: Callable, x: np.ndarray, limit: np.ndarray, params: Any) -> jax.Array:
    return jnp.linalg.norm(empirical_ntk(apply_fn, params, x) - limit) / jnp.linalg.norm(limit)


def relative_errors(topology: Topology, widths: tuple[int, ...], seeds: int, progress: bool = True) -> np.ndarray:
    """Compute |empirical NTK - NTK| / |NTK| (Frobenius norm) of networks with random weights, on random points.

    Returns:
        (widths, seeds), one network per width and seed.
    """
    x = np.random.default_rng(0).normal(size=(POINTS, FEATURES))
    limit = closed_form_kernels(x, None, topology, DEPTH)[DEPTH].ntk
    errors = np.empty((len(widths), seeds))
    for i, width in enumerate(ProgressBar(widths, desc=f"finite {topology}", disable=not progress)):
        init_fn, apply_fn, _ = stax_network(topology, DEPTH, width)
        relative_error = jax.jit(partial(_relative_error, apply_fn, x, limit))
        for seed in range(seeds):
            # Outside of jit, since compiling the random numbers would take longer than drawing them.
            _, params = init_fn(jax.random.PRNGKey(seed), (-1, FEATURES))
            errors[i, seed] = relative_error(params)
    return errors


def measure(widths: tuple[int, ...] = WIDTHS, seeds: int = 40, progress: bool = True) -> dict[str, Any]:
    """Return by topology the mean error, its standard error over the seeds, and the fitted power of the width."""
    results: dict[str, Any] = {"widths": list(widths), "seeds": seeds, "depth": DEPTH, "points": POINTS}
    for topology in TOPOLOGIES:
        errors = relative_errors(topology, widths, seeds, progress)
        results[topology] = {
            "mean": errors.mean(axis=1).tolist(),
            "standard_error": (errors.std(axis=1, ddof=1) / np.sqrt(seeds)).tolist(),
            "order": fitted_order(np.array(widths), errors.mean(axis=1)),
        }
    return results


def draw(results: dict[str, Any]) -> plt.Figure:
    """Draw the error against the width on logarithmic axes, with a line of slope -1/2."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    widths = np.array(results["widths"], dtype=float)
    for topology, colour, marker in (
        ("residual", "#c0392b", "s"),
        ("proposed", "#1f5fa8", "o"),
        ("chain", "#7f8c8d", "^"),
    ):
        curve = results[topology]
        axes.errorbar(widths, curve["mean"], yerr=curve["standard_error"], color=colour, marker=marker, capsize=3,
                      label=f"{topology}: width^({curve['order']:.2f})")  # fmt: skip
    start = np.mean([results[topology]["mean"][0] for topology in TOPOLOGIES])
    axes.plot(widths, start * np.sqrt(widths[0] / widths), ":", color="0.4", label="1 / sqrt(width)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set_xticks(widths, [f"{int(width)}" for width in widths])
    axes.set(
        xlabel="width of every hidden layer",
        ylabel="relative distance of a finite network's\nNTK from the infinite one's",
        title=f"Finite networks approach the kernel\n({results['depth']} blocks, {results['seeds']} networks)",
    )
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    return figure


def measure_and_save(out: Path) -> None:
    """Write `FILES` into the folder `out`, and print the fitted powers."""
    results = measure()
    write_json(out / FILES[0], run_record() | results)
    save_figure(out / FILES[1], draw(results))
    for topology in TOPOLOGIES:
        print(f"Finite {topology} networks approach their NTK as width^({results[topology]['order']:.2f})")
    print(f"Wrote {out / FILES[0]} and {out / FILES[1]}")
