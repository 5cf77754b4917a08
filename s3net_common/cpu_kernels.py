"""BatchNorm -> ReLU -> (average pool) -> convolution as one operation that trains fast on a CPU.

The networks of this repository consist of such units on tensors with few channels (12 in the paper's smallest
network). Most of the time is then spent in BatchNorm, not in the convolutions: PyTorch's channels-last BatchNorm
vectorises over the channels, and 12 channels fill a fraction of a vector register. These kernels read a channels-last
image as a matrix whose rows hold R pixels each, `(N*H*W / R, R*C)`, so that each pass uses full vector registers. Each
channel then has R partial statistics, which are combined into one. The output of the ReLU, half of what training would
keep in memory, is recomputed in the backward pass.

`models.py` calls `norm_relu_conv`, `norm_relu` and `concatenate`. On another device, in evaluation, under
`torch.compile` (which fuses equally well), under the transforms of `torch.func`, in forward-mode differentiation and
for other dtypes they are the plain PyTorch operations. PyTorch has no fused training kernel for this unit on a CPU.
These kernels need no compiler.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

aten = torch.ops.aten
CHANNELS_LAST = torch.channels_last
_kernels_allowed = True  # see plain_operations
ROW_WIDTH = 384  # target number of elements in a row: several vector registers, with statistics that fit the L1 cache


def norm_relu_conv(x: Tensor, norm: nn.BatchNorm2d, conv: nn.Conv2d, pool: int = 1) -> Tensor:
    """Compute `conv(avg_pool(relu(norm(x))))`, the unit of layers and transitions.

    Args:
        x: `(N, C, H, W)`.
        norm: a BatchNorm over the C channels, affine and with running statistics.
        conv: a convolution without bias, stride 1, padding `kernel_size // 2`.
        pool: size and stride of the average pool before the convolution; 1 for none.

    Returns:
        `(N, conv.out_channels, H // pool, W // pool)`.
    """
    if _use_kernel(x, norm):
        return _apply(x, norm, conv.weight, pool)
    x = F.relu(norm(x))
    return conv(F.avg_pool2d(x, pool) if pool > 1 else x)


def norm_relu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Compute `relu(norm(x))` for x of shape `(N, C, H, W)`."""
    return _apply(x, norm, None, 1) if _use_kernel(x, norm) else F.relu(norm(x))


def concatenate(tensors: list[Tensor], training: bool) -> Tensor:
    """Compute `torch.cat(tensors, dim=1)` of `(N, C_i, H, W)` tensors. In training, the gradients are contiguous.

    The gradients of `torch.cat` are strided views. Adding one to another gradient is slower than copying it first.
    """
    if training and tensors[0].device.type == "cpu" and _records_plain_gradients():
        return _Concatenate.apply(*tensors)
    return torch.cat(tensors, dim=1)


@contextmanager
def plain_operations() -> Iterator[None]:
    """Use PyTorch's operations instead of these kernels, in the whole process.

    They are faster for small inputs: by a factor of 2 for 20,000 elements, and up to about 300,000 elements.
    """
    global _kernels_allowed
    _kernels_allowed = False
    try:
        yield
    finally:
        _kernels_allowed = True


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory in the process instead of returning it to the system.

    By default every large tensor is new memory from the kernel, which clears each page at its first use. Returns
    whether the setting was changed (on Linux with glibc only). Calling this function twice is harmless.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, -1))


