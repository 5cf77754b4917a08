"""Fit of a power law, y proportional to x^order."""

import numpy as np


def fitted_order(x: np.ndarray, y: np.ndarray) -> float:
    """Return the exponent of a power law: the slope of the least-squares line through log y against log x.

    Args:
        x: (n,) above 0, n at least 2.
        y: (n,) above 0.
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
