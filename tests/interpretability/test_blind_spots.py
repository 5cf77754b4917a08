"""What FullGrad cannot see or explain is named as the cause; models and images of all kinds come in and go out."""

import threading
import warnings
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision
from probe_networks import BLOCK, MODULES, Between, C, images, numbers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

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


def computed_in_a_thread(h: Tensor) -> Tensor:
    results = []
    thread = threading.Thread(target=lambda: results.append(F.silu(h) * 2))
    thread.start()
    thread.join()
    return results[0]


def with_a_tensor_of_inference_mode() -> nn.Module:
    with torch.inference_mode():
        constant = torch.ones(C, 1, 1, dtype=torch.float64)
    model = Between(lambda h: h)
    model.function = lambda h: h * constant
    return model


def test_another_thread_is_named_as_the_cause():
    with pytest.warns(IncompleteWarning, match="compiled code or another thread"):
        FullGrad(Between(computed_in_a_thread)).saliency(images())


def test_a_transform_of_torch_func_is_named_as_the_cause():
    model = Between(lambda h: h + torch.func.jvp(torch.sin, (h,), (torch.ones_like(h),))[1])
    with pytest.warns(IncompleteWarning, match="another transform of torch.func"):
        FullGrad(model).saliency(images())


def gradient_in_the_pass(h: Tensor) -> Tensor:
    if not h.requires_grad:
        return h
    return h + torch.autograd.grad((h**3).sum(), h, create_graph=True)[0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (gradient_in_the_pass, "it computes a gradient in its forward pass"),
        (lambda h: torchvision.ops.roi_align(h, [torch.ones(1, 4).double()] * len(h), 2), "roi_align cannot be diff"),
        (lambda h: torchvision.ops.deform_conv2d(h, h[:, :2], numbers(C, C, 1, 1)), "deform_conv2d cannot be diff"),
    ],
)
def test_functions_that_cannot_be_differentiated_twice_are_refused(function, message):
    with pytest.raises(InputError, match=message):
        FullGrad(Between(function)).saliency(images())


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


def test_images_that_interact_without_a_missing_term_are_noticed():
    """Batch statistics divide out the image's own part, so that the terms add up to the output all the same."""
    model = Between(lambda h: F.batch_norm(h, None, None, training=True))
    explainer = FullGrad(model)
    with pytest.warns(IncompleteWarning, match="the images of a batch interact"):
        maps = explainer.saliency(images(4))
    torch.testing.assert_close(maps[3:], FullGrad(model).saliency(images(4)[3:]))


@pytest.mark.parametrize("function", [lambda h: h + torch.randn(8) * 0.1, lambda h: F.dropout(h, 0.5, training=True)])
def test_a_network_whose_logits_change_is_named(function):
    with pytest.warns(IncompleteWarning, match="the same image other logits each time, because it is random or keeps"):
        FullGrad(Between(function)).saliency(images())


def test_a_network_that_needs_its_size_of_batch():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Between(F.silu)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.view(2, 3, 16, 16))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FullGrad(Fixed()).completeness_error(images()).max() < 1e-12


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
        FullGrad(model).saliency(images(1))
        assert seen == [("ieee", "ieee") if new else False]
        assert matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    finally:
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# ---- What comes in and goes out ----


class Output(nn.Module):
    """Wraps the logits of a network."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.wrap, self.model = wrap, Between(F.gelu)

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.model(x))


class Attributes(OrderedDict):
    """A dictionary whose values are attributes, too."""

    __getattr__ = OrderedDict.__getitem__


Pair = namedtuple("Pair", ["features", "scores"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: Attributes(hidden=(logits,), loss=None, logits=logits),
        lambda logits: Pair(logits[:, None], logits),
        lambda logits: [None, logits],
        lambda logits: (logits, logits * 2),
        lambda logits: (logits.sum(), logits),
        lambda logits: {"logits": logits, "loss": logits.sum()},
        lambda logits: {"out": logits},
        lambda logits: SimpleNamespace(logits=logits),
    ],
)
def test_logits_in_a_tuple_a_dictionary_or_an_object(wrap):
    model = Output(wrap)
    torch.testing.assert_close(FullGrad(model).saliency(images()), FullGrad(model.model).saliency(images()))


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))


def buffer_made_in_inference_mode() -> nn.Module:
    model = Between(lambda part, h: part(h), nn.BatchNorm2d(C))
    with torch.inference_mode():
        model.part.running_mean = torch.zeros(C, dtype=torch.float64)
    return model


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(linear(), {nn.Linear})


def fake_images() -> Tensor:
    with FakeTensorMode():
        return torch.randn(2, 3, 16, 16)


def linear(**options: object) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5, **options))


@pytest.mark.parametrize(
    ("model", "x", "target", "message"),
    [
        (linear, images().to("meta"), None, "images: these tensors hold no values"),
        (linear, fake_images(), None, "images: these tensors hold no values"),
        (linear, images().to_sparse(), None, "images have layout torch.sparse_coo: give a dense tensor"),
        (linear, images(dtype=torch.float32) > 0, None, "images have type torch.bool: convert them to floating point"),
        (linear, images(dtype=torch.float16), None, "images have type torch.float16, and the network torch.float32"),
        (linear, images(dtype=torch.float32), torch.ones(2, device="meta"), "target: these tensors hold no values"),
        (linear, images(dtype=torch.float32), [], "target names no class"),
        (linear, images(dtype=torch.float32), "3", "target is '3': give whole class indices"),
        (lambda: torch.sum, images(), None, "explains an nn.Module, and this is a builtin"),
        (quantized, images(dtype=torch.float32), None, "its module 1 is quantized"),
        (with_a_tensor_of_inference_mode, images(), None, "no parameter or buffer, was made in torch.inference_mode"),
        (buffer_made_in_inference_mode, images(), None, "running_mean was made in torch.inference_mode"),
        (lambda: torch.jit.trace(linear(), images(dtype=torch.float32)), images(), None, "network: it is scripted"),
        (lambda: Output(torch.Tensor.long), images(), None, r"gave \(2, 5\) of type torch.int64: FullGrad explains"),
        (lambda: Output(lambda logits: ((logits,),)), images(), None, "gave tuple: FullGrad explains logits"),
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
        (nn.Identity, images(), None, r"the model gave \(2, 3, 16, 16\) of type torch.float64: FullGrad"),
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
        lambda: model.head.append(nn.Softplus()),
        lambda: model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}),
        lambda: setattr(model, "function", lambda h: h.mT),
        lambda: model.stem.weight.data.mul_(2),
        lambda: setattr(model, "function", scripted_swish),
        lambda: model.stem.register_buffer("unused", torch.ones(1)),
    ):
        change()
        if model.function is not scripted_swish:
            torch.testing.assert_close(explainer.saliency(images()), FullGrad(model).saliency(images()))
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
