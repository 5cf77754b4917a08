"""FullGrad saliency (Srinivas and Fleuret 2019), exact on networks with any order of execution.

A network of affine and piecewise-linear modules gives, at every image x, exactly

    f(x) = grad_x f . x  +  sum over modules m of  (grad of f at the output of m) . b_m                          (1)

with b_m the module's bias. FullGrad draws both parts: what the pixels carry, and what the biases carry at each place
of each feature map. Here one rule gives b_m for every module, z -> m(z):

    b_m = m(z) - Dm(z)[z]                                                                                        (2)

It is the bias of a convolution, beta - gamma * mean / sqrt(var + eps) of a BatchNorm, 0 of a ReLU or a pool, and the
implicit bias of whatever is smooth (SiLU, GELU, LayerNorm, a squeeze-and-excitation gate). So (1) also holds where a
network has no explicit biases, and `completeness_error` measures how well.

    explainer = FullGrad(model)
    maps = explainer.saliency(images)                         # (N, 1, H, W), for the largest logit of each image
    maps = explainer.saliency(images, target=7)
    input_gradient, bias_gradients = explainer.decompose(images)
    errors = explainer.completeness_error(images)             # (N,), about 1e-6 in float32

To teach it about a module that multiplies branches of its own, pass `composites=(*COMPOSITES, MyGate)`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from module_bias import (
    BATCH_NORMS,
    CONVOLUTIONS,
    LINEARS,
    WITHOUT_BIAS,
    Bias,
    channel_axis_of,
    float_tensors,
    module_bias,
)
from s3net_common.errors import InputError

# Modules with children that are one unit of eq. 2, since they multiply their own branches or never call their
# children: classes, or the names of classes (so that timm need not be installed).
COMPOSITES: tuple[type | str, ...] = (
    "SqueezeExcitation",  # torchvision
    "SqueezeExcite",  # timm, in MobileNets, EfficientNets and GhostNets
    "SEModule",
    "EffectiveSEModule",
    "MultiheadAttention",  # torch.nn
    "ShiftedWindowAttention",  # torchvision's Swin transformers
    "ShiftedWindowAttentionV2",
    "Attention",  # timm's vision transformers
    "WindowAttention",
    nn.modules.conv._ConvNd,  # subclasses with children, such as a padding or an activation, also run their own
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
)

INCOMPLETE = 1e-3  # relative error of eq. 1 from which `saliency` warns
PSI_EPS = 1e-6  # of psi's division, as published


class IncompleteWarning(UserWarning):
    """Eq. 1 does not hold on a network, so its maps leave something out."""


class Explanation(NamedTuple):
    """What one pass gives for N images and K targets each.

    Attributes:
        maps: `(N, K, H, W)` saliency, not negative, not normalised.
        logits: `(N, classes)`.
        target: `(N, K)` the explained classes.
        completeness_error: `(N, K)` `|f(x) - right side of eq. 1|`, relative to the image's largest absolute logit.
    """

    maps: Tensor
    logits: Tensor
    target: Tensor
    completeness_error: Tensor


class FullGrad:
    """FullGrad of a classifier that maps images `(N, C, H, W)` to logits `(N, classes)`.

    The model runs in evaluation mode and is handed back as it was: mode, hooks, `inplace` flags, `requires_grad` and
    gradients, also after an exception.

    Args:
        model: any `nn.Module`; its parameters and the images are on one device.
        batch_size: images a pass, which bounds the memory however many images come.
        composites: classes (or their names) whose instances are one unit of eq. 2.
    """

    def __init__(self, model: nn.Module, batch_size: int = 16, composites: Sequence[type | str] = COMPOSITES) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: give 1 or more")
        self.model = model
        self.batch_size = batch_size
        self.composites = tuple(composites)
        self._checked = False

    def saliency(self, images: Tensor, target: int | Tensor | None = None) -> Tensor:
        """Saliency maps `(N, 1, H, W)`, not negative: the larger, the more the pixel's place matters.

        Args:
            images: `(N, C, H, W)`, normalised as the model expects.
            target: the class to explain: None for each image's largest logit, one class for all images, `(N,)`
                classes, or `(N, K)` for K maps an image, which come back as `(N, K, H, W)`.

        Raises:
            InputError: images, target or the model's output have another shape, or a class is out of range.

        Warns once if eq. 1 misses by more than 0.1 % on this network, with the figure.
        """
        return self.explain(images, target).maps

    def explain(self, images: Tensor, target: int | Tensor | None = None) -> Explanation:
        """As `saliency`, with the logits, the classes and the completeness errors of the same pass."""
        parts = []
        for chunk in self._passes(images, target, _SaliencySum):
            maps = [sink.saliency(chunk.images, gradient) for sink, gradient in chunk.results]
            parts.append(Explanation(torch.cat(maps, dim=1), chunk.logits, chunk.target, chunk.completeness_error()))
        explanation = Explanation(*(torch.cat(values) for values in zip(*parts, strict=True)))
        self._warn_if_incomplete(explanation.completeness_error)
        return explanation

    def decompose(self, images: Tensor, target: int | Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms of eq. 1, for one class an image.

        Args:
            images: `(N, C, H, W)`.
            target: None, one class, or `(N,)` classes.

        Returns:
            `grad_x f` as `(N, C, H, W)`, and the bias-gradients `(grad of f at m's output) * b_m` by module name, in
            the shape of the module's output. A module's second and later runs are named `name#2`, `name#3`, ...
            Modules whose b_m is 0 by their kind (ReLU, pools, convolutions without a bias) are left out.

        Raises:
            InputError: as `saliency`.
        """
        if isinstance(target, Tensor) and target.dim() > 1:
            raise InputError("decompose takes one class an image: call it once for each")
        gradients, terms = [], {}
        for chunk in self._passes(images, target, _Terms):
            sink, gradient = chunk.results[0]
            done = sum(map(len, gradients))
            gradients.append(gradient)
            for name, term in sink.terms.items():  # a ReLU6 that no image saturates has no term in one pass
                whole = terms.setdefault(name, term.new_zeros(len(images), *term.shape[1:]))
                whole[done : done + len(term)] = term
        return torch.cat(gradients), terms

    def completeness_error(self, images: Tensor, target: int | Tensor | None = None) -> Tensor:
        """By how much eq. 1 misses `f(x)`, relative to the image's largest absolute logit: `(N,)` (`(N, K)` for K)."""
        errors = torch.cat([chunk.completeness_error() for chunk in self._passes(images, target, _Total)])
        return errors if isinstance(target, Tensor) and target.dim() == 2 else errors[:, 0]

    def _passes(self, images: Tensor, target: int | Tensor | None, sink: type["_Total"]) -> Iterator["_Pass"]:
        """Forward and backward, `batch_size` images at a time."""
        if images.dim() != 4 or len(images) == 0:
            raise InputError(f"images have shape {tuple(images.shape)}: give (N, channels, height, width), N above 0")
        columns = _target_columns(target, len(images))
        for start in range(0, len(images), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            yield self._pass(images[chosen], None if columns is None else columns[chosen], sink)

    def _pass(self, images: Tensor, target: Tensor | None, sink: type["_Total"]) -> "_Pass":
        with torch.inference_mode(False), torch.enable_grad(), _recorded(self.model, self.composites) as recording:
            images = images.detach().clone()
            x = images.clone().requires_grad_()
            logits = self.model(x)
            if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
                shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise InputError(f"the model gave {shape}: FullGrad explains logits of shape (N, classes)")
            target = _check_classes(target, logits)
            results = []
            for column in target.unbind(dim=1):
                recording.sink = sink(images)
                f = logits.gather(1, column[:, None]).sum()  # images do not interact: one backward pass serves all
                gradient = recording.backward(f, x, keep=len(results) + 1 < target.shape[1])
                results.append((recording.sink, gradient))
        return _Pass(images, logits.detach(), target, results)

    def _warn_if_incomplete(self, errors: Tensor) -> None:
        if not self._checked and not (errors <= INCOMPLETE).all():
            warnings.warn(
                f"FullGrad is not complete on this network: its terms miss the output by {errors.max():.2g} of it, so "
                "the maps leave something out. The network multiplies activations outside any module, or calls "
                "smooth functions of torch.nn.functional; if one module does it, pass FullGrad its class in composites",
                IncompleteWarning,
                stacklevel=4,
            )
        self._checked = True


class _Pass(NamedTuple):
    images: Tensor
    logits: Tensor
    target: Tensor
    results: list[tuple["_Total", Tensor]]  # for each column of target: what the sink gathered, and grad_x f

    def completeness_error(self) -> Tensor:
        """`(N, K)`."""
        sums = [sink.total + (gradient * self.images).sum(dim=(1, 2, 3)) for sink, gradient in self.results]
        missed = (self.logits.gather(1, self.target) - torch.stack(sums, dim=1)).abs()
        return missed / self.logits.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(missed.dtype).tiny)


