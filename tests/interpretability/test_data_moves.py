"""Every function of torch that moves data: its outputs have the right places, or none."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from full_grad import FullGrad
from operation_bias import Operations, watched

N, C, H, W = SHAPE = (2, 3, 4, 6)
REVERSED = torch.arange(W).flip(0).expand(SHAPE).contiguous()
PAIR = torch.tensor([2, 0])
ONE_HOT = torch.eye(W, dtype=torch.float64).flip(0)


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def write(function, start=torch.clone):
    """A function that writes into a copy of its input, or into zeros, and returns it."""

    def written(x: Tensor) -> Tensor:
        y = start(x)
        function(y, x)
        return y

    return written


def constant(x: Tensor) -> Tensor:
    return zeros(*SHAPE)


# The places of all elements are followed exactly.
FOLLOWED = {
    "view": lambda x: x.view(N, C, H * W),
    "reshape": lambda x: x.reshape(N, 9, 8),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(3, (2, 3)),
    "ravel": lambda x: x.ravel(),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "permute": lambda x: x.permute(3, 1, 0, 2),
    "T": lambda x: x[0, 0].T,
    "mT": lambda x: x.mT,
    "mH": lambda x: x.mH,
    "t": lambda x: x[1, 0].t(),
    "adjoint": lambda x: x.adjoint(),
    "movedim": lambda x: x.movedim(3, 0),
    "swapaxes": lambda x: x.swapaxes(0, 3),
    "flip": lambda x: x.flip(2, 3),
    "fliplr": lambda x: x[0, 0].fliplr(),
    "flipud": lambda x: torch.flipud(x[0, 0]),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "roll": lambda x: x.roll((1, -2), (2, 3)),
    "roll of the flattened tensor": lambda x: x.roll(5),
    "fftshift": lambda x: torch.fft.fftshift(x, dim=(2, 3)),
    "narrow": lambda x: x.narrow(3, 1, 3),
    "select": lambda x: x.select(1, 0),
    "index_select": lambda x: x.index_select(3, PAIR),
    "gather": lambda x: x.gather(3, REVERSED),
    "take_along_dim": lambda x: torch.take_along_dim(x, REVERSED, 3),
    "take": lambda x: x.take(torch.tensor([5, 100, 77])),
    "masked_select": lambda x: x.masked_select(REVERSED > 2),
    "index of slices": lambda x: x[:, None, ..., 1::2],
    "index of lists": lambda x: x[:, :, [0, 2], [1, 5]],
    "index of a mask": lambda x: x[:, :, torch.arange(H) % 2 == 0],
    "chunk": lambda x: x.chunk(2, 3)[1],
    "split": lambda x: x.split([2, 4], 3)[1],
    "tensor_split": lambda x: x.tensor_split(3, 3)[2],
    "hsplit": lambda x: torch.hsplit(x, 3)[1],
    "vsplit": lambda x: torch.vsplit(x, 2)[1],
    "dsplit": lambda x: torch.dsplit(x, 2)[1],
    "unbind": lambda x: x.unbind(3)[2],
    "unsafe_chunk": lambda x: torch.unsafe_chunk(x, 2, 3)[1],
    "expand": lambda x: x[:, :1].expand(N, 5, H, W),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x[:, :1], x)[0],
    "repeat": lambda x: x.repeat(1, 2, 1, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 3),
    "tile": lambda x: x.tile(2, 1),
    "diagonal": lambda x: x.diagonal(0, 2, 3),
    "unfold": lambda x: x.unfold(3, 2, 2),
    "F.unfold": lambda x: F.unfold(x, 2, stride=2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 3),
    "cat": lambda x: torch.cat([x, x.flip(3)], 3),
    "stack": lambda x: torch.stack([x, x.flip(3)], 2),
    "hstack": lambda x: torch.hstack([x, x.flip(3)]),
    "vstack": lambda x: torch.vstack([x, x.flip(3)]),
    "dstack": lambda x: torch.dstack([x, x.flip(3)]),
    "column_stack": lambda x: torch.column_stack([x, x.flip(3)]),
    "row_stack": lambda x: torch.row_stack([x, x.flip(3)]),
    "pad by reflection": lambda x: F.pad(x, (2, 1, 0, 0), "reflect"),
    "pad by repetition": lambda x: F.pad(x, (2, 1, 1, 0), "replicate"),
    "pad around": lambda x: F.pad(x, (2, 1, 0, 0), "circular"),
    "index_copy": lambda x: x.index_copy(3, PAIR, x[..., 3:5]),
    "index_put": lambda x: x.index_put((torch.tensor([0]),), x[1:]),
    "put": lambda x: x.put(torch.tensor([0, 50]), x.flatten()[:2].flip(0)),
    "scatter": lambda x: x.scatter(3, REVERSED[..., :2].contiguous(), x[..., :2]),
    "scatter into a constant": lambda x: zeros(*SHAPE).scatter_(3, REVERSED, x),
    "masked_scatter": lambda x: x.masked_scatter(torch.arange(W) % 2 == 0, x.flip(3)),
    "select_scatter": lambda x: x.select_scatter(x[..., 5], 3, 0),
    "slice_scatter": lambda x: x.slice_scatter(x[..., 3:].flip(3), 3, 0, 3),
    "diagonal_scatter": lambda x: x.diagonal_scatter(x[..., :4].diagonal(0, 2, 3).flip(2), 0, 2, 3),
    "copy_": write(lambda y, x: y.copy_(x.flip(3)), constant),
    "writing into slices": write(lambda y, x: y.__setitem__((..., slice(1, 3)), x[..., 0:2])),
    "writing by a list": write(lambda y, x: y.__setitem__((..., list(range(W))), x.flip(3)), constant),
    "einsum as a permutation": lambda x: torch.einsum("nchw->nwhc", x),
    "conv2d of a transposed image": lambda x: F.conv2d(x.mT, weight(5, C, 1, 1)),
    "conv2d of a flipped image": lambda x: F.conv2d(x.flip(3), weight(5, C, 1, 1)),
    "conv2d of a shifted image": lambda x: F.conv2d(x.roll(3, 3), weight(5, C, 1, 1)),
    "conv2d of a part": lambda x: F.conv2d(x[..., :3], weight(5, C, 1, 1)),
    "sort of the channels": lambda x: x.sort(1)[0],
}  # fmt: skip
# Some or all elements have no place, because they come from several, from constants, or by an order of the values.
PARTLY_FOLLOWED = {
    "cat with a constant": lambda x: torch.cat([zeros(N, C, H, 1), x], 3),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "F.unfold with padding": lambda x: F.unfold(x, 3, padding=1),
    "writing into a part of a constant": write(lambda y, x: y.__setitem__((..., slice(1, 6)), x[..., :5]), constant),
    "copy_ into a view": write(lambda y, x: y[..., :3].copy_(x[..., 3:])),
    "writing into a transposed view": write(lambda y, x: y.mT.__setitem__((..., slice(2), slice(4)), x.mT[..., 4:, :])),
    "diag_embed": lambda x: x.diag_embed(),
    "as_strided": lambda x: x.as_strided((N, 2, 2), (72, 3, 1), 1),
    "as_strided_scatter": lambda x: x.as_strided_scatter(x[:, 0, :2, :2].flip(1), (N, 2, 2), (72, 6, 1)),
    "index_add": lambda x: x.index_add(3, PAIR, x[..., 3:5]),
    "index_reduce": lambda x: x.index_reduce(3, PAIR, x[..., 3:5], "amax"),
    "scatter_add": lambda x: zeros(N, C, H, 2 * W).scatter_add(3, torch.arange(W).expand(SHAPE) * 2, x),
    "scatter_reduce": lambda x: x.scatter_reduce(3, REVERSED, x, "amax"),
    "where": lambda x: torch.where(torch.arange(W) < 3, x, x.roll(3, 3)),
    "maximum": lambda x: torch.maximum(x, x.roll(3, 3)),
    "block_diag": lambda x: torch.block_diag(x[0, 0], x[1, 0]),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0, 0], x[0, 0, :, 0], indexing="ij")[1],
    "cartesian_prod": lambda x: torch.cartesian_prod(x[0, 0, 0], x[0, 0, :, 0]),
    "sort": lambda x: x.sort(3)[0],
    "msort": lambda x: x.msort(),
    "topk": lambda x: x.topk(2, 3)[0],
    "kthvalue": lambda x: x.kthvalue(2, 3, keepdim=True)[0],
    "median": lambda x: x.median(3, keepdim=True)[0],
    "max": lambda x: x.max(3)[0],
    "cummax": lambda x: x.cummax(3)[0],
    "cumsum": lambda x: x.cumsum(3),
    "cumsum_": write(lambda y, x: y.cumsum_(3)),
    "cumprod": lambda x: x.cumprod(3),
    "logcumsumexp": lambda x: x.logcumsumexp(3),
    "diff": lambda x: x.diff(dim=3, prepend=x[..., :1]),
    "F.fold": lambda x: F.fold(F.unfold(x, 2, stride=2), (H, W), 2, stride=2),
    "max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "einsum of a permutation matrix": lambda x: torch.einsum("nchw,vw->nchv", x, ONE_HOT),
    "einsum that mixes tokens": lambda x: torch.einsum("bnd,nm->bmd", x.flatten(2).mT, weight(24, 24)),
    "einsum of a diagonal": lambda x: torch.einsum("nii->ni", x[:, 0, :, :4]),
    "tensordot": lambda x: torch.tensordot(x, ONE_HOT, dims=([3], [0])),
    "matmul from the right": lambda x: x @ ONE_HOT,
    "matmul from the left": lambda x: weight(H, H) @ x,
    "inner": lambda x: torch.inner(x, ONE_HOT),
    "multi_dot": lambda x: torch.linalg.multi_dot([x[0, 0], ONE_HOT]),
    "kron": lambda x: torch.kron(x[0, 0], weight(1, 2)),
    "linear of the columns": lambda x: F.linear(x, weight(W, W)),
    "linear of the tokens": lambda x: F.linear(x.flatten(2), weight(24, 24)),
    "conv1d that mixes tokens": lambda x: F.conv1d(x.flatten(2).mT, weight(24, 24, 1)),
    "max_pool2d of a flipped image": lambda x: F.max_pool2d(x.flip(3), 2),
    "conv2d with a step of a shifted image": lambda x: F.conv2d(x.roll(3, 3), weight(5, C, 1, 1), stride=2),
    "max_pool2d of a padded window": lambda x: F.max_pool2d(F.pad(x, (0, 6, 0, 4)), 2),
    "attention to another part": lambda x: F.scaled_dot_product_attention(
        x[..., 0].mT, x[..., 5].mT * torch.ones(4, 1).double(), x[..., 5].mT
    ),
    "interpolate of a part": lambda x: F.interpolate(x[..., 3:], size=(H, W)),
    "grid_sample": lambda x: F.grid_sample(x, weight(N, H, W, 2), align_corners=False),
    "fft": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * weight(H, W // 2 + 1), s=(H, W)),
    "inv": lambda x: torch.linalg.inv(x[..., :4]),
}  # fmt: skip
# The place is that of the nearest part of the image, or the mean of several near ones.
NEARLY_FOLLOWED = {
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1)[:, :8], 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "avg_pool2d after a reflected border": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "reflect"), 3, 2),
    "avg_pool2d after a border around": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "circular"), 3, 1),
    "conv2d": lambda x: F.conv2d(x, weight(5, C, 3, 3), padding=1),
    "conv1d of tokens": lambda x: F.conv1d(x.flatten(2), weight(5, C, 3), padding=1),
    "linear of the channels": lambda x: F.linear(x.movedim(1, -1), weight(5, C)),
    "linear with keywords": lambda x: F.linear(x.movedim(1, -1), weight=weight(5, C), bias=weight(5)),
    "attention with keywords": lambda x: F.scaled_dot_product_attention(
        query=x[:, 0, :, :1], key=x[:, 0, :, :1], value=x[:, 0, :, :1]
    ),
    "einsum of the channels": lambda x: torch.einsum("nchw,cd->nhwd", x, weight(C, 5)),
    "einsum of queries and keys": lambda x: torch.einsum("nchw,nchv->nhwv", x, x),
    "addmm": lambda x: torch.addmm(zeros(1, 5), x[0].flatten(1).mT, weight(C, 5)),
    "cumsum of the channels": lambda x: x.cumsum(1),
    "max over the channels": lambda x: x.max(1)[0],
    "addition": lambda x: x + x.roll(1, 3)[..., :].roll(-1, 3),
    "normalize": lambda x: F.normalize(x, dim=1),
    "mean of two columns": lambda x: x.unflatten(3, (6, 1)).mean(4) + x,
}  # fmt: skip


def sources_and_places(function) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column: the smallest and largest of an output's sources, and the place that is followed.

    Three tensors `(3, outputs)`. The sources are the inputs on which an output depends.
    """
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    copy = x.clone().requires_grad_().clone()
    with watched(Operations(copy)):
        output = function(copy)
    depends = torch.autograd.functional.jacobian(function, x).reshape(output.numel(), -1).abs() > 1e-9
    axes = [torch.arange(size, dtype=torch.float64) for size in SHAPE]
    image, _, row, column = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    sources = torch.stack([image, row, column])[:, None]
    low, high = torch.where(depends, sources, torch.inf).amin(2), torch.where(depends, sources, -torch.inf).amax(2)
    places = getattr(output, "_places", None)
    if places is None:
        return low, high, torch.full_like(low, torch.nan)
    return low, high, torch.stack([axis.expand(output.shape).flatten().double() for axis in places])


