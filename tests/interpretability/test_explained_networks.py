from pathlib import Path
from urllib.error import URLError

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

import explained_networks
from explain_images import chosen_networks, load_networks
from explained_networks import PAPER_NETWORKS, load_network
from network_flags import NetworkArgs
from s3net_common.checkpoints import save_weights
from s3net_common.errors import InputError
from s3net_common.framing import (
    CIFAR100_MEAN,
    CIFAR100_STD,
    Preparation,
    timm_preparation,
    torchvision_preparation,
)
from s3net_networks import create_network

CPU = torch.device("cpu")
DATA = Path(__file__).parents[1] / "data"


def save_trained(path: Path, name: str, classes: int, **options: object) -> nn.Module:
    """Write best.safetensors as the trainer does, and return the network."""
    model = create_network(name, classes, **options)
    metadata = {
        "model": name,
        "model_options": options,
        "num_classes": classes,
        "classes": [f"thing {i}" for i in range(classes)],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "image_size": 40,
        "dataset": "folder",
    }
    save_weights(path, model.state_dict(), metadata)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("s3net_cifar", {"depth": 13, "connections": "dense"}),
        ("resnet20_cifar", {}),
        ("densenet_cifar", {"depth": 13}),
        ("mobilenet_v2", {}),  # built by torchvision
    ],
)
def test_a_trainers_checkpoint_gives_network_classes_and_preprocessing(name, options, tmp_path):
    torch.manual_seed(1)
    model = save_trained(tmp_path / "best.safetensors", name, 7, **options)
    (network,) = load_networks(NetworkArgs(checkpoint=(str(tmp_path / "best.safetensors"),)), CPU)
    assert network.name == name
    assert network.preparation == Preparation(40, 40, 40, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "fit")
    assert network.class_name(6) == "thing 6"
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(network.model(images), model(images))


def test_a_checkpoint_whose_image_size_the_network_cannot_take(tmp_path):
    model = create_network("s3net_cifar", 3, depth=7)
    metadata = {"model": "s3net_cifar", "model_options": {"depth": 7}, "num_classes": 3, "classes": [], "image_size": 2}
    save_weights(tmp_path / "a.safetensors", model.state_dict(), metadata | {"mean": [0.5] * 3, "std": [0.5] * 3})
    arguments = {"checkpoint": (str(tmp_path / "a.safetensors"),)}
    with pytest.raises(InputError, match="s3net_cifar cannot take images of 2x2: pass another --image-size"):
        load_networks(NetworkArgs(**arguments), CPU)
    (network,) = load_networks(NetworkArgs(image_size=8, **arguments), CPU)
    assert network.preparation.image_size == 8


def test_a_baseline_without_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match="there are no trained weights for densenet_cifar"):
        load_network("densenet_cifar")
    network = load_network("densenet_cifar", random_weights=True)
    assert network.model(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
    assert network.preparation == Preparation(32, 32, 32, CIFAR100_MEAN, CIFAR100_STD, "fit")
    assert network.classes is None


@pytest.mark.parametrize(
    ("name", "resize", "crop", "interpolation"),
    [
        ("resnet18", 256, 224, "bilinear"),
        ("inception_v3", 342, 299, "bilinear"),
        ("efficientnet_b2", 288, 288, "bicubic"),
    ],
)
def test_torchvisions_networks_have_their_published_preparation(name, resize, crop, interpolation):
    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1.transforms()
    preparation = torchvision_preparation(published)
    assert (preparation.resize, preparation.image_size, preparation.interpolation) == (resize, crop, interpolation)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (310, 400, 3), dtype=np.uint8))
    expected = published(image)
    seen = preparation.normalization(CPU)(preparation.pixels(image)[None])[0]
    assert torch.allclose(seen, expected, atol=1e-5)


def test_timms_networks_have_their_published_preparation():
    config = timm.models.get_pretrained_cfg("efficientnet_lite0").to_dict()
    preparation = timm_preparation(config)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (310, 400, 3), dtype=np.uint8))
    expected = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))(image)
    assert torch.allclose(preparation.normalization(CPU)(preparation.pixels(image)[None])[0], expected, atol=1e-5)


def test_an_unreachable_hub_is_one_line_after_one_request(tmp_path, monkeypatch, caplog, capfd):
    requests = []

    def refuse(request, timeout):
        requests.append((request.full_url, request.get_method(), timeout))
        raise URLError(ConnectionRefusedError(111, "Connection refused"))

    monkeypatch.setattr(explained_networks, "urlopen", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        InputError, match=r"^the weights of timm/ghostnet_100 cannot be downloaded \(.*refused.*\): on .*$"
    ):
        load_network("timm/ghostnet_100")
    assert requests == [(huggingface_hub.constants.ENDPOINT, "HEAD", 5.0)]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # as before
    assert caplog.text == "" and capfd.readouterr().err == ""


