"""The networks of the Tiny ImageNet table that torchvision has, parameter for parameter; with random weights."""

from torch import nn
from torchvision import models


def mobilenet_v2(num_classes: int = 1000) -> nn.Module:
    """3,504,872 parameters. Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks"."""
    return models.mobilenet_v2(num_classes=num_classes)


def efficientnet_b0(num_classes: int = 1000) -> nn.Module:
    """5,288,548 parameters. Tan and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural ...".

    Of its own accord it drops whole blocks in training (stochastic depth), up to a fifth of them at the last.
    """
    return models.efficientnet_b0(num_classes=num_classes)