def _records_plain_gradients() -> bool:
    """Return whether autograd records the operations for one backward pass, all that the functions below support."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _is_batched(grad: Tensor) -> bool:
    """Return whether `vmap` calls the backward pass, as `torch.autograd.grad(..., is_grads_batched=True)` does."""
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad)


def _use_kernel(x: Tensor, norm: nn.BatchNorm2d) -> bool:
    return (
        _kernels_allowed
        and x.device.type == "cpu"
        and norm.training
        and _records_plain_gradients()
        and x.dtype in (torch.float32, torch.bfloat16)
        and type(norm) is nn.BatchNorm2d  # SyncBatchNorm and other variants keep their own arithmetic
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.weight.dtype == torch.float32
        and x.numel() > x.shape[1]  # else BatchNorm raises its error about one value per channel
    )


def _apply(x: Tensor, norm: nn.BatchNorm2d, conv_weight: Tensor | None, pool: int) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    norm.num_batches_tracked.add_(1)
    running = (norm.running_mean, norm.running_var, norm.momentum)
    return _NormReluConv.apply(x, norm.weight, norm.bias, norm.eps, running, conv_weight, pool)


class _NormReluConv(torch.autograd.Function):
    """Saves the input and the statistics. The backward pass recomputes everything else."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, running, conv_weight, pool):
        x = x.contiguous(memory_format=CHANNELS_LAST)
        mean, var = _batch_statistics(x)
        running_mean, running_var, momentum = running
        values = x.numel() // x.shape[1]
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (values / (values - 1)), momentum)
        invstd = torch.rsqrt(var + eps)

        y = _from_rows(_affine(_rows(x), weight * invstd, bias - weight * invstd * mean).relu_(), x)
        if conv_weight is None:
            ctx.save_for_backward(x, weight, bias, mean, invstd)
            return y
        if pool > 1:
            y = F.avg_pool2d(y, pool)
        conv_weight = conv_weight.to(x.dtype)
        ctx.pool = pool
        ctx.save_for_backward(x, weight, bias, mean, invstd, conv_weight, y if pool > 1 else None)
        return F.conv2d(y, conv_weight, padding=conv_weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() or _is_batched(grad):
            raise RuntimeError(
                "the CPU kernels have no second or batched derivatives: call eval() first, or use torch.func"
            )
        x, weight, bias, mean, invstd, *conv = ctx.saved_tensors
        grad = grad.contiguous(memory_format=CHANNELS_LAST)
        y = _from_rows(_affine(_rows(x), weight * invstd, bias - weight * invstd * mean), x)
        conv_weight_grad, pool = None, 1
        if conv:
            conv_weight, pooled = conv
            pool = ctx.pool
            padding = [conv_weight.shape[-1] // 2] * 2
            grad, conv_weight_grad, _ = aten.convolution_backward(
                grad, y.relu_() if pooled is None else pooled, conv_weight, None,
                [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False],
            )  # fmt: skip
            conv_weight_grad = conv_weight_grad.float()
            del pooled, conv
        grad = _pool_relu_backward(grad, y, pool)
        grad_x, grad_weight, grad_bias = _norm_backward(grad, x, weight, mean, invstd)
        return grad_x, grad_weight, grad_bias, None, None, conv_weight_grad, None


class _Concatenate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        ctx.channels = [t.shape[1] for t in tensors]
        return torch.cat(tensors, dim=1)

    @staticmethod
    def backward(ctx, grad):
        return tuple(part.contiguous(memory_format=CHANNELS_LAST) for part in grad.split(ctx.channels, dim=1))


def _rows(x: Tensor) -> Tensor:
    """View a channels-last `(N, C, H, W)` as `(N*H*W / R, R*C)` without a copy. R is a power of two."""
    channels, pixels, repeat = x.shape[1], x.numel() // x.shape[1], 1
    while 2 * repeat * channels <= ROW_WIDTH and pixels % (2 * repeat) == 0:
        repeat *= 2
    return x.permute(0, 2, 3, 1).reshape(-1, repeat * channels)


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    n, c, h, w = like.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


def _batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, float32 `(C,)`."""
    rows, channels = _rows(x), x.shape[1]
    unused = torch.zeros(2, rows.shape[1])  # float32 running statistics make the sums float32 too
    mean, var = torch.batch_norm_update_stats(rows, unused[0], unused[1], 0.0)
    mean, var = mean.view(-1, channels), var.view(-1, channels)
    return mean.mean(0), var.mean(0) + mean.var(0, unbiased=False)


def _affine(rows: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute `rows * scale + shift` with float32 coefficients `(C,)`, by one BatchNorm of mean 0, variance 1."""
    width = rows.shape[1]
    repeat = width // scale.numel()
    mean, variance = torch.zeros(width), torch.ones(width)
    return F.batch_norm(rows, mean, variance, scale.repeat(repeat), shift.repeat(repeat), eps=0.0)


def _pool_relu_backward(grad: Tensor, y: Tensor, pool: int) -> Tensor:
    """Return the gradient of `avg_pool(relu(y))` for y, as rows. Overwrites y."""
    n, c, h, w = y.shape
    if h % pool or w % pool:
        size = [pool, pool]
        grad = aten.avg_pool2d_backward(grad, y, size, size, [0, 0], False, True, None)
        pool = 1
    if pool > 1:
        grad = grad / pool**2
    # Broadcast each value of the pooled gradient to its pool x pool pixels.
    grad = grad.permute(0, 2, 3, 1).reshape(n, h // pool, 1, w // pool, 1, c).expand(-1, -1, pool, -1, pool, -1)
    y = y.permute(0, 2, 3, 1).view(n, h // pool, pool, w // pool, pool, c)
    aten.threshold_backward.grad_input(grad, y, 0, grad_input=y)
    return _rows(y.view(n, h, w, c).permute(0, 3, 1, 2))


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of a training BatchNorm for x, weight and bias. `grad` is that of its output, as rows."""
    rows, channels, values = _rows(x), x.shape[1], x.numel() // x.shape[1]
    repeat = rows.shape[1] // channels
    _, grad_weight, grad_bias = aten.native_batch_norm_backward(
        grad, rows, torch.ones(rows.shape[1]), None, None, mean.repeat(repeat), invstd.repeat(repeat),
        True, 0.0, [False, True, True],
    )  # fmt: skip
    grad_weight, grad_bias = grad_weight.view(-1, channels).sum(0), grad_bias.view(-1, channels).sum(0)
    # grad_x = scale * (grad - mean(grad) - x_hat * mean(grad * x_hat)), grouped by powers of x
    scale = weight * invstd
    slope = -scale * invstd * grad_weight / values
    shift = -scale * grad_bias / values - slope * mean
    grad_x = _affine(grad, scale, shift).addcmul_(rows, slope.repeat(repeat).to(rows.dtype))
    return _from_rows(grad_x, x), grad_weight, grad_bias
