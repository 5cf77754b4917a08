"""The networks of the Tiny ImageNet table: their sizes, their layers against plain formulas, RandWire's graphs."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from processes import run_python
from torch import nn

from s3net_common.errors import InputError
from s3net_networks import create_network, fix_options, list_networks
from s3net_networks.ghostnet import BLOCKS, GhostBottleneck, GhostModule
from s3net_networks.lambda_resnet import LambdaLayer
from s3net_networks.octresnet import OctaveConv
from s3net_networks.randwire import Stage, draw_graphs
from s3net_networks.scalenet import ScaleAggregation
from s3net_networks.se_resnet import SqueezeExcitation
from s3net_networks.size import model_size

# Parameters with 1000 classes, as counted in the code that the table was made with; billions of multiply-adds at
# 224x224 as each network's own paper has them (None: it has none for this network).
NETWORKS = {
    "mobilenet_v2": (3_504_872, 0.300),
    "efficientnet_b0": (5_288_548, 0.39),
    "octresnet50": (25_557_032, 2.4),
    "lambda_resnet50": (14_998_056, None),
    "se_resnet50": (28_071_976, 4.1),
    "scalenet50": (31_483_618, 3.8),
    "ghostnet": (5_183_016, 0.141),
    "randwire_ws": (31_619_209, 4.0),
    "s3net_tiny_k96": (5_021_608, None),
    "s3net_tiny_k108": (10_600_800, None),
}
BASELINES = [name for name in NETWORKS if not name.startswith("s3net")]


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_multiply_adds(name):
    parameters, billions = NETWORKS[name]
    with torch.device("meta"):
        facts = model_size(create_network(name, 1000), 224, torch.device("meta"))
    assert name in list_networks() and facts["parameters"] == parameters
    assert billions is None or facts["multiply_adds"] / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.fixture(scope="module", params=BASELINES)
def stepped(request):
    """Each network after one pass forward and back in bfloat16 and channels-last, and that pass's logits."""
    torch.manual_seed(0)
    model = create_network(request.param, 7).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = 1.0  # the running statistics are then those of this batch
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    nn.functional.cross_entropy(logits.float(), torch.arange(4)).backward()
    return model, logits


def test_gradients_reach_every_parameter(stepped):
    model, logits = stepped
    assert logits.shape == (4, 7)
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any()
    ]
    assert without == []


def test_an_image_alone_of_any_size(stepped):
    model = stepped[0].eval()
    with torch.inference_mode():
        for height, width in ((64, 64), (32, 32), (49, 38)):
            logits = model(torch.randn(1, 3, height, width))
            assert logits.shape == (1, 7) and logits.isfinite().all()


# ---- Layers against formulas, written out -------------------------------------------------------------------------


def slow_conv(x, weight):
    """Sum over inputs and taps, at every output and pixel; stride 1, zero padding."""
    reach, (height, width) = weight.shape[-1] // 2, x.shape[1:]
    padded = torch.zeros(len(x), height + 2 * reach, width + 2 * reach)
    padded[:, reach : reach + height, reach : reach + width] = x
    size = weight.shape[-1]
    return torch.stack(
        [
            torch.stack(
                [(padded[:, i : i + size, j : j + size] * w).sum() for i in range(height) for j in range(width)]
            )
            for w in weight
        ]
    ).view(-1, height, width)


def slow_pool(x, size, reduce):
    rows, columns = x.shape[1] // size, x.shape[2] // size
    cells = [
        [x[:, i * size : (i + 1) * size, j * size : (j + 1) * size].flatten(1) for j in range(columns)]
        for i in range(rows)
    ]
    return torch.stack([torch.stack([reduce(cell) for cell in row], dim=1) for row in cells], dim=1)


def mean(cell):
    return cell.mean(dim=1)


