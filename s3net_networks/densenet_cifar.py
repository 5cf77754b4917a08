"""DenseNet for 32x32 images, without bottlenecks: Huang et al. 2017, "Densely Connected Convolutional Networks"."""

from torch import Tensor, nn

from s3net_common.cpu_kernels import concatenate, norm_relu
from s3net_networks.own_models import models


class DenseBlock(nn.Module):
    """A dense block: every layer reads the concatenation of the block's input and all layers before it."""

    def __init__(self, num_layers: int, in_channels: int, growth_rate: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            models.NormReluConv(in_channels + i * growth_rate, growth_rate, kernel_size=3) for i in range(num_layers)
        )
        self.out_channels = in_channels + num_layers * growth_rate

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, in_channels, H, W)` to `(N, in_channels + num_layers * growth_rate, H, W)`."""
        for layer in self.layers:
            x = concatenate([x, layer(x)], self.training)
        return x


class DenseNetCifar(nn.Module):
    """Three dense blocks with transitions that keep all channels. Images `(N, 3, H, W)` to logits."""

    def __init__(self, growth_rate: int, depth: int, num_classes: int) -> None:
        super().__init__()
        channels = 16  # section 4.2: 16 channels before the first block
        self.conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        features = []
        for i in range(3):
            features.append(DenseBlock(models.layers_per_block(depth), channels, growth_rate))
            channels = features[-1].out_channels
            if i < 2:
                features.append(models.NormReluConv(channels, channels, kernel_size=1, pool=2))
        self.features = nn.Sequential(*features)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(N, num_classes)`."""
        x = norm_relu(self.features(self.conv(x)), self.norm)
        return self.classifier(x.mean(dim=(2, 3)))


def densenet_cifar(growth_rate: int = 12, depth: int = 40, num_classes: int = 100) -> DenseNetCifar:
    """The plain DenseNet: k=12, depth=40 has 1.0M parameters (their Table 2).

    Raises:
        InputError: where depth - 4 is not a positive multiple of 3.
    """
    return DenseNetCifar(growth_rate, depth, num_classes)
