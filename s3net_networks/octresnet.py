"""OctResNet-50: Chen et al. 2019, "Drop an Octave", section 3.

(In full "Drop an Octave: Reducing Spatial Redundancy in Convolutional Neural Networks with Octave Convolution".)

Half of the channels (alpha = 0.5) have half the resolution (low frequencies). The first stage reads only high
frequencies, and the last stage outputs only high frequencies. An octave convolution has as many parameters as a plain
one, so the network has ResNet-50's 25,557,032.

The paper leaves some details open. As in the code behind the paper's table: a stride of 2 is an average pool before the
convolution, also in the shortcut; each frequency has a separate BatchNorm; the last stage drops the low frequencies in
its first 1x1 convolution. Low frequencies are upsampled to the size of the high ones (nearest neighbour), so that odd
sizes work.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

ALPHA = 0.5  # share of low-frequency channels
Frequencies = tuple[Tensor, Tensor | None]  # high `(N, C_h, H, W)` and low `(N, C_l, H // 2, W // 2)`, or no low


class OctaveConv(nn.Module):
    """Convolutions from both input frequencies to both output frequencies, each output with a BatchNorm.

    Args:
        in_channels, out_channels: of both frequencies together.
        kernel_size: odd; the size is kept.
        stride: 1 or 2.
        alpha_in, alpha_out: fraction of low-frequency channels of the input and of the output, in [0, 1).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        alpha_in: float = ALPHA,
        alpha_out: float = ALPHA,
    ) -> None:
        super().__init__()
        in_low, out_low = int(alpha_in * in_channels), int(alpha_out * out_channels)
        in_high, out_high = in_channels - in_low, out_channels - out_low

        def conv(inputs: int, outputs: int) -> nn.Conv2d | None:
            if not inputs or not outputs:
                return None
            return nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)

        self.high_to_high, self.high_to_low = conv(in_high, out_high), conv(in_high, out_low)
        self.low_to_high, self.low_to_low = conv(in_low, out_high), conv(in_low, out_low)
        self.norm_high = nn.BatchNorm2d(out_high)
        self.norm_low = nn.BatchNorm2d(out_low) if out_low else None
        self.stride = stride

    def forward(self, x: Frequencies) -> Frequencies:
        """Return both frequencies of the output, normalised."""
        high, low = x
        if self.stride == 2:
            high = F.avg_pool2d(high, 2)
        out_high = self.high_to_high(high)
        out_low = self.high_to_low(F.avg_pool2d(high, 2)) if self.high_to_low else None
        if low is not None:
            from_low = self.low_to_high(low)
            if self.stride == 1:  # at stride 2 the low frequencies already have the size of the new high ones
                from_low = F.interpolate(from_low, size=out_high.shape[-2:])
            out_high = out_high + from_low
            if self.low_to_low:
                out_low = out_low + self.low_to_low(F.avg_pool2d(low, 2) if self.stride == 2 else low)
        return self.norm_high(out_high), self.norm_low(out_low) if self.norm_low else None


class OctaveBottleneck(nn.Module):
    """ResNet's bottleneck block with octave convolutions: `in_channels` to `4 * planes`, over both frequencies."""

    expansion = 4  # torchvision's ResNet reads it

    def __init__(self, in_channels: int, planes: int, stride: int, alpha_in: float, alpha_out: float) -> None:
        super().__init__()
        inner = {"alpha_in": alpha_out, "alpha_out": alpha_out}
        self.conv1 = OctaveConv(in_channels, planes, 1, alpha_in=alpha_in, alpha_out=alpha_out)
        self.conv2 = OctaveConv(planes, planes, 3, stride, **inner)
        self.conv3 = OctaveConv(planes, 4 * planes, 1, **inner)
        self.shortcut = None
        if in_channels != 4 * planes or stride > 1:
            self.shortcut = OctaveConv(in_channels, 4 * planes, 1, stride, alpha_in, alpha_out)

    def forward(self, x: Frequencies) -> Frequencies:
        """Compute `relu(shortcut(x) + f(x))` for each frequency."""
        out = _relu(self.conv1(x))
        out = _relu(self.conv2(out))
        out = self.conv3(out)
        shortcut = self.shortcut(x) if self.shortcut else x
        return _relu(tuple(None if a is None else a + b for a, b in zip(out, shortcut, strict=True)))


def _relu(x: Frequencies) -> Frequencies:
    return tuple(None if part is None else F.relu(part, inplace=True) for part in x)


class OctResNet(ResNet):
    """torchvision's ResNet with octave blocks. Images `(N, 3, H, W)`, at least 32x32, to logits."""

    def _make_layer(
        self, block: type[nn.Module], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        alpha_in, alpha_out = 0.0 if planes == 64 else ALPHA, 0.0 if planes == 512 else ALPHA
        layers = [block(self.inplanes, planes, stride, alpha_in, alpha_out)]
        self.inplanes = 4 * planes
        layers += [block(self.inplanes, planes, 1, alpha_out, alpha_out) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(N, num_classes)`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        frequencies = (x, None)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            frequencies = stage(frequencies)
        high, _ = frequencies
        return self.fc(high.mean(dim=(2, 3)))


def octresnet50(num_classes: int = 1000) -> OctResNet:
    """Build ResNet-50 with octave convolutions, alpha 0.5."""
    return OctResNet(OctaveBottleneck, [3, 4, 6, 3], num_classes)
