"""The repository's trained weights: `create_model(..., pretrained=True)`, torch.hub, and the saliency script's default.

The tests write weights of their own into a temporary folder, so that they do not depend on the content of weights/.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
from explain_images import load_networks
from explained_networks import load_network
from models import create_model
from network_flags import NetworkArgs
from s3net_common import checkpoints
from s3net_common.checkpoints import load_weights, pretrained_file, read_metadata, save_weights
from s3net_common.errors import InputError
from s3net_networks import create_network
from s3net_networks.connections import ChainBlock
from training.initial_weights import open_start

ROOT = Path(__file__).parents[2]
CLASSES = [f"thing {i}" for i in range(100)]


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """Write weights/s3net_cifar/best.safetensors as the trainer does, with random but fixed content."""
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "weights")
    file = tmp_path / "weights" / "s3net_cifar" / "best.safetensors"
    file.parent.mkdir(parents=True)
    torch.manual_seed(7)
    metadata = {
        "model": "s3net_cifar",
        "options": "{}",
        "num_classes": "100",
        "classes": json.dumps(CLASSES),
        "mean": "[0.1, 0.2, 0.3]",
        "std": "[0.4, 0.5, 0.6]",
        "image_size": "32",
        "dataset": "cifar100",
        "epoch": "3",
        "val_error": "61.5",
    }
    save_file(create_model("s3net_cifar").state_dict(), file, metadata)
    return file


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_pretrained_is_the_file(weights):
    expected = load_weights(create_model("s3net_cifar"), weights)
    assert same_weights(create_model("s3net_cifar", pretrained=True), expected)
    assert same_weights(create_model("s3net_cifar", 100, pretrained=True, growth_rate=12), expected)
    assert not same_weights(create_model("s3net_cifar"), expected)
    defaults = {"stem": "cifar", "compression": 1.0, "block": models.Block, "bn_size": None}  # spelled out
    assert same_weights(create_model("s3net_cifar", pretrained=True, **defaults), expected)
    dropping = create_model("s3net_cifar", pretrained=True, drop_rate=0.5)
    assert same_weights(dropping, expected)
    assert any(isinstance(module, nn.Dropout) for module in dropping.modules())


def test_another_number_of_classes_gets_a_new_classifier(weights):
    expected = load_weights(create_model("s3net_cifar"), weights)
    model = create_model("s3net_cifar", num_classes=7, pretrained=True)
    assert model.eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 7)
    features = {key: value for key, value in model.state_dict().items() if not key.startswith("classifier")}
    assert len(features) == len(expected.state_dict()) - 2
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in features.items())
    assert model.classifier.weight.std() > 0 and not model.classifier.bias.any()  # fresh, as S3Net initialises it


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("s3net_tiny_k96", {}, "there are no trained weights for s3net_tiny_k96, only for s3net_cifar; or train it"),
        ("s3net_cifar", {"growth_rate": 24}, "depth=40, num_init_features=24 only: leave out growth_rate"),
        ("s3net_cifar", {"block": ChainBlock, "depth": 40}, "only: leave out block"),
        ("s3net_cifa", {}, "there is no network 's3net_cifa': did you mean s3net_cifar"),
    ],
)  # fmt: skip
def test_error_for_missing_weights(weights, name, options, message):
    with pytest.raises(InputError) as raised:
        create_model(name, pretrained=True, **options)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_error_for_weights_without_metadata_and_for_a_damaged_file(weights):
    save_file(create_model("s3net_cifar").state_dict(), weights)
    with pytest.raises(InputError, match=r"best\.safetensors does not say how many classes it has: put a file there"):
        create_model("s3net_cifar", pretrained=True)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"best\.safetensors is damaged or no safetensors file .*: get it again$"):
        create_model("s3net_cifar", pretrained=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 40, "block_config": (2, 2)}, "depth and block_config both say how many layers"),
        ({"block_config": ()}, "block_config is empty: give the number of layers of one block or more"),
    ],
)
def test_error_for_contradicting_or_missing_layers(options, message):
    with pytest.raises(InputError, match=message):
        create_model("s3net_cifar", **options)


def test_the_error_for_a_missing_folder_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path / "weights")
    with pytest.raises(InputError) as raised:
        create_model("s3net_cifar", pretrained=True)
    assert f"since {tmp_path / 'weights'} is missing: get the whole repository" in str(raised.value)


def test_class_names_and_normalisation_come_with_the_weights(weights):
    metadata = read_metadata(pretrained_file("s3net_cifar"))
    assert metadata["classes"] == CLASSES
    assert (metadata["mean"], metadata["std"], metadata["image_size"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 32)
    assert (metadata["model"], metadata["model_options"], metadata["num_classes"]) == ("s3net_cifar", {}, 100)


def test_metadata_of_the_trainers_checkpoint_and_of_other_files(tmp_path):
    config = {"model": "s3net_cifar", "model_options": {"depth": 13}, "classes": ["a"]}
    torch.save({"config": config, "model": {}}, tmp_path / "last.pt")
    assert read_metadata(tmp_path / "last.pt") == config
    torch.save({"config": {"anything": 1}}, tmp_path / "other.pt")
    assert read_metadata(tmp_path / "other.pt") == {}
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    assert read_metadata(tmp_path / "plain.safetensors") == {}
    save_file({"x": torch.zeros(1)}, tmp_path / "half.safetensors", {"options": "{}", "model": "s3net_cifar"})
    with pytest.raises(InputError, match=r"half\.safetensors is damaged or no safetensors file of the trainer"):
        read_metadata(tmp_path / "half.safetensors")


def test_torch_hub_from_a_local_clone(weights):
    model = torch.hub.load(str(ROOT), "s3net_cifar", source="local", pretrained=True)
    assert same_weights(model, load_weights(create_model("s3net_cifar"), weights))
    small = torch.hub.load(str(ROOT), "s3net_tiny_k96", source="local", num_classes=3, growth_rate=4)
    assert small.classifier.out_features == 3


def test_the_last_epoch_has_precedence_over_the_best(weights):
    other = create_model("s3net_cifar")
    last = weights.with_name("last.safetensors")
    save_weights(last, other.state_dict(), read_metadata(weights))
    assert pretrained_file("s3net_cifar") == last
    assert same_weights(create_model("s3net_cifar", pretrained=True), other)


def test_torch_hub_has_a_resnet_whose_weights_may_be_missing(weights):
    model = create_network("resnet20_cifar", 100)
    with pytest.raises(InputError, match="no trained weights for resnet20_cifar, only for s3net_cifar; or train it"):
        torch.hub.load(str(ROOT), "resnet20_cifar", source="local", pretrained=True)
    assert torch.hub.load(str(ROOT), "resnet20_cifar", source="local", num_classes=3).classifier.out_features == 3
    metadata = read_metadata(weights) | {"model": "resnet20_cifar"}
    save_weights(weights.parents[1] / "resnet20_cifar" / "last.safetensors", model.state_dict(), metadata)
    assert same_weights(torch.hub.load(str(ROOT), "resnet20_cifar", source="local", pretrained=True), model)
    small = torch.hub.load(str(ROOT), "resnet20_cifar", source="local", num_classes=3, pretrained=True)
    assert torch.equal(small.conv.weight, model.conv.weight) and small.classifier.out_features == 3
    assert open_start("pretrained", "resnet20_cifar")[1]["model"] == "resnet20_cifar"
    assert same_weights(load_network("resnet20_cifar").model, model)


def test_torch_hub_has_every_network_and_nothing_else(weights, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    hubconf = torch.hub._import_module("hubconf", str(ROOT / "hubconf.py"))
    public = [name for name in dir(hubconf) if not name.startswith("_") and callable(getattr(hubconf, name))]
    assert sorted(public) == sorted([*models.list_models(), "resnet20_cifar"])
    assert "Build s3net_cifar with random or trained weights" in hubconf.s3net_cifar.__doc__
    assert "name: one of" not in hubconf.s3net_cifar.__doc__  # an argument of create_model only
    assert hubconf.dependencies == ["safetensors", "torch"]


def test_the_saliency_scripts_explain_the_trained_s3net_by_default(weights):
    (network,) = load_networks(NetworkArgs(), torch.device("cpu"))
    assert same_weights(network.model, create_model("s3net_cifar", pretrained=True))
    assert (network.preparation.image_size, network.preparation.mean, network.classes) == (32, (0.1, 0.2, 0.3), CLASSES)
    assert not network.model.training
    (named,) = load_networks(NetworkArgs(images=(Path("x.jpg"),), networks=("s3net_cifar",)), torch.device("cpu"))
    assert same_weights(named.model, network.model)
    with pytest.raises(InputError, match="there are no trained weights for s3net_imagenet_k48, only for s3net_cifar"):
        load_networks(NetworkArgs(networks=("s3net_imagenet_k48",)), torch.device("cpu"))


@pytest.mark.parametrize(
    ("size", "message"), [(0, "--image-size 0 is not possible"), (3, "s3net_cifar cannot take images of 3x3")]
)
def test_error_for_images_that_are_too_small(weights, size, message):
    with pytest.raises(InputError, match=message):
        load_networks(NetworkArgs(image_size=size), torch.device("cpu"))
    (network,) = load_networks(NetworkArgs(image_size=4), torch.device("cpu"))
    assert network.preparation.image_size == 4
