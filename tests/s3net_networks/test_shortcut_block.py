import numpy as np
import pytest
import torch
from torch import nn

from models import Block, S3Net
from s3net_common.errors import InputError
from s3net_networks.shortcut_block import ShortcutBlock, SumBlock


def dense_layers(count, width):
    return [nn.Sequential(nn.ReLU(), nn.Linear(width, width)) for _ in range(count)]


def test_convolutional_layers_give_the_block_of_models():
    torch.manual_seed(0)
    block = Block(num_layers=4, in_channels=5, growth_rate=3).eval()
    x = torch.randn(2, 5, 6, 6)
    torch.testing.assert_close(ShortcutBlock(block.layers)(x), block(x))


def test_a_sum_adds_the_outputs_of_the_chain():
    torch.manual_seed(0)
    layers = dense_layers(3, 4)
    x = torch.randn(7, 4)
    h1 = layers[0](x)
    h2 = layers[1](h1)
    h3 = layers[2](h2)
    torch.testing.assert_close(ShortcutBlock(layers, "sum")(x), x + h1 + h2 + h3)
    torch.testing.assert_close(ShortcutBlock(layers, "sum", input_shortcut=False)(x), h1 + h2 + h3)
    concatenated = ShortcutBlock(layers, input_shortcut=False)(x)
    torch.testing.assert_close(concatenated, torch.cat([h1, h2, h3], dim=1))


def test_the_block_computes_the_network_of_figure_3():
    """The same weights in neural-tangents' network and in the block with a sum."""
    jax = pytest.importorskip("jax")
    from kernels import B_STD, W_STD, stax_network

    init_fn, apply_fn, _ = stax_network("proposed", 3, width=6)
    _, params = init_fn(jax.random.PRNGKey(0), (-1, 4))
    pairs = list(weight_pairs(params))
    linear = []
    for w, b in pairs:
        layer = nn.Linear(*w.shape, dtype=torch.float64)
        layer.weight.data = torch.tensor(W_STD / np.sqrt(len(w)) * w.T)
        layer.bias.data = torch.tensor(B_STD * b.ravel())
        linear.append(layer)
    chain = [nn.Sequential(nn.ReLU(), layer) for layer in linear[1:-1]]
    block = ShortcutBlock(chain, "sum", input_shortcut=False)
    network = nn.Sequential(linear[0], block, nn.ReLU(), linear[-1])
    x = np.random.default_rng(0).normal(size=(5, 4))
    expected = np.asarray(apply_fn(params, x))
    np.testing.assert_allclose(network(torch.tensor(x)).detach().numpy(), expected, rtol=1e-10)


def weight_pairs(params):
    if isinstance(params, tuple) and len(params) == 2 and all(hasattr(p, "shape") for p in params):
        yield tuple(np.asarray(p, dtype=np.float64) for p in params)
    elif isinstance(params, tuple | list):
        for part in params:
            yield from weight_pairs(part)


def test_the_block_computes_the_network_of_theorem_1():
    from one_neuron_approximation import apply, sparse_chain

    depth = 9
    chain = sparse_chain(np.sin, -2.0, 2.0, depth)
    layers = []
    for weight, bias in zip(chain.weight, chain.bias, strict=True):
        layer = nn.Linear(1, 1, dtype=torch.float64)
        layer.weight.data.fill_(weight)
        layer.bias.data.fill_(bias)
        layers.append(nn.Sequential(layer, nn.ReLU()))
    block = ShortcutBlock(layers, "concatenate", input_shortcut=False)
    x = np.linspace(-2.0, 2.0, 101)
    outputs = block(torch.tensor(x)[:, None]).detach().numpy() @ np.asarray(chain.shortcut) + chain.offset
    np.testing.assert_allclose(outputs, np.asarray(apply(chain, x)), atol=1e-12)


@pytest.mark.parametrize(("in_channels", "with_input"), [(6, True), (5, False)])
def test_the_sum_block_replaces_the_block_of_s3net(in_channels, with_input):
    torch.manual_seed(0)
    network = S3Net(6, (3,), in_channels, num_classes=4, block=SumBlock)
    block = network.blocks[0]
    assert block.out_channels == network.classifier.in_features == 6
    assert block.input_shortcut == with_input
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def test_invalid_arguments_are_an_input_error():
    with pytest.raises(InputError, match="layers is empty"):
        ShortcutBlock([])
    with pytest.raises(InputError, match='aggregation is \'mean\': give "concatenate" or "sum"'):
        ShortcutBlock([nn.Identity()], "mean")
