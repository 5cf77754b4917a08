"""LambdaResNet-50: Bello 2021, "LambdaNetworks: Modeling Long-Range Interactions Without Attention", section 3.

ResNet-50 whose 3x3 convolutions are lambda layers: 4 heads, key depth 16, intra-depth 1, and a local context of 23x23
in which positions are embedded relative to each other (its "lambda convolution"). 14,998,056
parameters.

Some details are open or different in the paper. As in the code behind the paper's table: queries and keys are
batch-normalised and values are not; after the first lambda layer of a stage, a 3x3 average pool has the stage's stride;
the 1x1 convolutions of the shortcuts have biases; dropout of 0.3 before the classifier; the plain 7x7 stem.
Convolutions keep PyTorch's initialisation; embeddings are drawn from a standard normal distribution.

A lambda layer is quadratic in its input. Without BatchNorm's scaling, activations therefore grow without limit from
layer to layer: in evaluation, logits are finite only after training steps have updated the running statistics.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

HEADS, KEY_DEPTH, CONTEXT, DROPOUT = 4, 16, 23, 0.3


class LambdaLayer(nn.Module):
    """Lambda layer: each position n applies a linear map, the lambda, to its queries (eq. 1 and 2).

    The lambda is the sum of a content lambda, equal at all positions, and a position lambda:

        content[k, v] = sum over m of softmax(keys)[k, m] * values[v, m]
        position[k, v, n] = sum over the positions m around n of embedding[k, m - n] * values[v, m]
        output[h, v, n] = sum over k of queries[h, k, n] * (content[k, v] + position[k, v, n])

    Embeddings are relative, so the second is a convolution with kernel `context` that all values share, and memory
    grows with the number of positions times key depth, not with its square.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, a multiple of `heads`; each head gives `out_channels / heads`.
        heads: queries of each position, which share keys and values.
        key_depth: width of queries and keys.
        context: odd height and width in pixels of what a position's lambda reads.

    Maps `(N, in_channels, H, W)` to `(N, out_channels, H, W)`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int = HEADS,
        key_depth: int = KEY_DEPTH,
        context: int = CONTEXT,
    ) -> None:
        super().__init__()
        self.heads, self.key_depth = heads, key_depth
        self.queries = _conv_norm(in_channels, heads * key_depth)
        self.keys = _conv_norm(in_channels, key_depth)
        self.values = nn.Conv2d(in_channels, out_channels // heads, 1, bias=False)
        self.embedding = nn.Parameter(torch.randn(key_depth, 1, context, context))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the heads, concatenated."""
        n, _, height, width = x.shape
        queries = self.queries(x).reshape(n, self.heads, self.key_depth, -1)
        keys = self.keys(x).flatten(2).softmax(dim=2)
        values = self.values(x)
        content = torch.einsum("bkn,bvn->bkv", keys.to(values.dtype), values.flatten(2))

        one_by_one = values.reshape(-1, 1, height, width)
        position = F.conv2d(one_by_one, self.embedding, padding=self.embedding.shape[-1] // 2)
        position = position.reshape(n, -1, self.key_depth, height * width)

        output = torch.einsum("bhkn,bkv->bhvn", queries, content)
        output = output + torch.einsum("bhkn,bvkn->bhvn", queries, position)
        return output.reshape(n, -1, height, width)


def _conv_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


class LambdaBottleneck(Bottleneck):
    """torchvision's bottleneck block with a lambda layer in the middle."""

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Sequential | None = None, *args, **kwargs
    ) -> None:
        super().__init__(inplanes, planes, stride, downsample, *args, **kwargs)
        self.conv2 = LambdaLayer(planes, planes)
        if downsample is not None:  # the first block of a stage
            self.conv2 = nn.Sequential(self.conv2, nn.AvgPool2d(3, stride, padding=1))
            downsample[0] = nn.Conv2d(inplanes, planes * self.expansion, 1, stride)  # with bias


def lambda_resnet50(num_classes: int = 1000) -> ResNet:
    """Build ResNet-50 with lambda layers."""
    model = ResNet(LambdaBottleneck, [3, 4, 6, 3], num_classes)
    model.fc = nn.Sequential(nn.Dropout(DROPOUT), model.fc)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()  # torchvision's ResNet has its own initialisation
    return model
