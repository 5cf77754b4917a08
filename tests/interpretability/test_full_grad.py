import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from full_grad import FullGrad, psi
from models import S3Net, create_model
from s3net_common.errors import InputError


def with_statistics(model: nn.Module) -> nn.Module:
    """Random running statistics and affine parameters, so that no bias is 0 and no scale is 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
    return model


def benchmark() -> ModuleType:
    """interpretability/benchmark.py, which has the published formula spelled out; each experiment has one."""
    path = Path(__file__).parents[2] / "interpretability" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("interpretability_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def small_s3net(num_classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(S3Net(6, (2, 2), 8, bn_size=2, stem="imagenet", num_classes=num_classes))


def images(n: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(2))


# ---- Completeness ----

NETWORKS = {  # name -> (arguments, image size)
    "alexnet": ({}, 64),
    "squeezenet1_0": ({}, 64),
    "resnet18": ({}, 32),
    "densenet121": ({}, 32),
    "googlenet": ({"init_weights": False, "transform_input": True}, 32),
    "inception_v3": ({"init_weights": False, "transform_input": True}, 75),
    "mnasnet0_5": ({}, 32),
    "shufflenet_v2_x0_5": ({}, 32),
    "regnet_x_400mf": ({}, 32),
    "regnet_y_400mf": ({}, 32),
    "mobilenet_v2": ({}, 32),
    "mobilenet_v3_small": ({}, 32),
    "efficientnet_b0": ({}, 32),
    "convnext_tiny": ({}, 32),
    "swin_t": ({}, 32),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_networks_are_complete(name):
    arguments, size = NETWORKS[name]
    torch.manual_seed(0)
    model = with_statistics(torchvision.models.get_model(name, weights=None, num_classes=10, **arguments))
    x = images(size=size)
    assert FullGrad(model).completeness_error(x).max() < 1e-4
    assert FullGrad(model.double()).completeness_error(x.double()).max() < 1e-9


def test_vgg_is_complete():
    torch.manual_seed(0)
    features = torchvision.models.vgg16_bn(weights=None, init_weights=False, num_classes=2).features
    model = with_statistics(nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)))
    assert FullGrad(model.double()).completeness_error(images().double()).max() < 1e-9


def test_timm_ghostnet_is_complete():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = with_statistics(timm.create_model("ghostnet_100", num_classes=10))
    assert FullGrad(model).completeness_error(images(size=64)).max() < 1e-4
    assert FullGrad(model.double()).completeness_error(images(size=64).double()).max() < 1e-9


@pytest.mark.parametrize("name", ["s3net_cifar", "s3net_tiny_k96", "s3net_imagenet_k48"])
def test_s3nets_are_complete(name):
    torch.manual_seed(0)
    model = with_statistics(create_model(name, num_classes=10))
    assert FullGrad(model).completeness_error(images()).max() < 1e-4
    assert FullGrad(model.double()).completeness_error(images().double()).max() < 1e-9


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU6(inplace=True),
        nn.Hardswish(inplace=True),
        nn.Hardsigmoid(),
        nn.SiLU(inplace=True),
        nn.GELU(),
        nn.Tanh(),
        nn.ELU(inplace=True),
        nn.PReLU(),
        nn.Softmax(dim=1),
        nn.GroupNorm(2, 6),
        nn.InstanceNorm2d(6),
        nn.LocalResponseNorm(3),
        nn.BatchNorm2d(6, affine=False),
        torchvision.ops.misc.SqueezeExcitation(6, 2),
        nn.ConstantPad2d(1, 0.7),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_any_module_carries_its_implicit_bias(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), layer, nn.Conv2d(6, 4, 3), nn.Flatten(), nn.LazyLinear(7)).double()
    model = with_statistics(model)
    with torch.no_grad():
        model(images().double())
        model[0].weight.mul_(8)  # far enough for ReLU6 and its like to saturate
    assert FullGrad(model).completeness_error(images().double()).max() < 1e-12


def test_the_implicit_bias_of_a_saturated_relu6_is_six():
    model = nn.Sequential(nn.Identity(), nn.ReLU6(), nn.Flatten())
    x = torch.tensor([[[[7.0, 3.0], [-1.0, 5.0]]]])
    _, terms = FullGrad(model).decompose(x)
    assert torch.equal(terms["1"], torch.tensor([[[[6.0, 0.0], [0.0, 0.0]]]]))


# ---- Which bias belongs to which gradient ----


class OutOfOrder(nn.Module):
    """Defined in another order than run; one module runs twice, one never, and a ReLU overwrites a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.never = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu_(self.norm(self.stem(x)))
        x = self.twice(x)
        x = self.twice(x.relu_())
        return self.head(x.mean((2, 3)))


