"""95% intervals of errors: over the images of one run, and of the difference of two networks, paired by seed."""

import statistics
from collections.abc import Sequence

from scipy.stats import binomtest, t


def wilson_interval(errors: int, count: int) -> tuple[float, float]:
    """Return the 95% confidence interval of an error rate in percent (Wilson's score interval, 1927).

    It is about the choice of the images. It says nothing about another seed.
    """
    low, high = binomtest(errors, count).proportion_ci(method="wilson")
    return 100 * float(low), 100 * float(high)


def interval_of_percent(error: float, count: int) -> tuple[float, float]:
    """Return `wilson_interval` for an error in percent of `count` images."""
    return wilson_interval(round(error / 100 * count), count)


def mean_interval(values: Sequence[float], means: int = 1) -> tuple[float, float] | None:
    """Return the 95% interval of a mean (Student's t, values taken as normal); None for fewer than two values.

    With Bonferroni's correction for several means, all their intervals cover the true means in at least 95% of cases.

    Args:
        values: independent values, of any unit.
        means: the number of means that the correction is for.
    """
    if len(values) < 2:
        return None
    margin = float(t.ppf(1 - 0.025 / means, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.mean(values)
    return mean - margin, mean + margin
