"""Maps of networks that pad their feature maps by a function of their own, as TensorFlow's "same" padding needs it."""

import torch
from torch import nn

from full_grad import FullGrad


def test_a_border_of_zeros_does_not_change_the_map():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2, padding=1)
    tail = (nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    nn.init.normal_(tail[0].bias)
    inside = nn.Sequential(first, nn.ReLU(), second, *tail)
    bare = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, stride=2)]
    for conv, padded in zip(bare, (first, second), strict=True):
        conv.load_state_dict(padded.state_dict())
    outside = nn.Sequential(nn.ZeroPad2d(1), bare[0], nn.ReLU(), nn.ZeroPad2d((1, 1, 1, 1)), bare[1], *tail)
    images = torch.randn(2, 3, 12, 12)
    expected, padded = (FullGrad(model).explain(images) for model in (inside, outside))
    assert torch.allclose(padded.maps, expected.maps, atol=1e-5)
    assert torch.allclose(padded.drawn, expected.drawn, atol=1e-6)
    assert expected.drawn.min() > 0.5
