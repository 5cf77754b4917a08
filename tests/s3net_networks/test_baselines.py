"""The networks that S3-Net is compared with."""

import pytest
import torch

from s3net_common.errors import InputError
from s3net_networks import complete_options, create_network, list_networks


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("resnet20_cifar", 10, 269_722),  # 0.27M in their Table 6
        ("resnet20_cifar", 100, 275_572),
        ("densenet_cifar", 10, 1_019_722),  # 1.0M in their Table 2
        ("densenet_cifar", 100, 1_060_132),
        ("s3net_cifar", 100, 272_836),
    ],
)
def test_parameter_counts(name, classes, parameters):
    assert sum(p.numel() for p in create_network(name, classes).parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet20_cifar", "densenet_cifar"])
def test_they_train_and_evaluate(name):
    options = {"growth_rate": 8, "depth": 10} if "dense" in name else {}
    torch.manual_seed(0)
    model, images, labels = create_network(name, 5, **options), torch.randn(16, 3, 16, 16), torch.arange(16) % 5
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert model.eval()(images[:1]).shape == (1, 5)


def test_a_dense_block_reads_everything_before():
    block = create_network("densenet_cifar", 10, growth_rate=4, depth=13).features[0]
    assert [layer.conv.in_channels for layer in block.layers] == [16, 20, 24]


def test_names_and_options():
    assert list_networks()[0] == "s3net_cifar" and "densenet_cifar" in list_networks()
    with pytest.raises(InputError, match=r"there is no network 'resnet20': did you mean .*resnet20_cifar"):
        create_network("resnet20", 10)
    with pytest.raises(InputError, match="resnet20_cifar has no option 'depth': it has none"):
        create_network("resnet20_cifar", 10, depth=40)
    with pytest.raises(InputError, match=r"depth 39 is not possible.*37 and 40"):
        create_network("densenet_cifar", 10, depth=39)


@pytest.mark.parametrize("name", ["s3net_cifar", "s3net_imagenet_small", "densenet_cifar", "resnet20_cifar"])
def test_complete_options_build_the_same_network(name):
    options = complete_options(name, {})
    with torch.device("meta"):
        shapes = [
            [(key, value.shape) for key, value in create_network(name, 10, **given).state_dict().items()]
            for given in ({}, options)
        ]
    assert shapes[0] == shapes[1] and complete_options(name, options) == options


def test_complete_options():
    assert complete_options("densenet_cifar", {"depth": 22}) == {"growth_rate": 12, "depth": 22}
    assert complete_options("s3net_cifar", {"growth_rate": 24})["growth_rate"] == 24
    assert "depth" not in complete_options("s3net_cifar", {"block_config": [2, 2, 2]})
    assert complete_options("a network of another version", {"width": 3}) == {"width": 3}
