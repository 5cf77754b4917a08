"""Every closed form equals forward-mode differentiation, whichever of the arguments depend on the image."""

import inspect
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from bias_rules import FREE, RULES, Call, ChannelBias, differentiable_tensors, generic_biases


def numbers(*shape: int, seed: int = 0, low: float = -2.0) -> torch.Tensor:
    """Random numbers in [low, 2], of which none is close to 0 or to another: pools and maxima have derivatives."""
    count = torch.Size(shape).numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).double()
    return (low + (order + 0.5) * (2 - low) / count).reshape(shape)


X, Y, POSITIVE = numbers(2, 4, 4, 4), numbers(2, 4, 4, 4, seed=1), numbers(2, 4, 4, 4, low=0.3)
ROWS, INDEX = numbers(2, 4, 6), torch.tensor([[[2, 0], [1, 3], [3, 3], [0, 1]]]).expand(2, 4, 2)
MASK = X > 0.3
HEADS = [numbers(2, 2, 5, 3, seed=seed) for seed in range(3)]
SCORES = numbers(5, 5, seed=3)


def call(*args: object, **kwargs: object) -> tuple[tuple, dict]:
    return args, kwargs


def each(names: list[str], arguments: list) -> dict[str, list]:
    return dict.fromkeys(names, arguments)


