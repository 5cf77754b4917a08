"""Lipschitz constants along the graph of a network: from the input to each layer, and from each layer to the logits.

The network's own code runs on `Bound` objects instead of images. A bound carries, for the input and for each layer so
far, how much a change there can be amplified (in the Euclidean norm) up to this place. Convolutions and matrices
multiply it by their spectral norm, sums add, concatenations take the root of the sum of squares, and a ReLU keeps it.

A BatchNorm in evaluation mode scales each channel. A ReLU lets a scale pass, so the scale is folded into the next
convolution; at a sum it is folded into the convolution before. Shifts and biases do not change a Lipschitz constant.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POWER_ITERATIONS = 30


@dataclass
class LinearLayer:
    """A convolution or matrix with BatchNorm's scales folded in.

    Attributes:
        spectral_norm: the largest factor by which it can lengthen its input.
        norm_2_1: sum over its outputs of the Euclidean norms of their weights.
        from_input: Lipschitz constant from the network's input to the layer's input.
        to_logits: Lipschitz constant from the layer's output to the logits.
    """

    spectral_norm: float
    norm_2_1: float
    from_input: float
    to_logits: float = 0.0


@dataclass
class Bound:
    """What stands for a batch of feature maps: their shape, and how much changes before them are amplified.

    Attributes:
        shape: `(1, C, H, W)` or `(1, C)`.
        factors: Lipschitz constant from the input (key -1) and from the output of each layer (its index).
        scale: BatchNorm's factor of each channel that is not folded in yet, `(C,)`; None for 1.
        layers: all layers so far, shared by all bounds of a network.
        rebuild: makes the layer that gave this output anew with scaled outputs, if nothing else has read it.
    """

    shape: tuple[int, ...]
    factors: dict[int, float]
    layers: list[LinearLayer]
    scale: Tensor | None = None
    rebuild: Callable[[Tensor], "Bound"] | None = field(default=None, repr=False)
    device = torch.device("cpu")
    dtype = torch.float32

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> int | tuple[int, ...]:
        """Return the shape, or one of its numbers."""
        return self.shape if dim is None else self.shape[dim]

    def mean(self, dim: tuple[int, ...]) -> "Bound":
        """Average over the pixels: the average of n numbers changes by at most their change divided by sqrt(n)."""
        assert tuple(dim) == (2, 3)
        return self.times(1 / math.sqrt(math.prod(self.shape[2:])), self.shape[:2])

    def flatten(self, start_dim: int = 0) -> "Bound":
        """Return the bound as vectors, if there is one pixel only."""
        assert start_dim == 1 and self.shape[2:] in ((), (1, 1))
        return self.times(1.0, self.shape[:2])

    def times(self, factor: float, shape: tuple[int, ...]) -> "Bound":
        """Return the bound of a linear map that acts on every channel alike, with this norm."""
        factors = {layer: value * factor for layer, value in self.factors.items()}
        return Bound(shape, factors, self.layers, self.scale)

    def settled(self) -> "Bound":
        """Return the bound with its scale folded into the layer before, or applied as a diagonal map."""
        if self.scale is None:
            return self
        if self.rebuild is not None:
            return self.rebuild(self.scale)
        return Bound(self.shape, self.times(float(self.scale.max()), self.shape).factors, self.layers)

    def __getitem__(self, index: tuple[slice, ...]) -> "Bound":
        """Leave out rows and columns of pixels, which lengthens no change."""
        channels, rows, columns = index[1:]
        assert index[0] == channels == slice(None)
        height, width = (len(range(*part.indices(n))) for part, n in zip((rows, columns), self.shape[2:], strict=True))
        return self.times(1.0, (*self.shape[:2], height, width))

    def __add__(self, other: "Bound") -> "Bound":
        first, second = self.settled(), other.settled()
        keys = first.factors.keys() | second.factors.keys()
        factors = {key: first.factors.get(key, 0.0) + second.factors.get(key, 0.0) for key in keys}
        return Bound(first.shape, factors, self.layers)

    __iadd__ = __add__

    @classmethod
    def __torch_function__(cls, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        if function not in RULES:
            raise NotImplementedError(f"no Lipschitz constant is known for {getattr(function, '__name__', function)}")
        return RULES[function](*args, **(kwargs or {}))


# ---- Rules --------------------------------------------------------------------------------------------------------


def _linear_map(x: Bound, weight: Tensor, shape: tuple[int, ...], apply: Callable[[Tensor, Tensor], Tensor]) -> Bound:
    """Return the bound after a layer, and record the layer. `apply(x, weight)` computes it."""
    if x.scale is not None:
        weight = weight * x.scale.view(1, -1, *[1] * (weight.dim() - 2))

    def build(weight: Tensor) -> Bound:
        norm = spectral_norm(lambda v: apply(v, weight), x.shape)
        outputs = math.prod(shape[2:])
        norm_2_1 = outputs * float(weight.flatten(1).norm(dim=1).sum())
        factors = {layer: value * norm for layer, value in x.factors.items()} | {len(x.layers): 1.0}
        x.layers.append(LinearLayer(norm, norm_2_1, x.factors[-1]))
        return Bound(shape, factors, x.layers)

    result = build(weight)
    index = len(x.layers) - 1

    def rebuild(scale: Tensor) -> Bound:
        x.layers[index].norm_2_1 = 0.0  # replaced: it is part of no path
        return build(weight * scale.view(-1, *[1] * (weight.dim() - 1)))

    result.rebuild = rebuild
    return result


def _conv2d(x: Bound, weight: Tensor, bias: None, stride, padding, dilation, groups) -> Bound:
    def apply(v: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(v, w, None, stride, padding, dilation, groups)

    with torch.device("meta"):
        shape = apply(torch.empty(x.shape), torch.empty(weight.shape)).shape
    return _linear_map(x, weight.detach(), tuple(shape), apply)


def _linear(x: Bound, weight: Tensor, bias: Tensor | None = None) -> Bound:
    return _linear_map(x, weight.detach(), (1, weight.shape[0]), lambda v, w: F.linear(v, w))


def _batch_norm(x: Bound, mean, variance, weight, bias, training, momentum, eps) -> Bound:
    assert not training, "the network has to be in evaluation mode"
    scale = (weight / torch.sqrt(variance + eps)).detach().abs()
    scale = scale if x.scale is None else scale * x.scale
    return Bound(x.shape, x.factors, x.layers, scale, x.rebuild)


def _relu(x: Bound, inplace: bool = False) -> Bound:
    return Bound(x.shape, x.factors, x.layers, x.scale)


def _avg_pool2d(x: Bound, size: int, *args, **kwargs) -> Bound:
    assert not args and not kwargs
    return x.times(1 / size, (*x.shape[:2], x.shape[2] // size, x.shape[3] // size))


def _pad(x: Bound, padding: tuple[int, ...], mode: str = "constant", value: float | None = None) -> Bound:
    """Return the bound with zero channels after the others."""
    assert (*padding[:5], mode, value or 0) == (0, 0, 0, 0, 0, "constant", 0)
    scale = None if x.scale is None else torch.cat([x.scale, torch.ones(padding[5])])
    return Bound((1, x.shape[1] + padding[5], *x.shape[2:]), x.factors, x.layers, scale)


def _adaptive_avg_pool2d(x: Bound, size: int | tuple[int, int]) -> Bound:
    assert size in (1, (1, 1))
    return x.times(1 / math.sqrt(math.prod(x.shape[2:])), (*x.shape[:2], 1, 1))


def _cat(bounds: list[Bound], dim: int) -> Bound:
    assert dim == 1
    channels = sum(b.shape[1] for b in bounds)
    scale = None
    if any(b.scale is not None for b in bounds):
        scale = torch.cat([torch.ones(b.shape[1]) if b.scale is None else b.scale for b in bounds])
    keys = set().union(*(b.factors for b in bounds))
    factors = {key: math.sqrt(sum(b.factors.get(key, 0.0) ** 2 for b in bounds)) for key in keys}
    return Bound((1, channels, *bounds[0].shape[2:]), factors, bounds[0].layers, scale)


RULES = {
    F.conv2d: _conv2d,
    torch.conv2d: _conv2d,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.relu: _relu,
    torch.relu: _relu,
    F.avg_pool2d: _avg_pool2d,
    F.pad: _pad,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    torch.cat: _cat,
    torch.flatten: lambda x, start_dim=0: x.flatten(start_dim),
}


def spectral_norm(apply: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
    """Return the norm of a linear map of tensors of a shape, by power iteration (a lower bound that converges)."""
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    norm = 0.0
    for _ in range(POWER_ITERATIONS):
        with torch.no_grad():
            v /= v.norm()
        with torch.enable_grad():
            output = apply(v)
            (gradient,) = torch.autograd.grad(output, v, output)
        norm = float(output.detach().norm())
        v = gradient.detach().requires_grad_()
    return norm


# ---- A network ----------------------------------------------------------------------------------------------------


def linear_layers(model: nn.Module, image_size: int) -> tuple[list[LinearLayer], float]:
    """Return the layers of a network for images `(3, image_size, image_size)`, and its Lipschitz constant.

    The network's operations have to be among `RULES`.

    Raises:
        NotImplementedError: another operation, which the message names.
    """
    model.eval()
    layers: list[LinearLayer] = []
    logits = model(Bound((1, 3, image_size, image_size), {-1: 1.0}, layers)).settled()
    for index, layer in enumerate(layers):
        layer.to_logits = logits.factors.get(index, 0.0)
    return [layer for layer in layers if layer.norm_2_1], logits.factors[-1]


def spectral_complexity(layers: list[LinearLayer]) -> float:
    """Return R of Bartlett, Foster and Telgarsky (2017), eq. (1.2), for a graph of layers, with reference matrices 0.

    For a chain this is their product of spectral norms times (sum (|A|_{2,1} / |A|_2)^(2/3))^(3/2). For a graph, the
    product without a layer's own norm becomes the product of the Lipschitz constants before and after the layer.
    """
    return sum((layer.from_input * layer.norm_2_1 * layer.to_logits) ** (2 / 3) for layer in layers) ** 1.5