def _target_columns(target: int | Tensor | None, images: int) -> Tensor | None:
    """`(N, K)` classes, or None."""
    if target is None:
        return None
    target = torch.as_tensor(target)
    if target.is_floating_point() or target.dtype == torch.bool:
        raise InputError(f"target has type {target.dtype}: give whole class indices")
    if target.dim() == 0:
        target = target.expand(images)
    if target.dim() > 2 or len(target) != images:
        raise InputError(f"target has shape {tuple(target.shape)} for {images} images: give (N,) or (N, K)")
    return target.reshape(images, -1).long()


def _check_classes(target: Tensor | None, logits: Tensor) -> Tensor:
    classes = logits.shape[1]
    if target is None:
        return logits.detach().argmax(dim=1, keepdim=True)
    if target.shape[1] == 0:
        raise InputError("target names no class: give at least one")
    outside = target[(target < 0) | (target >= classes)]
    if len(outside):
        raise InputError(f"there is no class {outside[0].item()}: this network has the classes 0 to {classes - 1}")
    return target.to(logits.device)


# ---- What is done with a bias and the gradient at its place ---------------------------------------------------------


class _Total:
    """The sum of all bias-gradients, for each image."""

    def __init__(self, images: Tensor) -> None:
        self.total = images.new_zeros(len(images))

    def add(self, name: str, gradient: Tensor, bias: Bias) -> None:
        """Take one bias-gradient in."""
        if bias.per_channel():
            channels = gradient.movedim(bias.channel_axis, 1)  # (N, C) of a vector, else (N, C, places)
            self.total += (channels.flatten(2).sum(2) if channels.dim() > 2 else channels) @ bias.values
        else:
            self.total += (gradient * bias.values).flatten(1).sum(1)