def slow_resize(x, height, width, linear):
    """Each pixel of the result reads x where its centre falls: the nearest pixel, or the four around."""
    out = torch.zeros(len(x), height, width)
    rows, columns = x.shape[1:]
    for i in range(height):
        for j in range(width):
            if not linear:
                out[:, i, j] = x[:, i * rows // height, j * columns // width]
                continue
            y = min(max((i + 0.5) * rows / height - 0.5, 0), rows - 1)
            z = min(max((j + 0.5) * columns / width - 0.5, 0), columns - 1)
            for a in range(rows):
                for b in range(columns):
                    out[:, i, j] += max(0, 1 - abs(y - a)) * max(0, 1 - abs(z - b)) * x[:, a, b]
    return out


@pytest.mark.parametrize("stride", [1, 2])
def test_octave_convolution(stride):
    torch.manual_seed(0)
    layer = OctaveConv(4, 6, 3, stride).eval()
    high, low = torch.randn(2, 8, 4), torch.randn(2, 4, 2)
    with torch.no_grad():
        out_high, out_low = layer((high[None], low[None]))
    halved = slow_pool(high, 2, mean)
    if stride == 1:
        from_low = slow_conv(low, layer.low_to_high.weight)
        expected_high = slow_conv(high, layer.high_to_high.weight) + slow_resize(from_low, 8, 4, linear=False)
        expected_low = slow_conv(low, layer.low_to_low.weight) + slow_conv(halved, layer.high_to_low.weight)
    else:
        expected_high = slow_conv(halved, layer.high_to_high.weight) + slow_conv(low, layer.low_to_high.weight)
        quartered = slow_pool(halved, 2, mean)
        expected_low = slow_conv(slow_pool(low, 2, mean), layer.low_to_low.weight)
        expected_low = expected_low + slow_conv(quartered, layer.high_to_low.weight)
    torch.testing.assert_close(out_high[0], expected_high, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out_low[0], expected_low, atol=1e-4, rtol=1e-4)


def test_octaves_of_the_first_and_last_stage():
    with torch.device("meta"):
        model = create_network("octresnet50", 10)
    first, last = model.layer1[0], model.layer4[0]
    assert first.conv1.low_to_high is None and first.conv1.norm_low.num_features == 32
    assert last.conv1.low_to_low is None and last.conv3.norm_low is None and last.conv3.norm_high.num_features == 2048


def test_lambda_layer():
    torch.manual_seed(0)
    heads, depth, context, height, width = 2, 3, 5, 4, 6
    layer = LambdaLayer(4, 6, heads, depth, context).eval()
    x = torch.randn(2, 4, height, width)
    with torch.no_grad():
        output, queries, keys, values = layer(x), layer.queries(x), layer.keys(x), layer.values(x)
    keys = keys.exp() / keys.exp().sum(dim=(2, 3), keepdim=True)
    places = [(i, j) for i in range(height) for j in range(width)]
    for b, h, v in ((b, h, v) for b in range(2) for h in range(heads) for v in range(3)):
        for i, j in ((0, 0), (2, 3), (3, 5)):
            expected = 0.0
            for k in range(depth):
                content = sum(keys[b, k, y, z] * values[b, v, y, z] for y, z in places)
                position = sum(
                    layer.embedding[k, 0, y - i + 2, z - j + 2] * values[b, v, y, z]
                    for y, z in places
                    if abs(y - i) <= 2 and abs(z - j) <= 2
                )
                expected += queries[b, h * depth + k, i, j] * (content + position)
            assert output[b, h * 3 + v, i, j].item() == pytest.approx(expected.item(), abs=1e-4)


def test_multiply_adds_of_a_lambda_layer():
    layer, pixels, values = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), LambdaLayer(8, 12, 4, 16, 23)), 12 * 12, 3
    by_hand = pixels * (
        3 * 8  # the convolution before it
        + 8 * (4 * 16 + 16 + values)  # queries, keys, values
        + 16 * values  # the lambda of the content
        + 16 * values * 23 * 23  # those of the positions
        + 2 * 4 * 16 * values  # each applied to every head's queries
    )
    assert model_size(layer, 12, torch.device("cpu"))["multiply_adds"] == by_hand


@pytest.mark.parametrize(("height", "width", "linear"), [(8, 8, (False,) * 4), (15, 8, (False, True, False, True))])
def test_scale_aggregation(height, width, linear):
    torch.manual_seed(0)
    layer, x = ScaleAggregation(2, (3, 2, 1, 2)), torch.randn(2, height, width)
    with torch.no_grad():
        output = layer(x[None])[0]
    parts = []
    for conv, scale, by_line in zip(layer.convs, (1, 2, 4, 7), linear, strict=True):
        small = slow_conv(slow_pool(x, scale, lambda cell: cell.amax(dim=1)), conv.weight)
        parts.append(slow_resize(small, height, width, by_line))
    torch.testing.assert_close(output, torch.cat(parts), atol=1e-4, rtol=1e-4)
    assert [conv.out_channels for conv in ScaleAggregation(2, (3, 0, 1, 0)).convs] == [3, 1]


def test_squeeze_and_excitation():
    torch.manual_seed(0)
    layer, x = SqueezeExcitation(32), torch.randn(2, 32, 3, 4)
    output = layer(x)
    for n in range(2):
        means = [x[n, c].sum() / 12 for c in range(32)]
        inner = [max(0.0, sum(w * m for w, m in zip(row, means, strict=True)).item()) for row in layer.squeeze.weight]
        for c, row in enumerate(layer.excite.weight):
            gate = 1 / (1 + math.exp(-sum(w.item() * a for w, a in zip(row, inner, strict=True))))
            torch.testing.assert_close(output[n, c], gate * x[n, c])


def test_ghost_module_and_gates():
    torch.manual_seed(0)
    module, x = GhostModule(3, 8, relu=False).eval(), torch.randn(3, 5, 4)
    with torch.no_grad():
        output = module(x[None])[0]
    primary = slow_conv(x, module.primary[0].weight)
    cheap = [slow_conv(primary[c : c + 1], module.cheap[0].weight[c : c + 1])[0] for c in range(4)]
    torch.testing.assert_close(output, torch.stack([*primary, *cheap]), atol=1e-4, rtol=1e-4)

    gates = GhostBottleneck(40, *BLOCKS[4][1:3], *BLOCKS[4][:1], *BLOCKS[4][3:]).layers[1]
    nn.init.zeros_(gates.fc2.weight)
    images = torch.randn(1, 120, 2, 2)
    for bias, gate in ((3.0, 1.0), (0.25, 0.25), (-3.0, 0.0)):
        nn.init.constant_(gates.fc2.bias, bias)
        torch.testing.assert_close(gates(images), gate * images)


