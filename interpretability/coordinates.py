"""Coordinates of the elements of a tensor, and how functions of shapes change them."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NOWHERE = float("nan")


class Coordinates(NamedTuple):
    """Image, row and column of each element of a tensor; NaN where there is none.

    Each of the three broadcasts to the tensor's shape: its size is 1 along axes that it does not depend on.
    """

    image: Tensor
    row: Tensor
    column: Tensor

    def expand(self, shape: torch.Size) -> "Coordinates":
        """Return coordinates of the full shape."""
        return Coordinates(*(axis.expand(shape) for axis in self))

    def compact(self) -> "Coordinates":
        """Reduce the axes that repeat one value in memory to size 1."""
        return Coordinates(*map(_compact, self))


def broadcasts(places: Coordinates, shape: torch.Size) -> bool:
    """Return whether each coordinate has an axis of size 1, or of the full size, for each axis of the shape."""
    return all(
        coordinate.dim() == len(shape) and all(c in (1, s) for c, s in zip(coordinate.shape, shape, strict=True))
        for coordinate in places
    )


def equal(places: Coordinates, others: Coordinates) -> bool:
    """Return whether both are one object, or have the same values and no NaN."""
    return places is others or all(map(torch.equal, places, others))


def _compact(coordinate: Tensor) -> Tensor:
    for axis in range(coordinate.dim()):
        if coordinate.stride(axis) == 0 and coordinate.shape[axis] > 1:
            coordinate = coordinate.narrow(axis, 0, 1)
    return coordinate


def without_repetition(coordinate: Tensor) -> Tensor:
    """Reduce the axes that a coordinate does not depend on to size 1."""
    for axis in range(coordinate.dim()):
        if coordinate.shape[axis] > 1:
            first = coordinate.narrow(axis, 0, 1)
            if ((coordinate == first) | (coordinate.isnan() & first.isnan())).all():
                coordinate = first
    return coordinate


def merged(places: Coordinates, others: Coordinates) -> Coordinates:
    """Fill coordinates that are missing from others of the same tensor shape."""
    if equal(places, others) or not any(coordinate.isnan().any() for coordinate in places):
        return places
    return Coordinates(*(torch.where(a.isnan(), b, a) for a, b in zip(places, others, strict=True)))


def unfold_places(coordinate: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """`F.unfold` of coordinates from 0 on: its padding, which is 0, has none."""
    patches = F.unfold(coordinate + 1, *args[1:], **kwargs)
    return torch.where(patches == 0, NOWHERE, patches - 1)


def reshape_places(places: Coordinates, old: torch.Size, new: torch.Size) -> Coordinates:
    """Reshape coordinates, keeping size 1 along groups of axes that they do not depend on."""
    groups = _axis_groups(old, new)

    def reshape(coordinate: Tensor) -> Tensor:
        full, reshaped = [], []
        for before, after in groups:
            depends = any(coordinate.shape[axis] > 1 for axis in before)
            full += [old[axis] if depends else 1 for axis in before]
            reshaped += [new[axis] if depends else 1 for axis in after]
        return coordinate.expand(full).reshape(reshaped)

    return Coordinates(*map(reshape, places))


def _axis_groups(old: torch.Size, new: torch.Size) -> list[tuple[list[int], list[int]]]:
    """Pair the smallest groups of neighbouring axes that hold equally many elements before and after a reshape."""
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = [], []
        sizes = [1, 1]
        if i < len(old):
            before, sizes[0], i = [i], old[i], i + 1
        if j < len(new) and (not before or old[before[0]] != 1 or new[j] == 1):
            after, sizes[1], j = [j], new[j], j + 1
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                before.append(i)
                sizes[0], i = sizes[0] * old[i], i + 1
            else:
                after.append(j)
                sizes[1], j = sizes[1] * new[j], j + 1
        groups.append((before, after))
    return groups


def line_along(coordinate: Tensor, axis: int) -> Tensor | None:
    """Return the values of a coordinate along an axis, without NaN.

    None if the values along the other axes differ by more than half of a step along this one, or if more than a quarter
    is padding at one end, which is no border but fills up windows.
    """
    others = [other for other in range(coordinate.dim()) if other != axis]
    low, high = coordinate.nan_to_num(torch.inf).amin(others), coordinate.nan_to_num(-torch.inf).amax(others)
    known = low.isfinite()
    positions = known.nonzero()[:, 0].tolist()
    if not positions or abs(positions[0] - (len(known) - 1 - positions[-1])) > max(1, len(known) / 4):
        return None
    line, spread = (low[known] + high[known]) / 2, high[known] - low[known]
    step = line.diff().abs().amin() if len(line) > 1 else 0.0
    return line if (spread <= step / 2).all() else None


def spans(line: Tensor | None, length: int) -> bool:
    """Return whether places increase from one end of the image's height or width to the other.

    A border that repeats or reflects the image is left out.
    """
    if line is None or len(line) == 0:
        return False
    if len(line) == 1:
        return abs(line.item() - (length - 1) / 2) < 1e-3
    values = line.tolist()
    starts = [0] + [i for i in range(1, len(values)) if values[i] <= values[i - 1]]
    run = max((values[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)), key=len)
    if len(run) == 1:
        return False
    margin = 1.5 * max(b - a for a, b in pairwise(run)) - 0.5  # a row of the grid may be missing, as without padding
    return run[0] <= margin and length - 1 - run[-1] <= margin


def half_of_places(places: Coordinates, seed: int) -> Tensor:
    """Return a random choice of about half of all places, as a mask. It is False without a place."""
    image, row, column = places
    noise = (image * 12.9898 + row * 78.233 + column * 37.719 + seed).sin() * 43758.5453
    return noise.frac().abs() > 0.5


def contracted(
    equation: object, places: Sequence[Coordinates | None], mean: Callable[[Coordinates, int], Coordinates]
) -> Coordinates | None:
    """Return the places of an einsum: of the first operand that has any after a mean over the axes that are summed.

    Args:
        equation: of `torch.einsum`. Forms other than "ab,bc->ac" (with an ellipsis, or without an arrow) give None.
        places: those of each operand, or None.
        mean: takes coordinates and an axis, and returns the mean along the axis, with size 1.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->") if isinstance(equation, str) else ("", "", "")
    if not arrow or "." in equation:
        return None
    for letters, coordinates in zip(inputs.split(","), places, strict=True):
        if coordinates is None or len(set(letters)) < len(letters):
            continue
        axes = [axis for axis, letter in enumerate(letters) if letter not in output]
        for axis in axes:
            coordinates = mean(coordinates, axis)
        kept = "".join(letter for letter in letters if letter in output)
        order = "".join(letter for letter in output if letter in kept)
        index = tuple(slice(None) if letter in kept else None for letter in output)
        moved = Coordinates(*(torch.einsum(f"{kept}->{order}", c.squeeze(axes))[index] for c in coordinates))
        if not moved.row.isnan().all():
            return moved
    return None
