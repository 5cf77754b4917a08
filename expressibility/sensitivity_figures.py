"""Draw the figures of `ntk_sensitivity.py`."""

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ntk_comparison import COLOURS, DIAG_REG


def draw_cells(results: dict[str, Any]) -> plt.Figure:
    """Draw a map of depth and regulariser for every data set and scaling.

    A cell is blue if the proposed topology has the smaller error, red if the residual one has. Its number is the share
    of the splits on which the proposed topology has the smaller error, in brackets if the 95% interval of the
    difference includes 0.
    """
    settings, cells = results["settings"], results["cells"]
    datasets, scalings = list(settings["datasets"]), list(dict.fromkeys(cell["scaling"] for cell in cells))
    figure, panels = plt.subplots(
        len(scalings), len(datasets), figsize=(1.6 + 5.2 * len(datasets), 1.9 + 2.9 * len(scalings)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    limit = max(max(abs(cell["percent"]) for cell in cells), 1e-9)
    for row, scaling in enumerate(scalings):
        for column, dataset in enumerate(datasets):
            axes = panels[row][column]
            selected = [cell for cell in cells if (cell["dataset"], cell["scaling"]) == (dataset, scaling)]
            image = _draw_map(axes, selected, settings["diag_regs"], limit)
            axes.set_title(f"{dataset}, {scaling} features", fontsize=11, parse_math=False)
    explanation = (
        "Blue: the proposed topology has the smaller error. Red: the residual topology has. Number: % of "
        f"{settings['splits']} random splits on which the proposed topology has the smaller error, in brackets if the "
        "95% interval of the difference includes 0."
    )
    if "boston" in datasets and DIAG_REG in settings["diag_regs"]:
        regulariser, depths = settings["diag_regs"].index(DIAG_REG), len(settings["depths"])
        panels[scalings.index("raw")][datasets.index("boston")].add_patch(
            plt.Rectangle((-0.5, regulariser - 0.5), depths, 1, fill=False, ec="#e67e22", lw=3, clip_on=False)
        )
        explanation += " Orange box: the settings of Figure 3."
    bar = figure.colorbar(image, ax=panels, shrink=0.8)
    bar.set_label("residual error minus proposed error,\n% of the residual error")
    figure.suptitle(textwrap.fill(explanation, 62 * len(datasets)), fontsize=10.5)
    return figure


def _draw_map(axes: plt.Axes, cells: list[dict[str, Any]], diag_regs: list[float], limit: float) -> Any:
    """Draw the cells of one data set and scaling, with the colour scale from -limit to limit percent."""
    layers = sorted({cell["K"] for cell in cells})
    percents = np.zeros((len(diag_regs), len(layers)))
    for cell in cells:
        y, x = diag_regs.index(cell["diag_reg"]), layers.index(cell["K"])
        percents[y, x] = cell["percent"]
        text = f"{100 * cell['win_rate']:.0f}"
        if cell["ci95"][0] <= 0 <= cell["ci95"][1]:
            text = f"({text})"
        colour = "white" if abs(cell["percent"]) > 0.6 * limit else "black"
        axes.text(x, y, text, ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(diag_regs)), [f"{diag_reg:g}" for diag_reg in diag_regs])
    axes.set(xlabel="K, number of Dense layers", ylabel="diag_reg")
    return axes.imshow(percents, cmap="RdBu", vmin=-limit, vmax=limit, origin="lower", aspect="auto")


def draw_baselines(results: dict[str, Any]) -> plt.Figure:
    """Draw the mean test errors of both topologies and of ordinary predictors on the same splits."""
    datasets = list(results["settings"]["datasets"])
    figure, panels = plt.subplots(
        1, len(datasets), figsize=(1.0 + 6.0 * len(datasets), 3.8), squeeze=False, layout="constrained"
    )
    for axes, dataset in zip(panels[0], datasets, strict=True):
        rows = [row for row in results["baselines"] if row["dataset"] == dataset]
        rows.sort(key=lambda row: -row["mse"])
        colours = [COLOURS.get(row["predictor"].split()[0], "0.6") for row in rows]
        axes.barh([row["predictor"] for row in rows], [row["mse"] for row in rows], color=colours)
        for y, row in enumerate(rows):
            axes.text(row["mse"], y, f" {row['mse']:,.{2 if row['mse'] < 100 else 0}f}", va="center", fontsize=9)
        axes.set_xlabel("mean squared error on test rows")
        axes.set_title(dataset, parse_math=False)
        axes.set_xlim(0, 1.15 * max(row["mse"] for row in rows))
    figure.suptitle(f"Mean error of the predictors on the same {results['settings']['splits']} splits", fontsize=11)
    return figure
