"""ResNet for 32x32 images: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2."""

import torch.nn.functional as F
from torch import Tensor, nn

from s3net_common.cpu_kernels import norm_relu


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (the paper's option A).

    Maps `(N, in_channels, H, W)` to `(N, out_channels, H / stride, W / stride)`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.stride, self.new_channels = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Compute `relu(x + f(x))`. If the shape changes, x is subsampled and padded with zero channels."""
        out = self.norm2(self.conv2(norm_relu(self.conv1(x), self.norm1)))
        if self.stride > 1 or self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(out + x)


class ResNetCifar(nn.Module):
    """Three stages of 16, 32 and 64 channels; `6 * blocks + 2` layers. Images `(N, 3, H, W)` to logits."""

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [16] * blocks + [32] * blocks + [64] * blocks
        self.blocks = nn.Sequential(
            *(
                BasicBlock(before, width, stride=1 if before == width else 2)
                for before, width in zip([16, *widths], widths, strict=False)
            )
        )
        self.classifier = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(N, num_classes)`."""
        x = self.blocks(norm_relu(self.conv(x), self.norm))
        return self.classifier(x.mean(dim=(2, 3)))


def resnet20_cifar(num_classes: int = 100) -> ResNetCifar:
    """Build ResNet-20: three basic blocks per stage, 0.27M parameters with 10 classes (their Table 6)."""
    return ResNetCifar(blocks=3, num_classes=num_classes)
