import pytest
from matplotlib.figure import Figure

from s3net_common.log_ticks import plain_ticks


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((0.002, 1000), ["0.01", "0.1", "1", "10", "100", "1000"]),
        ((0.02, 1), ["0.02", "0.05", "0.1", "0.2", "0.5", "1"]),
        ((0.02, 0.2), ["0.02", "0.05", "0.1", "0.2"]),
        ((1, 4), ["1", "1.5", "2", "2.5", "3", "4"]),
    ],
)
def test_a_logarithmic_axis_has_plain_numbers(values, labels):
    figure = Figure()
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.plot(values)
    plain_ticks(axes.yaxis)
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    shown = [text.get_text() for text in axes.get_yticklabels() if low <= text.get_position()[1] <= high]
    assert shown == labels
    assert not len(axes.yaxis.get_minorticklocs())
