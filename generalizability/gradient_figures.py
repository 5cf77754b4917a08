"""Draw the figures of `gradient_flow.py`."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

STYLES = {  # colour and marker by kind of connection
    "chain": ("#7f8c8d", "s"),
    "sparse": ("#1f5fa8", "o"),
    "dense": ("#27864a", "^"),
    "residual": ("#c0392b", "D"),
    "sparse, sum": ("#e67e22", "v"),
}
DASHES = {"sparse, sum": (0, (3, 3))}  # lies on the curve of "sparse"
TITLES = {
    "BatchNorm": "with BatchNorm",
    "none": "without BatchNorm",
    "none, He initialisation": "without BatchNorm, He initialisation",
}


def draw_initial(results: dict[str, Any], curves: dict[str, Any]) -> plt.Figure:
    """Draw the gradient norm of each layer of the deepest block, and below it the decades against the depth."""
    rows = results["initial"]
    by_layer = {(curve["kind"], curve["normalisation"]): curve["outputs"] for curve in curves["initial"]}
    ends = sorted({row["depth"] for row in rows})
    deepest = ends[-1]
    figure, panels = plt.subplots(2, 3, figsize=(14.5, 8.2), layout="constrained")
    for column, (normalisation, title) in enumerate(TITLES.items()):
        profile, growth = panels[:, column]
        for kind, (colour, marker) in STYLES.items():
            selected = [row for row in rows if (row["kind"], row["normalisation"]) == (kind, normalisation)]
            depths = [row["depth"] for row in selected]
            decades = np.array([[row["outputs"]["mean"], *row["outputs"]["ci95"]] for row in selected])
            layers = np.arange(1, deepest + 1)
            if (kind, normalisation) in by_layer:
                profile.plot(layers, by_layer[kind, normalisation], color=colour, lw=2.2, ls=DASHES.get(kind, "-"))
            growth.plot(depths, decades[:, 0], color=colour, marker=marker, ls=DASHES.get(kind, "-"), label=kind)
            growth.fill_between(depths, decades[:, 1], decades[:, 2], color=colour, alpha=0.25, lw=0)
        profile.set(title=f"{deepest} layers, {title}", xlabel="layer", xlim=(1, deepest))
        growth.set(xscale="log", xlabel="depth, number of layers", xticks=ends)
        growth.set_xticklabels(ends)
        growth.minorticks_off()
        for axes in (profile, growth):
            axes.axhline(0, color="0.4", lw=0.8, ls=":")
            axes.grid(alpha=0.25)
    panels[0, 0].set_ylabel(
        "gradient of the loss by the layer's output:\nlog10 of its norm, relative to the last layer"
    )
    panels[1, 0].set_ylabel("decades between the first and the last layer\n(above 0: exploding, below 0: vanishing)")
    panels[1, 0].legend(frameon=False)
    figure.suptitle(
        f"Gradients along a block with random weights. Means of {results['seeds']} networks; "
        "bands: 95% intervals of the mean.",
        fontsize=11,
    )
    return figure


def draw_training(results: dict[str, Any], curves: dict[str, Any]) -> plt.Figure:
    """Draw the test error and the decades after training against the depth, and the losses of one depth."""
    rows = results["training"]
    shown = min({row["depth"] for row in rows}, key=lambda depth: abs(depth - 100))
    figure, (errors, losses, decades) = plt.subplots(1, 3, figsize=(14.5, 4.3), layout="constrained")
    ends = sorted({row["depth"] for row in rows})
    for kind in dict.fromkeys(row["kind"] for row in rows):
        colour, marker = STYLES[kind]
        selected = [row for row in rows if row["kind"] == kind]
        depths = [row["depth"] for row in selected]
        errors.plot(depths, [row["test_error"]["mean"] for row in selected], color=colour, marker=marker, label=kind)
        for row in selected:
            runs = row["test_errors"][f"{row['best_peak']:g}"]
            errors.plot([row["depth"]] * len(runs), runs, ls="", marker="_", color=colour, alpha=0.8)
            best = {"kind": kind, "depth": shown, "peak": row["best_peak"]}
            runs = [curve["losses"] for curve in curves["training"] if best.items() <= curve.items()]
            if row["depth"] == shown and len({len(run) for run in runs}) == 1:
                losses.plot(np.mean(runs, axis=0), color=colour, marker=marker, markevery=15, label=kind)
        for row in selected:
            if row["depth"] == shown:
                steps = [int(step) for step in row["decades"]["outputs"]]
                medians = [point["median"] for point in row["decades"]["outputs"].values()]
                decades.plot(steps, medians, color=colour, marker=marker, label=kind)
    errors.axhline(90, color="0.4", ls=":", lw=1)
    errors.text(ends[0], 90.5, "chance", fontsize=9, color="0.35")
    errors.set(xscale="log", xticks=ends, xlabel="depth, number of layers", ylabel="test error, %", ylim=(0, 100))
    errors.set_xticklabels(ends)
    errors.minorticks_off()
    errors.set_title(f"After {results['steps']} steps (dashes: single runs)")
    losses.set(xlabel="step", ylabel="training loss, mean of the runs", title=f"{shown} layers: training loss")
    decades.axhline(0, color="0.4", lw=0.8, ls=":")
    decades.set(xlabel="step", ylabel="decades between first and last layer")
    decades.set_title(f"{shown} layers: gradients, median")
    if max(map(abs, decades.get_ylim())) > 20:
        decades.set_ylim(-20, 20)  # a gradient that is exactly 0 lies far outside
    errors.legend(frameon=False)
    for axes in (errors, losses, decades):
        axes.grid(alpha=0.25)
    return figure
