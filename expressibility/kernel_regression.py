"""Predict with a neural tangent kernel, as the average of fully trained networks of infinite width does."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from scipy.linalg import lapack

from kernels import W_STD, Backend, Topology, kernel_row_blocks


class NtkMatrices(NamedTuple):
    """Kernel matrices for a prediction from n training points at m test points."""

    train: np.ndarray
    """(n, n). Only the lower triangle and the diagonal are valid."""
    test: np.ndarray
    """(m, n), test points in rows."""


def ntk_matrices(
    x_train: np.ndarray,
    x_test: np.ndarray,
    topology: Topology,
    depths: Collection[int],
    *,
    h0_shortcut: bool = False,
    w_std: float = W_STD,
    backend: Backend | None = None,
) -> dict[int, NtkMatrices]:
    """Compute the neural tangent kernels of (n, d) training and (m, d) test points in closed form.

    Takes the arguments of `kernels.kernel_row_blocks` and raises its errors. Returns the matrices by depth.
    """
    n, m = len(x_train), len(x_test)
    matrices = {depth: NtkMatrices(np.zeros((n, n)), np.empty((m, n))) for depth in depths}
    options = {"h0_shortcut": h0_shortcut, "w_std": w_std, "backend": backend}
    for rows, kernels in kernel_row_blocks(x_train, None, topology, depths, lower_triangle=True, **options):
        for depth, kernel in kernels.items():
            matrices[depth].train[rows, : rows.stop] = kernel.ntk
    for rows, kernels in kernel_row_blocks(x_test, x_train, topology, depths, **options):
        for depth, kernel in kernels.items():
            matrices[depth].test[rows] = kernel.ntk
    return matrices


def predict(matrices: NtkMatrices, y_train: np.ndarray, diag_reg: float) -> np.ndarray:
    """Return the mean prediction after gradient descent on the squared error has converged (section 6.2).

    Computes K_test (K_train + diag_reg * mean(diag K_train) * I)^-1 y. This equals the result of neural-tangents'
    `gradient_descent_mse_ensemble(..., diag_reg=diag_reg)` for infinite time.

    Args:
        matrices: kernels of n training and m test points.
        y_train: (n,) targets.
        diag_reg: regulariser relative to the mean of the kernel's diagonal, above 0.

    Returns:
        (m,) predictions, in the target's unit.

    Raises:
        ValueError: diag_reg is so small that the matrix is not positive definite in float64.
    """
    system = matrices.train.copy()
    diagonal = np.einsum("ii->i", system)
    diagonal += diag_reg * diagonal.mean()
    # LAPACK expects column-major order. The transpose has it without a copy; its upper triangle is our lower one.
    _, weights, info = lapack.dposv(system.T, y_train, lower=False, overwrite_a=True)
    if info != 0:
        raise ValueError(f"diag_reg {diag_reg:g} leaves the kernel matrix singular in float64: choose a larger one")
    return matrices.test @ weights


def mean_squared_error(prediction: np.ndarray, target: np.ndarray) -> float:
    """Return the mean of the squared differences, in the target's unit squared."""
    return float(np.mean((prediction - target) ** 2))
