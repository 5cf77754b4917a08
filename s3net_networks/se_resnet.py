"""SE-ResNet-50: Hu, Shen, Sun 2018, "Squeeze-and-Excitation Networks", section 3 and Figure 3.

The network of the paper's table has 28,071,976 parameters, so its gates have no biases (those of timm and torchvision
have). As in torchvision's ResNet, the 3x3 convolution of a block has the stride.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

REDUCTION = 16  # section 6.1: channels over the gate's inner width


class SqueezeExcitation(nn.Module):
    """Multiplies each channel by a gate in (0, 1), computed from the means of all channels (eq. 2 to 4).

    Maps `(N, channels, H, W)` to the same shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // REDUCTION, bias=False)
        self.excite = nn.Linear(channels // REDUCTION, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x * gate`."""
        gate = self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class SEBottleneck(Bottleneck):
    """torchvision's bottleneck block with gates on its residual branch, before the shortcut is added."""

    def __init__(self, inplanes: int, planes: int, *args, **kwargs) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        self.bn3 = nn.Sequential(self.bn3, SqueezeExcitation(planes * self.expansion))


def se_resnet50(num_classes: int = 1000) -> ResNet:
    """Build ResNet-50 with squeeze-and-excitation blocks."""
    return ResNet(SEBottleneck, [3, 4, 6, 3], num_classes)
