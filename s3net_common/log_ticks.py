"""Labels of logarithmic axes."""

import math

from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers: 0.1, 0.2 and 0.5 instead of powers of ten and multiples of them.

    Call it after the data are drawn, since the axis' range decides which numbers are labelled.
    """
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    multiples = (1,) if decades > 3 else (1, 2, 5) if decades > 1.05 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    axis.set_major_locator(LogLocator(subs=multiples))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
