"""Follows where in the images each element of a function's output comes from.

Every element of a tensor may have three coordinates: its image, its row and its column, in pixels of the network's
input. They are followed through functions that move data (views, windows, shifts), and kept by functions that act
element by element or along the channels. A convolution, a pool or an interpolation starts a fresh grid. A mean over a
quarter of the image's height or width, or more, has no place. This is done once for each shape of the input.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from bias_rules import (
    ATTENTION,
    CONCATENATIONS,
    CONVOLUTIONS,
    JOINS,
    LINEAR,
    PERMUTATIONS,
    REDUCTIONS,
    RESAMPLING,
    RESHAPES,
    SELECTIONS,
    named,
)

NOWHERE = float("nan")
WITHOUT_ROOM = 1 / 4  # of the image's height or width: a mean over more has no place
GRIDS = CONVOLUTIONS | RESAMPLING | named("grid_sample", "lp_pool2d")
MATRIX_PRODUCTS = named("matmul", "__matmul__", "bmm", "mm") | {LINEAR}
SCRAMBLED = named("sort", "topk", "einsum", "cumsum", "fold")
PAD, ROLL, UNFOLD = named("pad"), named("roll"), F.unfold


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


class Grid(NamedTuple):
    """Where the elements of a tensor lie in a picture of (rows, columns).

    Attributes:
        free: the axes along which elements share a place, such as the channels; they are summed first.
        size: rows and columns.
        ordered: whether the sums are `(N, rows, columns)` in this order. The next two are then None.
        index: which of the flattened sums have a place.
        cell: for each of those its index in the flattened `(N, rows, columns)`.
    """

    free: tuple[int, ...]
    size: tuple[int, int]
    ordered: bool
    index: Tensor | None
    cell: Tensor | None


class Layout(NamedTuple):
    """How a tensor is split into images, and where its elements lie.

    Attributes:
        axis: axis of the images. None: the tensor cannot be split.
        inner: along this axis, the image's index is `position // inner % N`.
        grid: None if no element has a place.
    """

    axis: int | None
    inner: int
    grid: Grid | None


class Places:
    """The coordinates of all tensors of a forward pass, kept as the attribute `_places` of the tensors.

    Args:
        images: `(N, C, H, W)`, the tensor that the model is called with.
    """

    def __init__(self, images: Tensor) -> None:
        self.n, _, self.height, self.width = images.shape
        self.device = images.device
        self._grids: dict[tuple[int, int], Coordinates] = {}
        self._known_grids: dict[int, tuple[Coordinates, Grid | None]] = {}
        images._places = self.fresh_grid(self.height, self.width)

    def follow(self, func: Callable, args: tuple, kwargs: dict, output: Any) -> None:
        """Give the outputs of a function their coordinates. Call it after the function."""
        leaves = tree_flatten((args, kwargs))[0]
        known = [
            leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad and hasattr(leaf, "_places")
        ]
        outputs = [output] if isinstance(output, Tensor) else tree_flatten(output)[0]
        outputs = [leaf for leaf in outputs if isinstance(leaf, Tensor)]
        if not known or not any(leaf.requires_grad for leaf in outputs):
            return
        try:
            places = self._places(func, args, kwargs, known, outputs)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):  # no function of coordinates
            places = [None] * len(outputs)
        for leaf, coordinates in zip(outputs, places, strict=False):
            if coordinates is not None and _broadcasts(coordinates, leaf.shape):
                leaf._places = coordinates
            elif hasattr(leaf, "_places"):
                del leaf._places

    def fresh_grid(self, rows: int, columns: int) -> Coordinates:
        """Return the coordinates of `(N, C, rows, columns)`; a single place has an image only."""
        if (rows, columns) not in self._grids:
            image, row, column = (
                torch.arange(size, dtype=torch.float32, device=self.device) for size in (self.n, rows, columns)
            )
            row = (row + 0.5) * self.height / rows - 0.5
            column = (column + 0.5) * self.width / columns - 0.5
            if rows * columns == 1:
                row, column = row * NOWHERE, column * NOWHERE
            self._grids[rows, columns] = Coordinates(
                image[:, None, None, None], row[None, None, :, None], column[None, None, None, :]
            )
        return self._grids[rows, columns]

    # ---- Functions ----

    def _places(
        self, func: Callable, args: tuple, kwargs: dict, known: list[Tensor], outputs: list[Tensor]
    ) -> list[Coordinates | None]:
        first, output = known[0], outputs[0]
        if func in SCRAMBLED:
            return [None] * len(outputs)
        if func in RESHAPES and first is args[0]:
            return [_reshape(first._places, first.shape, output.shape)]
        if (func in PERMUTATIONS and first is args[0]) or getattr(func, "__name__", "") == "__get__":
            return [Coordinates(*(func(axis, *args[1:], **kwargs) for axis in first._places))]
        if func in JOINS:
            return [self._joined(func, args, kwargs, known, output)]
        if func in PAD:
            return [self._padded(first, args, kwargs)]
        if func is UNFOLD:
            return [Coordinates(*(_unfold(axis, args, kwargs) for axis in first._places.expand(first.shape)))]
        if func in SELECTIONS:
            return self._selected(func, args, kwargs)
        if func in GRIDS and output.dim() == 4:
            return [self._sampled(first._places, output)] * len(outputs)
        if func in REDUCTIONS:
            return [self._reduced(first, *args[1:2], **kwargs)]
        if func in MATRIX_PRODUCTS or func is ATTENTION:
            return [self._product(func, args, output)]
        return [self._elementwise(known, leaf) for leaf in outputs]

    def _sampled(self, places: Coordinates, output: Tensor) -> Coordinates | None:
        image = places.image.flatten(1)
        low, high = image.nan_to_num(torch.inf).amin(1), image.nan_to_num(-torch.inf).amax(1)  # NaN: padding
        if len(output) != self.n or len(image) != self.n or not torch.equal(low, high):
            return None
        if places.row.isnan().all():
            nowhere = torch.full((1, 1, 1, 1), NOWHERE, device=self.device)
            return Coordinates(low[:, None, None, None], nowhere, nowhere)
        return self.fresh_grid(*output.shape[2:])

    def _joined(
        self, func: Callable, args: tuple, kwargs: dict, known: list[Tensor], output: Tensor
    ) -> Coordinates | None:
        axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        tensors = args[0]
        places = known[0]._places
        if (
            func in CONCATENATIONS
            and len(known) == len(tensors)
            and all(coordinate.shape[axis] == 1 for coordinate in places)
            and all(_equal(tensor._places, places) for tensor in known[1:])
        ):
            return places
        return self._selected(func, args, kwargs)[0]

    def _padded(self, tensor: Tensor, args: tuple, kwargs: dict) -> Coordinates:
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        widths = args[1] if len(args) > 1 else kwargs["pad"]
        if not any(widths):
            return tensor._places
        value = {"value": NOWHERE} if mode == "constant" else {}
        full = tensor._places.expand(tensor.shape)
        padded = Coordinates(*(F.pad(axis, widths, mode=mode, **value) for axis in full)).compact()
        axes = [tensor.dim() - 1 - i // 2 for i, width in enumerate(widths) if width]
        image = tensor._places.image
        if all(image.shape[axis] == 1 for axis in axes):  # the border of an image belongs to it
            return padded._replace(image=image)
        return padded

    def _selected(self, func: Callable, args: tuple, kwargs: dict) -> list[Coordinates]:
        """Move the coordinates as the function moves the elements."""

        def coordinate(axis: int, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
                return leaf
            if not leaf.requires_grad or not hasattr(leaf, "_places"):
                return torch.full((), NOWHERE, device=leaf.device).expand(leaf.shape)
            return leaf._places[axis].expand(leaf.shape)

        moved = []
        for axis in range(3):
            axis_args, axis_kwargs = tree_map(lambda leaf, axis=axis: coordinate(axis, leaf), (args, kwargs))
            result = func(*axis_args, **axis_kwargs)
            moved.append([leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)])
        return [Coordinates(*axes).compact() for axes in zip(*moved, strict=True)]

    def _reduced(self, tensor: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Coordinates | None:
        axes = range(tensor.dim()) if dim is None else dim if isinstance(dim, tuple | list) else [dim]
        axes = sorted({axis % tensor.dim() for axis in axes}, reverse=True)
        places = tensor._places
        for axis in axes:
            places = self._mean(places, axis)
        if not keepdim:
            for axis in axes:
                places = Coordinates(*(coordinate.squeeze(axis) for coordinate in places))
        return places

    def _product(self, func: Callable, args: tuple, output: Tensor) -> Coordinates | None:
        """Rows of a matrix product have the places of the first factor's rows, else columns those of the second's."""
        places = getattr(args[0], "_places", None)
        places = None if places is None or not args[0].requires_grad else self._mean(places, -1)
        if func not in MATRIX_PRODUCTS - {LINEAR} or not (places is None or places.row.isnan().all()):
            return places
        second = args[1]
        if getattr(second, "_places", None) is not None and second.requires_grad and second.dim() > 1:
            return self._mean(second._places, -2)
        return places

    def _elementwise(self, known: list[Tensor], output: Tensor) -> Coordinates | None:
        """Keep the places of inputs of the output's shape, else of those that differ in the last axis or broadcast."""
        same = [tensor for tensor in known if tensor.shape == output.shape]
        if same:
            places = same[0]._places
            for tensor in same[1:]:
                places = _merged(places, tensor._places)
            return places
        for tensor in known:
            if tensor.dim() == output.dim() and tensor.shape[:-1] == output.shape[:-1]:
                return self._mean(tensor._places, -1)
        for tensor in known:
            if tensor.dim() == output.dim() and _broadcasts(tensor._places, output.shape):
                return tensor._places
        return None

    def _mean(self, places: Coordinates, axis: int) -> Coordinates:
        """Return the mean place along an axis, which keeps size 1."""
        if all(coordinate.shape[axis] == 1 for coordinate in places):
            return places
        low, high = ([function(c, axis, keepdim=True) for c in places] for function in (torch.amin, torch.amax))
        image = torch.where(low[0] == high[0], low[0], NOWHERE)
        spread = (high[1] - low[1] > self.height * WITHOUT_ROOM) | (high[2] - low[2] > self.width * WITHOUT_ROOM)
        row, column = (torch.where(spread, NOWHERE, c.mean(axis, keepdim=True)) for c in places[1:])
        return Coordinates(image, row, column)

    # ---- Layouts ----

    def layout(self, tensor: Tensor) -> Layout:
        """Return how a tensor is split into images, and where its elements lie."""
        shape, places = tensor.shape, getattr(tensor, "_places", None)
        if places is None or not shape:
            return _rows_of_images(shape, self.n)
        if id(places) not in self._known_grids:
            self._known_grids[id(places)] = places, self._grid(places)
        return Layout(*self._image_axis(places, shape), self._known_grids[id(places)][1])

    def _image_axis(self, places: Coordinates, shape: torch.Size) -> tuple[int | None, int]:
        if self.n == 1 or (places.image.numel() == self.n == shape[0] == places.image.shape[0]):
            return 0, shape[0] // self.n
        image = _without_repetition(places.image)
        axes = [axis for axis, size in enumerate(image.shape) if size > 1]
        if image.isnan().all():
            return _rows_of_images(shape, self.n)[:2]
        for axis in axes:
            blocks = shape[axis] // self.n
            for inner in (size for size in range(blocks, 0, -1) if shape[axis] % self.n == 0 and blocks % size == 0):
                index = torch.arange(shape[axis], device=self.device) // inner % self.n
                index = index.view([-1 if i == axis else 1 for i in range(image.dim())])
                if ((image == index) | image.isnan()).all():
                    return axis, inner
        return None, 1

    def _grid(self, places: Coordinates) -> Grid | None:
        places = Coordinates(*map(_without_repetition, places))
        full = torch.broadcast_shapes(*(coordinate.shape for coordinate in places))
        free = tuple(axis for axis, size in enumerate(full) if size == 1)
        image, row, column = (coordinate.expand(full).flatten() for coordinate in places)
        placed = ~(image.isnan() | row.isnan() | column.isnan())
        rows, columns = row[placed].unique(), column[placed].unique()
        size = len(rows), len(columns)
        cells = size[0] * size[1]
        if cells <= 1 or cells * self.n > int(placed.sum()):
            return None
        index = placed.nonzero()[:, 0]
        cell = torch.searchsorted(rows, row[index]) * size[1] + torch.searchsorted(columns, column[index])
        cell += image[index].long() * cells
        ordered = len(cell) == len(placed) == self.n * cells and bool((cell == index).all())
        return Grid(free, size, True, None, None) if ordered else Grid(free, size, False, index, cell)


