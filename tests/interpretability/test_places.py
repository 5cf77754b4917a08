"""Bias-gradients of networks that compute on tokens and in windows are drawn where they belong."""

from contextlib import ExitStack

import pytest
import torch
import torchvision
from torch import Tensor, nn

from bias_rules import ChannelBias
from bias_sums import SaliencySum
from explained_model import prepared
from full_grad import FullGrad, psi
from operation_bias import BiasGradient, Operations, watched
from places import Places


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def with_biases(model: nn.Module) -> nn.Module:
    """No bias is 0, so that every function counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.double().eval()


def small_swin() -> nn.Module:
    torch.manual_seed(0)
    return with_biases(torchvision.models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], num_classes=5))


def small_maxvit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"stem_channels": 8, "partition_size": 4, "block_channels": [12, 12], "block_layers": [1, 1], "head_dim": 4}
    model = torchvision.models.MaxVit((64, 64), stochastic_depth_prob=0.0, num_classes=5, **sizes)
    return with_biases(model)


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return with_biases(torchvision.models.VisionTransformer(32, 8, 2, 2, 12, 24, num_classes=5))


def in_rows(gradient: Tensor, bias: Tensor) -> Tensor:
    """The psi of a bias-gradient with the channels last or first, summed over the channels: `(N, rows, columns)`."""
    if gradient.shape[-1] == len(bias):
        return psi(gradient * bias).sum(-1)
    return psi(gradient * bias[:, None, None]).sum(1)


def planes_of(model: nn.Module, x: Tensor, parts: list[tuple[nn.Module, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """For each module and bias of it: the plane that FullGrad draws, and the one of the gradient at the output."""
    drawn, gradients = {}, {}

    class Planes(SaliencySum):
        def add(self, term: BiasGradient) -> None:
            self.planes.clear()
            super().add(term)
            if isinstance(term.bias, ChannelBias):
                drawn[term.bias.values.data_ptr()] = [plane.clone() for plane in self.planes.values()]

    def keep(index):
        return lambda module, args, output: output.register_hook(lambda g: gradients.__setitem__(index, g)) and None

    with ExitStack() as undo, prepared(model):
        for i, (module, _) in enumerate(parts):
            undo.callback(module.register_forward_hook(keep(i)).remove)
        copy = x.clone().requires_grad_().clone()
        operations = Operations(copy)
        operations.sink = Planes(x)
        with watched(operations):
            logits = model(copy)
        logits[:, 0].sum().backward()
    return [(*drawn[bias.data_ptr()], in_rows(gradients[i], bias.detach())) for i, (_, bias) in enumerate(parts)]


def swin_parts(model: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    kind = torchvision.models.swin_transformer.ShiftedWindowAttention
    return [(module, module.proj.bias) for module in model.modules() if isinstance(module, kind)]


def maxvit_parts(model: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    kind = torchvision.models.maxvit.PartitionAttentionLayer
    return [(module, module.mlp_layer[3].bias) for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    ("build", "size", "parts", "count"), [(small_swin, 32, swin_parts, 4), (small_maxvit, 64, maxvit_parts, 4)]
)
@pytest.mark.parametrize("n", [1, 2])
def test_windows_are_drawn_where_they_lie_after_they_are_put_back(build, size, parts, count, n):
    model = build()
    planes = planes_of(model, images(n, size), parts(model))
    assert len(planes) == count
    for drawn, expected in planes:
        torch.testing.assert_close(drawn, expected, rtol=1e-9, atol=1e-9)
    flipped = [torch.allclose(drawn, expected.flip(-1), rtol=1e-2, atol=1e-2) for drawn, expected in planes]
    assert sum(flipped) <= 1  # a wrong place would show, but after the last mixing all places are alike


@pytest.mark.parametrize("build", [small_swin, small_maxvit, small_vit])
def test_networks_of_tokens_are_complete(build):
    x = images(2, 64 if build is small_maxvit else 32)
    assert FullGrad(build()).completeness_error(x).max() < 1e-12


class Tokens(nn.Module):
    """Attends from a class token to patches; only the patches of the top half reach the output's first class."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 4, 4, 4)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Parameter(torch.randn(1, 17, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        x = self.mix(self.norm(x))
        return torch.stack([x[:, 1:9].sum((1, 2)), x[:, 0].sum(1)], 1)


def test_tokens_are_drawn_at_their_patches():
    explanation = FullGrad(Tokens().double()).explain(images(size=16), target=torch.zeros(2, dtype=torch.long))
    assert explanation.maps[:, 0, :4].amin() > 0
    assert (explanation.maps[:, 0, 11:] == 0).all()
    torch.testing.assert_close(explanation.drawn, torch.ones_like(explanation.drawn), rtol=1e-12, atol=0)
    assert explanation.drawn.amax() <= 1


def test_what_has_no_place_is_not_drawn():
    explanation = FullGrad(Tokens().double()).explain(images(size=16), target=torch.ones(2, dtype=torch.long))
    assert (explanation.maps == 0).all()
    assert (explanation.drawn == 0).all()


def test_the_share_drawn_is_that_of_the_absolute_terms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    x = images(2, 8)
    explainer = FullGrad(model)
    gradient, terms = explainer.decompose(x)
    pixels, conv, classifier = (t.abs().flatten(1).sum(1) for t in (gradient * x, terms["0"], terms["3"]))
    expected = (pixels + conv) / (pixels + conv + classifier)
    torch.testing.assert_close(explainer.explain(x).drawn[:, 0], expected, rtol=1e-12, atol=1e-12)
    assert (expected < 0.999).all()