# Arguments by the function's name. Other functions are called with X alone.
SAMPLES = {
    **each(["view", "reshape"], [call(X, (2, 64)), call(X, (2, 4, 16))]),
    **each(["view_as", "reshape_as"], [call(X, numbers(8, 16))]),
    "unflatten": [call(X, 1, (2, 2))],
    "unsqueeze": [call(X, 1)],
    "unsqueeze_": [call(X, 1)],
    "permute": [call(X, (0, 2, 3, 1))],
    **each(["transpose", "transpose_", "swapaxes", "swapdims", "movedim", "moveaxis"], [call(X, 1, 2)]),
    "t": [call(numbers(3, 4))],
    "adjoint": [call(X)],
    "flip": [call(X, (1, 2))],
    "__getitem__": [call(X, (slice(None), 1)), call(X, (0, [0, 2])), call(X, MASK)],
    "narrow": [call(X, 1, 1, 2)],
    "select": [call(X, 1, 2)],
    "index_select": [call(X, 1, torch.tensor([2, 0]))],
    "gather": [call(ROWS, 2, INDEX)],
    "take_along_dim": [call(ROWS, INDEX, 2)],
    **each(["chunk", "split", "tensor_split"], [call(X, 2, 1)]),
    "split_with_sizes": [call(X, (1, 3), 1)],
    **each(["hsplit", "vsplit", "dsplit"], [call(X, 2)]),
    **each(["unsafe_chunk", "unsafe_split"], [call(X, 2, 1)]),
    "unsafe_split_with_sizes": [call(X, (1, 3), 1)],
    "take": [call(X, torch.tensor([5, 100]))],
    "masked_select": [call(X, MASK)],
    **each(["expand", "broadcast_to"], [call(X[:, :1], (2, 4, 4, 4))]),
    "expand_as": [call(X[:, :1], Y)],
    **each(["repeat", "tile"], [call(X, (1, 2, 1, 1))]),
    "repeat_interleave": [call(X, 2, 1)],
    "roll": [call(X, (1, 2), (2, 3))],
    "rot90": [call(X, 1, (2, 3))],
    "channel_shuffle": [call(X, 2)],
    "to": [call(X, torch.float64), call(X, Y)],
    "type": [call(X, torch.float64)],
    "type_as": [call(X, Y)],
    **{f"{kind}_pool1d": [call(ROWS, 2)] for kind in ("max", "avg", "adaptive_max", "adaptive_avg")},
    **{f"{kind}_pool2d": [call(X, 2)] for kind in ("max", "avg", "adaptive_max", "adaptive_avg")},
    **{f"{kind}_pool3d": [call(X[None], 2)] for kind in ("max", "avg", "adaptive_max", "adaptive_avg")},
    "max_pool2d_with_indices": [call(X, 2)],
    **each(["interpolate", "upsample"], [call(X, scale_factor=2, mode="bicubic"), call(X, (3, 3))]),
    **each(["pixel_shuffle", "pixel_unshuffle"], [call(X, 2)]),
    **each(["mean", "sum", "amax", "amin", "std"], [call(X, (2, 3)), call(X, 1, keepdim=True)]),
    "cumsum": [call(X, 1)],
    "topk": [call(X, 2, 1)],
    "fold": [call(numbers(2, 8, 4), (4, 4), 2, stride=2)],
    **each(["feature_dropout"], [call(X, 0.5, False)]),
    "dropout1d": [call(ROWS)],
    "conv1d": [call(ROWS, numbers(3, 4, 3), numbers(3)), call(ROWS[0], numbers(3, 4, 3), numbers(3))],
    "conv2d": [call(X, numbers(3, 4, 3, 3), numbers(3)), call(X, numbers(4, 1, 3, 3), None, 1, 1, 1, 4)],
    "conv3d": [call(X[None], numbers(3, 2, 2, 2, 2), numbers(3))],
    "conv_transpose1d": [call(ROWS, numbers(4, 3, 3), numbers(3))],
    "conv_transpose2d": [call(X, numbers(4, 3, 3, 3), bias=numbers(3))],
    "conv_transpose3d": [call(X[None], numbers(2, 3, 2, 2, 2), numbers(3))],
    "linear": [call(X, numbers(3, 4), numbers(3)), call(X, numbers(3, 4)), call(X[0, 0, 0], numbers(3, 4), numbers(3))],
    "batch_norm": [
        call(X, numbers(4), numbers(4, low=0.2), numbers(4), numbers(4)),
        call(X, numbers(4), numbers(4, low=0.2)),
        call(X, None, None, training=True),
    ],
    "layer_norm": [call(X, (4,), numbers(4), numbers(4)), call(X, (4, 4)), call(X, (4,), numbers(4), None, 0.7)],
    "scaled_dot_product_attention": [
        call(*HEADS),
        call(*HEADS, is_causal=True),
        call(*HEADS, SCORES, scale=0.3),
        call(*HEADS, SCORES > -1),
    ],
    **each(["add", "add_", "sub", "sub_", "subtract"], [call(X, Y), call(X, 2), call(X, Y, alpha=3)]),
    **each(["__add__", "__iadd__", "__sub__", "__isub__"], [call(X, Y), call(X, 0), call(X, 1.5)]),
    **each(["__radd__", "__rsub__", "rsub"], [call(X, Y), call(X, 1.5)]),
    **each(["mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"], [call(X, Y), call(X, 2.5)]),
    **each(["matmul", "__matmul__", "__rmatmul__"], [call(X, Y)]),
    "bmm": [call(ROWS, numbers(2, 6, 3))],
    "mm": [call(ROWS[0], numbers(6, 3))],
    "einsum": [call("nchw,ncwk->nhk", X, Y)],
    **each(
        ["div", "div_", "divide", "true_divide"], [call(X, POSITIVE), call(X, 2.5)]
    ),
    **each(["__truediv__", "__idiv__", "__itruediv__"], [call(X, POSITIVE), call(X, 2.5)]),
    **each(["cat", "concat", "concatenate", "stack"], [call([X, Y], 1), call((X, Y, POSITIVE))]),
    **each(["hstack", "vstack", "dstack", "row_stack", "column_stack"], [call([X, Y])]),
    "where": [call(MASK, X, Y), call(MASK, X, 2.0), call(MASK, X, 0.0)],
    "masked_fill": [call(X, MASK, 2.0), call(X, MASK, -torch.inf), call(X, MASK, 0)],
    "pad": [call(X, (1, 1)), call(X, (1, 1), "constant", 2.0), call(X, (1, 1, 0, 1), "reflect")],
    **each(["max", "min"], [call(X, Y), call(X), call(X, 1)]),
    **each(["maximum", "minimum"], [call(X, Y)]),
    **each(["addcmul", "addcmul_"], [call(X, Y, POSITIVE), call(X, Y, numbers(4), value=3)]),
    **each(["addmm", "addmm_"], [call(numbers(4, 3), ROWS[0], numbers(6, 3), beta=beta) for beta in (1, 2)]),
    "addmv": [call(numbers(4), ROWS[0], numbers(6), alpha=2)],
    "addbmm": [call(numbers(4, 3), ROWS, numbers(2, 6, 3))],
    "baddbmm": [call(numbers(2, 4, 3), ROWS, numbers(2, 6, 3), beta=0.5)],
    "grid_sample": [call(X, numbers(2, 3, 3, 2) / 3, align_corners=False)],
    "prelu": [call(X, numbers(4))],
    **each(["softmax", "_softmax"], [call(X, 1), call(X, -1)]),
    **each(["log", "log1p", "sqrt", "sqrt_", "rsqrt", "reciprocal"], [call(POSITIVE)]),
    **each(["__rtruediv__", "__rdiv__"], [call(POSITIVE, 2.0)]),
    **each(["pow", "__pow__"], [call(X, 2), call(POSITIVE, 1.5), call(POSITIVE, X), call(2.0, X)]),
    "threshold": [call(X, 0.5, 2.0)],
    **each(["clamp", "clamp_", "clip"], [call(X, -1, 1), call(X, min=0.5), call(X, -POSITIVE, POSITIVE)]),
    **each(["clamp_min", "clamp_max"], [call(X, 0.5)]),
    **each(["relu6", "silu", "hardswish", "hardsigmoid", "mish"], [call(3 * X), call(3 * X, inplace=True)]),
    **each(["elu", "hardtanh"], [call(X), call(X, inplace=True)]),
}  # fmt: skip
SAMPLES_OF_METHODS = {  # other arguments than those of the function of the same name
    torch.Tensor.unfold: [call(X, 2, 2, 1)],
    torch.Tensor.where: [call(X, MASK, Y), call(X, MASK, 1.5)],
    torch.Tensor.__pow__: [call(X, 2), call(POSITIVE, X)],
    torch.Tensor.pow: [call(X, 2), call(POSITIVE, X)],
    F.unfold: [call(X, 2)],
    torch.dropout: [call(X, 0.5, True)],
    torch.dropout_: [call(X, 0.5, True)],
}
WITHOUT_GRADIENT = {torch.Tensor.cuda, torch.Tensor.detach, torch.Tensor.detach_, torch.detach, torch.detach_}


