"""95% intervals: over images, and over seeds."""

import pytest

from comparison.intervals import interval_of_percent, mean_interval, wilson_interval


def test_wilson_intervals():
    # Wilson's equation; without errors the limits are 0 and z^2 / (n + z^2).
    assert wilson_interval(10, 50) == pytest.approx((11.2435, 33.0364), abs=1e-3)
    z2 = 1.959963984540054**2
    assert wilson_interval(0, 60) == pytest.approx((0, 100 * z2 / (60 + z2)))
    assert wilson_interval(60, 60) == pytest.approx((100 * 60 / (60 + z2), 100))
    assert interval_of_percent(20.0, 50) == wilson_interval(10, 50)


def test_the_interval_of_a_mean():
    # Student: 4.303 is the 97.5% quantile with 2 degrees of freedom; the standard deviation of 1, 2, 3 is 1.
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    # Bonferroni for 5 means: the 99% interval
    assert mean_interval([0.0, 3.0, 6.0], means=5) == pytest.approx((3 - 9.9248 * 3**0.5, 3 + 9.9248 * 3**0.5), 1e-4)
    assert mean_interval([1.0]) is None and mean_interval([2.0, 2.0]) == (2.0, 2.0)
