"""Ordinary predictors to compare the kernels with: the training mean, ridge regression and a Gaussian process."""

import warnings
from collections.abc import Callable

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import RidgeCV

from tabular import Split

RIDGE_PENALTIES = np.logspace(-4, 4, 33)


def mean(split: Split) -> np.ndarray:
    """Predict the mean of the training targets for every test row."""
    return np.full(len(split.y_test), split.y_train.mean())


def ridge(split: Split) -> np.ndarray:
    """Predict by ridge regression; the penalty minimises the leave-one-out error of the training rows."""
    return RidgeCV(alphas=RIDGE_PENALTIES).fit(split.x_train, split.y_train).predict(split.x_test)


def gaussian_process(split: Split) -> np.ndarray:
    """Predict by a Gaussian process with squared-exponential kernel and noise.

    The kernel's parameters maximise the marginal likelihood of the training rows.
    """
    features = split.x_train.shape[1]
    kernel = ConstantKernel(1.0) * RBF(np.sqrt(features), (1e-2, 1e3)) + WhiteKernel(0.1, (1e-6, 1e1))
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a parameter at its bound still gives a usable fit
        process.fit(split.x_train, split.y_train)
    return process.predict(split.x_test)


BASELINES: dict[str, Callable[[Split], np.ndarray]] = {
    "mean": mean,
    "ridge": ridge,
    "gaussian process": gaussian_process,
}
"""Predictors by name. Each takes a split with standardised features and returns (test rows,) predictions."""
