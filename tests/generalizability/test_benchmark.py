"""benchmark.py: the published formulation equals S3-Net, and the measurements are printed and written."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from models import create_model
from s3net_common.errors import InputError

FOLDER = Path(__file__).parents[2] / "generalizability"


def benchmark_module():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("generalizability_benchmark", FOLDER / "benchmark.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_without_the_resource_module_memory_is_left_out(monkeypatch):
    """Windows lacks it."""
    benchmark = benchmark_module()
    assert benchmark.peak_memory() > 50
    monkeypatch.setattr(benchmark, "resource", None)
    monkeypatch.setattr(benchmark, "trainer_step", lambda contender, batch_size, ranks: lambda: None)
    assert list(benchmark.measure_contender("ours S3-Net k=12", 4, 0.0, "cpu")) == [
        "images_per_second",
        "cpu_ms_per_image",
        "first_step_seconds",
    ]


def test_both_formulations_train_and_are_timed():
    benchmark = benchmark_module()
    for contender in ("published k=2", "ours DenseNet k=12, depth=22"):
        measured = benchmark.measure_contender(contender, 2, 0.0, "cpu")
        assert measured["images_per_second"] > 0 and measured["cpu_ms_per_image"] > 0


def test_only_the_chosen_networks_train(tmp_path, monkeypatch, capsys):
    benchmark = benchmark_module()
    speed = {"images_per_second": 2.0, "cpu_ms_per_image": 500.0}
    monkeypatch.setattr(benchmark, "measure_in_new_process", lambda contender, args: speed)
    benchmark.main(benchmark.Args(only="training", networks=("ResNet-20",), rounds=1, out=tmp_path))
    assert "published" not in capsys.readouterr().out
    benchmark.main(benchmark.Args(only="training", networks=("ResNet-20", "S3-Net k=12"), rounds=1, out=tmp_path))
    medians = json.loads((tmp_path / "benchmark.json").read_text())["training"]["medians"]
    assert list(medians) == ["published k=12", "ours ResNet-20", "ours S3-Net k=12"]
    assert "ratio to the published formulation" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"networks": ()}, {"batch_size": 0}, {"rounds": 0}])
def test_nothing_to_measure_is_refused(tmp_path, wrong):
    benchmark = benchmark_module()
    with pytest.raises(InputError, match=f"--{next(iter(wrong)).replace('_', '-')} "):
        benchmark.main(benchmark.Args(out=tmp_path, **wrong))


def test_the_published_formulation_computes_the_same_function():
    torch.manual_seed(0)
    published = benchmark_module().PublishedFormulation(growth_rate=4, layers=3, num_classes=10)
    model = create_model("s3net_cifar", growth_rate=4, depth=13, num_classes=10)

    def in_order(model):  # both networks register all transitions after all blocks
        return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]

    for module, published_module in zip(in_order(model), in_order(published), strict=True):
        module.load_state_dict(published_module.state_dict())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(images), published(images), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.eval()(images), published.eval()(images), atol=1e-4, rtol=1e-4)


def test_the_data_benchmark_writes_its_rates(tmp_path, monkeypatch, capsys):
    benchmark = benchmark_module()
    benchmark.main(benchmark.Args(only="data", batch_size=4, rounds=1, out=tmp_path))
    rates = json.loads((tmp_path / "benchmark.json").read_text())["data"]["images_per_second"]
    assert len(rates) == 3 and all(rate > 0 for rate in rates.values())
    assert f"{rates['ours']:,.0f} images/s" in capsys.readouterr().out
