"""GhostNet: Han et al. 2020, "GhostNet: More Features from Cheap Operations", section 3, Table 1.

This is the authors' first release, used for the paper's table: 5,183,016 parameters. timm has their second release
(5,182,508). The first has gates of exactly a quarter of the channels, clamped to [0, 1], and BatchNorm in the last
hidden layer. The second rounds the gates to multiples of 4, uses a hard sigmoid, and has a bias instead of BatchNorm.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

# Table 1: kernel size, expanded channels, output channels, gates, stride
BLOCKS = [
    (3, 16, 16, False, 1),
    (3, 48, 24, False, 2),
    (3, 72, 24, False, 1),
    (5, 72, 40, True, 2),
    (5, 120, 40, True, 1),
    (3, 240, 80, False, 2),
    (3, 200, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 480, 112, True, 1),
    (3, 672, 112, True, 1),
    (5, 672, 160, True, 2),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
]
DROPOUT = 0.2

_linear_conv = partial(Conv2dNormActivation, activation_layer=None)  # convolution and BatchNorm


class GhostModule(nn.Module):
    """Half of the channels by a 1x1 convolution, the other half from these by a depthwise 3x3 convolution (eq. 3).

    Maps `(N, in_channels, H, W)` to `(N, out_channels, H, W)`; `out_channels` is even. `relu`: whether both
    halves end in a ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, relu: bool) -> None:
        super().__init__()
        half, activation = out_channels // 2, nn.ReLU if relu else None
        self.primary = Conv2dNormActivation(in_channels, half, 1, activation_layer=activation)
        self.cheap = Conv2dNormActivation(half, half, 3, groups=half, activation_layer=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `[primary(x), cheap(primary(x))]`."""
        x = self.primary(x)
        return torch.cat([x, self.cheap(x)], dim=1)


class GhostBottleneck(nn.Module):
    """Two ghost modules, with a depthwise convolution (if the stride is 2) and gates between them (Figure 3)."""

    def __init__(
        self, in_channels: int, expanded: int, out_channels: int, kernel_size: int, gated: bool, stride: int
    ) -> None:
        super().__init__()
        layers = [GhostModule(in_channels, expanded, relu=True)]
        if stride > 1:
            layers.append(_linear_conv(expanded, expanded, kernel_size, stride, groups=expanded))
        if gated:
            layers.append(SqueezeExcitation(expanded, expanded // 4, scale_activation=partial(nn.Hardtanh, 0.0, 1.0)))
        self.layers = nn.Sequential(*layers, GhostModule(expanded, out_channels, relu=False))
        self.shortcut = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                _linear_conv(in_channels, in_channels, kernel_size, stride, groups=in_channels),
                _linear_conv(in_channels, out_channels, 1),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Compute `f(x) + shortcut(x)`."""
        return self.layers(x) + self.shortcut(x)


class GhostNet(nn.Module):
    """Stem, bottlenecks, and a classifier with one hidden layer. Images `(N, 3, H, W)` to logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels, hidden = 16, 1280
        features = [Conv2dNormActivation(3, channels, 3, stride=2)]
        for kernel_size, expanded, out_channels, gated, stride in BLOCKS:
            features.append(GhostBottleneck(channels, expanded, out_channels, kernel_size, gated, stride))
            channels = out_channels
        self.features = nn.Sequential(*features, Conv2dNormActivation(channels, expanded, 1))
        self.classifier = nn.Sequential(
            nn.Linear(expanded, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(DROPOUT),
            nn.Linear(hidden, num_classes),
        )
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:  # the gates keep PyTorch's default
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(N, num_classes)`."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def ghostnet(num_classes: int = 1000) -> GhostNet:
    """Build GhostNet with width 1.0."""
    return GhostNet(num_classes)
