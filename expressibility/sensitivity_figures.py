"""Draw the figures of `ntk_sensitivity.py`."""

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from kernels import W_STD
from ntk_comparison import COLOURS, DIAG_REG

TITLES = {"boston": "Boston housing", "diabetes": "Diabetes"}  # a table of the user keeps the name of its file


def draw_all(results: dict[str, Any]) -> tuple[plt.Figure, plt.Figure, plt.Figure]:
    """Return the maps against the residual topology and against the chain, and the errors of all predictors."""
    return draw_cells(results, "residual"), draw_cells(results, "chain"), draw_baselines(results)


def draw_cells(results: dict[str, Any], rival: str) -> plt.Figure:
    """Draw a map of depth and regulariser for every data set, scaling and W_std.

    A cell is blue if the proposed topology has the smaller error, red if the rival ("residual" or "chain") has. Its
    number is the share of the splits on which the proposed topology has the smaller error, in brackets if the
    difference is not significant after Holm's correction over all cells.
    """
    settings = results["settings"]
    cells = [cell if rival == "residual" else cell | cell["chain"] for cell in results["cells"]]
    data = list(dict.fromkeys((cell["dataset"], cell["scaling"]) for cell in cells))
    w_stds = settings["w_stds"]
    figure, panels = plt.subplots(
        len(data), len(w_stds), figsize=(1.8 + 4.6 * len(w_stds), 1.3 + 2.6 * len(data)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    limit = max(max(abs(cell["percent"]) for cell in cells), 1e-9)
    for row, (dataset, scaling) in enumerate(data):
        for column, w_std in enumerate(w_stds):
            axes, place = panels[row][column], (dataset, scaling, w_std)
            selected = [cell for cell in cells if (cell["dataset"], cell["scaling"], cell["w_std"]) == place]
            image = _draw_map(axes, selected, settings["diag_regs"], limit)
            axes.set_title(
                f"{TITLES.get(dataset, dataset)}, {scaling} features, W_std {w_std:g}", fontsize=11, parse_math=False
            )
            if place == ("boston", "raw", W_STD) and DIAG_REG in settings["diag_regs"]:
                start = (-0.5, settings["diag_regs"].index(DIAG_REG) - 0.5)
                box = {"fill": False, "ec": "#e67e22", "lw": 3, "clip_on": False}
                axes.add_patch(plt.Rectangle(start, len(settings["depths"]), 1, **box))
    name = "residual topology" if rival == "residual" else "chain without shortcuts"
    explanation = (
        f"Blue: the proposed topology has the smaller error. Red: the {name} has. Number: % of {settings['splits']} "
        "random splits on which the proposed topology has the smaller error, in brackets if the difference is not "
        "significant (5%, Holm's correction over all cells). Orange box: the settings of Figure 3."
    )
    bar = figure.colorbar(image, ax=panels, shrink=0.6)
    bar.set_label(f"{rival} error minus proposed error, % of the {rival} error")
    figure.suptitle(f"Proposed topology against the {name}", fontsize=12)
    figure.supxlabel(textwrap.fill(explanation, 60 * len(w_stds)), fontsize=9, color="0.25")
    return figure


def _draw_map(axes: plt.Axes, cells: list[dict[str, Any]], diag_regs: list[float], limit: float) -> Any:
    """Draw the cells of one data set, scaling and W_std, with the colour scale from -limit to limit percent."""
    layers = sorted({cell["K"] for cell in cells})
    percents = np.zeros((len(diag_regs), len(layers)))
    for cell in cells:
        y, x = diag_regs.index(cell["diag_reg"]), layers.index(cell["K"])
        percents[y, x] = cell["percent"]
        text = f"{100 * cell['win_rate']:.0f}"
        if cell["holm_p_value"] >= 0.05:
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
        axes.set_title(TITLES.get(dataset, dataset), parse_math=False)
        axes.set_xlim(0, 1.15 * max(row["mse"] for row in rows))
    figure.suptitle(f"Mean error of the predictors on the same {results['settings']['splits']} splits", fontsize=11)
    return figure