# ---- RandWire's graphs --------------------------------------------------------------------------------------------


def test_a_random_stage():
    torch.manual_seed(0)
    stage = Stage({"nodes": 4, "edges": [[0, 2], [1, 2], [0, 3]]}, 3, 6).eval()
    a, b, c, d = stage.nodes
    nn.init.normal_(c.weights)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        output, (left, right) = stage(x), 1 / (1 + (-c.weights).exp())
        first, second = a.norm(a.conv(x.clamp(min=0))), b.norm(b.conv(x.clamp(min=0)))
        third = c.norm(c.conv((left * first + right * second).clamp(min=0)))
        fourth = d.norm(d.conv(first.clamp(min=0)))
    assert output.shape == (2, 6, 4, 4) and d.weights is None
    torch.testing.assert_close(output, (third + fourth) / 2)


def test_drawn_graphs():
    graphs = draw_graphs()
    assert [graph["nodes"] for graph in graphs] == [16, 32, 32, 32]
    assert [len(graph["edges"]) for graph in graphs] == [32, 64, 64, 64]  # K / 2 edges a node
    assert graphs == draw_graphs() != draw_graphs(seed=2)
    assert json.loads(json.dumps(graphs)) == graphs


def test_a_saved_graph_needs_no_networkx(monkeypatch):
    given = {"channels": 8}
    options = json.loads(json.dumps(fix_options("randwire_ws", given)))
    assert options.keys() == {"channels", "graphs"} and given == {"channels": 8}
    torch.manual_seed(0)
    saved, x = create_network("randwire_ws", 5, **options).eval(), torch.randn(1, 3, 64, 64)
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(InputError, match="drawn by networkx: pip install networkx"):
        create_network("randwire_ws", 5, channels=8)
    assert fix_options("randwire_ws", options) == options
    loaded = create_network("randwire_ws", 5, **options).eval()
    loaded.load_state_dict(saved.state_dict())
    with torch.inference_mode():
        assert torch.equal(loaded(x), saved(x))


def test_other_networks_have_nothing_to_draw():
    assert fix_options("s3net_cifar", {"depth": 22}) == {"depth": 22} and fix_options("octresnet50", {}) == {}
    with pytest.raises(InputError, match="there is no network 'randwire': did you mean randwire_ws"):
        fix_options("randwire", {})


@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        ({"nodes": 2}, "graphs must be a list of 4, one for each stage"),
        ([{"nodes": 2, "edges": [[0, 1]]}] * 3, "graphs must be a list of 4"),
        ([{"nodes": 2, "edges": [[0, 1]]}] * 3 + ["ring"], r"graphs\[3\] is no graph: give it as in"),
        ([{"nodes": 2}] * 4, r"graphs\[0\] is no graph"),
        ([{"nodes": 2.5, "edges": [[0, 1]]}] * 4, r"graphs\[0\] has 2.5 nodes: give a whole number of 1 or more"),
        ([{"nodes": 2, "edges": [[0, 2]]}] * 4, r"graphs\[0\] has the edge \[0, 2\], and its nodes are 0 to 1"),
        ([{"nodes": 2, "edges": [[0, 1], [1, 0]]}] * 4, r"the edge \[1, 0\]: edges lead to higher numbers.* no cycle"),
        ([{"nodes": 2, "edges": [[0, 1], [0, 1]]}] * 4, r"graphs\[0\] has the same edge twice"),
        ([{"nodes": 2, "edges": [[0, "1"]]}] * 4, r"has the edge \[0, '1'\]: give it as two node numbers"),
    ],
)
def test_graphs_that_cannot_be_wired(graphs, message):
    with pytest.raises(InputError, match=message):
        create_network("randwire_ws", 5, graphs=graphs)


def test_options_that_there_are_not():
    with pytest.raises(InputError, match="randwire_ws has no option 'growth_rate': its options are channels, graphs"):
        create_network("randwire_ws", 5, growth_rate=12)
    with pytest.raises(InputError, match="mobilenet_v2 has no option 'depth': it has none"):
        create_network("mobilenet_v2", 5, depth=40)
    with pytest.raises(InputError, match="channels is 1: give 2 or more"):
        create_network("randwire_ws", 5, channels=1)
    with pytest.raises(InputError, match="there is no network 'mobilenetv2': did you mean mobilenet_v2"):
        create_network("mobilenetv2", 5)


def test_the_registry_imports_no_network_before_it_is_asked_for():
    program = "import sys, s3net_networks; print(sorted({'torchvision', 'timm', 'networkx'} & sys.modules.keys()))"
    folder = Path(__file__).resolve().parents[2] / "generalizability"
    assert run_python("-c", program, cwd=folder, check=True).stdout == "[]\n"
