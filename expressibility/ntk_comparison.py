"""Compute Figure 3: test error against depth of both topologies and of a chain without shortcuts, at infinite width.

    python expressibility/ntk_comparison.py
    python expressibility/ntk_comparison.py --depths 2 4 8 16 --h0-shortcut --out runs/deeper

The chain is a control that the paper lacks: the same Dense layers without shortcuts. The data are Boston housing with
raw features, 455 training and 51 test rows. Predictions are those of fully trained networks in the NTK limit. Every
number is computed twice, in closed form and by neural-tangents, and the largest relative difference is printed.

Writes ntk_results.json and ntk_results.png. With --finite-width, also measures how finite networks approach the
limit, and writes finite_width.json and finite_width.png.
"""

import math
import textwrap
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from figure_3 import FIGURE_3_DEPTHS, check_depths
from s3net_common.command_line import OVERWRITE, THREADS, answer_flags, run_script
from s3net_common.output_files import claim_folder, default_out, run_record, save_figure, write_json

DIAG_REG = 0.1

PAPER = {  # Figure 3 as printed
    "K": [4, 5, 6, 7, 8, 9, 10],
    "residual": [0.7708, 0.7463, 0.7307, 0.7196, 0.7074, 0.6975, 0.6902],
    "proposed": [0.7514, 0.7261, 0.7034, 0.6846, 0.6687, 0.6567, 0.6512],
}
NOTEBOOK = {  # the newest outputs saved in the published notebook, in float32
    "K": [4, 5],
    "residual": [0.78054477, 0.76126444],
    "proposed": [0.76725888, 0.74939610],
}
COLOURS = {"residual": "#c0392b", "proposed": "#1f5fa8", "chain": "#7f8c8d"}
MARKERS = {"residual": "s", "proposed": "o", "chain": "^"}


@dataclass
class Args:
    """Flags of the comparison."""

    out: Path = field(default_factory=lambda: default_out("ntk_comparison"))
    """Folder for the results, created if missing. Those of an earlier run are replaced."""
    overwrite: OVERWRITE = False
    depths: tuple[int, ...] = FIGURE_3_DEPTHS
    """Numbers of blocks, each at least 1. Figure 3's K counts Dense layers and is larger by 2."""
    h0_shortcut: bool = False
    """Give h_0 of the proposed topology a shortcut, too, as in Figure 2(a). The paper's notebook omits it."""
    finite_width: bool = False
    """Also measure how finite networks approach the kernel (about a minute)."""
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import matplotlib.pyplot as plt
import numpy as np

import finite_width
import tabular
from jax_backend import jax_backend
from kernel_regression import NtkMatrices, mean_squared_error, ntk_matrices, predict
from kernels import DENSE_LAYERS_BESIDE_DEPTH, PAPER_TOPOLOGIES, TOPOLOGIES, Topology, stax_network
from s3net_common.progress import ProgressBar


class Comparison(NamedTuple):
    """Test errors of the topologies by depth."""

    depths: tuple[int, ...]
    mse: dict[Topology, list[float]]
    """Mean squared errors on the test rows, in (1000 dollars)^2, one per depth."""
    disagreement: float
    """Largest relative difference between closed form and neural-tangents; NaN if not compared."""


def figure_score(mse: float, test_points: int) -> float:
    """Return the error as in Figure 3: the mean squared error, divided once more by the number of test points."""
    return mse / test_points


def stax_matrices(data: tabular.Split, topology: Topology, depth: int, h0_shortcut: bool) -> NtkMatrices:
    """Compute the kernel matrices of one network with neural-tangents."""
    _, _, kernel_fn = stax_network(topology, depth, h0_shortcut=h0_shortcut)
    train = np.asarray(kernel_fn(data.x_train, None, "ntk"))
    return NtkMatrices(train, np.asarray(kernel_fn(data.x_test, data.x_train, "ntk")))


def relative_difference(first: NtkMatrices, second: NtkMatrices) -> float:
    """Return the largest relative difference between entries, relative to `second`."""
    lower = np.tril_indices(len(first.train))
    pairs = ((first.train[lower], second.train[lower]), (first.test, second.test))
    return max(float(np.max(np.abs(a - b) / np.abs(b))) for a, b in pairs)


