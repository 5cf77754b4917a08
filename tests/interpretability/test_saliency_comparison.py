"""Trainings on digit scenes, and the comparison of networks by their maps."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import saliency_comparison
from s3net_common.checkpoints import read_metadata
from s3net_common.errors import InputError
from s3net_networks import create_network
from saliency_comparison import SCORES, Args, main, networks
from scene_training import Training, train

CPU = torch.device("cpu")
TINY = {
    "small": ("s3net_cifar", {"growth_rate": 4, "depth": 7}),
    "other": ("s3net_cifar", {"growth_rate": 5, "depth": 7}),
}


def test_networks_of_the_comparison_have_similar_sizes():
    sizes = {}
    for name, (network, options) in networks(40).items():
        with torch.device("meta"):
            model = create_network(network, 10, **options)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    assert sizes == {
        "S3-Net k=12": 231_706,
        "ResNet-20": 269_722,
        "DenseNet-22 k=12": 270_706,
        "dense k=5": 220_060,
        "chain k=28": 257_738,
    }


def test_a_training_depends_on_its_settings_only():
    training = Training("s3net_cifar", {"growth_rate": 4, "depth": 7}, epochs=1, batch_size=32, held_out=1374, size=18)
    assert (training.digits, training.steps) == (64, 2)
    steps, epochs = [], []
    first = train(training, CPU, lambda: steps.append(1), lambda model: epochs.append(model.training))
    assert (len(steps), epochs, first.training) == (2, [False], False)
    torch.manual_seed(7)
    again, other = train(training, CPU), train(replace(training, seed=1), CPU)
    weights = [model.state_dict()["classifier.weight"] for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Args:
    monkeypatch.setattr(saliency_comparison, "networks", lambda depth: TINY)
    return Args(
        epochs=2, tuning_epochs=1, peaks=(0.1, 0.2), seeds=2, batch_size=32, held_out=1374, equal_accuracy=0.01,
        scenes=6, faithfulness_scenes=3, scene_size=18, device="cpu", out=tmp_path / "out",
    )  # fmt: skip


def test_the_report_and_its_figures(args, capsys):
    main(args)
    report = json.loads((args.out / "comparison.json").read_text())
    assert report["command"].startswith("python ") and report["versions"]["captum"]
    assert min(report["cpu_seconds"].values()) > 0 and list(report["cpu_seconds"]) == ["tuning", "training", "scores"]
    assert report["settings"]["tuning_epochs"] == 1 and report["scenes"] == 6
    assert list(report["networks"]) == list(TINY)
    for name, row in report["networks"].items():
        assert row["tuning"].keys() == {"0.1", "0.2"}
        best = max(row["tuning"].values())
        assert row["tuning"][f"{row['peak_lr']:g}"] == best
        assert len(row["accuracy"]) == len(row["cpu_seconds"]) == 2
        for kind in ("FullGrad", "gradient"):
            assert tuple(row["scores"][kind]) == SCORES
            for score in row["scores"][kind].values():
                low, high = score["interval"]
                assert low - 1e-9 <= score["mean"] <= high + 1e-9
                assert ("difference" in score) == (name == "other")
        assert -1 <= row["autocorrelation"]["mean"] <= 1
    first, other = (row["scores"]["FullGrad"]["dice"] for row in report["networks"].values())
    assert other["difference"] == pytest.approx(other["mean"] - first["mean"])
    reached = [*report["equal_accuracy"], *report["not_reached"]]
    assert sorted(reached) == sorted(TINY)
    for name in ("comparison.png", "maps.png"):
        assert Image.open(args.out / name).size[0] > 300
    weights = args.out / "networks" / "s3net_cifar-growth_rate4-depth7-peak0.1-epochs1-seed0.safetensors"
    assert read_metadata(weights)["image_size"] == 18
    assert "small" in capsys.readouterr().out


def test_finished_trainings_and_evaluations_are_not_redone(args, monkeypatch):
    main(args)
    report = json.loads((args.out / "comparison.json").read_text())

    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(saliency_comparison, "train", fail)
        patched.setattr(saliency_comparison, "maps_of", fail)
        main(args)
        assert json.loads((args.out / "comparison.json").read_text()) == report
        with pytest.raises(AssertionError):  # another setting needs other trainings
            main(replace(args, batch_size=16))
    trained = []
    monkeypatch.setattr(
        saliency_comparison, "train", lambda training, *rest: trained.append(training) or train(training, *rest)
    )
    main(replace(args, seeds=3))
    assert [training.seed for training in trained] == [2, 2]


def test_networks_that_miss_the_equal_accuracy_are_listed(args):
    main(replace(args, equal_accuracy=1.0, seeds=1, peaks=(0.1,)))
    report = json.loads((args.out / "comparison.json").read_text())
    assert (report["equal_accuracy"], report["not_reached"]) == ({}, list(TINY))
    assert report["networks"]["small"]["tuning"] == {}
    values = report["networks"]["small"]["scores"]["FullGrad"]["dice"]
    assert np.isfinite([values["mean"], *values["interval"]]).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seeds": 0}, "--seeds 0 is too small: give 1 or more"),
        ({"scene_size": 17}, "--scene-size 17 is too small: give 18 or more"),
        ({"scenes": 360}, "--scenes 360 is too large: there are 359 test digits"),
        ({"peaks": ()}, "--peaks needs at least one learning rate"),
        ({"equal_accuracy": 1.5}, "--equal-accuracy 1.5 is not above 0 and at most 1"),
        ({"held_out": 1400}, "--held-out 1400 leaves no batch to train on: give at most 1374"),
    ],
)
def test_error_for_flags_out_of_range(flags, message):
    with pytest.raises(InputError, match=message):
        main(Args(**flags))
