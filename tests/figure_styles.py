"""Curves in figures: told apart by their markers or lines, and not by colours only."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D


def check_styles(figure: Figure) -> None:
    """Check that all curves in the legend of a panel differ without their colours."""
    for axes in figure.axes:
        styles = {}
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            line = handle if isinstance(handle, Line2D) else getattr(handle, "lines", [None])[0]  # of error bars
            if line is None or len(line.get_xdata()) == 0:
                continue
            style = (
                line.get_marker(),
                line.get_linestyle(),
                line.get_linewidth() >= 4,
                line.get_markerfacecolor() == "none",
                len(line.get_xdata()) > 1 and len(set(line.get_ydata())) == 1,  # a level
            )
            assert styles.setdefault(style, label) == label, f"{label!r} and {styles[style]!r} differ by colour only"
