"""RandWire-WS: Xie et al. 2019, "Exploring Randomly Wired Neural Networks for Image Recognition", section 3, Table 1.

The regular regime: four stages, each a random graph of the Watts-Strogatz model (K=4, P=0.75), with 16, 32, 32 and 32
nodes. With 109 channels and the graphs that networkx draws from seed 1, it has 31,619,209 parameters.

A graph is plain JSON: `{"nodes": 16, "edges": [[0, 1], [0, 3], ...]}`. Each edge leads to a node with a higher number.
Graphs are an option of the network, so a run's configuration and checkpoints contain them. Only drawing new graphs
needs networkx.

The paper leaves some details open. As in the code behind the paper's table: every stage draws from the same seed, so
the last three graphs are equal; a node with one input has no weight; both parts of a depthwise-separable convolution
have biases.
"""

from functools import reduce
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3net_common.errors import InputError

STAGE_NODES = (16, 32, 32, 32)
NEIGHBOURS, REWIRED, SEED = 4, 0.75, 1  # K and P of the Watts-Strogatz model
HEAD_CHANNELS = 1280
MOST_NODES = 200
GRAPH_FORM = '{"nodes": 16, "edges": [[0, 1], [0, 3], ...]}'


class Node(nn.Module):
    """A node: weighted sum of its inputs, ReLU, depthwise-separable convolution, BatchNorm (section 3.2).

    Maps a list of `inputs` tensors `(N, in_channels, H, W)` to `(N, out_channels, H / stride, W / stride)`. The weights
    of the sum are in (0, 1).
    """

    def __init__(self, inputs: int, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs)) if inputs > 1 else None
        self.conv = _separable_conv(in_channels, out_channels, stride)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Compute `norm(conv(relu(sum of sigmoid(weights[i]) * inputs[i])))`."""
        x = inputs[0]
        if self.weights is not None:
            first, *others = self.weights.sigmoid().to(x.dtype).unbind()
            x = x * first
            for weight, other in zip(others, inputs[1:], strict=True):
                x = torch.addcmul(x, other, weight)
        return self.norm(self.conv(F.relu(x)))


def _separable_conv(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels),  # depthwise
        nn.Conv2d(in_channels, out_channels, 1),
    )


class Stage(nn.Module):
    """A stage, which is a graph of nodes (section 3.2): `(N, in_channels, H, W)` to `(N, out_channels, H / 2, W / 2)`.

    Nodes without an incoming edge read the stage's input, with stride 2. The output is the mean of the nodes without an
    outgoing edge.
    """

    def __init__(self, graph: dict, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.sources = [sorted(a for a, b in graph["edges"] if b == node) for node in range(graph["nodes"])]
        self.outputs = sorted(set(range(graph["nodes"])) - {a for a, _ in graph["edges"]})
        self.nodes = nn.ModuleList(
            Node(len(sources), out_channels, out_channels, stride=1)
            if sources
            else Node(1, in_channels, out_channels, stride=2)
            for sources in self.sources
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the nodes in the order of their numbers, which every edge respects."""
        results = []
        for node, sources in zip(self.nodes, self.sources, strict=True):
            results.append(node([results[i] for i in sources] or [x]))
        return reduce(torch.add, [results[i] for i in self.outputs]) / len(self.outputs)


class RandWire(nn.Module):
    """Stem, four random stages and a classifier. Images `(N, 3, H, W)` to logits `(N, num_classes)`."""

    def __init__(self, channels: int, graphs: list[dict], num_classes: int) -> None:
        super().__init__()
        widths = [channels // 2, channels, 2 * channels, 4 * channels, 8 * channels]
        self.stem = nn.Sequential(_separable_conv(3, widths[0], stride=2), nn.BatchNorm2d(widths[0]))
        self.stages = nn.Sequential(
            *(Stage(graph, *pair) for graph, pair in zip(graphs, pairwise(widths), strict=True))
        )
        self.conv = nn.Conv2d(widths[-1], HEAD_CHANNELS, 1)
        self.norm = nn.BatchNorm2d(HEAD_CHANNELS)
        self.classifier = nn.Linear(HEAD_CHANNELS, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(N, num_classes)`."""
        x = self.stages(self.stem(x))
        x = F.relu(self.norm(self.conv(F.relu(x))))
        return self.classifier(x.mean(dim=(2, 3)))


def randwire_ws(channels: int = 109, graphs: list[dict] | None = None, num_classes: int = 1000) -> RandWire:
    """Build RandWire with Watts-Strogatz graphs.

    Args:
        channels: C, the first stage's width; 109 in the regular regime.
        graphs: one for each of the four stages, as returned by `draw_graphs`; None draws them.
        num_classes: outputs.

    Raises:
        InputError: there are too few channels, a graph has another form, or networkx is needed and not installed.
    """
    if channels < 2:
        raise InputError(f"channels is {channels}: give 2 or more")
    if graphs is None:
        graphs = draw_graphs()
    check_graphs(graphs)
    return RandWire(channels, graphs, num_classes)


def draw_graphs(seed: int = SEED) -> list[dict]:
    """Draw the graphs of the four stages with networkx: connected, with edges from lower to higher numbers.

    Raises:
        InputError: networkx is not installed.
    """
    try:
        from networkx import connected_watts_strogatz_graph
    except ImportError as error:
        raise InputError("new RandWire graphs are drawn by networkx: pip install networkx") from error
    graphs = []
    for nodes in STAGE_NODES:
        graph = connected_watts_strogatz_graph(nodes, NEIGHBOURS, REWIRED, tries=200, seed=seed)
        graphs.append({"nodes": nodes, "edges": sorted([min(edge), max(edge)] for edge in graph.edges)})
    return graphs


def check_graphs(graphs: object) -> None:
    """Check that `graphs` are four valid graphs.

    Raises:
        InputError: a graph is invalid; the message names it.
    """
    if not isinstance(graphs, list) or len(graphs) != len(STAGE_NODES):
        raise InputError(f"graphs must be a list of {len(STAGE_NODES)}, one for each stage, as in {GRAPH_FORM}")
    for i, graph in enumerate(graphs):
        if not isinstance(graph, dict) or graph.keys() != {"nodes", "edges"} or not isinstance(graph["edges"], list):
            raise InputError(f"graphs[{i}] is no graph: give it as in {GRAPH_FORM}")
        nodes, edges = graph["nodes"], graph["edges"]
        if type(nodes) is not int or not 1 <= nodes <= MOST_NODES:
            raise InputError(f"graphs[{i}] has {nodes!r} nodes: give a whole number of 1 or more, at most {MOST_NODES}")
        for edge in edges:
            _check_edge(edge, nodes, f"graphs[{i}]")
        if len({tuple(edge) for edge in edges}) < len(edges):
            raise InputError(f"graphs[{i}] has the same edge twice")


def _check_edge(edge: object, nodes: int, name: str) -> None:
    if not isinstance(edge, list | tuple) or len(edge) != 2 or not all(type(node) is int for node in edge):
        raise InputError(f"{name} has the edge {edge!r}: give it as two node numbers, as in {GRAPH_FORM}")
    if not all(0 <= node < nodes for node in edge):
        raise InputError(f"{name} has the edge {list(edge)}, and its nodes are 0 to {nodes - 1}")
    if edge[0] >= edge[1]:
        raise InputError(f"{name} has the edge {list(edge)}: edges lead to higher numbers, so that there is no cycle")