def test_each_run_of_a_module_is_its_own_term():
    torch.manual_seed(0)
    model = with_statistics(OutOfOrder()).double()
    x = images(3, 8).double()
    explainer = FullGrad(model)
    gradient, terms = explainer.decompose(x)
    assert list(terms) == ["head", "twice#2", "twice", "norm", "stem"]  # in the order of the backward pass
    assert terms["twice"].shape == (3, 4, 8, 8)
    assert terms["head"].shape == (3, 3)
    total = (gradient * x).sum((1, 2, 3)) + sum(term.flatten(1).sum(1) for term in terms.values())
    torch.testing.assert_close(total, model.eval()(x).amax(1), rtol=1e-12, atol=1e-12)
    # the last run of `twice` has the head's weights, averaged over 64 places, as its gradient
    target = model(x).argmax(1)
    expected = model.head.weight[target] * model.twice.bias
    torch.testing.assert_close(terms["twice#2"].sum((2, 3)), expected, rtol=1e-12, atol=1e-12)


def test_the_classes_bias_is_the_heads_term():
    model = small_s3net().double()
    nn.init.normal_(model.classifier.bias)
    _, terms = FullGrad(model).decompose(images().double(), target=3)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    expected[:, 3] = model.classifier.bias[3].detach()
    assert torch.equal(terms["classifier"], expected)


class PaddedConv(nn.Conv2d):
    """Has a child, and yet a bias of its own."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.pad = nn.ZeroPad2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.pad(x))


def test_a_convolution_with_children_keeps_its_bias():
    torch.manual_seed(0)
    model = nn.Sequential(PaddedConv(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).double()
    explainer = FullGrad(model)
    _, terms = explainer.decompose(images(size=8).double())
    assert list(terms) == ["3", "0"]
    assert explainer.completeness_error(images(size=8).double()).max() < 1e-12


class SquareRoot(torch.autograd.Function):
    """Defines no forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient / (2 * x.sqrt())


class OfAutogradFunction(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return SquareRoot.apply(x.square() + 1)


def test_a_module_without_forward_mode_is_complete_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), OfAutogradFunction(), nn.Flatten(), nn.Linear(72, 3)).double()
    explainer = FullGrad(model)
    terms = explainer.decompose(images(size=8).double())[1]
    assert list(terms) == ["3", "1:SquareRoot", "1:add", "1:square", "0"]
    assert explainer.completeness_error(images(size=8).double()).max() < 1e-12


# ---- The maps ----


@pytest.mark.parametrize("network", ["s3net", "squeezenet1_0", "resnet18"])
def test_saliency_equals_the_published_formula(network):
    torch.manual_seed(0)
    if network == "s3net":
        model = small_s3net()
    else:
        model = with_statistics(torchvision.models.get_model(network, weights=None, num_classes=10))
    x = images(2, 64)
    maps = FullGrad(model).saliency(x)
    assert maps.shape == (2, 1, 64, 64)
    for image, saliency in zip(x, maps, strict=True):
        expected = benchmark().published_saliency(model.eval(), image[None])[0]
        assert expected.max() > 1
        torch.testing.assert_close(saliency, expected, rtol=1e-5, atol=1e-5 * expected.max().item())


def test_psi_rescales_each_image_by_itself():
    terms = torch.tensor([[[[-4.0, 2.0]], [[0.0, 1.0]]], [[[3.0, 3.0]], [[-3.0, 5.0]]]])
    expected = torch.tensor([[[[1.0, 0.5]], [[0.0, 0.25]]], [[[0.0, 0.0]], [[0.0, 1.0]]]])
    torch.testing.assert_close(psi(terms), expected, rtol=1e-6, atol=1e-6)


def test_a_module_without_bias_leaves_no_rounding_in_the_map():
    class Permuted(nn.Module):  # linear, but of no kind that FullGrad knows
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 0.1) @ torch.full((8, 8), 1 / 3) / 0.7

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), Permuted(), nn.Flatten(), nn.Linear(256, 3, bias=False))
    x = images(2, 8)
    gradient, terms = FullGrad(model).decompose(x)
    assert terms == {}
    torch.testing.assert_close(FullGrad(model).saliency(x), psi(gradient * x).sum(1, keepdim=True))