def wrong(low: Tensor, high: Tensor, places: Tensor, slack: float) -> Tensor:
    """Whether an output that has a place and a source lies outside of its sources."""
    outside = ((places < low - slack) | (places > high + slack)).any(0)
    return outside & ~places.isnan().any(0) & low.isfinite().all(0)


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_function_that_moves_data_is_followed(name):
    low, high, places = sources_and_places(FOLLOWED[name])
    assert torch.equal(low, high) and torch.allclose(places, low, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PARTLY_FOLLOWED)
def test_what_cannot_be_followed_has_no_place(name):
    low, high, places = sources_and_places(PARTLY_FOLLOWED[name])
    assert places.isnan().any()
    assert not wrong(low, high, places, 1e-5).any()


@pytest.mark.parametrize("name", NEARLY_FOLLOWED)
def test_a_function_of_neighbours_is_followed(name):
    low, high, places = sources_and_places(NEARLY_FOLLOWED[name])
    assert not places.isnan().any()
    assert not wrong(low, high, places, 0.5).any()


# ---- Moves that depend on the images, and parts of an image ----


def strongest_columns(x: Tensor) -> Tensor:
    return x[..., x.detach().mean((0, 1, 2)).topk(2).indices]


def shifted(x: Tensor) -> Tensor:
    return x.roll(int(x.detach().mean((0, 1, 2)).argmax()), 3)


