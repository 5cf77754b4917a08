"""The sparse shortcut topology of any layers, also fully connected ones, with a concatenation or a sum at the end.

The convolutional networks use `models.Block`, which concatenates. The paper's kernel experiment and theorems are about
fully connected layers; the kernel experiment adds the outputs:

    layers = [nn.Sequential(nn.ReLU(), nn.Linear(64, 64)) for _ in range(8)]
    block = ShortcutBlock(layers, aggregation="sum", input_shortcut=False)
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from s3net_common.errors import InputError, shown
from s3net_networks.own_models import models


class ShortcutBlock(nn.Module):
    """A chain of layers, with one shortcut from each output to the end of the block (Figure 1).

    Args:
        layers: the chain, one layer or more. Each reads only the output of the layer before it.
        aggregation: "concatenate" joins the outputs along dimension 1 in the order [block input, layer 1, ..., layer
            L]; "sum" adds them, so they need the same shape.
        input_shortcut: whether the block's input has a shortcut, too, as in Figure 1. The published notebook's networks
            for Figure 3 lack it.

    Raises:
        InputError: there are no layers, or the aggregation is unknown.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        aggregation: Literal["concatenate", "sum"] = "concatenate",
        input_shortcut: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not self.layers:
            raise InputError("layers is empty: give one layer or more")
        if aggregation not in ("concatenate", "sum"):
            raise InputError(f'aggregation is {shown(aggregation)}: give "concatenate" or "sum"')
        self.aggregation, self.input_shortcut = aggregation, input_shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain, then aggregate the outputs once."""
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        if not self.input_shortcut:
            del outputs[0]
        return torch.cat(outputs, dim=1) if self.aggregation == "concatenate" else sum(outputs)


class SumBlock(ShortcutBlock):
    """S3-Net's layers with a sum at the end. Has the arguments of `models.Block`, for `models.S3Net(block=...)`.

    Maps `(N, in_channels, H, W)` to `(N, growth_rate, H, W)`. The block's input has a shortcut if both numbers of
    channels are equal.
    """

    def __init__(self, num_layers: int, in_channels: int, growth_rate: int, *args, **kwargs) -> None:
        layers = models.Block(num_layers, in_channels, growth_rate, *args, **kwargs).layers
        super().__init__(layers, "sum", input_shortcut=in_channels == growth_rate)
        self.out_channels = growth_rate
