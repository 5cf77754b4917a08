"""Scatter plot of the error against the size of networks, with labels that do not overlap."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from s3net_common.log_ticks import plain_ticks

STYLES = {  # by `Point.kind`, which the legend shows
    "measured here": {"marker": "o", "color": "tab:red", "markersize": 8},
    "measured here, without augmentation": {"marker": "s", "color": "tab:red", "markersize": 7, "fillstyle": "none"},
    "measured here, training not finished": {"marker": "v", "color": "tab:orange", "markersize": 8},
    "quoted": {"marker": "D", "color": "tab:blue", "markersize": 6, "fillstyle": "none"},
    "quoted, without augmentation": {"marker": "x", "color": "gray", "markersize": 7},
    "quoted, augmentation unknown": {"marker": "^", "color": "gray", "markersize": 6, "fillstyle": "none"},
}
PANELS = {"parameters": "parameters", "multiply_adds": "multiply-adds for one image"}
LABEL_SIZE = 8.5  # points
LONGEST = 48  # characters of a label beside its point


@dataclass(frozen=True)
class Point:
    """A network: label, top-1 error in percent, sizes (None if unknown), and its key in `STYLES`."""

    label: str
    error: float
    parameters: float | None
    multiply_adds: float | None
    kind: str


def draw_scatter(data_sets: dict[str, Sequence[Point]]) -> Figure:
    """Draw the error against parameters and against multiply-adds, two panels for each data set (title -> points).

    Long labels stand below the left panel. Their points have letters.
    """
    letters = {title: _letters(points) for title, points in data_sets.items()}
    height = 6.4 * len(data_sets) + 0.2 * sum(map(len, letters.values()))
    figure = Figure(figsize=(15, height), layout="constrained")
    FigureCanvasAgg(figure)  # measures the size of texts
    grid = figure.subplots(len(data_sets), 2, squeeze=False)
    panels = []
    for (title, points), row in zip(data_sets.items(), grid, strict=True):
        short = {p.label: p.label for p in points} | letters[title]
        for (quantity, name), axes in zip(PANELS.items(), row, strict=True):
            known = [p for p in points if getattr(p, quantity)]
            unknown = ", ".join(short[p.label] for p in points if p not in known)
            axes.set(title=title, ylabel="top-1 error (%)")
            remarks = [f"(unknown for {unknown})"] if unknown else []
            if axes is row[0]:
                remarks += [f"{letter}: {label}" for label, letter in letters[title].items()]
            axes.set_xlabel("\n".join([name, *(textwrap.fill(remark, 92) for remark in remarks)]), fontsize="small")
            _draw_panel(axes, known, quantity)
            panels.append((axes, [(getattr(p, quantity), p.error, short[p.label]) for p in known]))
    kinds = {point.kind for points in data_sets.values() for point in points}
    handles = [Line2D([], [], linestyle="", label=kind, **STYLES[kind]) for kind in STYLES if kind in kinds]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.draw_without_rendering()  # places the axes, which stay where they are from here on
    figure.set_layout_engine("none")
    for axes, labelled in panels:
        _place_labels(axes, labelled)
    return figure


def _letters(points: Sequence[Point]) -> dict[str, str]:
    """Return A, B, ..., Z, A1, B1, ... for the long labels."""
    long = dict.fromkeys(p.label for p in points if len(p.label) > LONGEST)
    return {label: f"{ascii_uppercase[i % 26]}{i // 26 or ''}" for i, label in enumerate(long)}


def _draw_panel(axes: Axes, points: Sequence[Point], quantity: str) -> None:
    if not points:
        axes.set(xticks=[], yticks=[])
        return
    for kind, style in STYLES.items():
        chosen = [p for p in points if p.kind == kind]
        if chosen:
            axes.plot([getattr(p, quantity) for p in chosen], [p.error for p in chosen], linestyle="", **style)
    errors = [p.error for p in points]
    axes.margins(0.12, 0.12)
    axes.set_xscale("log")
    smallest, largest = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if largest > 5 * smallest else range(1, 10)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if min(errors) > 0 and max(errors) > 2 * min(errors):  # one large error would squeeze the others together
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def _place_labels(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each label at the nearest free place around its point, with a line between them if they are far apart."""
    if not points:
        return
    renderer, pixel = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    places = axes.transData.transform([(x, y) for x, y, _ in points])
    inside = axes.get_window_extent(renderer)
    used = [Bbox.from_bounds(x - 6 * pixel, y - 6 * pixel, 12 * pixel, 12 * pixel) for x, y in places]
    for (x, y), (_, _, label) in zip(places, points, strict=True):
        text = axes.text(0, 0, label, transform=None, fontsize=LABEL_SIZE, ha="center", va="center")
        size = text.get_window_extent(renderer)
        box = min(_boxes_around(x, y, size.width, size.height, pixel), key=lambda box: _overlap(box, used, inside))
        used.append(box)
        middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        text.set_transform(axes.transData)  # a file may have another resolution
        text.set_position(axes.transData.inverted().transform(middle))
        end = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
        if math.dist((x, y), end) > 12 * pixel:
            ends = axes.transData.inverted().transform([(x, y), end])
            axes.plot(*ends.T, color="gray", linewidth=0.6, zorder=1, scalex=False, scaley=False)


def _boxes_around(x: float, y: float, width: float, height: float, pixel: float) -> list[Bbox]:
    """Return boxes of a label's size around a point, the nearest first, in pixels."""
    boxes = []
    for distance in range(7, 100, 6):
        for turn in range(16):
            angle = 2 * math.pi * turn / 16
            middle_x = x + math.cos(angle) * (distance * pixel + width / 2)
            middle_y = y + math.sin(angle) * (distance * pixel + height / 2)
            boxes.append(Bbox.from_bounds(middle_x - width / 2, middle_y - height / 2, width, height))
    return boxes


def _overlap(box: Bbox, used: Sequence[Bbox], inside: Bbox) -> float:
    """Return the area of a box that covers other boxes or lies outside the axes, in square pixels."""
    shared = sum(_shared_area(box, other) for other in used)
    return shared + box.width * box.height - _shared_area(box, inside)


def _shared_area(first: Bbox, second: Bbox) -> float:
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return max(0.0, width) * max(0.0, height)