def flipped(x: Tensor) -> Tensor:
    return x.flip(3) if x[..., 0].mean() > 0 else x


def written(x: Tensor) -> Tensor:
    y = zeros(1, C, H, W)
    y[..., x.detach().mean((0, 1, 2)).argsort()] = x
    return y


class Moving(nn.Module):
    """Moves pixels, adds a bias to half of the columns that result, and reads them."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.bias, self.weight = nn.Parameter(weight(C, H, W)), nn.Parameter(weight(2, C, H, W))

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(x)
        width = x.shape[-1]
        return ((x + self.bias[..., :width])[:, None] * self.weight[..., :width]).sum((2, 3, 4))


@pytest.mark.parametrize("function", [strongest_columns, shifted, flipped, written], ids=lambda f: f.__name__)
def test_places_are_followed_again_when_the_images_move_in_another_way(function):
    model, images = Moving(function), weight(6, C, H, W)
    explainer = FullGrad(model, batch_size=1)
    for image in images:
        torch.testing.assert_close(explainer.saliency(image[None]), FullGrad(model).saliency(image[None]))


@pytest.mark.parametrize("columns", [slice(0, 3), slice(2, 3), slice(3, 6)])
def test_a_part_of_the_image_is_drawn_where_it_lies(columns):
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(weight(C, H, W)[..., columns])

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([(x[..., columns] + self.bias).sum((1, 2, 3))] * 2, 1)

    explanation = FullGrad(Part()).explain(zeros(*SHAPE))  # images of 0: only the bias is drawn
    drawn = (explanation.maps > 0).any(2)[0, 0]
    expected = torch.zeros(W, dtype=torch.bool)
    expected[columns] = True
    assert torch.equal(drawn, expected)
    torch.testing.assert_close(explanation.drawn, torch.ones(N, 1, dtype=torch.float64))
