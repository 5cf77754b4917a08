"""Run a training script of commit 24c20f8 with its bfloat16 convolutions computed in float32, on a CPU.

    PYTHONPATH=CLONE python float32_convolutions.py CLONE/generalizability/train_s3net.py --amp --resume --out RUN

On a processor without bfloat16 instructions, this is faster than PyTorch's bfloat16 convolutions. The numbers are the
same but for the rounding of few values: operands are rounded to bfloat16, products are summed in float32, and each
result is rounded to bfloat16 once. NOTE.txt of a run says which epochs were computed like this.
"""

import runpy
import sys
from pathlib import Path

import cpu_kernels
import torch
import torch.nn.functional as F
from torch import Tensor

aten, conv2d = torch.ops.aten, F.conv2d


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *settings: object) -> tuple[Tensor | None, ...]:
    """Gradients as `aten.convolution_backward` gives them, for bfloat16 by way of float32."""
    if x.dtype != torch.bfloat16:
        return aten.convolution_backward(grad, x, weight, *settings)
    grads = aten.convolution_backward(grad.float(), x.float(), weight.float(), *settings)
    return tuple(None if g is None else g.bfloat16() for g in grads)


class Convolution(torch.autograd.Function):
    """A convolution of bfloat16 tensors without bias; the settings are stride, padding, dilation and groups."""

    @staticmethod
    def forward(ctx, x, weight, *settings):
        ctx.save_for_backward(x, weight)
        ctx.settings = [[v] * 2 if isinstance(v, int) else list(v) for v in settings[:3]], settings[3]
        return conv2d(x.float(), weight.float(), None, *settings).bfloat16()

    @staticmethod
    def backward(ctx, grad):
        (stride, padding, dilation), groups = ctx.settings
        mask = [*ctx.needs_input_grad[:2], False]
        settings = (None, stride, padding, dilation, False, [0, 0], groups, mask)
        return *convolution_backward(grad, *ctx.saved_tensors, *settings)[:2], None, None, None, None


def mixed_conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """`F.conv2d`; under autocast and for bfloat16 tensors by way of float32, if there is no bias."""
    settings = (stride, padding, dilation, groups)
    if bias is not None or not (torch.is_autocast_enabled("cpu") or x.dtype == torch.bfloat16):
        return conv2d(x, weight, bias, *settings)
    x, weight = x.bfloat16(), weight.bfloat16()
    with torch.autocast("cpu", enabled=False):
        return Convolution.apply(x, weight, *settings)


class Operators:
    """PyTorch's operators, with the `convolution_backward` above."""

    convolution_backward = staticmethod(convolution_backward)

    def __getattr__(self, name: str) -> object:
        return getattr(aten, name)


if __name__ == "__main__":
    F.conv2d, cpu_kernels.aten = mixed_conv2d, Operators()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
