"""Sizes of networks, with the transitions in the order of this repository and in the published one."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import network_sizes
from network_sizes import Args, size_row
from s3net_networks import create_network
from s3net_networks.own_models import models
from s3net_networks.size import count_multiply_adds

RECORD = Path(network_sizes.__file__).parent / "results" / "network_sizes.json"


@pytest.mark.parametrize(
    ("name", "options", "before", "after", "share"),
    [
        ("s3net_cifar", {"growth_rate": 12, "depth": 40}, 42.8, 83.1, 46),
        ("s3net_cifar", {"growth_rate": 64, "depth": 70}, 2412.7, 5536.2, 66),
        ("s3net_cifar", {"growth_rate": 5, "depth": 40, "connections": "dense"}, 53.6, 63.0, 12),
        ("densenet_cifar", {"growth_rate": 12, "depth": 22}, 62.1, 72.9, 12),
        ("resnet20_cifar", {}, 40.6, 40.6, 0),
    ],
)
def test_a_pool_after_the_convolution_takes_more_multiply_adds(monkeypatch, name, options, before, after, share):
    row = size_row(name, 100, options, 32)
    assert row["multiply_adds"] / 1e6 == pytest.approx(before, abs=0.05)
    assert row["multiply_adds_published_order"] / 1e6 == pytest.approx(after, abs=0.05)
    assert 100 * row["transition_share"] == pytest.approx(share, abs=0.5)

    def convolve_first(self, x):
        x = self.conv(F.relu(self.norm(x)))
        return F.avg_pool2d(x, self.pool) if self.pool > 1 else x

    with torch.device("meta"):
        model = create_network(name, 100, **options)
    monkeypatch.setattr(models.NormReluConv, "forward", convolve_first)
    assert count_multiply_adds(model, 32, torch.device("meta")) == row["multiply_adds_published_order"]


def test_both_orders_compute_the_same_function(monkeypatch):
    torch.manual_seed(0)
    unit = models.NormReluConv(12, 7, kernel_size=1, pool=2).eval()
    x = torch.randn(2, 12, 8, 8)
    published = F.avg_pool2d(unit.conv(F.relu(unit.norm(x))), 2)
    torch.testing.assert_close(unit(x), published, atol=1e-6, rtol=1e-5)


def test_the_record_has_every_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(network_sizes, "CIFAR", network_sizes.CIFAR[:2])
    monkeypatch.setattr(network_sizes, "LARGE", [])
    network_sizes.main(Args(tmp_path))
    rows = json.loads((tmp_path / "network_sizes.json").read_text())["rows"]
    recorded = json.loads(RECORD.read_text())["rows"]
    assert rows == recorded[:2] and len(recorded) == 27
    assert "s3net_cifar growth_rate=12 depth=40" in capsys.readouterr().out
