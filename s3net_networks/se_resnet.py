"""SE-ResNet-50: Hu, Shen, Sun 2018, "Squeeze-and-Excitation Networks", section 3 and Figure 3.

The table's network has 28,071,976 parameters, and so no biases in the gates; those of timm and torchvision have them.
Left open by the paper, and here as in torchvision's ResNet: the stride stands in the 3x3 convolution of a block.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

REDUCTION = 16  # section 6.1: channels over the gate's inner width


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate in (0, 1) that is computed from the mean of every channel (eq. 2 to 4).

    Maps `(N, channels, H, W)` to the same shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // REDUCTION, bias=False)
        self.excite = nn.Linear(channels // REDUCTION, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x * gate`."""
        gate = self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class SEBottleneck(Bottleneck):
    """torchvision's bottleneck block with gates on its residual branch, before the shortcut is added."""

    def __init__(self, inplanes: int, planes: int, *args, **kwargs) -> None:
        super().__init__(inplanes, planes, *args, **kwargs)
        self.bn3 = nn.Sequential(self.bn3, SqueezeExcitation(planes * self.expansion))


def se_resnet50(num_classes: int = 1000) -> ResNet:
    """ResNet-50 of blocks with gates."""
    return ResNet(SEBottleneck, [3, 4, 6, 3], num_classes)