def samples(func: object) -> list[tuple[tuple, dict]]:
    name = func.__name__.removeprefix("special_").removeprefix("linalg_").removeprefix("_threshold") or "threshold"
    arguments = SAMPLES_OF_METHODS.get(func) or SAMPLES.get(name, [call(X)])
    return [(args, kwargs) for args, kwargs in arguments if "inplace" not in kwargs or "inplace" in parameters(func)]


def parameters(func: object) -> list[str]:
    try:
        return list(inspect.signature(func).parameters)
    except ValueError:  # a function in C
        return []


def with_moving(leaves: list, moving: tuple[int, ...]) -> list:
    """Copies of the arguments, of which some require gradients."""
    copies = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    for i in moving:
        copies[i] = copies[i].requires_grad_().clone()  # which may be written over
    return copies


def calls(func: object):
    """The function's calls with every choice of the arguments that depend on the image, and their outputs."""
    for args, kwargs in samples(func):
        leaves, layout = tree_flatten((args, kwargs))
        floats = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        for count in range(1, len(floats) + 1):
            for moving in combinations(floats, count):
                moving_args, moving_kwargs = tree_unflatten(with_moving(leaves, moving), layout)
                made = Call(func, moving_args, moving_kwargs)
                try:
                    output = func(*moving_args, **moving_kwargs)
                except RuntimeError as error:
                    assert "not differentiable with respect to argument" in str(error)  # BatchNorm's statistics
                    continue
                if any(tensor.requires_grad for tensor in differentiable_tensors(output)):
                    yield made, output


def identity(func: object) -> str:
    return f"{getattr(func, '__objclass__', None) or getattr(func, '__module__', '')}.{func.__name__}"


@pytest.mark.parametrize("func", sorted(FREE - WITHOUT_GRADIENT, key=identity), ids=identity)
def test_a_function_of_the_free_table_has_no_bias(func):
    tested = 0
    for made, _ in calls(func):
        for bias in generic_biases(made):
            assert bias.abs().max().double() < 1e-12
            tested += 1
    assert tested


@pytest.mark.parametrize("func", sorted(RULES, key=identity), ids=identity)
def test_a_closed_form_equals_forward_mode_differentiation(func):
    closed_forms = 0
    for made, output in calls(func):
        if not isinstance(output, torch.Tensor):
            continue
        bias = RULES[func](made, output)
        if bias is NotImplemented:
            continue
        closed_forms += 1
        (expected,) = generic_biases(made)
        if isinstance(bias, ChannelBias):
            shape = [1] * output.dim()
            shape[bias.axis] = -1
            bias = bias.values.view(shape)
        bias = torch.zeros(()) if bias is None else bias
        torch.testing.assert_close(bias.expand(output.shape).double(), expected, rtol=1e-10, atol=1e-10)
    assert closed_forms


def test_samples_are_numerous_and_cover_moving_weights():
    moving = [len(made.moving) for made, _ in calls(F.conv2d)]
    assert moving == [1, 1, 1, 2, 2, 2, 3, 1, 1, 2]


@pytest.mark.parametrize(
    "func", [F.silu, F.hardsigmoid, torch.softmax, torch.add, torch.addcmul, torch.cat], ids=identity
)
def test_a_closed_form_reads_no_value_from_the_device(func):
    """The host would wait for a GPU. Tensors on "meta" have no values to read."""
    x, constant = torch.empty(2, 4, 4, 4, device="meta").requires_grad_(), torch.empty(4, device="meta")
    args = {torch.softmax: (x, 1), torch.add: (x, constant), torch.addcmul: (constant, x, constant)}
    args = args.get(func, ([x, constant.expand(x.shape)],) if func is torch.cat else (x,))
    bias = RULES[func](Call(func, args, {}), func(*args))
    assert bias.device.type == "meta" and bias.shape == func(*args).shape
