"""Networks of the Tiny ImageNet table that torchvision has, with the same number of parameters. Random weights."""

from torch import nn
from torchvision import models


def mobilenet_v2(num_classes: int = 1000) -> nn.Module:
    """3,504,872 parameters. Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks"."""
    return models.mobilenet_v2(num_classes=num_classes)


def efficientnet_b0(num_classes: int = 1000) -> nn.Module:
    """5,288,548 parameters. Tan and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural ...".

    In training it drops whole blocks at random (stochastic depth), with a probability of up to 0.2 at the last block.
    """
    return models.efficientnet_b0(num_classes=num_classes)