def compare(
    data: tabular.Split,
    depths: tuple[int, ...] = FIGURE_3_DEPTHS,
    topologies: tuple[Topology, ...] = TOPOLOGIES,
    *,
    h0_shortcut: bool = False,
    check: bool = True,
    progress: bool = False,
) -> Comparison:
    """Compute Figure 3's errors in closed form, and with `check` a second time with neural-tangents.

    Args:
        data: training and test rows.
        depths: numbers of blocks, each at least 1.
        topologies: the networks to compute.
        h0_shortcut: see `kernels.kernel_row_blocks`.
        check: also compute `disagreement`, over all kernel entries and errors.
        progress: show a progress bar.

    Raises:
        ValueError: a depth is below 1.
        ImportError: with `check`, neural-tangents is missing or cannot run on the installed JAX.
    """
    mse: dict[Topology, list[float]] = {topology: [] for topology in topologies}
    disagreement = 0.0 if check else float("nan")
    bar = ProgressBar(total=len(depths) * len(topologies), desc="networks", disable=not progress)
    for topology in topologies:
        matrices = ntk_matrices(
            data.x_train, data.x_test, topology, depths, h0_shortcut=h0_shortcut and topology == "proposed"
        )
        for depth in depths:
            error = mean_squared_error(predict(matrices[depth], data.y_train, DIAG_REG), data.y_test)
            mse[topology].append(error)
            if check:
                stax_ntk = stax_matrices(data, topology, depth, h0_shortcut)
                stax_error = mean_squared_error(predict(stax_ntk, data.y_train, DIAG_REG), data.y_test)
                disagreement = max(
                    disagreement,
                    relative_difference(matrices[depth], stax_ntk),
                    abs(error - stax_error) / stax_error,
                )
            bar.update()
    bar.close()
    return Comparison(tuple(depths), mse, disagreement)


def results_dict(comparison: Comparison, test_points: int, h0_shortcut: bool) -> dict[str, Any]:
    """Return the content of ntk_results.json.

    `residual`, `proposed` and `chain` are errors as in Figure 3, `residual_mse` etc. mean squared errors.
    """
    scores = {topology: [figure_score(mse, test_points) for mse in comparison.mse[topology]] for topology in TOPOLOGIES}
    layers = [depth + DENSE_LAYERS_BESIDE_DEPTH for depth in comparison.depths]
    return {
        "K": layers,
        **scores,
        **{f"{topology}_mse": comparison.mse[topology] for topology in TOPOLOGIES},
        "smallest_error": [min(TOPOLOGIES, key=lambda topology, i=i: scores[topology][i]) for i in range(len(layers))],
        "paper": PAPER,
        "published_notebook": NOTEBOOK,
        "why_the_paper_differs": why_the_paper_differs(layers, scores, h0_shortcut),
        "engine_disagreement": None if math.isnan(comparison.disagreement) else comparison.disagreement,
        "h0_shortcut": h0_shortcut,
        "diag_reg": DIAG_REG,
        "test_points": test_points,
    }


def why_the_paper_differs(layers: list[int], scores: dict[Topology, list[float]], h0_shortcut: bool) -> str:
    """Return what the computed curves have to do with the printed ones and with the published notebook's outputs.

    Args:
        layers: the computed numbers of Dense layers, K.
        scores: computed errors as in Figure 3, by topology, one per K.
        h0_shortcut: whether the proposed topology was computed with the shortcut from h_0.
    """
    if h0_shortcut:
        return (
            "The proposed topology was computed with the shortcut from h_0 that Figure 2(a) draws. The published "
            "notebook omits it, so this curve reproduces neither the notebook's outputs nor the printed (dashed) curve."
        )
    differences = {
        k: max(abs(scores[topology][layers.index(k)] / NOTEBOOK[topology][i] - 1) for topology in PAPER_TOPOLOGIES)
        for i, k in enumerate(NOTEBOOK["K"])
        if k in layers
    }
    reason = "The dashed curves come from an older run than the published notebook's own saved outputs"
    if not differences:
        return f"{reason}. Those are for K = 4 and 5, which were not computed here."
    depths = " and ".join(map(str, differences))
    return (
        f"{reason}, which the residual and the proposed curve computed "
        f"here reproduce to within {math.ceil(1e4 * max(differences.values())) / 100:.2f}% at K = {depths}."
    )