def test_networks_and_their_checkpoints(tmp_path):
    first, second = str(tmp_path / "a.safetensors"), str(tmp_path / "b=c.safetensors")
    save_trained(Path(first), "s3net_cifar", 3, depth=7)
    save_trained(Path(second), "resnet20_cifar", 3)
    both = [(None, "s3net_cifar", Path(first)), (None, "resnet20_cifar", Path(second))]
    assert chosen_networks(NetworkArgs(checkpoint=(first, second))) == both
    assert chosen_networks(NetworkArgs(checkpoint=(f"s3net_cifar={first}", f"resnet20_cifar={second}"))) == both
    assert chosen_networks(NetworkArgs(networks=("vgg19", "resnet20_cifar"), checkpoint=(second,))) == [
        (None, "vgg19", None),
        (None, "resnet20_cifar", Path(second)),
    ]
    assert chosen_networks(NetworkArgs(networks=("my_net",), checkpoint=(first,))) == [(None, "my_net", Path(first))]
    assert chosen_networks(NetworkArgs()) == [(None, "s3net_cifar", None)]
    names = [name for _, name, _ in chosen_networks(NetworkArgs(images=(Path("photo.jpg"),)))]
    assert names == list(PAPER_NETWORKS)


def test_several_checkpoints_of_one_network_are_side_by_side(tmp_path):
    files = [tmp_path / run / "best.safetensors" for run in ("first", "second")]
    models = []
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        models.append(save_trained(file, "s3net_cifar", 3, depth=7, growth_rate=4 + seed))
    networks = load_networks(NetworkArgs(checkpoint=tuple(map(str, files))), CPU)
    assert [network.name for network in networks] == ["first-best", "second-best"]
    images = torch.randn(1, 3, 40, 40)
    for network, model in zip(networks, models, strict=True):
        with torch.no_grad():
            assert torch.equal(network.model(images), model(images))
    with pytest.raises(InputError, match="two files are called first-best: rename a folder"):
        chosen_networks(NetworkArgs(checkpoint=(str(files[0]), str(files[0]))))


def test_a_file_without_metadata_takes_options_from_the_command_line(tmp_path):
    torch.manual_seed(0)
    model = create_network("s3net_cifar", 5, growth_rate=4, depth=7).eval()
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    arguments = {"networks": ("s3net_cifar",), "checkpoint": (str(tmp_path / "plain.pt"),), "num_classes": 5}
    options = '{"growth_rate": 4, "depth": 7}'
    (network,) = load_networks(NetworkArgs(model_options=options, **arguments), CPU)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.model(images), model(images))
    with pytest.raises(InputError, match="--model-options growth is no JSON object"):
        load_networks(NetworkArgs(model_options="growth", **arguments), CPU)
    with pytest.raises(InputError, match="--model-options is for networks of this repository, and vgg11 is not one"):
        load_networks(NetworkArgs(model_options=options, networks=("vgg11",), random_weights=True), CPU)


def test_the_authors_file_takes_its_options_from_the_command_line():
    file = DATA / "authors_cifar_k4_d13.pt"
    with pytest.raises(InputError, match=r"does not fit this network.*has other options, pass --model-options"):
        load_networks(NetworkArgs(checkpoint=(f"s3net_cifar={file}",)), CPU)
    options = '{"growth_rate": 4, "depth": 13}'
    arguments = NetworkArgs(checkpoint=(f"s3net_cifar={file}",), model_options=options, num_classes=10)
    (network,) = load_networks(arguments, CPU)
    with np.load(DATA / "authors_cifar_k4_d13_io.npz") as recorded, torch.no_grad():
        images, logits = (torch.from_numpy(recorded[name]) for name in recorded.files)
        assert torch.allclose(network.model(images), logits, atol=1e-5)


def test_error_for_checkpoints_of_unclear_or_other_networks(tmp_path):
    save_trained(tmp_path / "a.safetensors", "s3net_cifar", 3, depth=7)
    torch.save(create_network("s3net_cifar", 3, depth=7).state_dict(), tmp_path / "plain.pt")
    file, plain = str(tmp_path / "a.safetensors"), str(tmp_path / "plain.pt")
    with pytest.raises(InputError, match=r"plain\.pt does not name its network: pass --checkpoint NAME="):
        chosen_networks(NetworkArgs(checkpoint=(plain,)))
    with pytest.raises(InputError, match="s3net_cifar is none of --networks vgg19, resnet50: add it"):
        chosen_networks(NetworkArgs(networks=("vgg19", "resnet50"), checkpoint=(file,)))


def test_random_weights_with_a_checkpoint_are_refused():
    with pytest.raises(InputError, match="--random-weights loads no weights: leave out --checkpoint"):
        chosen_networks(NetworkArgs(checkpoint=("a.pt",), random_weights=True))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_the_published_weights_transform_their_input(name, auxiliary, tmp_path):
    """torchvision sets transform_input only together with weights that it downloads itself."""
    published = torchvision.models.get_model(
        name, weights=None, init_weights=False, transform_input=True, aux_logits=auxiliary, num_classes=4
    ).eval()
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    network = load_network(name, tmp_path / "weights.pth", num_classes=4)
    assert network.model.transform_input
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(network.model(images), published(images))


def test_targets_are_class_names_or_indices(tmp_path):
    save_trained(tmp_path / "best.safetensors", "s3net_cifar", 7, depth=7)
    network = load_network("s3net_cifar", tmp_path / "best.safetensors")
    assert [network.target_index(target) for target in ("thing 6", "3", None)] == [6, 3, None]
    arguments = NetworkArgs(checkpoint=(str(tmp_path / "best.safetensors"),), target="thing 8")
    with pytest.raises(InputError, match="the network has no class 'thing 8': did you mean thing"):
        load_networks(arguments, CPU)
