"""What is done with the bias-gradients of a backward pass: their sums, the terms themselves, or the planes of a map."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bias_rules import ChannelBias
from operation_bias import BiasGradient
from places import Grid, Layout

PSI_EPS = 1e-6  # of psi's division, as published


def psi(terms: Tensor) -> Tensor:
    """Absolute values, rescaled to [0, 1] over each image's whole tensor: `(N, ...)` to the same shape."""
    absolute = terms.abs()
    axes = tuple(range(1, terms.dim()))
    return _rescaled(absolute, 1, absolute.amin(axes, keepdim=True), absolute.amax(axes, keepdim=True))


def _rescaled(sums: Tensor, count: int, low: Tensor, high: Tensor) -> Tensor:
    """Sums of `count` values, each rescaled from [low, high] to [0, 1]."""
    return (sums - count * low) / (high - low + PSI_EPS)


class Total:
    """The sum of all bias-gradients, for each image.

    Attributes:
        total: `(N,)`.
        splits: whether every bias-gradient could be split into images.
    """

    def __init__(self, images: Tensor) -> None:
        self.n = len(images)
        self.zeros = images.new_zeros(self.n, dtype=torch.promote_types(images.dtype, torch.float32))
        self.total = self.zeros.clone()
        self.splits = True

    def add(self, term: BiasGradient) -> None:
        """Take one bias-gradient."""
        rows = channel_rows(term, self.n)
        if rows is None:
            self.total += self.per_image(term.term(), term.layout)
        else:
            gradient, values, last = rows
            self.total += gradient.sum(1) @ values if last else gradient.sum(2) @ values

    def per_image(self, terms: Tensor, layout: Layout) -> Tensor:
        """Return the sum of `terms` over each image, `(N,)`."""
        if self.n == 1:
            return terms.sum(dtype=self.zeros.dtype).reshape(1)
        if layout.axis is None:
            self.splits = False
            return self.zeros
        blocks = terms.to(self.zeros.dtype).unflatten(layout.axis, (-1, self.n, layout.inner))
        return blocks.movedim(layout.axis + 1, 0).flatten(1).sum(1)


def channel_rows(term: BiasGradient, n: int) -> tuple[Tensor, Tensor, bool] | None:
    """Return the gradient of a bias with one value for each channel as a matrix for each image.

    Returns:
        The gradient, the bias's values `(C,)`, and whether the channels come last: `(N, places, C)`, else
        `(N, C, places)`. None for other biases.
    """
    gradient, bias, layout = term.gradient, term.bias, term.layout
    if not isinstance(bias, ChannelBias) or layout.axis != 0 or layout.inner * n != gradient.shape[0]:
        return None
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    last = bias.axis in (-1, gradient.dim() - 1)
    if not last and (layout.inner > 1 or bias.axis != 1):
        return None
    gradient = gradient.to(dtype)
    gradient = gradient.reshape(n, -1, gradient.shape[-1]) if last else gradient.flatten(2)
    return gradient, bias.values.to(dtype), last


