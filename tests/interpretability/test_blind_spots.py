"""What FullGrad cannot see or explain is named as the cause; models and images of all kinds come in and go out."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from probe_networks import BLOCK, MODULES, Between, C, images
from torch import Tensor, nn

from full_grad import FullGrad, IncompleteWarning
from s3net_common.errors import InputError

# ---- What cannot be seen, or does not hold ----


@torch.jit.script
def scripted_swish(x: Tensor):
    return x * torch.sigmoid(x)


def test_a_scripted_function_is_named_as_the_cause():
    model = Between(lambda part, h: part(scripted_swish(h)), nn.Conv2d(C, C, 1))
    with pytest.warns(IncompleteWarning, match="did not see every function.*conv2d in module part takes the result of"):
        FullGrad(model).saliency(images())


def test_vmap_is_named_as_the_cause():
    with pytest.warns(IncompleteWarning, match=r"takes the result of MulBackward0.* torch\.vmap or another transform"):
        FullGrad(Between(lambda h: torch.vmap(lambda t: t.sigmoid() * 2)(h))).saliency(images())


def test_decompose_warns_too_and_each_warning_comes_once():
    explainer = FullGrad(Between(scripted_swish))
    with pytest.warns(IncompleteWarning, match="its terms miss the output by"):
        explainer.decompose(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explainer.saliency(images())


def test_a_foreign_tensor_is_named_as_the_cause():
    foreign = torch.ones(C, 1, 1, dtype=torch.float64, requires_grad=True)
    with pytest.warns(IncompleteWarning, match="neither parameters nor buffers"):
        FullGrad(Between(lambda h: h + foreign)).saliency(images())


def test_an_output_that_is_not_finite_is_named_as_the_cause():
    with pytest.warns(IncompleteWarning, match="output is not finite"):
        FullGrad(Between(lambda h: h / 0)).saliency(images())


def test_a_custom_function_is_named_as_the_cause():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * gradient * ctx.saved_tensors[0]

    with pytest.warns(IncompleteWarning, match=r"custom torch\.autograd\.Function.*no derivative itself: Once"):
        FullGrad(Between(lambda h: Once.apply(h))).saliency(images())
    stored = Once.apply
    with pytest.warns(IncompleteWarning, match=r"call Once\.apply in the forward pass"):
        FullGrad(Between(lambda h: stored(h))).saliency(images())


def test_reentrant_checkpoints_are_refused():
    model = Between(lambda part, h: torch.utils.checkpoint.checkpoint(part, h, use_reentrant=True), BLOCK)
    with pytest.raises(InputError, match="CheckpointFunction cannot be differentiated twice"):
        FullGrad(model).saliency(images())


def test_a_hidden_write_is_refused():
    class Writing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            return x.mul_(2)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    with pytest.raises(InputError, match="Writing writes over its input"):
        FullGrad(Between(lambda h: Writing.apply(h * 1))).saliency(images())


@pytest.mark.parametrize("function", [torch.Tensor.detach, lambda h: h.argmax(1, keepdim=True).double()])
def test_an_output_that_does_not_depend_on_the_images_is_an_error(function):
    with pytest.raises(InputError, match="does not depend on the images"):
        FullGrad(Between(function)).saliency(images())


def test_images_that_interact_are_explained_one_by_one():
    model = Between(lambda part, h: part(h), nn.BatchNorm2d(C, track_running_stats=False))
    explainer = FullGrad(model)
    with pytest.warns(IncompleteWarning, match="the images of a batch interact"):
        explanation = explainer.explain(images())
    assert explanation.completeness_error.max() < 1e-12
    torch.testing.assert_close(explanation.maps[1:], FullGrad(model).saliency(images()[1:]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        terms = explainer.decompose(images())[1]
    assert terms["part"].shape == (2, C, 8, 8)


def test_images_in_another_axis_are_not_mixed_up():
    model = Between(*MODULES["tokens first"])
    terms = FullGrad(model, batch_size=2).decompose(images(4))[1]
    whole = FullGrad(model, batch_size=4).decompose(images(4))[1]
    assert terms["part.1"].shape == (64, 4, C)
    for name in whole:
        torch.testing.assert_close(terms[name], whole[name], rtol=1e-10, atol=1e-12)


# ---- Precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_networks_precision_sets_the_tolerance(dtype):
    model = Between(lambda part, h: part(h), BLOCK).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explanation = FullGrad(model).explain(images(dtype=dtype))
    assert explanation.maps.dtype == dtype and explanation.maps.isfinite().all()
    reference = FullGrad(model.double()).saliency(images(dtype=dtype).double())
    correlation = torch.corrcoef(torch.stack([explanation.maps.double().flatten(), reference.flatten()]))[0, 1]
    assert correlation > 0.9


def test_autocast_inside_of_a_network():
    def function(part, h):
        with torch.autocast("cpu", torch.bfloat16):
            return part(h).to(h.dtype)

    model = Between(function, BLOCK).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FullGrad(model).explain(images(dtype=torch.float32)).completeness_error.max() < 0.1


def test_tensorfloat_is_off_in_the_pass_only():
    seen, matmul = [], torch.backends.cuda.matmul
    before = matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    new = hasattr(torch.backends.cudnn, "conv")

    def look(h):
        seen.append((matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) if new else matmul.allow_tf32)
        return h

    try:
        model = Between(look)
        seen.clear()
        FullGrad(model).saliency(images())
        assert seen == [("ieee", "ieee") if new else False]
        assert matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    finally:
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# ---- What comes in and goes out ----


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: (logits, logits * 2),
        lambda logits: (logits.sum(), logits),
        lambda logits: {"logits": logits, "loss": logits.sum()},
        lambda logits: {"out": logits},
        lambda logits: SimpleNamespace(logits=logits),
    ],
)
def test_logits_in_a_tuple_a_dictionary_or_an_object(wrap):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Between(F.gelu)

        def forward(self, x: Tensor) -> object:
            return wrap(self.model(x))

    model = Wrapped()
    torch.testing.assert_close(FullGrad(model).saliency(images()), FullGrad(model.model).saliency(images()))


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))


def linear(**options: object) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5, **options))


@pytest.mark.parametrize(
    ("model", "x", "target", "message"),
    [
        (linear, images().to(torch.uint8), None, "images have type torch.uint8: convert them to floating point"),
        (linear, images(dtype=torch.float32).numpy(), None, "images are a ndarray: give a tensor"),
        (linear, images(), None, "images have type torch.float64, and the network torch.float32: convert one"),
        (linear, images(dtype=torch.float32), "cat", "target is 'cat': give whole class indices"),
        (linear, images(dtype=torch.float32), ["cat", "dog"], "target is .'cat', 'dog'.: give whole class indices"),
        (made_in_inference_mode, images(dtype=torch.float32), None, "1.weight was made in torch.inference_mode"),
        (lambda: torch.jit.script(linear()), images(), None, "look inside this network: it is scripted"),
        (lambda: nn.Sequential(torch.jit.script(linear())), images(), None, "its module 0 is scripted"),
        (
            lambda: linear(device="meta"),
            images(dtype=torch.float32),
            None,
            "images are on cpu, and the network is on",
        ),
        (nn.Identity, images(), None, r"the model gave \(2, 3, 16, 16\): FullGrad explains logits"),
    ],
)
def test_unusable_input_is_an_error_in_one_line(model, x, target, message):
    with pytest.raises(InputError, match=message) as caught:
        FullGrad(model()).saliency(x, target)
    assert "\n" not in str(caught.value)


def test_a_changed_network_is_noticed():
    model = Between(F.gelu)
    explainer = FullGrad(model)
    explainer.saliency(images())
    for change in (
        lambda: model.stem.weight.data.mul_(2),
        lambda: setattr(model, "function", scripted_swish),
        lambda: model.stem.register_buffer("unused", torch.ones(1)),
    ):
        change()
    with pytest.warns(IncompleteWarning, match="did not see every function"):
        explainer.saliency(images())
    model.function = F.silu
    torch.testing.assert_close(explainer.saliency(images()), FullGrad(model).saliency(images()))


def test_the_names_of_functions():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (x * torch.sigmoid(self.conv(x)) + 1) * 2 + 3

    gate = Gate()
    model = nn.Sequential(gate, nn.SiLU(), gate, nn.Flatten(), nn.Linear(3 * 16 * 16, 5))
    terms = FullGrad(model).decompose(images(dtype=torch.float32))[1]
    run = ["0:add#2", "0:add", "0:mul", "0:sigmoid", "0.conv"]
    again = ["0#2:add#2", "0#2:add", "0#2:mul", "0#2:sigmoid", "0.conv#2"]
    assert list(terms) == ["4", *again, "1", *run]
