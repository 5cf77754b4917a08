"""ScaleNet-50: Li et al. 2019, "Data-Driven Neuron Allocation for Scale Aggregation Networks", section 3.

ResNet-50 whose 3x3 convolutions are split over four scales of their input. The authors learnt on ImageNet how many
channels each scale gets in each block, and published the numbers used here. 31,483,618 parameters.

The paper leaves some details open. As in the authors' code: a stride is a max pool before the whole block, shortcut
included; a scale is resized to full size by nearest neighbour if that is a whole multiple, else bilinearly. On feature
maps smaller than a pool's window, the window is the whole map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

SCALES = (1, 2, 4, 7)
# Channels at each scale, block by block, for each stage's width.
CHANNELS = {
    64: [(62, 9, 5, 12), (55, 27, 5, 1), (59, 26, 0, 3)],
    128: [(125, 41, 6, 3), (90, 39, 9, 37), (106, 56, 4, 9), (116, 56, 3, 0)],
    256: [
        (223, 71, 55, 0),
        (196, 104, 44, 5),
        (195, 98, 52, 4),
        (155, 128, 66, 0),
        (134, 129, 86, 0),
        (120, 127, 98, 4),
    ],
    512: [(237, 354, 106, 0), (172, 435, 90, 0), (138, 462, 97, 0)],
}


class ScaleAggregation(nn.Module):
    """3x3 convolutions of the input max-pooled to several scales, resized to the input's size and concatenated.

    Maps `(N, in_channels, H, W)` to `(N, sum(channels), H, W)`. `channels[i]` are computed from the input
    pooled by `SCALES[i]`; 0 omits the scale.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        used = [(scale, count) for scale, count in zip(SCALES, channels, strict=True) if count]
        self.scales = [scale for scale, _ in used]
        self.convs = nn.ModuleList(nn.Conv2d(in_channels, count, 3, padding=1, bias=False) for _, count in used)

    def forward(self, x: Tensor) -> Tensor:
        """Return the concatenated outputs in the order of `SCALES`."""
        size = x.shape[-2:]
        return torch.cat(
            [_resize(conv(_pool(x, scale)), size) for scale, conv in zip(self.scales, self.convs, strict=True)], dim=1
        )


def _pool(x: Tensor, scale: int) -> Tensor:
    return x if scale == 1 else F.max_pool2d(x, [min(scale, side) for side in x.shape[-2:]])


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[-2:] == size:
        return x
    whole = size[0] % x.shape[2] == 0 and size[1] % x.shape[3] == 0
    return F.interpolate(x, size=size, mode="nearest" if whole else "bilinear")


class ScaleBottleneck(nn.Module):
    """ResNet's bottleneck block with a scale aggregation in the middle: `in_channels` to `4 * planes`."""

    expansion = 4  # torchvision's ResNet reads it

    def __init__(self, in_channels: int, planes: int, channels: tuple[int, ...], stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = ScaleAggregation(planes, channels)
        self.bn2 = nn.BatchNorm2d(sum(channels))
        self.conv3 = nn.Conv2d(sum(channels), 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.shortcut = nn.Identity()
        if in_channels != 4 * planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        """Compute `relu(shortcut(x) + f(x))` of the max-pooled x."""
        if self.stride > 1:
            x = F.max_pool2d(x, self.stride)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x), inplace=True)


class ScaleNet(ResNet):
    """torchvision's ResNet with scale aggregation. Images `(N, 3, H, W)` to logits `(N, num_classes)`."""

    def _make_layer(
        self, block: type[nn.Module], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        layers = []
        for channels in CHANNELS[planes][:blocks]:
            layers.append(block(self.inplanes, planes, channels, 1 if layers else stride))
            self.inplanes = 4 * planes
        return nn.Sequential(*layers)


def scalenet50(num_classes: int = 1000) -> ScaleNet:
    """Build ResNet-50 with scale aggregation."""
    return ScaleNet(ScaleBottleneck, [3, 4, 6, 3], num_classes)
