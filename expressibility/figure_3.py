"""Settings of Figure 3, and the check of --depths. Imports no JAX."""

from s3net_common.errors import InputError

W_STD, B_STD = 1.5, 0.05  # of weights and biases
MAX_DEPTH = 100
FIGURE_3_DEPTHS = (2, 3, 4, 5, 6, 7, 8)


def check_depths(depths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the depths in ascending order.

    Raises:
        InputError: there are no depths, one is repeated, below 1 or above 100.
    """
    if not depths:
        raise InputError("--depths is empty: give at least one number of blocks, such as --depths 2 3 4")
    if min(depths) < 1:
        raise InputError(f"--depths has {min(depths)}: every depth must be at least 1")
    if max(depths) > MAX_DEPTH:
        raise InputError(
            f"--depths has {max(depths)}: it must be at most {MAX_DEPTH}, since kernels grow roughly as 2^depth"
        )
    if repeated := sorted({depth for depth in depths if depths.count(depth) > 1}):
        raise InputError(f"--depths has {repeated[0]} more than once: give each depth once")
    return tuple(sorted(depths))