# ---- Functions that move data ----


def followed(function, *shape: int) -> Tensor:
    """The rows and columns of a function's output, `(2, ...)`, of an image whose pixels are at their places."""
    x = torch.zeros(2, 3, *shape).requires_grad_().clone()
    operations = Operations(x)
    with watched(operations):
        output = function(x)
    places = output._places.expand(output.shape)
    return torch.stack([places.row, places.column])


def pixels(rows: int, columns: int) -> Tensor:
    """The rows and columns of `(2, 3, rows, columns)` images."""
    places = torch.stack(torch.meshgrid(torch.arange(rows).float(), torch.arange(columns).float(), indexing="ij"))
    return places[:, None, None].expand(2, 2, 3, rows, columns)


def windows(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)


MOVES = {
    "windows": windows,
    "shift": lambda x: torch.roll(x, (-1, 2), (2, 3)),
    "flip and transpose": lambda x: x.flip(2).mT,
    "slices": lambda x: torch.cat([x[:, :, 0::2, 1::2], x[:, :, 1::2, 0::2]], 1),
    "chunks": lambda x: torch.cat(x.chunk(2, 2)[::-1], 2),
    "stack": lambda x: torch.stack([x, x.flip(3)], 1).flatten(1, 2),
    "tokens": lambda x: x.flatten(2).permute(2, 0, 1)[1:],
    "repeat": lambda x: x.repeat_interleave(2, 3).squeeze(1).unsqueeze(0),
    "gather": lambda x: x.index_select(3, torch.tensor([2, 0])),
    "unfold": lambda x: x.unfold(2, 2, 1),
    "shuffle": lambda x: x.view(2, 3, 1, 4, 6).transpose(1, 2).reshape(2, 3, 4, 6),
}


@pytest.mark.parametrize("name", MOVES)
def test_places_move_with_the_elements(name):
    rows, columns = pixels(4, 6)
    expected = torch.stack([MOVES[name](rows), MOVES[name](columns)])
    assert torch.equal(followed(MOVES[name], 4, 6), expected)


def test_padding_has_no_place():
    padded = followed(lambda x: nn.functional.pad(x, (1, 0, 2, 0)), 4, 6)
    assert padded[:, :, :, :2].isnan().all() and padded[:, :, :, :, 0].isnan().all()
    assert torch.equal(padded[:, :, :, 2:, 1:], pixels(4, 6))
    patches = followed(lambda x: nn.functional.unfold(x, 3, padding=1), 4, 6)
    assert patches[0, 0, 0, 0].isnan() and patches[1, 0, 8, 0] == 1


def test_a_convolution_after_padding_starts_a_fresh_grid():
    weight = torch.ones(2, 3, 2, 2)
    rows, _ = followed(lambda x: nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), weight, None, 2), 4, 6)
    assert rows[1, 1, :, 0].tolist() == [0.5, 2.5]


@pytest.mark.parametrize("order", [1, -1])
def test_a_convolution_after_a_shortcut_by_subsampling_has_its_places(order):
    """The shortcuts of ResNets for CIFAR: every second pixel, and channels of zeros."""
    weight = torch.ones(5, 3, 3, 3)

    def function(x: Tensor) -> Tensor:
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        first, second = (nn.functional.conv2d(x, weight, None, 2, 1), shortcut)[::order]
        return nn.functional.conv2d(first + second, torch.ones(4, 5, 1, 1))

    rows, columns = followed(function, 4, 6)
    torch.testing.assert_close(rows[1, 1, :, 0], torch.tensor([0.5, 2.5]), rtol=0, atol=0.5)
    torch.testing.assert_close(columns[1, 1, 0], torch.tensor([0.5, 2.5, 4.5]), rtol=0, atol=0.5)


def test_a_pool_starts_a_fresh_grid_and_a_wide_mean_has_no_place():
    pooled = followed(lambda x: nn.functional.avg_pool2d(x, 2), 4, 6)
    assert pooled[0, 0, 0, :, 0].tolist() == [0.5, 2.5] and pooled[1, 0, 0, 0].tolist() == [0.5, 2.5, 4.5]
    assert followed(lambda x: x.mean((2, 3)), 4, 6).isnan().all()
    assert followed(lambda x: x.mean(3), 4, 6)[1].isnan().all()
    narrow = followed(lambda x: x[:, :, :, :2].mean(3), 4, 8)
    assert narrow[1, 0, 0].tolist() == [0.5] * 4 and narrow[0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("function", "axis", "inner"),
    [
        (lambda x: x, 0, 1),
        (windows, 0, 6),
        (lambda x: x.flatten(2).permute(2, 0, 1), 1, 1),
        (lambda x: x.permute(1, 0, 2, 3).flatten(0, 1), 0, 1),
        (lambda x: x.flatten(2).permute(2, 0, 1).unflatten(2, (3, 1)).flatten(1, 2), 1, 3),
        (lambda x: x.sum(0), None, 1),
    ],
)
def test_the_axis_of_the_images_is_found(function, axis, inner):
    x = torch.zeros(2, 3, 4, 6).requires_grad_().clone()
    places = Places(x)
    operations = Operations(x)
    operations.places = places
    with watched(operations):
        output = function(x)
    assert places.layout(output)[:2] == (axis, inner)
