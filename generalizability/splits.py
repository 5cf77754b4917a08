"""Which images are held out, and which are chosen where only some are wanted: always the same ones."""

import numpy as np
import torch
from torch import Tensor

from models import InputError


def stratified_split(labels: np.ndarray, count: int, classes: int) -> tuple[Tensor, Tensor]:
    """The indices of all but `count` images, and of those; every class has its share in both.

    Raises:
        InputError: where `count` leaves one of the two halves with fewer images than there are classes.
    """
    if not classes <= count <= len(labels) - classes:
        raise InputError(
            f"--hold-out {count} is not possible: give a number from {classes}, one image a class, to "
            f"{max(classes, len(labels) - classes)}"
        )
    from sklearn.model_selection import train_test_split

    try:
        halves = train_test_split(np.arange(len(labels)), test_size=count, random_state=0, stratify=labels)
    except ValueError as error:  # a class with a single image
        raise InputError(f"--hold-out {count} is not possible: {error}") from error
    return tuple(torch.from_numpy(half) for half in halves)


def random_subset(images: int, count: int | None) -> Tensor:
    """The first `count` indices of a fixed random order, so that every class has its share; all in order for None.

    Raises:
        InputError: for a count below 1.
    """
    if count is None:
        return torch.arange(images)
    if count < 1:
        raise InputError(f"a limit of {count} images leaves none: give 1 or more")
    return torch.randperm(images, generator=torch.Generator().manual_seed(0))[:count]
