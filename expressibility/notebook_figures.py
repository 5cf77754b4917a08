"""Figures of topology_ntk_comparison.ipynb."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ntk_comparison import COLOURS

Shortcut = tuple[int, int, float]  # numbers of the first and the last box, and the height of the arc


def draw_topologies() -> plt.Figure:
    """Draw the topologies of Figure 2 and the chain, with four blocks: layers grey, shortcuts as coloured arrows."""
    chains: dict[str, tuple[str, list[str], list[Shortcut], float]] = {  # caption, boxes, shortcuts, height above them
        "residual": (
            "a shortcut around every layer",
            ["$x$", "$h$", "+", "+", "+", "+", "out"],
            [(i, i + 1, 0.7) for i in range(1, 5)],
            0.45,
        ),
        "proposed": (
            "one shortcut from every layer to the end",
            ["$x$", "$h_0$", "$h_1$", "$h_2$", "$h_3$", "$h_4$", "+", "out"],
            [(2, 6, 0.42), (3, 6, 0.42), (4, 6, 0.42), (5, 6, 0.0)],
            0.9,
        ),
        "chain": ("no shortcuts, the control", ["$x$", "$h_0$", "$h_1$", "$h_2$", "$h_3$", "$h_4$", "out"], [], 0.25),
    }
    below = 0.3
    heights = [below + above for *_, above in chains.values()]
    figure, panels = plt.subplots(
        len(chains), figsize=(9, 1.6 * sum(heights) + 0.4), height_ratios=heights, layout="constrained"
    )
    for axes, (topology, (caption, boxes, shortcuts, above)) in zip(panels, chains.items(), strict=True):
        _draw_chain(axes, boxes, shortcuts, COLOURS[topology])
        axes.set(xlim=(-0.5, 7.5), ylim=(-below, above))
        axes.set_title(f"{topology}: {caption} (4 blocks, K = 6)", fontsize=11)
        axes.axis("off")
    return figure


def _draw_chain(axes: Axes, boxes: Sequence[str], shortcuts: Sequence[Shortcut], colour: str) -> None:
    patches = []
    for i, name in enumerate(boxes):
        style = {"boxstyle": "circle" if name == "+" else "round,pad=0.45", "fc": "white", "ec": "0.2"}
        text = axes.text(i, 0, name, ha="center", va="center", fontsize=12, bbox=style, zorder=2)
        patches.append(text.get_bbox_patch())
    straight_shortcuts = {(start, end) for start, end, height in shortcuts if height == 0}
    layers = [(i, i + 1, 0.0) for i in range(len(boxes) - 1) if (i, i + 1) not in straight_shortcuts]
    for (start, end, height), arrow_colour in [(a, "0.35") for a in layers] + [(a, colour) for a in shortcuts]:
        arrow = {
            "arrowstyle": "-|>",
            "connectionstyle": f"arc3,rad={-height}",
            "color": arrow_colour,
            "lw": 1.6,
            "patchA": patches[start],
            "patchB": patches[end],
            "shrinkA": 2,
            "shrinkB": 2,
        }
        axes.annotate("", (end, 0), (start, 0), arrowprops=arrow, zorder=3)


def draw_kernels(cosines: Mapping[str, np.ndarray], depth_label: str) -> plt.Figure:
    """Draw the kernel of each topology, and the proposed one's minus the residual one's.

    Args:
        cosines: kernels by topology, each (n, n) and 1 on the diagonal; among them "residual" and "proposed".
        depth_label: what the titles say about the depth, such as "K = 10".
    """
    difference = cosines["proposed"] - cosines["residual"]
    lowest, limit = min(matrix.min() for matrix in cosines.values()), np.abs(difference).max()
    figure, panels = plt.subplots(1, len(cosines) + 1, figsize=(4.4 * (len(cosines) + 1), 4.2), layout="constrained")
    for axes, (topology, matrix) in zip(panels, cosines.items(), strict=False):
        kernel_image = axes.imshow(matrix, vmin=lowest, vmax=1, cmap="viridis")
        axes.set_title(f"{topology}, {depth_label}")
    figure.colorbar(kernel_image, ax=panels[:-1], shrink=0.85, label="NTK, normalised to 1 on the diagonal")
    difference_image = panels[-1].imshow(difference, vmin=-limit, vmax=limit, cmap="RdBu")
    panels[-1].set_title("proposed − residual")
    figure.colorbar(difference_image, ax=panels[-1], shrink=0.85, label="difference")
    for axes in panels:
        axes.set(xlabel="tract, by price", ylabel="tract, by price", xticks=[], yticks=[])
    return figure


def draw_splits(differences: Mapping[str, np.ndarray], of_the_paper: float) -> plt.Figure:
    """Draw one row of dots for each kind of features, one dot for each split.

    Args:
        differences: (splits,) by kind of features: the proposed topology's error minus the residual one's, in % of it.
        of_the_paper: the same for the paper's split, drawn in the first row.
    """
    figure, axes = plt.subplots(figsize=(8.5, 2.8), layout="constrained")
    for row, (values, colour) in enumerate(zip(differences.values(), ("#1f5fa8", "#8e44ad"), strict=True)):
        axes.scatter(values, -row + np.linspace(-0.3, 0.3, len(values)), color=colour, alpha=0.7)
    axes.scatter([of_the_paper], [0], color="#e67e22", marker="D", zorder=3, label="the paper's split")
    axes.axvline(0, color="0.3")
    axes.set_yticks([-row for row in range(len(differences))], list(differences))
    axes.set(xlabel="error of the proposed topology relative to the residual one, %", ylim=(-1.5, 0.6))
    axes.legend(frameon=False, loc="upper right")
    return figure