def _rows_of_images(shape: torch.Size, n: int) -> Layout:
    """Split axis 0 into N blocks, the usual layout."""
    splits = len(shape) > 0 and shape[0] % n == 0
    return Layout(0 if splits else None, shape[0] // n if splits else 1, None)


def _broadcasts(places: Coordinates, shape: torch.Size) -> bool:
    return all(
        coordinate.dim() == len(shape) and all(c in (1, s) for c, s in zip(coordinate.shape, shape, strict=True))
        for coordinate in places
    )


def _equal(places: Coordinates, others: Coordinates) -> bool:
    return places is others or all(map(torch.equal, places, others))


def _compact(coordinate: Tensor) -> Tensor:
    for axis in range(coordinate.dim()):
        if coordinate.stride(axis) == 0 and coordinate.shape[axis] > 1:
            coordinate = coordinate.narrow(axis, 0, 1)
    return coordinate


def _without_repetition(coordinate: Tensor) -> Tensor:
    """Reduce the axes that a coordinate does not depend on to size 1."""
    for axis in range(coordinate.dim()):
        if coordinate.shape[axis] > 1:
            first = coordinate.narrow(axis, 0, 1)
            if ((coordinate == first) | (coordinate.isnan() & first.isnan())).all():
                coordinate = first
    return coordinate


def _merged(places: Coordinates, others: Coordinates) -> Coordinates:
    """Fill coordinates that are missing from others of the same tensor shape."""
    if _equal(places, others) or not any(coordinate.isnan().any() for coordinate in places):
        return places
    return Coordinates(*(torch.where(a.isnan(), b, a) for a, b in zip(places, others, strict=True)))


def _unfold(coordinate: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """`F.unfold` of coordinates from 0 on: its padding, which is 0, has none."""
    patches = F.unfold(coordinate + 1, *args[1:], **kwargs)
    return torch.where(patches == 0, NOWHERE, patches - 1)


def _reshape(places: Coordinates, old: torch.Size, new: torch.Size) -> Coordinates:
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
