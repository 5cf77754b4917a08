"""The bias b = f(z) - Df(z)[z] of a call of a torch function (eq. 2 of `full_grad`).

There are three kinds of functions. `FREE` holds those whose bias is 0 whatever moves: linear ones, and positively
homogeneous ones of degree 1, for which Df(z)[z] = f(z) (Euler's theorem). `RULES` holds those with a closed form. The
bias of all others comes from forward-mode differentiation. A tensor *moves* if it depends on the image.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from s3net_common.errors import InputError, first_line

NAMESPACES = (torch, Tensor, F, torch._C._nn, torch.special, torch.linalg, torch.fft)


def named(*names: str) -> set[Callable]:
    """Return the functions of these names in torch, torch.Tensor and torch.nn.functional."""
    functions = {getattr(space, name, None) for space in NAMESPACES for name in names}
    return {function for function in functions if callable(function)}


# ---- Functions without a bias ---------------------------------------------------------------------------------------

METADATA = named(
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "data_ptr",
    "untyped_storage", "get_device", "is_contiguous", "is_floating_point", "is_complex", "is_inference",
    "requires_grad_", "register_hook", "retain_grad", "item", "tolist", "numpy", "equal", "allclose",
    "__len__", "__hash__", "__repr__", "__format__", "__bool__", "__int__", "__float__", "__index__", "__contains__",
)  # fmt: skip
RESHAPES = named("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze")
PERMUTATIONS = named("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "adjoint", "flip",
                     "fliplr", "flipud")  # fmt: skip
SELECTIONS = named(
    "__getitem__", "narrow", "select", "index_select", "gather", "take_along_dim", "chunk", "split",
    "split_with_sizes", "tensor_split", "hsplit", "vsplit", "unbind", "expand", "expand_as", "broadcast_to",
    "repeat", "repeat_interleave", "tile", "roll", "rot90", "diagonal", "unfold", "channel_shuffle",
    "take", "masked_select", "dsplit", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes",
    "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "fftshift", "ifftshift",
)  # fmt: skip
COPIES = named(
    "clone", "contiguous", "to", "float", "double", "half", "bfloat16", "type", "type_as", "detach", "detach_",
    "cpu", "cuda", "tril", "triu",
)  # fmt: skip
RESAMPLING = named(
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "max_pool2d_with_indices", "interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle",
)  # fmt: skip
REDUCTIONS = named("mean", "sum", "amax", "amin", "std")
FREE = RESHAPES | PERMUTATIONS | SELECTIONS | COPIES | RESAMPLING | REDUCTIONS
FREE |= named(
    "relu", "relu_", "leaky_relu", "leaky_relu_", "abs", "abs_", "neg", "neg_", "__neg__", "negative", "positive",
    "cumsum", "sort", "topk", "fold", "squeeze_", "unsqueeze_", "transpose_",
    "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "rrelu",
)  # fmt: skip

# ---- Calls ----------------------------------------------------------------------------------------------------------

CONVOLUTIONS = named("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
LINEAR, BATCH_NORM, LAYER_NORM, ATTENTION = F.linear, F.batch_norm, F.layer_norm, F.scaled_dot_product_attention
MULTI_HEAD_ATTENTION = F.multi_head_attention_forward
ADDITIONS = named("add", "add_", "__add__", "__radd__", "__iadd__")
SUBTRACTIONS = named("sub", "sub_", "subtract", "__sub__", "__rsub__", "__isub__", "rsub")
PRODUCTS = named("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__", "matmul", "__matmul__", "__rmatmul__",
                 "bmm", "mm", "einsum")  # fmt: skip
QUOTIENTS = named("div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__")
CONCATENATIONS = named("cat", "concat", "concatenate")
JOINS = CONCATENATIONS | named("stack", "hstack", "vstack", "dstack", "column_stack", "row_stack")
EXTREMA = named("max", "min", "maximum", "minimum")
FUSED_SUMS = named("addcmul", "addcmul_", "addmm", "addmm_", "addbmm", "baddbmm", "addmv")
FIRST_ARGUMENT_ONLY = named("grid_sample", "prelu")
SYMMETRIC = named(
    "gelu", "silu", "hardswish", "hardsigmoid", "relu6", "hardtanh", "sigmoid", "tanh", "mish", "elu", "selu", "celu",
    "softplus", "softsign", "logsigmoid", "threshold", "hardshrink", "softshrink", "tanhshrink", "softmax",
    "exp", "log", "log1p", "sqrt", "rsqrt", "square", "reciprocal", "sin", "cos", "erf", "clamp", "clip", "clamp_min",
    "clamp_max", "pow", "__pow__", "__rtruediv__", "__rdiv__", "sigmoid_", "tanh_", "hardtanh_", "elu_", "selu_",
    "exp_", "sqrt_", "clamp_",
)  # fmt: skip
WRITING_OPERATORS = {
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__idiv__",
    "__ipow__",
    "__imatmul__",
    "__setitem__",
}


def moves(value: object) -> bool:
    """Whether a value is a tensor that depends on the image."""
    return isinstance(value, Tensor) and value.requires_grad


class ChannelBias(NamedTuple):
    """A bias with one value for each channel: `(C,)`, and the axis of the channels in the function's output."""

    values: Tensor
    axis: int