class Terms(Total):
    """Every bias-gradient, with its layout, by its function's index in `ModuleNames.names`."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(images)
        self.terms: dict[int, tuple[Tensor, Layout]] = {}

    def add(self, term: BiasGradient) -> None:
        """Take one bias-gradient."""
        super().add(term)
        self.terms[term.name] = term.term(), term.layout


class SaliencySum(Total):
    """The sum over channels of psi(bias-gradient), one plane for each size of feature map.

    Bilinear upsampling is linear, and psi is elementwise once its two extrema are known. So the sums over channels and
    functions come first, and one plane for each size is upsampled instead of every channel of every function.

    Attributes:
        planes: `(N, rows, columns)` by (rows, columns).
        absolute: `(N,)`, the sum of the absolute bias-gradients.
        drawn: `(N,)`, the part of it that has a place in the image.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__(images)
        self.planes: dict[tuple[int, int], Tensor] = {}
        self.absolute, self.drawn = self.zeros.clone(), self.zeros.clone()

    def add(self, term: BiasGradient) -> None:
        """Take one bias-gradient."""
        grid = term.layout.grid
        rows = channel_rows(term, self.n)
        if rows is not None and (grid is None or _only_channels_are_free(grid, term)):
            self._add_channels(grid, *rows)
            return
        terms = term.term().to(self.zeros.dtype)
        self.total += self.per_image(terms, term.layout)
        absolute = terms.abs()
        sums = self.per_image(absolute, term.layout)
        self.absolute += sums
        if grid is not None:
            self._draw(grid, absolute)

    def _add_channels(self, grid: Grid | None, gradient: Tensor, values: Tensor, last: bool) -> None:
        """|g b| = |g| |b|: extrema and sums follow from |g|, without a tensor for the product."""
        places, scale = (1 if last else 2), values.abs()
        self.total += gradient.sum(places) @ values
        gradient = gradient.abs()
        sums = gradient @ scale if last else scale @ gradient  # (N, places)
        self.absolute += sums.sum(1)
        if grid is not None:
            low, high = (gradient.amin(places) * scale).amin(1), (gradient.amax(places) * scale).amax(1)
            self.drawn += sums.sum(1)
            self._add_plane(grid.size, _rescaled(sums, len(scale), low[:, None], high[:, None]))

    def _draw(self, grid: Grid, absolute: Tensor) -> None:
        """Rescale and add the terms of any grid."""
        if grid.free:
            low, high, sums = (reduce(grid.free) for reduce in (absolute.amin, absolute.amax, absolute.sum))
        else:
            low = high = sums = absolute
        count = absolute.numel() // max(1, sums.numel())
        if grid.ordered:
            low, high, sums = (values.reshape(self.n, -1) for values in (low, high, sums))
            self.drawn += sums.sum(1)
            low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
            self._add_plane(grid.size, _rescaled(sums, count, low, high))
            return
        cells = grid.size[0] * grid.size[1]
        owner = grid.cell // cells
        low, high, sums = (values.flatten()[grid.index] for values in (low, high, sums))
        self.drawn.index_add_(0, owner, sums)
        low = torch.full_like(self.zeros, torch.inf).scatter_reduce_(0, owner, low, "amin")
        high = self.zeros.scatter_reduce(0, owner, high, "amax")
        plane = self.zeros.new_zeros(self.n * cells)
        plane.index_add_(0, grid.cell, _rescaled(sums, count, low[owner], high[owner]))
        self._add_plane(grid.size, plane)

    def _add_plane(self, size: tuple[int, int], plane: Tensor) -> None:
        plane = plane.reshape(self.n, *size)
        self.planes[size] = self.planes[size] + plane if size in self.planes else plane

    def saliency(self, images: Tensor, input_gradient: Tensor) -> Tensor:
        """Return the maps `(N, 1, H, W)`."""
        saliency = psi(input_gradient * images).sum(dim=1, keepdim=True)
        for plane in self.planes.values():
            plane = plane[:, None].to(saliency.dtype)
            saliency += F.interpolate(plane, images.shape[-2:], mode="bilinear", align_corners=True)
        return saliency

    def drawn_share(self, images: Tensor, input_gradient: Tensor) -> Tensor:
        """Return the share of eq. 1's absolute terms that has a place in the image, `(N,)`. The pixels have one."""
        pixels = (input_gradient * images).abs().sum((1, 2, 3), dtype=self.zeros.dtype)
        whole = pixels + self.absolute
        return ((pixels + self.drawn) / whole.clamp(min=torch.finfo(whole.dtype).tiny)).clamp(max=1)  # rounding


def _only_channels_are_free(grid: Grid, term: BiasGradient) -> bool:
    shape = term.gradient.shape
    free = {axis for axis in grid.free if shape[axis] > 1}
    return grid.ordered and free <= {term.bias.axis % len(shape)}


def joined_terms(parts: list[tuple[int, dict[str, tuple[Tensor, Layout]]]]) -> dict[str, Tensor]:
    """Join the terms of several passes along their images.

    Args:
        parts: the number of images of each pass; and its terms, with their layouts, by name. A term that a pass lacks
            is 0 there.
    """
    joined = {}
    for name in dict.fromkeys(name for _, terms in parts for name in terms):
        layout = next(terms[name][1] for _, terms in parts if name in terms)
        axis = layout.axis or 0
        blocks = [_by_image(terms[name][0], axis, n, layout.inner) if name in terms else None for n, terms in parts]
        example = next(block for block in blocks if block is not None)
        for i, (n, _) in enumerate(parts):
            if blocks[i] is None:
                shape = list(example.shape)
                shape[axis + 1] = n
                blocks[i] = example.new_zeros(shape)
        joined[name] = torch.cat(blocks, axis + 1).flatten(axis, axis + 2)
    return joined


def _by_image(term: Tensor, axis: int, n: int, inner: int) -> Tensor:
    """Unfold the axis of the images into three, of which the second is the images."""
    return (
        term.reshape(1, 1, 1)
        if term.dim() == 0
        else term.unflatten(axis, (-1, n, term.shape[axis] // n if n == 1 else inner))
    )
