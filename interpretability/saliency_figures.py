"""Figures: maps, segmentations, Dice and faithfulness curves."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from explain_images import Explained
from explained_networks import Network
from map_scores import PERCENTILES, dice, segment
from pictures import Picture
from s3net_common.output_files import write_atomically

CELL = 2.1  # inches of one image in a grid
MOST_ROWS = 6  # images in one grid; every one has its own overlay
CAPTION = 24  # characters of a class name under an image


def overlay(pixels: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """The map in colour over the grey image: `(H, W, 3)` uint8 and `(H, W)` to `(H, W, 3)` uint8."""
    heat = brightness(saliency)
    grey = (pixels.astype(float) @ (0.299, 0.587, 0.114) / 255)[..., None]
    colour = matplotlib.colormaps["inferno"](heat)[..., :3]
    opacity = (0.25 + 0.65 * heat)[..., None]
    return ((grey * (1 - opacity) + colour * opacity) * 255).round().astype(np.uint8)


def brightness(saliency: np.ndarray) -> np.ndarray:
    """The map in [0, 1] for looking at: from its 20th to its 99.5th percentile, so that single pixels don't decide."""
    low, high = np.percentile(saliency, (20, 99.5))
    return ((saliency - low) / max(high - low, 1e-12)).clip(0, 1)


def save_overlay(path: Path, picture: Picture, saliency: np.ndarray) -> None:
    """Write one overlay in the image's own size."""
    write_atomically(path, lambda temporary: Image.fromarray(overlay(picture.pixels, saliency)).save(temporary))


def caption(network: Network, explained: Explained) -> str:
    """The explained class and its probability; where it is not the prediction, also that."""
    text = f"{_short(network.class_name(explained.target))} {explained.probability:.2f}"
    if explained.prediction != explained.target:
        text += f"\n(predicted: {_short(network.class_name(explained.prediction))})"
    return text


def draw_maps(
    path: Path, pictures: Sequence[Picture], columns: Sequence[tuple[Network, Sequence[Picture], Sequence[Explained]]]
) -> None:
    """As the paper's figure: a row an image, a column a network, the class and its probability under each map.

    Only the first `MOST_ROWS` images are drawn.

    Args:
        path: PNG to write.
        pictures: first column.
        columns: each network with its pictures (in its own size) and its explanations.
    """
    figure, axes = _grid(len(pictures), 1 + len(columns))
    for row, picture in enumerate(pictures[:MOST_ROWS]):
        _show(axes[row][0], picture.pixels, "")
        for column, (network, own, explained) in enumerate(columns, start=1):
            one = explained[row]
            _show(axes[row][column], overlay(own[row].pixels, one.saliency), caption(network, one))
    for axis, title in zip(axes[0], ["image", *(network.name for network, _, _ in columns)], strict=True):
        axis.set_title(title, fontsize=9)
    _save(figure, path)


def draw_crops(path: Path, network: Network, pictures: Sequence[Picture], explained: Sequence[Explained]) -> None:
    """A column an image: it in its own size with the most probable classes, what the network sees of it, and the map.

    Args:
        path: PNG to write.
        network: whose explanations they are.
        pictures: with their originals.
        explained: one a picture.
    """
    figure = Figure(figsize=(CELL * len(pictures), CELL * 3 + 0.8), layout="constrained")
    axes = figure.subplots(3, len(pictures), squeeze=False)
    for column, (picture, one) in enumerate(zip(pictures, explained, strict=True)):
        side = len(picture.original)
        enlarged = Image.fromarray(one.saliency).resize((side, side), Image.Resampling.BILINEAR)
        _show(axes[0][column], picture.original, "")
        _show(axes[1][column], picture.pixels, "")
        _show(axes[2][column], overlay(picture.original, np.asarray(enlarged)), "")
        names = [f"{_short(network.class_name(index))} {probability:.2f}" for index, probability in one.most_probable]
        axes[0][column].set_title("\n".join(names), fontsize=9)
    size = len(pictures[0].pixels)
    for row, text in zip(axes, ("photograph", f"as the network sees it, {size}x{size}", "FullGrad"), strict=True):
        row[0].set_ylabel(text, fontsize=9)
    _save(figure, path)


