"""--recipe of train_s3net.py: what it sets, which flags replace it, and resuming with it."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_s3net
from data.image_sets import ImageSet
from s3net_common.command_line import given_flags
from s3net_common.errors import InputError
from train_s3net import Args
from training.config import check_flags, check_same_recipe, resolve_config, shell_command_of

CPU = torch.device("cpu")
RUNS = Path(__file__).resolve().parents[2] / "generalizability" / "results" / "fast_recipes" / "runs"
FOUR_IMAGES = ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4) % 2, ["a", "b"])
DATA = (FOUR_IMAGES, FOUR_IMAGES)  # for training and validation
SMALL = {"growth_rate": 4, "depth": 7, "device": "cpu"}


def configuration(**flags):
    """Return the configuration of a new run on four images."""
    check_flags(flags)
    return asdict(resolve_config(flags, DATA, CPU, {}))


def run(**flags):
    return train_s3net.main(Args(**SMALL, **flags))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders in the place of CIFAR-100."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("apple", "bear"):
            (folder / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(
                    folder / split / name / f"{i}.png"
                )
    return folder


def test_fast_is_the_recipe_of_the_measured_runs():
    measured = json.loads((RUNS / "fast_progressive_s0" / "config.json").read_text())
    data = ("train_images", "val_images", "classes", "num_classes", "hold_out", "amp")
    config = configuration(recipe="fast")
    expected = {name: measured.get(name, value) for name, value in config.items()}
    expected["model_options"] = config["model_options"]  # the network's defaults, which the measured runs name
    assert {**config, **dict.fromkeys(data)} == {**expected, **dict.fromkeys(data)}
    assert measured["model_options"] == {"growth_rate": 12, "depth": 40}
    assert (config["early_size"], config["early_epochs"], config["average_epochs"], config["epochs"]) == (24, 7, 3, 15)


def test_given_flags_replace_those_of_the_recipe():
    plain = configuration(recipe="fast")
    changed = configuration(recipe="fast", lr=0.1, nesterov=False, model="resnet20_cifar")
    assert {name for name in plain if plain[name] != changed[name]} == {"lr", "nesterov", "model"}
    longer = configuration(recipe="fast", epochs=30, image_size=64)
    assert [longer[name] for name in ("average_epochs", "early_epochs", "early_size")] == [6, 15, 48]
    one_epoch = configuration(recipe="fast", epochs=1)
    assert [one_epoch[name] for name in ("average_epochs", "early_epochs", "early_size")] == [1, 0, None]
    one_size = configuration(recipe="fast", early_epochs=0)
    assert {name for name in plain if plain[name] != one_size[name]} == {"early_epochs", "early_size"}
    assert one_size["early_size"] is None


def test_the_papers_recipe_is_the_default():
    for dataset in ("cifar100", "tinyimagenet", "imagenet"):
        assert configuration(recipe="paper", dataset=dataset) == configuration(dataset=dataset)
    config = configuration(recipe="paper", dataset="tinyimagenet", model="se_resnet50", epochs=3)
    assert (config["batch_size"], config["lr"], config["epochs"]) == (96, 0.05, 3)


def test_the_recorded_command_has_every_setting():
    config = resolve_config({"recipe": "fast"}, DATA, CPU, {})
    words = shell_command_of(config).split()
    assert "--recipe" not in words
    for flag, value in (("--epochs", "15"), ("--early-size", "24"), ("--label-smoothing", "0.1"), ("--lr", "0.4")):
        assert words[words.index(flag) + 1] == value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"recipe": "quick"}, "there is no recipe 'quick': "),
        ({"recipe": "fats"}, "there is no recipe 'fats': did you mean fast"),
        ({"recipe": "fast", "dataset": "digits"}, "--recipe fast is for --dataset cifar100: leave it out"),
        ({"recipe": "paper", "dataset": "folder"}, "--recipe paper is for --dataset cifar100 or --dataset tiny"),
        ({"recipe": "fast", "momentum": 0.0}, "--nesterov needs a --momentum above 0"),
        ({"recipe": "fast", "image_size": 4}, "--early-size 4 is not smaller than the images"),
    ],
)
def test_wrong_recipes(images, tmp_path, flags, message):
    with pytest.raises(InputError) as error:
        run(data_dir=images, out=tmp_path / "new", **flags)
    assert message in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_run_of_the_fast_recipe_is_resumed(images, tmp_path):
    first = {"recipe": "fast", "data_dir": images, "out": tmp_path / "run", "epochs": 2, "batch_size": 4}
    assert run(**first) == 0
    assert run(**first, resume=True) == 0  # the same command again
    assert train_s3net.main(Args(out=tmp_path / "run", resume=True)) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["nesterov"], config["early_size"], config["early_epochs"]) == (True, 24, 1)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"--recipe fast changes the recipe .* was started with epochs 2"):
        run(recipe="fast", out=tmp_path / "run", resume=True)
    with pytest.raises(InputError, match=r"--recipe paper changes the .* leave --recipe out to resume"):
        run(recipe="paper", out=tmp_path / "run", resume=True, epochs=2)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_run_of_the_papers_recipe_is_not_resumed_with_the_fast_one(tmp_path):
    started = resolve_config({}, DATA, CPU, {})
    check_same_recipe({"recipe": "paper"}, started, tmp_path)
    with pytest.raises(InputError, match=r"--recipe fast changes the recipe .* started with epochs 200: "):
        check_same_recipe(given_flags(Args(recipe="fast")), started, tmp_path)