Bias = Tensor | ChannelBias | None


class Call:
    """A call of a torch function, made before the function runs, which may write over its arguments.

    Attributes:
        func: the function.
        args: its arguments by position.
        kwargs: its arguments by name.
        writes: whether it writes over its first argument. A copy of that argument is then kept.
    """

    def __init__(self, func: Callable, args: tuple, kwargs: dict) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = getattr(func, "__name__", str(func))
        self.writes = writes_over_argument(func, self.name, args, kwargs)
        self._leaves: list | None = None
        if self.writes:
            self.flatten()
            if not (func in ADDITIONS and moves(args[0])):  # only the constant summand is needed
                self._leaves[0] = args[0].detach().clone()

    def flatten(self) -> None:
        """Note the arguments one by one, and which of them move."""
        if self._leaves is None:
            self._leaves, self._layout = tree_flatten((self.args, self.kwargs))
            self._moving = [i for i, leaf in enumerate(self._leaves) if moves(leaf)]

    @property
    def leaves(self) -> list:
        """The arguments one by one, with the values from before the call."""
        self.flatten()
        return self._leaves

    @property
    def moving(self) -> list[int]:
        """Where in `leaves` the tensors are that move."""
        self.flatten()
        return self._moving

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument that may be given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def operands(self) -> list[tuple[Any, bool]]:
        """Return all tensors and numbers among the arguments, each with whether it moves."""
        moving = set(self.moving)
        kinds = Tensor | float | int | complex
        return [(leaf, i in moving) for i, leaf in enumerate(self.leaves) if isinstance(leaf, kinds)]

    def run(self, *moving: Tensor) -> Any:
        """Run the function on other values of the tensors that move. Writes over none of its arguments."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.moving, moving, strict=True):
            leaves[i] = tensor
        if self.writes:
            leaves[0] = leaves[0].clone()
        args, kwargs = tree_unflatten(leaves, self._layout)
        result = self.func(*args, **kwargs)
        return args[0] if self.name == "__setitem__" else result

    def at_zero(self) -> Tensor:
        """Return the function's value where all that moves is 0: the bias of an affine function."""
        return finite(self.run(*(torch.zeros_like(self.leaves[i]) for i in self.moving)).detach())


@cache
def _inplace_position(func: Callable) -> int | None:
    try:
        return list(inspect.signature(func).parameters).index("inplace")
    except (ValueError, TypeError):
        return None


