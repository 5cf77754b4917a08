"""Lipschitz constants along a network's graph, and the study of a spectral margin bound."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import lipschitz
import spectral_bounds
from data.image_sets import ImageSet
from lipschitz import Bound, linear_layers, spectral_complexity, spectral_norm
from s3net_common.errors import InputError
from s3net_networks import create_network
from spectral_bounds import NETWORKS, Args, bound_and_gap, margins_of

SMALL = {
    "sparse": ("s3net_cifar", {"growth_rate": 3, "depth": 7}),
    "dense": ("s3net_cifar", {"growth_rate": 3, "depth": 7, "connections": "dense"}),
    "chain": ("s3net_cifar", {"growth_rate": 8, "depth": 7, "connections": "chain"}),
    "residual": ("s3net_cifar", {"growth_rate": 3, "depth": 10, "connections": "residual"}),
    "densenet": ("densenet_cifar", {"growth_rate": 3, "depth": 7}),
    "resnet": ("resnet20_cifar", {}),
}


def with_statistics(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(-1.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("kind", SMALL)
def test_no_change_of_the_image_changes_the_logits_more(kind):
    """The largest ratio of changes that gradient ascent finds is below the constant, and the Jacobian's norm too."""
    torch.manual_seed(0)
    name, options = SMALL[kind]
    model = with_statistics(create_network(name, 4, **options))
    layers, constant = linear_layers(model, 8)
    convolutions = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    assert len(layers) == convolutions
    for seed in range(2):
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        jacobian = torch.func.jacrev(lambda v: model(v)[0])(x).detach().reshape(4, -1)
        norm = float(torch.linalg.matrix_norm(jacobian, 2))
        assert 0 < norm <= constant


def test_a_linear_chain_has_the_product_of_its_norms():
    """Without BatchNorm and ReLU the constant of two matrices and an average is the product, and R is eq. (1.2)."""
    torch.manual_seed(0)

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 5, 1, bias=False), nn.Linear(5, 4)

        def forward(self, x):
            return self.linear(self.conv(x).mean(dim=(2, 3)))

    model = Chain()
    layers, constant = linear_layers(model, 6)
    first, second = model.conv.weight.detach()[:, :, 0, 0], model.linear.weight.detach()
    norms = [float(torch.linalg.matrix_norm(weight, 2)) for weight in (first, second)]
    assert [layer.spectral_norm for layer in layers] == pytest.approx(norms, rel=1e-3)
    assert constant == pytest.approx(norms[0] * norms[1] / 6, rel=2e-3)
    rows = [36 * float(first.norm(dim=1).sum()), float(second.norm(dim=1).sum())]
    assert [layer.norm_2_1 for layer in layers] == pytest.approx(rows, rel=1e-5)
    ratios = [(row / norm) ** (2 / 3) for row, norm in zip(rows, norms, strict=True)]
    expected = norms[0] * norms[1] / 6 * sum(ratios) ** 1.5
    assert spectral_complexity(layers) == pytest.approx(expected, rel=5e-3)


def test_a_batchnorm_is_folded_into_the_next_convolution():
    torch.manual_seed(0)
    model = with_statistics(create_network("s3net_cifar", 4, growth_rate=3, depth=7, connections="chain"))
    _, before = linear_layers(model, 8)
    with torch.no_grad():
        norm, conv = model.blocks[1].layers[0][0].norm, model.blocks[1].layers[0][0].conv
        norm.weight *= -10
        norm.bias += 5
        conv.weight /= 10
    _, after = linear_layers(model, 8)
    assert after == pytest.approx(before, rel=1e-4)


def test_the_spectral_norm_of_a_convolution_is_that_of_its_matrix():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1, stride=2, bias=False)
    matrix = torch.func.jacrev(lambda v: conv(v).flatten())(torch.zeros(1, 2, 6, 6)).reshape(27, 72)
    assert spectral_norm(lambda v: conv(v), (1, 2, 6, 6)) == pytest.approx(
        float(torch.linalg.matrix_norm(matrix.detach(), 2)), rel=1e-3
    )


