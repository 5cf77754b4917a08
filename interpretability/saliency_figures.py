"""Figures of maps, segmentations, Dice coefficients and faithfulness curves."""

import os
from collections.abc import Iterator, Sequence
from itertools import count, cycle, takewhile
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from explain_images import PictureExplanation
from explained_networks import Network
from map_scores import PERCENTILES, dice, segment
from pictures import Picture
from s3net_common.output_files import save_figure, write_atomically

CELL = 2.1  # width of an image in a figure, in inches
PAGE_ROWS = 6  # images on a page of a figure
CAPTION = 24  # characters of a class name or a file name in a figure
DPI = 110
MARKERS = "os^DvPX*<>"  # of curves, which are not told apart by colour only


def overlay(pixels: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """Draw a map `(H, W)` in colour over its image `(H, W, 3)` in grey. Returns `(H, W, 3)` uint8."""
    heat = brightness(saliency)
    grey = (pixels.astype(float) @ (0.299, 0.587, 0.114) / 255)[..., None]
    colour = matplotlib.colormaps["inferno"](heat)[..., :3]
    opacity = (0.25 + 0.65 * heat)[..., None]
    return ((grey * (1 - opacity) + colour * opacity) * 255).round().astype(np.uint8)


def brightness(saliency: np.ndarray) -> np.ndarray:
    """Scale a map to [0, 1] for display, from its 20th to its 99.5th percentile, so that outliers do not dominate."""
    low, high = np.percentile(saliency, (20, 99.5))
    return ((saliency - low) / max(high - low, 1e-12)).clip(0, 1)


def save_overlay(path: Path, picture: Picture, saliency: np.ndarray) -> None:
    """Write the overlay of a map as a PNG. A squashed image gets its aspect ratio back."""
    image, size = Image.fromarray(overlay(picture.pixels, saliency)), len(picture.pixels)
    if picture.aspect != 1:
        image = image.resize((round(size * max(1, picture.aspect)), round(size * max(1, 1 / picture.aspect))))
    write_atomically(path, image.save)


def caption(network: Network, explanation: PictureExplanation) -> str:
    """Return the explained class with its probability, and the predicted class if it is another one."""
    text = f"{_short(network.class_name(explanation.target))} {explanation.probability:.2f}"
    if explanation.prediction != explanation.target:
        text += f"\n(predicted: {_short(network.class_name(explanation.prediction))})"
    return text


def drawn_share(explanations: Sequence[PictureExplanation]) -> str:
    """Return what share of the terms a network's maps show, for a title: "96% of terms drawn", "91-96% ..."."""
    low, high = (round(100 * bound(e.drawn for e in explanations)) for bound in (min, max))
    return f"{low}% of terms drawn" if low == high else f"{low}-{high}% of terms drawn"


def draw_maps(
    path: Path,
    pictures: Sequence[Picture],
    columns: Sequence[tuple[Network, Sequence[Picture], Sequence[PictureExplanation]]],
) -> None:
    """Draw a row for each image and a column for each network, as in the paper's figure.

    Under each map are the explained class and its probability; under a network's name is the share of the terms that
    have a place in the image.

    Args:
        path: PNG to write; for the further pages see `pages`.
        pictures: the images of the first column.
        columns: each network with its pictures (in its image size) and their explanations.
    """
    titles = ["image", *(f"{network.name}\n{drawn_share(explained)}" for network, _, explained in columns)]
    for page, rows in pages(path, len(pictures)):
        figure, axes = _grid(titles, [pictures[i] for i in rows])
        for axis, i in zip(axes, rows, strict=True):
            for column, (network, resized, explanations) in enumerate(columns, start=1):
                drawn = overlay(resized[i].pixels, explanations[i].saliency)
                _show(axis[column], drawn, caption(network, explanations[i]), resized[i].aspect)
        save_figure(page, figure, DPI)


def draw_crops(
    path: Path, network: Network, pictures: Sequence[Picture], explanations: Sequence[PictureExplanation]
) -> None:
    """Draw a column for each image: the original with its most probable classes, the network's input, and the map.

    Args:
        path: PNG to write.
        network: the network that was explained.
        pictures: pictures that have `original`.
        explanations: of the pictures, in the same order.
    """
    figure = Figure(figsize=(CELL * len(pictures), CELL * 3 + 0.8), layout="constrained")
    axes = figure.subplots(3, len(pictures), squeeze=False)
    for column, (picture, explanation) in enumerate(zip(pictures, explanations, strict=True)):
        side = len(picture.original)
        enlarged = Image.fromarray(explanation.saliency).resize((side, side), Image.Resampling.BILINEAR)
        _show(axes[0][column], picture.original, "")
        _show(axes[1][column], picture.pixels, "")
        _show(axes[2][column], overlay(picture.original, np.asarray(enlarged)), "")
        lines = [f"{_short(network.class_name(i))} {probability:.2f}" for i, probability in explanation.most_probable]
        axes[0][column].set_title("\n".join(lines), fontsize=9, parse_math=False)
    size = len(pictures[0].pixels)
    for row, label in zip(
        axes, ("photograph", f"network's input, {size}x{size}", f"FullGrad\n{drawn_share(explanations)}"), strict=True
    ):
        row[0].set_ylabel(label, fontsize=9)
    save_figure(path, figure, DPI)


def draw_segmentations(
    path: Path,
    pictures: Sequence[Picture],
    columns: Sequence[tuple[str, Sequence[Picture], Sequence[np.ndarray]]],
    percentile: float,
) -> None:
    """Draw a row for each image: the image, its true mask, and the segmentation by each method with its Dice.

    Args:
        path: PNG to write; for the further pages see `pages`.
        pictures: pictures with masks, for the first two columns.
        columns: name of each method, its pictures (in its image size) and their maps.
        percentile: percentile of a map from which its pixels belong to the segmentation.
    """
    titles = ["image", "true mask", *(name for name, _, _ in columns)]
    for page, rows in pages(path, len(pictures)):
        figure, axes = _grid(titles, [pictures[i] for i in rows])
        for axis, i in zip(axes, rows, strict=True):
            _show(axis[1], _cut_out(pictures[i].pixels, pictures[i].mask), "", pictures[i].aspect)
            for column, (_, resized, maps) in enumerate(columns, start=2):
                marked = segment(maps[i], percentile)
                score = dice(marked, resized[i].mask)
                _show(axis[column], _cut_out(resized[i].pixels, marked), f"Dice {score:.2f}", resized[i].aspect)
        save_figure(page, figure, DPI)


def draw_dice(path: Path, curves: dict[str, np.ndarray]) -> None:
    """Draw Dice coefficients by percentile: the mean over the images with a band of one standard deviation.

    Args:
        path: PNG to write.
        curves: for each method, by name, `(images, percentiles)` in the order of `PERCENTILES`.
    """
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    markers = cycle(MARKERS)
    for name, values in curves.items():
        mean, spread = values.mean(0), values.std(0)
        (line,) = axes.plot(PERCENTILES, mean, marker=next(markers), ms=4, label=f"{name} ({mean.mean():.2f})")
        axes.fill_between(PERCENTILES, mean - spread, mean + spread, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.invert_xaxis()
    axes.set_xticks([99, 95, 90, 85, 80])
    axes.set(xlabel="percentile of the map from which pixels are marked", ylabel="Dice coefficient", ylim=(0, None))
    axes.set_title("mean over the images, band: ± 1 standard deviation", fontsize="medium")
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    axes.legend(title="method\n(mean over percentiles)", fontsize=8, title_fontsize=8, **place)
    axes.grid(alpha=0.3)
    save_figure(path, figure, DPI)


def draw_faithfulness(path: Path, results: dict[str, dict[str, dict]]) -> None:
    """Draw a row for each network: insertion and deletion curves of each method, with their areas.

    Args:
        path: PNG to write.
        results: what `measure_faithfulness` returns, for each network by name.
    """
    figure = Figure(figsize=(9, 4.6 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 2, squeeze=False, sharey="row")
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "ncols": 2}
    for axes, (network, methods) in zip(rows, results.items(), strict=True):
        for axis, kind, better in zip(axes, ("insertion", "deletion"), ("higher", "lower"), strict=True):
            for (method, values), marker in zip(methods.items(), cycle(MARKERS), strict=False):
                curve = values[kind]
                label = f"{method} ({values[f'{kind}_area']:.3f})"
                axis.plot(np.linspace(0, 100, len(curve)), curve, marker=marker, ms=4, lw=1, label=label)
            verb = "revealed" if kind == "insertion" else "removed"
            axis.set(title=f"{network}: {kind} ({better} is better)", xlabel=f"% of pixels {verb}")
            axis.legend(fontsize=8, title="method (area)", title_fontsize=8, **below)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("probability of the class")
    save_figure(path, figure, DPI)


SCORE_TITLES = {
    "iou": "IoU",
    "pointing": "Pointing game",
    "deletion": "Deletion (lower is better)",
    "gini": "Gini coefficient",
    "mass": "Mass on the digit",
    "autocorrelation": "Autocorrelation",
}


def draw_comparison(path: Path, report: dict) -> None:
    """Draw a panel for each score: the mean and its 95% interval by network, for each kind of map.

    Args:
        path: PNG to write.
        report: of saliency_comparison.py.
    """
    names = list(report["networks"])
    rows = {name: report["networks"][name] for name in names}
    scores = list(rows[names[0]]["scores"]["FullGrad"])
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    axes = figure.subplots(2, (len(scores) + 3) // 2, squeeze=False).ravel()
    for axis, score in zip(axes, ("accuracy", *scores, "autocorrelation"), strict=False):
        for i, name in enumerate(names):
            if score == "accuracy":
                axis.plot(rows[name]["accuracy"], [i] * len(rows[name]["accuracy"]), "|k")
                axis.plot(rows[name]["mean_accuracy"], i, "ok", label="accuracy (lines: seeds)" if i == 0 else None)
            elif score == "autocorrelation":
                _interval(axis, rows[name][score], i, "C1", "gradient" if i == 0 else None)
            else:
                _interval(axis, rows[name]["scores"]["FullGrad"][score], i, "C0", "FullGrad" if i == 0 else None)
                _interval(axis, rows[name]["scores"]["gradient"][score], i + 0.25, "C1", "gradient" * (i == 0))
        axis.set_title(SCORE_TITLES.get(score, score.replace("_", " ").capitalize()))
        axis.set_yticks(range(len(names)), names if axis in axes[:: len(axes) // 2] else [""] * len(names))
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
    for axis in axes[len(scores) + 2 :]:
        axis.axis("off")
    handles = [handle for axis in axes[:2] for handle in axis.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    save_figure(path, figure, DPI)


def _interval(axes: Axes, score: dict, y: float, colour: str, label: str | None) -> None:
    low, high = score["interval"]
    axes.plot([low, high], [y, y], color=colour, linewidth=1.5)
    marker = {"C0": "o", "C1": "s"}[colour]
    axes.plot(score["mean"], y, marker, color=colour, markersize=4, label=label or None)


def pages(path: Path, pictures: int) -> Iterator[tuple[Path, range]]:
    """Yield the file and the pictures' indices of each page: figure.png, figure-2.png, ..., `PAGE_ROWS` on each.

    Pages that an earlier run with more pictures has left are removed.
    """
    files = (path if number == 1 else path.with_stem(f"{path.stem}-{number}") for number in count(1))
    for start in range(0, pictures, PAGE_ROWS):
        yield next(files), range(start, min(start + PAGE_ROWS, pictures))
    for surplus in takewhile(Path.is_file, files):
        surplus.unlink()


def page_names(name: str) -> tuple[str, str]:
    """Return patterns of the names of a figure's pages."""
    return name, f"{Path(name).stem}-[0-9]*.png"


def _grid(titles: list[str], pictures: Sequence[Picture]) -> tuple[Figure, np.ndarray]:
    """Return a figure with a titled column for each title, a named row for each picture, and pictures in column 0."""
    figure = Figure(figsize=(CELL * len(titles), (CELL + 0.35) * len(pictures)), layout="constrained")
    axes = figure.subplots(len(pictures), len(titles), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9, parse_math=False)
    for (axis, *_), picture in zip(axes, pictures, strict=True):
        _show(axis, picture.pixels, "", picture.aspect)
        axis.set_ylabel(_short(picture.name), fontsize=8, parse_math=False)
    return figure, axes


def _show(axes: Axes, pixels: np.ndarray, text: str, aspect: float = 1.0) -> None:
    axes.imshow(pixels, aspect=1 / aspect)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(text, fontsize=8, parse_math=False)


def _cut_out(pixels: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """Return the pixels, almost white outside of the marked ones."""
    return np.where(marked[..., None], pixels, 255 - (255 - pixels) // 8)


def _short(name: str) -> str:
    name = os.fsencode(name).decode("utf-8", "replace")  # file names need not be UTF-8
    return name if len(name) <= CAPTION else name[: CAPTION - 1] + "…"
