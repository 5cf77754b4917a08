"""Maps of other gradient methods on networks whose attributions are known."""

import pytest
import torch
from torch import Tensor, nn

from rival_maps import RIVALS, rival_map


class Weighted(nn.Module):
    """The logit of class 1 is the sum of `weights * x ** power` over the pixels."""

    def __init__(self, weights: Tensor, power: int) -> None:
        super().__init__()
        self.weights, self.power = nn.Parameter(weights), power

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.weights * x**self.power).flatten(1).sum(1)
        return torch.stack([-scores, scores], dim=1)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def weights_of(seed: int) -> Tensor:
    return torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(seed))


def test_maps_of_a_linear_network(images):
    weights = weights_of(1)
    model, target = Weighted(weights, power=1), torch.tensor([1, 0])
    for method in ("gradient", "SmoothGrad"):
        expected = weights.abs().sum(0).expand(2, 5, 5)
        assert torch.allclose(rival_map(method, model, images, target), expected, atol=1e-5)
    for method in ("gradient x input", "integrated gradients"):
        expected = (weights * images).abs().sum(1)
        assert torch.allclose(rival_map(method, model, images, target), expected, atol=1e-5)


def test_integrated_gradients_add_up_to_the_logit_of_a_curved_network(images):
    """For w x^2 they are w x^2 at each pixel; gradient x input is twice as much."""
    weights = weights_of(2).abs()
    model, target = Weighted(weights, power=2), torch.tensor([1, 1])
    integrated = rival_map("integrated gradients", model, images, target)
    assert torch.allclose(integrated.sum((1, 2)), model(images)[:, 1], rtol=1e-3)
    assert torch.allclose(rival_map("gradient x input", model, images, target), 2 * integrated, rtol=1e-3)


@pytest.mark.parametrize("method", RIVALS)
def test_maps_do_not_change_the_model_or_the_random_numbers(method, images):
    model = Weighted(weights_of(3), power=2)
    state = torch.get_rng_state()
    maps = rival_map(method, model, images, torch.tensor([0, 1]))
    assert maps.shape == (2, 5, 5) and maps.min() >= 0 and not maps.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert model.weights.grad is None and model.weights.requires_grad
    assert torch.equal(maps, rival_map(method, model, images, torch.tensor([0, 1])))
