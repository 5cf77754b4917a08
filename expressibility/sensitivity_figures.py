"""The pictures of `ntk_sensitivity.py`."""

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ntk_comparison import COLOURS, DIAG_REG


def draw_cells(found: dict[str, Any]) -> plt.Figure:
    """Who is ahead, by depth and regulariser: a map for every data set and scaling.

    Blue where the proposed topology has the smaller error, red where the residual one has; in a cell, the
    share of splits that the proposed one wins, in brackets where the 95% interval of the difference includes
    0.
    """
    settings, cells = found["settings"], found["cells"]
    datasets, scalings = list(settings["datasets"]), list(dict.fromkeys(cell["scaling"] for cell in cells))
    depths, regs = sorted({cell["K"] for cell in cells}), settings["diag_regs"]
    figure, panels = plt.subplots(
        len(scalings), len(datasets), figsize=(1.6 + 5.2 * len(datasets), 1.9 + 2.9 * len(scalings)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    boxed = ""
    limit = max(max(abs(cell["percent"]) for cell in cells), 1e-9)
    for row, scaling in enumerate(scalings):
        for column, dataset in enumerate(datasets):
            axes = panels[row][column]
            mine = [cell for cell in cells if (cell["dataset"], cell["scaling"]) == (dataset, scaling)]
            percent = np.zeros((len(regs), len(depths)))
            for cell in mine:
                y, x = regs.index(cell["diag_reg"]), depths.index(cell["K"])
                percent[y, x] = cell["percent"]
                undecided = cell["ci95"][0] <= 0 <= cell["ci95"][1]
                text = f"{100 * cell['win_rate']:.0f}"
                dark = abs(cell["percent"]) > 0.6 * limit
                axes.text(x, y, f"({text})" if undecided else text, ha="center", va="center", fontsize=9,
                          color="white" if dark else "black")  # fmt: skip
            image = axes.imshow(percent, cmap="RdBu", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
            axes.set_title(f"{dataset}, {scaling} features", fontsize=11)
            if (dataset, scaling) == ("boston", "raw") and DIAG_REG in regs:
                corner = (-0.5, regs.index(DIAG_REG) - 0.5)
                axes.add_patch(plt.Rectangle(corner, len(depths), 1, fill=False, ec="#e67e22", lw=3, clip_on=False))
                boxed = "; boxed, the settings of Figure 3"
            axes.set_xticks(range(len(depths)), depths)
            axes.set_yticks(range(len(regs)), [f"{reg:g}" for reg in regs])
            axes.set(xlabel="K, number of Dense layers", ylabel="diag_reg")
    bar = figure.colorbar(image, ax=panels, shrink=0.8)
    bar.set_label("error of the residual topology above the proposed one's, %")
    key = (
        "Blue: the proposed topology has the smaller error. Red: the residual one has. Number: % of "
        f"{settings['splits']} random splits that the proposed one wins; in brackets where the 95% interval "
        f"includes a tie{boxed}."
    )
    figure.suptitle(textwrap.fill(key, 62 * len(datasets)), fontsize=10.5)
    return figure


def draw_baselines(found: dict[str, Any]) -> plt.Figure:
    """Mean test error of both topologies and of ordinary predictors on the same splits."""
    datasets = list(found["settings"]["datasets"])
    figure, panels = plt.subplots(
        1, len(datasets), figsize=(1.0 + 6.0 * len(datasets), 3.8), squeeze=False, layout="constrained"
    )
    for axes, dataset in zip(panels[0], datasets, strict=True):
        rows = [row for row in found["baselines"] if row["dataset"] == dataset]
        rows.sort(key=lambda row: -row["mse"])
        colours = [COLOURS.get(row["predictor"].split()[0], "0.6") for row in rows]
        axes.barh([row["predictor"] for row in rows], [row["mse"] for row in rows], color=colours)
        for y, row in enumerate(rows):
            axes.text(row["mse"], y, f" {row['mse']:,.{2 if row['mse'] < 100 else 0}f}", va="center", fontsize=9)
        axes.set(xlabel="mean squared error on test rows", title=dataset)
        axes.set_xlim(0, 1.15 * max(row["mse"] for row in rows))
    figure.suptitle(f"The same {found['settings']['splits']} splits, other predictors", fontsize=11)
    return figure