def writes_over_argument(func: Callable, name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a call writes over its first argument: `relu_`, `+=`, `x[i] = y`, or `inplace=True`."""
    if not args or not isinstance(args[0], Tensor):
        return False
    if name in WRITING_OPERATORS or (name.endswith("_") and not name.endswith("__")):
        return True
    if kwargs.get("inplace") is True:
        return True
    position = _inplace_position(func)
    return position is not None and len(args) > position and args[position] is True


# ---- Closed forms ---------------------------------------------------------------------------------------------------
# Each takes a call and the function's output, and returns the bias, None if it is 0, or NotImplemented.


def convolution_bias(call: Call, output: Tensor) -> Bias:
    """The bias parameter."""
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    if moves(weight) or moves(bias) or output.dim() != weight.dim():
        return NotImplemented
    return None if bias is None else ChannelBias(bias.detach(), 1)


def linear_bias(call: Call, output: Tensor) -> Bias:
    """The bias parameter."""
    bias = call.argument(2, "bias")
    if moves(call.argument(1, "weight")) or moves(bias) or output.dim() < 2:
        return NotImplemented
    return None if bias is None else ChannelBias(bias.detach(), -1)


def batch_norm_bias(call: Call, output: Tensor) -> Bias:
    """Return beta - gamma * mean / sqrt(var + eps), in evaluation mode."""
    mean, var, weight, bias = (
        call.argument(i, name) for i, name in enumerate(("running_mean", "running_var", "weight", "bias"), start=1)
    )
    if call.argument(5, "training", False) or any(map(moves, (mean, var, weight, bias))):
        return NotImplemented
    shift = -mean * torch.rsqrt(var + call.argument(7, "eps", 1e-5))
    if weight is not None:
        shift = shift * weight
    return ChannelBias((shift if bias is None else shift + bias).detach(), 1)


def layer_norm_bias(call: Call, output: Tensor) -> Bias:
    """Without eps, output - beta is homogeneous of degree 0, so all of the output is bias; eps takes a share off."""
    z, shape = call.args[0].detach(), call.argument(1, "normalized_shape")
    weight, bias, eps = call.argument(2, "weight"), call.argument(3, "bias"), call.argument(4, "eps", 1e-5)
    if moves(weight) or moves(bias):
        return NotImplemented
    variance = z.var(tuple(range(-len(shape), 0)), correction=0, keepdim=True)
    share = variance / (variance + eps)
    value = output.detach()
    return value * share if bias is None else torch.lerp(bias.detach().expand_as(value), value, share.to(value.dtype))


def attention_bias(call: Call, output: Tensor) -> Bias:
    """softmax(s) v with the scores s = scale * q k^T + mask; the mask stays constant."""
    q, k, v, mask = (call.argument(i, name) for i, name in enumerate(("query", "key", "value", "attn_mask")))
    if moves(mask) or call.argument(4, "dropout_p", 0.0) or call.kwargs.get("enable_gqa"):
        return NotImplemented
    degree, value_moves = moves(q) + moves(k), moves(v)
    q, k, v = q.detach(), k.detach(), v.detach()
    scores = (q * (call.kwargs.get("scale") or q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
    masked = scores
    if call.argument(5, "is_causal", False):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        masked = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(masked, -1)
    along = scores * weights  # the derivative of the weights along (q, k) is degree * (along - weights * sum(along))
    change = (weights * along.sum(-1, keepdim=True) - along) @ v * degree
    return change if value_moves else change + output.detach()


def addition_bias(call: Call, output: Tensor) -> Bias:
    """The summand that does not move."""
    if "alpha" in call.kwargs or len(call.args) != 2:
        return subtraction_bias(call, output)
    constants = [operand for operand, moving in call.operands() if not moving]
    if not constants or (not isinstance(constants[0], Tensor) and constants[0] == 0):
        return None
    value = torch.as_tensor(constants[0], dtype=output.dtype, device=output.device)
    return finite(value.detach()).expand(output.shape)


def subtraction_bias(call: Call, output: Tensor) -> Bias:
    """The value where what moves is 0. A third operand, alpha, is a factor."""
    return None if all(moving for _, moving in call.operands()[:2]) else call.at_zero()


def join_bias(call: Call, output: Tensor) -> Bias:
    """The constant tensors, each at its place."""
    tensors = [moving for operand, moving in call.operands() if isinstance(operand, Tensor)]
    return None if all(tensors) else call.at_zero()


def where_bias(call: Call, output: Tensor) -> Bias:
    """The constant branch. The condition is constant."""
    branches = [
        moving for operand, moving in call.operands() if not isinstance(operand, Tensor) or operand.dtype != torch.bool
    ]
    return None if all(branches) else call.at_zero()


def fill_bias(call: Call, output: Tensor) -> Bias:
    """The filled-in number."""
    value = call.argument(2, "value")
    return call.at_zero() if isinstance(value, Tensor) or value != 0 else None


def pad_bias(call: Call, output: Tensor) -> Bias:
    """The number on the rim."""
    return call.at_zero() if call.argument(3, "value") else None


def product_bias(call: Call, output: Tensor) -> Bias:
    """A product of d moving factors is homogeneous of degree d: the bias is (1 - d) times the output."""
    return _homogeneous_bias(len(call.moving), output)


def quotient_bias(call: Call, output: Tensor) -> Bias:
    """A quotient is homogeneous of degree 1, 0 or -1."""
    if "rounding_mode" in call.kwargs:
        return NotImplemented
    (_, dividend), (_, divisor) = call.operands()[:2]
    return _homogeneous_bias(int(dividend) - int(divisor), output)


def _homogeneous_bias(degree: int, output: Tensor) -> Bias:
    return None if degree == 1 else output.detach() * (1 - degree)


def extremum_bias(call: Call, output: Tensor) -> Bias:
    """Homogeneous of degree 1, if all tensors move."""
    tensors = [moving for operand, moving in call.operands() if isinstance(operand, Tensor)]
    return None if all(tensors) else NotImplemented


def fused_sum_bias(call: Call, output: Tensor) -> Bias:
    """The value where what moves is 0 of summand + factor * factor, unless both factors move."""
    if len(call.args) != 3 or {1, 2} <= set(call.moving):
        return NotImplemented
    return None if set(call.moving) in ({0, 1}, {0, 2}) else call.at_zero()


def first_argument_bias(call: Call, output: Tensor) -> Bias:
    """Homogeneous of degree 1 in the first argument."""
    return None if call.moving == [0] else NotImplemented


def symmetric_bias(call: Call, output: Tensor) -> Bias:
    """The Jacobian is symmetric, so one backward step along z gives Df(z)[z]."""
    z = call.leaves[0]
    if call.moving != [0] or output.shape != z.shape or output.dtype != z.dtype or z.is_complex():
        return NotImplemented
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        value = call.run(z)
        (along,) = torch.autograd.grad(value, z, finite(z.detach()))
    return without_rounding(value.detach(), along)


RULES: dict[Callable, Callable[[Call, Tensor], Bias]] = {
    **dict.fromkeys(CONVOLUTIONS, convolution_bias),
    LINEAR: linear_bias,
    BATCH_NORM: batch_norm_bias,
    LAYER_NORM: layer_norm_bias,
    ATTENTION: attention_bias,
    **dict.fromkeys(ADDITIONS, addition_bias),
    **dict.fromkeys(SUBTRACTIONS, subtraction_bias),
    **dict.fromkeys(JOINS, join_bias),
    **dict.fromkeys(named("where"), where_bias),
    **dict.fromkeys(named("masked_fill"), fill_bias),
    **dict.fromkeys(named("pad"), pad_bias),
    **dict.fromkeys(PRODUCTS, product_bias),
    **dict.fromkeys(QUOTIENTS, quotient_bias),
    **dict.fromkeys(EXTREMA, extremum_bias),
    **dict.fromkeys(FUSED_SUMS, fused_sum_bias),
    **dict.fromkeys(FIRST_ARGUMENT_ONLY, first_argument_bias),
    **dict.fromkeys(SYMMETRIC, symmetric_bias),
}

# ---- Any function ---------------------------------------------------------------------------------------------------


def generic_biases(call: Call) -> list[Tensor]:
    """The bias of each floating-point output, by forward-mode differentiation, or by two backward steps."""
    z = tuple(call.leaves[i].detach() for i in call.moving)
    direction = tuple(map(finite, z))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(differentiable_tensors(call.run(*tensors)))

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # fused kernels: no forward mode
        warnings.simplefilter("ignore")  # of torch about its own code
        try:
            values, along = _forward_mode(run, z, direction)
        except (RuntimeError, NotImplementedError, TypeError):
            try:
                values, along = torch.autograd.functional.jvp(run, z, direction)
            except RuntimeError as error:
                raise InputError(
                    f"FullGrad cannot explain this network: {call.name} cannot be differentiated twice "
                    f"({first_line(error)}). Replace it by functions of torch"
                ) from error
    return [without_rounding(value.detach(), d.detach()) for value, d in zip(values, along, strict=True)]


def _forward_mode(run: Callable, z: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> tuple[list[Tensor], ...]:
    """Return a function's outputs, and their derivatives along a direction.

    Raises:
        NotImplementedError: an output has no derivative in forward mode, as of torch.library's custom operators. (There
            `torch.func.jvp` returns 0.)
    """
    with forward_ad.dual_level():
        outputs = run(*map(forward_ad.make_dual, z, direction))
        pairs = [forward_ad.unpack_dual(output) for output in outputs]
    if any(pair.tangent is None for pair in pairs):
        raise NotImplementedError
    return [pair.primal for pair in pairs], [pair.tangent for pair in pairs]


def differentiable_tensors(tree: object) -> list[Tensor]:
    """Return the floating-point and complex tensors in arguments or results, in order."""
    leaves = [tree] if isinstance(tree, Tensor) else tree_flatten(tree)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())]


def finite(tensor: Tensor) -> Tensor:
    """Set infinite elements (masks before a softmax, rims of a max pool) to 0: no gradient reaches them."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    if tensor.device.type == "cpu" and tensor.isfinite().all():  # elsewhere the host would wait for the device
        return tensor
    return torch.where(tensor.isfinite(), tensor, 0)


def without_rounding(value: Tensor, along: Tensor) -> Tensor:
    """`value - along`; exactly 0 for rows of axis 0 where that is rounding only, which psi would blow up to [0, 1]."""
    value = finite(value)
    bias = value - finite(along)
    if bias.dim() < 2 or bias.numel() == 0:
        return bias
    axes = tuple(range(1, bias.dim()))
    noise = 32 * torch.finfo(value.dtype).eps * value.abs().amax(axes, keepdim=True)
    return bias * (bias.abs().amax(axes, keepdim=True) > noise)
