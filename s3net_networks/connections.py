"""Other connections between the layers of a block than S3-Net's, for ablations.

Each class replaces `models.Block` in `models.S3Net(block=...)` and has the same arguments and attributes.
"""

from torch import Tensor, nn

from s3net_common.cpu_kernels import concatenate
from s3net_networks.own_models import models


class ChainBlock(models.Block):
    """A chain without shortcuts. Maps `(N, in_channels, H, W)` to `(N, growth_rate, H, W)`."""

    def __init__(self, num_layers: int, in_channels: int, growth_rate: int, *args, **kwargs) -> None:
        super().__init__(num_layers, in_channels, growth_rate, *args, **kwargs)
        self.out_channels = growth_rate

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last layer."""
        for layer in self.layers:
            x = layer(x)
        return x


class DenseBlock(nn.Module):
    """Each layer reads the concatenation of all outputs before it, as in DenseNet. The output is that of `Block`."""

    def __init__(
        self, num_layers: int, in_channels: int, growth_rate: int, bn_size: int | None = None, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        widths = [in_channels + i * growth_rate for i in range(num_layers)]
        self.layers = nn.ModuleList(models.Layer(width, growth_rate, bn_size, drop_rate) for width in widths)
        self.out_channels = in_channels + num_layers * growth_rate

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate before every layer and at the end."""
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(concatenate(outputs, self.training)))
        return concatenate(outputs, self.training)


class ResidualBlock(ChainBlock):
    """Each layer's output is added to its input, if both have the same number of channels, as in ResNet."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the last sum, `(N, growth_rate, H, W)`."""
        for layer in self.layers:
            output = layer(x)
            x = output + x if output.shape == x.shape else output
        return x


CONNECTIONS: dict[str, type[nn.Module]] = {
    "sparse": models.Block,
    "chain": ChainBlock,
    "dense": DenseBlock,
    "residual": ResidualBlock,
}