class _Terms(_Total):
    """Every bias-gradient by its module's name."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(images)
        self.terms: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor, bias: Bias) -> None:
        self.terms[name] = bias.times(gradient)


class _SaliencySum(_Total):
    """The sum over channels of psi(bias-gradient), kept once for each size of feature map.

    Bilinear upsampling is linear and psi is elementwise once its two extrema are known; so the sums over channels and
    modules come first, and one plane for each size is upsampled instead of every channel of every module.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__(images)
        self.planes: dict[tuple[int, int], Tensor] = {}

    def add(self, name: str, gradient: Tensor, bias: Bias) -> None:
        super().add(name, gradient, bias)
        if gradient.dim() == 4:
            plane = _summed_psi(gradient, bias)
            size = (plane.shape[-2], plane.shape[-1])
            self.planes[size] = self.planes[size] + plane if size in self.planes else plane

    def saliency(self, images: Tensor, input_gradient: Tensor) -> Tensor:
        """`(N, 1, H, W)`."""
        saliency = psi(input_gradient * images).sum(dim=1, keepdim=True)
        for plane in self.planes.values():
            saliency += F.interpolate(plane[:, None], images.shape[-2:], mode="bilinear", align_corners=True)
        return saliency


def psi(terms: Tensor) -> Tensor:
    """Absolute values, rescaled to [0, 1] over each image's whole tensor: `(N, ...)` to the same shape."""
    absolute = terms.abs()
    dims = tuple(range(1, terms.dim()))
    shifted = absolute - absolute.amin(dims, keepdim=True)
    return shifted / (shifted.amax(dims, keepdim=True) + PSI_EPS)


def _summed_psi(gradient: Tensor, bias: Bias) -> Tensor:
    """`psi(bias.times(gradient)).sum(over channels)` of an `(N, C, H, W)` (or channels-last) gradient: `(N, H, W)`."""
    if not bias.per_channel():
        return psi(bias.times(gradient)).sum(dim=bias.channel_axis)
    # |g b| = |g| |b|: extrema and sum follow from |g|, without a tensor for the product.
    rows = gradient.abs().movedim(bias.channel_axis, 1).flatten(2)  # (N, C, H * W)
    scale = bias.values.abs()
    lowest = (rows.amin(2) * scale).amin(1)[:, None]
    highest = (rows.amax(2) * scale).amax(1)[:, None]
    summed = ((scale @ rows) - len(scale) * lowest) / (highest - lowest + PSI_EPS)
    return summed.unflatten(1, gradient.movedim(bias.channel_axis, 1).shape[2:])


# ---- Recording a pass ------------------------------------------------------------------------------------------------