def titles(results: dict[str, Any]) -> dict[str, str]:
    """Return the name of each computed curve."""
    return {
        "residual": "residual",
        "proposed": "proposed, with the shortcut from h_0" if results["h0_shortcut"] else "proposed",
        "chain": "chain without shortcuts",
    }


def draw(results: dict[str, Any]) -> plt.Figure:
    """Draw the computed curves, and Figure 3's as dashed lines."""
    figure, axes = plt.subplots(figsize=(7.2, 5.2), layout="constrained")
    for topology, title in titles(results).items():
        style = {"marker": MARKERS[topology], "color": COLOURS[topology]}
        axes.plot(results["K"], results[topology], label=f"{title}, computed here", **style)
        if topology in PAPER:
            axes.plot(PAPER["K"], PAPER[topology], "--", mfc="none", alpha=0.6,
                      label=f"{topology}, printed in the paper", **style)  # fmt: skip
    variant = "with the shortcut from h_0 of Figure 2(a)" if results["h0_shortcut"] else "and a chain without shortcuts"
    axes.set(
        xlabel="K, number of Dense layers",
        ylabel="test error as in the paper\n(mean squared error / 51 test rows)",
        title=f"Figure 3 {variant}:\nBoston housing, infinitely wide networks",
    )
    axes.set_xticks(sorted({*results["K"], *PAPER["K"]}))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.supxlabel(textwrap.fill(results["why_the_paper_differs"], 105), fontsize=8, color="0.35")
    return figure


def format_table(results: dict[str, Any]) -> str:
    """Return the errors as a Markdown table."""
    proposed = "proposed with h_0" if results["h0_shortcut"] else "proposed"
    lines = [
        f"| K | residual | {proposed} | chain | residual, paper | proposed, paper "
        f"| residual MSE | {proposed} MSE | chain MSE |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    printed = {topology: dict(zip(PAPER["K"], PAPER[topology], strict=True)) for topology in PAPER_TOPOLOGIES}
    for i, k in enumerate(results["K"]):
        cells = [f"{results[topology][i]:.5f}" for topology in TOPOLOGIES]
        cells += [f"{printed[topology][k]:.4f}" if k in printed[topology] else "" for topology in PAPER_TOPOLOGIES]
        cells += [f"{results[f'{topology}_mse'][i]:.3f}" for topology in TOPOLOGIES]
        lines.append(f"| {' | '.join([str(k), *cells])} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    """Compute Figure 3, print its table and write the results."""
    depths = check_depths(args.depths)
    jax_backend()  # raises InputError before the folder is made
    out = claim_folder(args.out, "ntk_results.json", "ntk_results.png", overwrite=args.overwrite)
    if args.finite_width:
        claim_folder(args.out, *finite_width.FILES, overwrite=args.overwrite)
    data = tabular.split(tabular.boston(), tabular.PAPER_SEED)
    check = find_spec("neural_tangents") is not None  # not on every system: see requirements.txt
    comparison = compare(data, depths, h0_shortcut=args.h0_shortcut, check=check, progress=True)
    results = results_dict(comparison, len(data.y_test), args.h0_shortcut)
    write_json(out / "ntk_results.json", run_record() | results)
    save_figure(out / "ntk_results.png", draw(results))
    print(format_table(results))
    print(results["why_the_paper_differs"])
    for topology in TOPOLOGIES:
        print(
            f"{topology} has the smallest error at {results['smallest_error'].count(topology)} of {len(depths)} depths"
        )
    if check:
        print(f"Largest relative difference between closed form and neural-tangents: {comparison.disagreement:.1e}")
    else:
        print("neural-tangents is not installed: the numbers are computed in closed form only")
    print(f"Wrote {out / 'ntk_results.json'} and {out / 'ntk_results.png'}")
    if args.finite_width:
        finite_width.measure_and_save(out)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