def draw_segmentations(
    path: Path,
    pictures: Sequence[Picture],
    columns: Sequence[tuple[str, Sequence[Picture], Sequence[np.ndarray]]],
    percentile: float,
) -> None:
    """A row an image: it, its true mask, and what each method's map marks, with the Dice coefficient under it.

    Only the first `MOST_ROWS` images are drawn.

    Args:
        path: PNG to write.
        pictures: first two columns.
        columns: each method's name, its pictures and its maps.
        percentile: of the map, from which a pixel is marked.
    """
    figure, axes = _grid(len(pictures), 2 + len(columns))
    for row, picture in enumerate(pictures[:MOST_ROWS]):
        _show(axes[row][0], picture.pixels, "")
        _show(axes[row][1], _cut_out(picture.pixels, picture.mask), "")
        for column, (_, own, maps) in enumerate(columns, start=2):
            marked = segment(maps[row], percentile)
            score = dice(marked, own[row].mask)
            _show(axes[row][column], _cut_out(own[row].pixels, marked), f"Dice {score:.2f}")
    for axis, title in zip(axes[0], ["image", "true mask", *(name for name, _, _ in columns)], strict=True):
        axis.set_title(title, fontsize=9)
    _save(figure, path)


def draw_dice(path: Path, curves: dict[str, np.ndarray]) -> None:
    """Dice against percentile: the mean over the images, and a band of one standard deviation.

    Args:
        path: PNG to write.
        curves: by method, `(images, percentiles)` in the order of `PERCENTILES`.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        mean, spread = values.mean(0), values.std(0)
        (line,) = axes.plot(PERCENTILES, mean, marker=".", label=f"{name} ({mean.mean():.2f})")
        axes.fill_between(PERCENTILES, mean - spread, mean + spread, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.invert_xaxis()
    axes.set_xticks([99, 95, 90, 85, 80])
    axes.set(xlabel="percentile of the map from which a pixel is marked", ylabel="Dice coefficient", ylim=(0, None))
    axes.legend(title="method (mean over percentiles)", fontsize=8, title_fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)


def draw_faithfulness(path: Path, results: dict[str, dict[str, dict]]) -> None:
    """A row a network: insertion and deletion curves of each method, with their areas.

    Args:
        path: PNG to write.
        results: by network, what `measure_faithfulness` returns.
    """
    figure = Figure(figsize=(9, 3.2 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 2, squeeze=False, sharey="row")
    for axes, (network, methods) in zip(rows, results.items(), strict=True):
        for axis, kind, better in zip(axes, ("insertion", "deletion"), ("higher", "lower"), strict=True):
            for method, values in methods.items():
                curve = values[kind]
                label = f"{method} ({np.mean(values[f'{kind}_area']):.3f})"
                axis.plot(np.linspace(0, 100, len(curve)), curve, label=label)
            verb = "revealed" if kind == "insertion" else "removed"
            axis.set(title=f"{network}: {kind} ({better} is better)", xlabel=f"% of pixels {verb}")
            axis.legend(fontsize=8, title="method (area)", title_fontsize=8)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("probability of the class")
    _save(figure, path)


def _grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    rows = min(rows, MOST_ROWS)
    figure = Figure(figsize=(CELL * columns, (CELL + 0.35) * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axes: Axes, pixels: np.ndarray, text: str) -> None:
    axes.imshow(pixels)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(text, fontsize=8)


def _cut_out(pixels: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """The image, almost white outside of what is marked."""
    return np.where(marked[..., None], pixels, 255 - (255 - pixels) // 8)


def _short(name: str) -> str:
    return name if len(name) <= CAPTION else name[: CAPTION - 1] + "…"


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
