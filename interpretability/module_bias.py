"""The bias of any module: b_m = m(z) - Dm(z)[z], eq. 2 of `full_grad`, in closed form where there is one."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

CONVOLUTIONS = {
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
}  # fmt: skip
LINEARS = {nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear}
BATCH_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
# Dm(z)[z] = m(z): linear without a bias, or positively homogeneous (Euler's theorem). Nothing to record.
WITHOUT_BIAS = {
    nn.Identity, nn.Sequential, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.ChannelShuffle, nn.Fold, nn.Unfold, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
}  # fmt: skip
# Dm(z) is diagonal, so that Dm(z)[z] is one ordinary backward step.
ELEMENTWISE = {
    nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
    nn.Tanh, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Softsign, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink,
    nn.Threshold,
}  # fmt: skip


class Bias(NamedTuple):
    """b_m of eq. 2: one value a channel, `(C,)`, or of the whole output's shape; and where the channels are."""

    values: Tensor
    channel_axis: int

    def per_channel(self) -> bool:
        """Whether `values` is one value a channel."""
        return self.values.dim() == 1

    def times(self, gradient: Tensor) -> Tensor:
        """The bias-gradient, in the shape of the module's output."""
        if not self.per_channel():
            return gradient * self.values
        shape = [1] * gradient.dim()
        shape[self.channel_axis] = -1
        return gradient * self.values.view(shape)


def module_bias(module: nn.Module, args: tuple, kwargs: dict, outputs: list[Tensor]) -> list[Bias | None]:
    """b_m for each tensor that a run of the module gave (eq. 2), in closed form where there is one.

    Args:
        module: in evaluation mode.
        args: what it was called with; tensors that the image reaches require gradients.
        kwargs: the same by name.
        outputs: the floating-point tensors that it returned.

    Returns:
        For each output its bias, or None where that is 0.
    """
    kind = type(module)
    if kind in WITHOUT_BIAS or not outputs:
        return [None] * len(outputs)
    reached = any(z.requires_grad for z in float_tensors((args, kwargs)))
    if not reached:  # nothing of the image comes here: all of the output is bias
        return [Bias(output.detach(), 1) for output in outputs]
    if kind in CONVOLUTIONS:
        return [_channel_bias(module.bias, 1)]
    if kind in LINEARS:
        return [_channel_bias(module.bias, -1)]
    if kind in BATCH_NORMS and module.running_mean is not None:
        return [_channel_bias(_batch_norm_bias(module), 1)]
    if kind in ELEMENTWISE and len(args) == 1 and not kwargs:
        values = [_elementwise_bias(module, args[0])]
    else:
        values = _implicit_bias(module, args, kwargs)
    axis = channel_axis_of(module, args, outputs[0])
    return [Bias(value, axis) if value.any() else None for value in values]


def _channel_bias(values: Tensor | None, axis: int) -> Bias | None:
    return None if values is None else Bias(values.detach(), axis)


def _batch_norm_bias(norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """The bias of z -> gamma * (z - mean) / sqrt(var + eps) + beta, `(C,)`."""
    bias = -norm.running_mean * torch.rsqrt(norm.running_var + norm.eps)
    return torch.addcmul(norm.bias, norm.weight, bias) if norm.affine else bias


def _elementwise_bias(module: nn.Module, z: Tensor) -> Tensor:
    """m(z) - m'(z) z: the Jacobian is diagonal, so the backward step along z gives m'(z) z."""
    z = z.detach().requires_grad_()
    value = module.forward(z)
    (along,) = torch.autograd.grad(value, z, z.detach())
    return _without_rounding(value.detach(), along)


def _implicit_bias(module: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    """m(z) - Dm(z)[z] by forward-mode differentiation, over all tensors that the image reaches."""
    leaves, layout = tree_flatten((args, kwargs))
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, tensor in zip(moving, tensors, strict=True):
            filled[i] = tensor
        positional, named = tree_unflatten(filled, layout)
        return tuple(float_tensors(module.forward(*positional, **named)))

    z = tuple(leaves[i].detach() for i in moving)
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # the fused kernels have no forward mode
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # of torch by torch
        try:
            values, along = torch.func.jvp(run, z, z)
        except (
            RuntimeError,
            NotImplementedError,
        ):  # autograd functions that define no forward mode: two backward steps
            values, along = torch.autograd.functional.jvp(run, z, z)
    return [_without_rounding(value.detach(), tangent.detach()) for value, tangent in zip(values, along, strict=True)]


def _without_rounding(value: Tensor, along: Tensor) -> Tensor:
    """`value - along`; exactly 0 for images where that is rounding only, which psi would blow up to [0, 1]."""
    bias = value - along
    dims = tuple(range(1, bias.dim()))
    noise = 32 * torch.finfo(value.dtype).eps * value.abs().amax(dims, keepdim=True)
    return bias * (bias.abs().amax(dims, keepdim=True) > noise)


def float_tensors(tree: object) -> list[Tensor]:
    """The floating-point tensors in arguments or results, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def channel_axis_of(module: nn.Module, args: tuple, output: Tensor) -> int:
    """Where a module's 4-D output has its channels: 1, or -1 in networks that compute channels last (ConvNeXt, Swin).

    Linear and LayerNorm act on the last axis; what follows them keeps their layout as long as it gets their output
    directly.
    """
    if isinstance(module, nn.LayerNorm):
        channels = module.normalized_shape[-1]
        if output.shape[-1] != channels or (output.shape[1] == channels and type(module) is not nn.LayerNorm):
            return 1  # subclasses that permute, such as torchvision's LayerNorm2d
        return -1
    return -1 if args and getattr(args[0], "_channels_are_last", False) else 1
