"""Follows where in the images each element of a function's output comes from.

Every element of a tensor may have three coordinates: its image, its row and its column, in pixels of the network's
input. They are followed through functions that move data (views, windows, shifts, writes into slices), and kept by
functions that act element by element or along the channels, and by a convolution or pool that keeps the size. A
convolution or pool that changes the size, and an interpolation, start a fresh grid; if the input is a part of the
image, or flipped or shuffled, the output has no place. A mean over a quarter of the image's height or width, or more,
has no place.

A function that is in no table keeps the places if a backward step shows that each output depends only on inputs at its
own place. Otherwise (sorting, cumulative sums, Fourier transforms, folding) its outputs have no place. So a term is
drawn where it belongs, or not at all.

This is done once for each shape of the input, and again when the model moves its data in another way.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from bias_rules import (
    ADDITIONS,
    ATTENTION,
    BATCH_NORM,
    CONCATENATIONS,
    CONVOLUTIONS,
    COPIES,
    JOINS,
    LAYER_NORM,
    LINEAR,
    PERMUTATIONS,
    QUOTIENTS,
    REDUCTIONS,
    RESAMPLING,
    RESHAPES,
    SELECTIONS,
    SUBTRACTIONS,
    SYMMETRIC,
    named,
)
from coordinates import (
    NOWHERE,
    Coordinates,
    broadcasts,
    contracted,
    equal,
    half_of_places,
    line_along,
    merged,
    reshape_places,
    spans,
    unfold_places,
    without_repetition,
)

WITHOUT_ROOM = 1 / 4  # of the image's height or width: a mean over more has no place
GRIDS = CONVOLUTIONS | RESAMPLING | named("lp_pool2d")
MATRIX_PRODUCTS = named("matmul", "__matmul__", "bmm", "mm") | {LINEAR}
SUMS_WITH_PRODUCTS = named("addmm", "baddbmm")
EXTREMA_ALONG_AXIS = named("max", "min")
RECURRENT = named("lstm", "gru", "rnn_tanh", "rnn_relu")
PAD, EINSUM, UNFOLD = named("pad"), named("einsum"), F.unfold
WRITES = named(
    "__setitem__", "copy_", "index_copy", "index_copy_", "index_put", "index_put_", "put", "put_", "scatter",
    "scatter_", "masked_scatter", "masked_scatter_", "select_scatter", "slice_scatter", "diagonal_scatter",
)  # fmt: skip
MOVING = RESHAPES | PERMUTATIONS | SELECTIONS | JOINS | WRITES | PAD
# Also the normalisations, each of whose outputs depends most on the input at its own place.
ELEMENTWISE = ADDITIONS | SUBTRACTIONS | QUOTIENTS | COPIES | SYMMETRIC | {BATCH_NORM, LAYER_NORM} | named(
    "mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__", "relu", "relu_", "leaky_relu", "leaky_relu_", "prelu",
    "abs", "abs_", "neg", "__neg__", "where", "masked_fill", "masked_fill_", "dropout", "group_norm", "instance_norm",
    "rms_norm", "log_softmax", "addcmul", "addcmul_",
)  # fmt: skip


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
            if coordinates is not None and broadcasts(coordinates, leaf.shape):
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
        if func in RESHAPES and first is args[0]:
            return [reshape_places(first._places, first.shape, output.shape)]
        if (func in PERMUTATIONS and first is args[0]) or getattr(func, "__name__", "") == "__get__":
            return [Coordinates(*(func(axis, *args[1:], **kwargs) for axis in first._places))]
        if func in JOINS:
            return [self._joined(func, args, kwargs, known, output)]
        if func in PAD:
            return [self._padded(first, args, kwargs)]
        if func is UNFOLD:
            return [Coordinates(*(unfold_places(axis, args, kwargs) for axis in first._places.expand(first.shape)))]
        if func in SELECTIONS:
            return self._selected(func, args, kwargs)
        if func in WRITES:
            return [self._written(func, args, kwargs)]
        if func in GRIDS and output.dim() == 4:
            return [self._sampled(first._places, first.shape, output)] * len(outputs)
        if func in CONVOLUTIONS and output.dim() == 3 and output.shape[::2] == first.shape[::2]:
            return [self._mean_of_channels(first._places)]
        if func in REDUCTIONS or (func in EXTREMA_ALONG_AXIS and len(outputs) == 2):
            return [self._reduced(first, *args[1:2], **kwargs)]
        if func in MATRIX_PRODUCTS or func is ATTENTION:
            return [self._product(func, [*args, *kwargs.values()])]
        if func in SUMS_WITH_PRODUCTS:
            return [self._product(torch.matmul, args[1:])]
        if func in EINSUM:
            return [contracted(args[0], [self._places_of(operand) for operand in args[1:]], self._mean)]
        if func in RECURRENT:  # the states that follow the outputs have no place
            return [self._elementwise(known, output), *[None] * (len(outputs) - 1)]
        places = [self._elementwise(known, leaf) for leaf in outputs]
        return places if func in ELEMENTWISE or self._stay(known, outputs, places) else [None] * len(outputs)

    @staticmethod
    def _places_of(leaf: Any) -> Coordinates | None:
        return getattr(leaf, "_places", None) if isinstance(leaf, Tensor) and leaf.requires_grad else None

    @staticmethod
    def _stay(known: list[Tensor], outputs: list[Tensor], places: list[Coordinates | None]) -> bool:
        """Whether outputs depend only on inputs of their own place, by the gradients of random halves of the places."""
        kept = [
            (output, coordinates)
            for output, coordinates in zip(outputs, places, strict=True)
            if output.requires_grad and coordinates is not None and broadcasts(coordinates, output.shape)
        ]
        if not kept or any(output is tensor for output in outputs for tensor in known):  # written in place
            return False
        for seed in range(4):
            chosen = [half_of_places(c, seed).expand(output.shape).to(output.dtype) for output, c in kept]
            with torch.enable_grad():
                gradients = torch.autograd.grad(
                    [output for output, _ in kept], known, chosen, retain_graph=True, allow_unused=True
                )
            for tensor, gradient in zip(known, gradients, strict=True):
                others = ~half_of_places(tensor._places, seed).expand(tensor.shape)
                if gradient is not None and (gradient[others] != 0).any():
                    return False
        return True

    def _sampled(self, places: Coordinates, size: torch.Size, output: Tensor) -> Coordinates | None:
        """Return the places of a convolution, pool or interpolation of a tensor `(N, C, H, W)` of the given size."""
        image = places.image.flatten(1)
        low, high = image.nan_to_num(torch.inf).amin(1), image.nan_to_num(-torch.inf).amax(1)  # NaN: padding
        if len(output) != self.n or len(image) != self.n or not torch.equal(low, high):
            return None
        if any(places is grid for grid in self._grids.values()):
            return self.fresh_grid(*output.shape[2:])
        if size[2:] == output.shape[2:]:
            return self._mean_of_channels(places)
        if spans(line_along(places.row, 2), self.height) and spans(line_along(places.column, 3), self.width):
            return self.fresh_grid(*output.shape[2:])
        nowhere = torch.full((1, 1, 1, 1), NOWHERE, device=self.device)
        return Coordinates(low[:, None, None, None], nowhere, nowhere)

    def _mean_of_channels(self, places: Coordinates) -> Coordinates:
        """Return the mean place along axis 1, of those channels that have a place."""
        low = Coordinates(*(c.nan_to_num(torch.inf).amin(1, keepdim=True) for c in places))
        high = Coordinates(*(c.nan_to_num(-torch.inf).amax(1, keepdim=True) for c in places))
        near = (high.row - low.row).abs() <= self.height * WITHOUT_ROOM  # infinite without a place
        near = near & ((high.column - low.column).abs() <= self.width * WITHOUT_ROOM)
        image = torch.where(low.image == high.image, low.image, NOWHERE)
        row, column = (torch.where(near, (a + b) / 2, NOWHERE) for a, b in zip(low[1:], high[1:], strict=True))
        return Coordinates(image, row, column)

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
            and all(equal(tensor._places, places) for tensor in known[1:])
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
            places = self._places_of(leaf)
            if places is None:
                return torch.full(leaf.shape, NOWHERE, device=leaf.device)
            return places[axis].expand(leaf.shape).clone() if func in WRITES else places[axis].expand(leaf.shape)

        moved = []
        for axis in range(3):
            axis_args, axis_kwargs = tree_map(lambda leaf, axis=axis: coordinate(axis, leaf), (args, kwargs))
            result = func(*axis_args, **axis_kwargs)
            result = axis_args[0] if result is None else result  # __setitem__
            moved.append([leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)])
        return [Coordinates(*axes).compact() for axes in zip(*moved, strict=True)]

    def _written(self, func: Callable, args: tuple, kwargs: dict) -> Coordinates | None:
        """Write the coordinates of what is written. Constants get the places of what they replace."""
        before = self._places_of(args[0])
        if all(self._places_of(leaf) is None for leaf in tree_flatten((args[1:], kwargs))[0]):
            return before
        (places,) = self._selected(func, args, kwargs)
        if args[0]._is_view() and hasattr(args[0]._base, "_places"):
            del args[0]._base._places
        return places if before is None else merged(places, before.expand(args[0].shape))

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

    def _product(self, func: Callable, args: Sequence) -> Coordinates | None:
        """Rows of a matrix product have the places of the first factor's rows, else columns those of the second's.

        If the sum is over the tokens of a window, as of the values of an attention, a row outside of the window has no
        place.
        """
        places = None if self._places_of(args[0]) is None else self._mean(self._places_of(args[0]), -1)
        second = self._places_of(args[2 if func is ATTENTION else 1])
        if second is None or func is LINEAR or second.row.dim() < 2:
            return places
        if func is not ATTENTION and (places is None or places.row.isnan().all()):
            return self._mean(second, -2)
        if places is None or all(coordinate.shape[-2] == 1 for coordinate in second):
            return places
        far = torch.zeros((), dtype=torch.bool, device=self.device)
        for axis, length in ((1, self.height), (2, self.width)):
            low, high = (second[axis].nan_to_num(c * torch.inf) for c in (1, -1))
            low, high = low.amin((-2, -1), keepdim=True), high.amax((-2, -1), keepdim=True)
            margin = 1 + (high - low) / 8
            outside = (places[axis] < low - margin) | (places[axis] > high + margin)
            far = far | (outside & (high - low < length / 2))
        row, column = (torch.where(far, NOWHERE, coordinate) for coordinate in places[1:])
        return places._replace(row=row, column=column)

    def _elementwise(self, known: list[Tensor], output: Tensor) -> Coordinates | None:
        """Keep the places of inputs of the output's shape, else of those that differ in the last axis or broadcast."""
        same = [tensor for tensor in known if tensor.shape == output.shape]
        if same:
            places = same[0]._places
            for tensor in same[1:]:
                places = self._common(places, tensor._places)
            return places
        for tensor in known:
            if tensor.dim() == output.dim() and tensor.shape[:-1] == output.shape[:-1]:
                return self._mean(tensor._places, -1)
        for tensor in known:
            if tensor.dim() == output.dim() and broadcasts(tensor._places, output.shape):
                return tensor._places
        return None

    def _common(self, places: Coordinates, others: Coordinates) -> Coordinates:
        """Return the places of a function of two tensors of one shape: those of the first, if both are near."""
        if equal(places, others):
            return places
        gaps = [(a - b).abs() for a, b in zip(places, others, strict=True)]  # NaN where one has no place
        far = (gaps[0] > 0) | (gaps[1] > self.height * WITHOUT_ROOM) | (gaps[2] > self.width * WITHOUT_ROOM)
        image, row, column = merged(places, others)
        row, column = (torch.where(far, NOWHERE, coordinate) for coordinate in (row, column))
        return Coordinates(image, row, column)

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
        image = without_repetition(places.image)
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
        places = Coordinates(*map(without_repetition, places))
        full = torch.broadcast_shapes(*(coordinate.shape for coordinate in places))
        free = tuple(axis for axis, size in enumerate(full) if size == 1)
        image, row, column = (coordinate.expand(full).flatten() for coordinate in places)
        placed = ~(image.isnan() | row.isnan() | column.isnan())
        rows, columns = row[placed].unique(), column[placed].unique()
        if len(rows) * len(columns) <= 1 or len(rows) * len(columns) * self.n > int(placed.sum()):
            return None
        size, lattice = zip(_lattice(rows, self.height, columns), _lattice(columns, self.width, rows), strict=True)
        cells = size[0] * size[1]
        index = placed.nonzero()[:, 0]
        cell = lattice[0][torch.searchsorted(rows, row[index])] * size[1]
        cell += lattice[1][torch.searchsorted(columns, column[index])]
        cell += image[index].long() * cells
        ordered = len(cell) == len(placed) == self.n * cells and bool((cell == index).all())
        return Grid(free, size, True, None, None) if ordered else Grid(free, size, False, index, cell)


def _rows_of_images(shape: torch.Size, n: int) -> Layout:
    """Split axis 0 into N blocks, the usual layout."""
    splits = len(shape) > 0 and shape[0] % n == 0
    return Layout(0 if splits else None, shape[0] // n if splits else 1, None)


def _lattice(values: Tensor, length: int, others: Tensor) -> tuple[int, Tensor]:
    """Return the number of cells in the whole image's height or width, and the cell of each of the sorted values.

    A single value has the spacing of the values along the other axis.
    """
    if spans(values, length):
        return len(values), torch.arange(len(values), device=values.device)
    spacing = (values if len(values) > 1 else others).diff().min().item()
    cells = min(length, max(1, round(length / spacing)))
    return cells, ((values + 0.5) / length * cells).long().clamp(0, cells - 1)