def test_an_unknown_operation_is_named():
    with pytest.raises(NotImplementedError, match="no Lipschitz constant is known for sigmoid"):
        torch.sigmoid(Bound((1, 3, 4, 4), {-1: 1.0}, []))


def test_margins_errors_and_the_bound():
    class Identity(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3, bias=False)
            nn.init.eye_(self.linear.weight)

        def forward(self, x):
            return self.linear(x.mean(dim=(2, 3)))

    pixels = torch.tensor([[200, 100, 0], [50, 60, 70], [10, 20, 5]], dtype=torch.uint8)
    data = ImageSet(pixels[:, :, None, None].repeat(1, 1, 4, 4), torch.tensor([0, 0, 1]), ["a", "b", "c"])
    mean, std = (0.0,) * 3, (1 / 255,) * 3
    margins, norm = margins_of(Identity(), data, mean, std)
    assert margins.tolist() == pytest.approx([100, -20, 10], abs=1e-3)
    assert norm == pytest.approx(4 * math.sqrt(float((pixels.double() ** 2).sum())), rel=1e-5)
    row = bound_and_gap(Identity(), data, data, mean, std)
    assert (row["train_error"], row["gap"]) == (pytest.approx(100 / 3), 0)
    assert row["margin"] == pytest.approx(19, abs=0.01)  # a tenth of the way from 10 to 100
    complexity = 0.25 * 3  # the mean over 16 pixels, and three rows of norm 1
    assert row["log10_bound"] == pytest.approx(math.log10(norm * complexity / (19 * 3)), abs=1e-3)


def test_the_study_writes_its_numbers_and_a_picture(tmp_path, monkeypatch, capsys):
    chosen = {title: NETWORKS[title] for title in ("sparse, k=8", "chain, k=10")}
    monkeypatch.setattr(spectral_bounds, "NETWORKS", chosen)
    monkeypatch.setattr(lipschitz, "POWER_ITERATIONS", 3)
    spectral_bounds.main(Args(seeds=1, epochs=1, images=50, out=tmp_path))
    results = json.loads((tmp_path / "spectral_bounds.json").read_text())
    assert [row["network"] for row in results["rows"]] == ["sparse, k=8", "chain, k=10"]
    for row in results["rows"]:
        assert row["gap"] == pytest.approx(row["test_error"] - row["train_error"]) and 0 <= row["test_error"] <= 100
        parts = row["log10_complexity"] + np.log10(row["norm"] / (row["margin"] * 50))
        assert row["log10_bound"] == pytest.approx(parts, abs=1e-6) and row["layers"] == 13
    assert abs(results["rank_correlation"]["tau"]) == 1
    assert (tmp_path / "spectral_bounds.png").stat().st_size > 10_000
    assert "Kendall's tau between bound and gap" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"^give 1 or more --seeds"):
        spectral_bounds.main(Args(seeds=0, out=tmp_path))


def test_means_over_seeds_have_intervals():
    names = [name for name in spectral_bounds.MEANS if name not in ("gap", "log10_bound")]
    rows = [
        {"network": title, "seed": seed, "gap": float(gap), "log10_bound": float(gap)} | dict.fromkeys(names, 2.0)
        for title in NETWORKS
        for seed, gap in enumerate((1, 2, 3))
    ]
    summary = spectral_bounds.means(rows)[0]
    assert (summary["network"], summary["seeds"], summary["gap"]) == (next(iter(NETWORKS)), 3, 2.0)
    half_width = 4.302653 / math.sqrt(3)  # t distribution with 2 degrees of freedom
    assert summary["gap_ci95"] == pytest.approx([2 - half_width, 2 + half_width])
    [single] = [row for row in spectral_bounds.means(rows[::3]) if row["network"] == rows[0]["network"]]
    assert "gap_ci95" not in single