class _Recording:
    """Hooks every unit of a model: at its forward run it notes b_m, and at its output's gradient it calls the sink.

    The gradient is taken by a hook on the output tensor, which sees the right one even if the next operation
    overwrites the tensor in place (a module's backward hooks do not).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sink: _Total | None = None
        self.runs: dict[str, int] = {}
        self.constants: list[Tensor] = []

    def hook(self, name: str) -> Callable:
        """The forward hook of the unit of that name."""

        def after_forward(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            self.record(name, module, args, kwargs, output)

        return after_forward

    def record(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        """Note b_m of this run of the module."""
        run = self.runs[name] = self.runs.get(name, 0) + 1
        if run > 1:
            name = f"{name}#{run}"
        outputs = float_tensors(output)
        for i, (tensor, bias) in enumerate(zip(outputs, module_bias(module, args, kwargs, outputs), strict=True)):
            if bias is not None:
                self._watch(name if i == 0 else f"{name}[{i}]", tensor, bias)
        if outputs and outputs[0].dim() == 4:
            last = type(module) in LINEARS or channel_axis_of(module, args, outputs[0]) == -1
            outputs[0]._channels_are_last = last and type(module) not in CONVOLUTIONS

    def _watch(self, name: str, tensor: Tensor, bias: Bias) -> None:
        if not tensor.requires_grad:
            self.constants.append(tensor.requires_grad_())
        tensor.register_hook(lambda gradient: self._receive(name, gradient, bias))

    @torch.no_grad()
    def _receive(self, name: str, gradient: Tensor, bias: Bias) -> None:
        self.sink.add(name, gradient, bias)

    def backward(self, f: Tensor, x: Tensor, keep: bool) -> Tensor:
        """`grad_x f`, feeding the sink on the way."""
        gradient = None
        if f.requires_grad:
            inputs = [x, *self.constants]
            gradient = torch.autograd.grad(f, inputs, retain_graph=keep, allow_unused=True)[0]
        return torch.zeros_like(x) if gradient is None else gradient.detach()


@contextmanager
def _recorded(model: nn.Module, composites: tuple[type | str, ...]) -> Iterator[_Recording]:
    """The model in evaluation mode with a recording on it; on leaving, the model is as it was."""
    recording = _Recording(model)
    modules = list(model.modules())
    modes = [module.training for module in modules]
    parameters = list(model.parameters())
    wanted = [parameter.requires_grad for parameter in parameters]
    with ExitStack() as undo:
        undo.callback(_set_attributes, modules, "training", modes)
        undo.callback(_set_requires_grad, parameters, wanted)
        model.eval()
        _set_requires_grad(parameters, [False] * len(parameters))  # only grad_x is needed: half of a backward pass
        closed_form = WITHOUT_BIAS | CONVOLUTIONS | LINEARS | BATCH_NORMS
        for name, unit in _units(model, composites):
            if type(unit) not in closed_form:
                _keep_inputs(unit, undo)
            handle = unit.register_forward_hook(recording.hook(name), with_kwargs=True)
            undo.callback(handle.remove)
        for name, module in model.named_modules():
            _record_input_transform(name, module, recording, undo)
        yield recording


def _units(model: nn.Module, composites: tuple[type | str, ...]) -> list[tuple[str, nn.Module]]:
    """The modules that eq. 2 is applied to, by name: composites, and leaves outside of them."""
    classes = tuple(kind for kind in composites if isinstance(kind, type))
    names = {kind for kind in composites if isinstance(kind, str)}
    units, seen = [], set()

    def walk(name: str, module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        children = list(module.named_children())
        if not children or isinstance(module, classes) or names & {kind.__name__ for kind in type(module).__mro__}:
            units.append((name, module))
            return
        for child_name, child in children:
            walk(f"{name}.{child_name}" if name else child_name, child)

    walk("", model)
    return units


def _keep_inputs(unit: nn.Module, undo: ExitStack) -> None:
    """A unit that is run again for eq. 2 must still have its input: no writing over it."""
    inplace = [module for module in unit.modules() if getattr(module, "inplace", False) is True]
    undo.callback(_set_attributes, inplace, "inplace", [True] * len(inplace))
    _set_attributes(inplace, "inplace", [False] * len(inplace))


def _record_input_transform(name: str, module: nn.Module, recording: _Recording, undo: ExitStack) -> None:
    """GoogLeNet and Inception of torchvision shift their input in a method, with constants that are in no module."""
    if not (getattr(module, "transform_input", False) is True and hasattr(module, "_transform_input")):
        return
    method = module._transform_input
    undo.callback(module.__dict__.pop, "_transform_input")

    class Transform(nn.Module):
        forward = staticmethod(method)

    def transform(x: Tensor) -> Tensor:
        output = method(x)
        recording.record(f"{name}.transform_input".lstrip("."), Transform(), (x,), {}, output)
        return output

    module.__dict__["_transform_input"] = transform


def _set_attributes(modules: Sequence[nn.Module], attribute: str, values: Sequence[bool]) -> None:
    for module, value in zip(modules, values, strict=True):
        setattr(module, attribute, value)


def _set_requires_grad(parameters: Sequence[nn.Parameter], values: Sequence[bool]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.requires_grad_(value)
