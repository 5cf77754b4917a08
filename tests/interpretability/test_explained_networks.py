from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from explain_images import chosen_networks, load_networks
from explained_networks import IMAGENET_MEAN, PAPER_NETWORKS, load_network
from network_flags import NetworkArgs
from s3net_common.checkpoints import save_weights
from s3net_common.errors import InputError
from s3net_networks import create_network

CPU = torch.device("cpu")


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
    assert (network.name, network.image_size) == (name, 40)
    assert (network.mean, network.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert network.class_name(6) == "thing 6"
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(network.model(images), model(images))


def test_a_baseline_without_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match="there are no trained weights for resnet20_cifar"):
        load_network("resnet20_cifar")
    network = load_network("resnet20_cifar", random_weights=True)
    assert network.model(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
    assert (network.image_size, network.mean, network.classes) == (32, IMAGENET_MEAN, None)


def test_networks_and_their_checkpoints(tmp_path):
    first, second = str(tmp_path / "a.safetensors"), str(tmp_path / "b=c.safetensors")
    save_trained(Path(first), "s3net_cifar", 3, depth=7)
    save_trained(Path(second), "resnet20_cifar", 3)
    both = {"s3net_cifar": Path(first), "resnet20_cifar": Path(second)}
    assert chosen_networks(NetworkArgs(checkpoint=(first, second))) == both
    assert chosen_networks(NetworkArgs(checkpoint=(f"s3net_cifar={first}", f"resnet20_cifar={second}"))) == both
    assert chosen_networks(NetworkArgs(networks=("vgg19", "resnet20_cifar"), checkpoint=(second,))) == {
        "vgg19": None,
        "resnet20_cifar": Path(second),
    }
    assert chosen_networks(NetworkArgs(networks=("my_net",), checkpoint=(first,))) == {"my_net": Path(first)}
    assert chosen_networks(NetworkArgs()) == {"s3net_cifar": None}
    assert list(chosen_networks(NetworkArgs(images=(Path("photo.jpg"),)))) == list(PAPER_NETWORKS)


def test_error_for_checkpoints_of_unclear_or_other_networks(tmp_path):
    save_trained(tmp_path / "a.safetensors", "s3net_cifar", 3, depth=7)
    torch.save(create_network("s3net_cifar", 3, depth=7).state_dict(), tmp_path / "plain.pt")
    file, plain = str(tmp_path / "a.safetensors"), str(tmp_path / "plain.pt")
    with pytest.raises(InputError, match=r"plain\.pt does not name its network: pass --checkpoint NAME="):
        chosen_networks(NetworkArgs(checkpoint=(plain,)))
    for flags in ({"checkpoint": (file, file)}, {"networks": ("vgg19", "resnet50"), "checkpoint": (file,)}):
        with pytest.raises(InputError, match="give each of these networks at most one checkpoint"):
            chosen_networks(NetworkArgs(**flags))
    with pytest.raises(InputError, match="--random-weights loads no weights: leave out --checkpoint"):
        chosen_networks(NetworkArgs(checkpoint=(file,), random_weights=True))


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
