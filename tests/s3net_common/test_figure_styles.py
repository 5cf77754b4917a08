"""The check that conftest.py makes of every figure that a test saves."""

import io

import pytest
from matplotlib.figure import Figure


@pytest.mark.parametrize(("styles", "is_told_apart"), [(("-", "-"), False), (("-", "--"), True), (("o-", "s-"), True)])
def test_curves_that_differ_by_colour_only_are_found(styles, is_told_apart):
    figure = Figure()
    axes = figure.subplots()
    for style, label in zip(styles, "ab", strict=True):
        axes.plot([0, 1], [1, 2], style, label=label)
    if is_told_apart:
        figure.savefig(io.BytesIO())
    else:
        with pytest.raises(AssertionError, match="'b' and 'a' differ by colour only"):
            figure.savefig(io.BytesIO())