def test_a_map_does_not_depend_on_the_batch():
    model = small_s3net()
    x = images(5)
    together = FullGrad(model, batch_size=5).saliency(x)
    torch.testing.assert_close(FullGrad(model, batch_size=2).saliency(x), together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(FullGrad(model).saliency(x[3:4]), together[3:4], rtol=1e-4, atol=1e-4)


def test_decompose_puts_chunks_together():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.cat([images(2, 8) * 0.01, images(2, 8) * 100])  # no image of the first chunk saturates
    model(x)
    gradient, terms = FullGrad(model, batch_size=2).decompose(x)
    whole_gradient, whole = FullGrad(model, batch_size=4).decompose(x)
    assert terms.keys() == whole.keys() == {"0", "1", "3"}
    torch.testing.assert_close(gradient, whole_gradient)
    for name in whole:
        torch.testing.assert_close(terms[name], whole[name])
    assert (terms["1"][:2] == 0).all()


def test_targets_choose_the_explained_class():
    model = small_s3net()
    x = images(2)
    explainer = FullGrad(model)
    each = torch.cat([explainer.saliency(x, target=k) for k in (1, 4)], dim=1)
    together = explainer.explain(x, torch.tensor([[1, 4], [1, 4]]))
    assert together.maps.shape == (2, 2, 32, 32)
    assert together.completeness_error.shape == (2, 2)
    torch.testing.assert_close(together.maps, each, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(each[:, 0], each[:, 1], rtol=0.1)
    best = explainer.explain(x)
    assert torch.equal(best.target[:, 0], model.eval()(x).argmax(1))
    torch.testing.assert_close(explainer.saliency(x, best.target[:, 0]), best.maps)


def test_channels_last_networks_are_drawn_the_right_way_round():
    """A bias that only the top rows' gradient reaches lights the top rows, whatever the layout inside."""

    class TopRows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act = nn.Linear(3, 5), nn.GELU()
            self.norm = nn.LayerNorm(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.act(self.linear(x.permute(0, 2, 3, 1))))  # (N, H, W, C)
            return x[:, :4].mean((1, 2))

    torch.manual_seed(0)
    saliency = FullGrad(TopRows()).saliency(images(1, 16))[0, 0]
    assert saliency[:4].min() > 0
    assert saliency[5:].abs().max() == 0


# ---- What is left behind ----


def state_of(model: nn.Module) -> list:
    modules = list(model.modules())
    return [
        [module.training for module in modules],
        [getattr(module, "inplace", None) for module in modules],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules],
        [sorted(vars(m)) for m in modules],
        [name for name, _ in model.named_buffers()],
    ]


def mixed_state_googlenet() -> nn.Module:
    model = torchvision.models.googlenet(
        weights=None, init_weights=False, transform_input=True, aux_logits=False, num_classes=4
    )
    model.inception3a.eval()
    model.conv1.conv.weight.requires_grad_(False)
    model.add_module("extra", nn.ReLU6(inplace=True))
    model.inception3b.register_forward_hook(lambda *_: None)
    return model


def test_the_model_is_handed_back_as_it_was():
    model = mixed_state_googlenet()
    before, buffers = state_of(model), [buffer.clone() for buffer in model.buffers()]
    FullGrad(model).saliency(images())
    assert state_of(model) == before
    assert all(torch.equal(old, new) for old, new in zip(buffers, model.buffers(), strict=True))


def test_the_model_is_handed_back_as_it_was_after_an_exception():
    model = mixed_state_googlenet()
    before = state_of(model)
    with pytest.raises(InputError, match="no class 4"):
        FullGrad(model).saliency(images(), target=4)
    assert state_of(model) == before
    model.fc.forward = lambda x: 1 / 0
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        FullGrad(model).saliency(images())
    assert state_of(model) == before


def test_the_images_are_left_alone_and_no_graph_is_kept():
    model, x = small_s3net(), images()
    kept = x.clone()
    with torch.no_grad():
        maps = FullGrad(model).saliency(x)
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert not maps.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(FullGrad(model).saliency(images()), maps)


# ---- Where it cannot hold ----


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.conv(x))


def test_a_product_outside_of_any_module_is_complete_and_composites_are_accepted():
    torch.manual_seed(0)
    model = nn.Sequential(Gate(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    with pytest.warns(UserWarning, match="composites has no effect"):
        explainer = FullGrad(model, composites=[Gate])
    assert explainer.completeness_error(images()).max() < 1e-6


def test_a_network_whose_logits_are_all_zero_is_complete():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    explanation = FullGrad(model).explain(images(size=8))
    assert (explanation.completeness_error == 0).all()
    assert (explanation.maps == 0).all()


@pytest.mark.parametrize(
    ("x", "target", "message"),
    [
        (torch.zeros(3, 8, 8), None, r"images have shape \(3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), None, r"images have shape \(0, 3, 8, 8\)"),
        (images(), 5, "no class 5: this network has the classes 0 to 4"),
        (images(), -1, "no class -1"),
        (images(), torch.tensor([1, 2, 3]), r"target has shape \(3,\) for 2 images"),
        (images(), torch.tensor([0.5, 1.0]), r"target has type torch.float32"),
        (images(), torch.zeros(2, 0, dtype=torch.long), "target names no class"),
    ],
)
def test_bad_input_is_named(x, target, message):
    with pytest.raises(InputError, match=message):
        FullGrad(small_s3net()).saliency(x, target)


def test_only_classifiers_are_explained():
    with pytest.raises(InputError, match=r"the model gave \(2, 4, 6, 6\)"):
        FullGrad(nn.Conv2d(3, 4, 3)).saliency(images(size=8))
    with pytest.raises(InputError, match="batch_size is 0"):
        FullGrad(small_s3net(), batch_size=0)
    with pytest.raises(InputError, match="decompose takes one class"):
        FullGrad(small_s3net()).decompose(images(), torch.zeros(2, 2, dtype=torch.long))
