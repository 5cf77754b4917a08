"""Small networks that call torch in unusual ways, for the tests of FullGrad."""

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from full_grad import FullGrad

C = 6  # channels


class Between(nn.Module):
    """Applies a function between a convolution and a classifier."""

    def __init__(self, function, part: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.part = function, part
        self.stem = nn.Conv2d(3, C, 3, 2, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))
        self.double()
        with torch.no_grad():
            self(images())

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(self.function(h) if self.part is None else self.function(self.part, h))


def images(n: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def tokens(h: Tensor) -> Tensor:
    return h.flatten(2).transpose(1, 2)


def grid(t: Tensor) -> Tensor:
    return t.transpose(1, 2).reshape(len(t), -1, 8, 8)


def error(model: nn.Module, x: Tensor | None = None) -> float:
    return FullGrad(model).completeness_error(images() if x is None else x).max().item()


def recurrent(part, h):
    return grid(part(tokens(h))[0])


def attention(need_weights):
    return lambda part, h: grid(part(tokens(h), tokens(h), tokens(h), need_weights=need_weights)[0])


def checkpointed(part, h):
    return torch.utils.checkpoint.checkpoint(part, h, use_reentrant=False)


BLOCK = nn.Sequential(nn.Conv2d(C, C, 3, 1, 1), nn.GELU(), nn.BatchNorm2d(C), nn.Softmax(1))


class LazyBuffer(nn.Module):
    """Makes its buffer when it first runs."""

    def forward(self, h: Tensor) -> Tensor:
        if not hasattr(self, "position"):
            self.register_buffer("position", torch.linspace(0, 1, h.shape[-1], dtype=h.dtype))
        return h * self.position + self.position


class Tied(nn.Module):
    """Two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(C, C), nn.Linear(C, C)
        self.second.weight = self.first.weight

    def forward(self, h: Tensor) -> Tensor:
        return grid(self.second(nn.functional.gelu(self.first(tokens(h)))))


def masked_attention(part, h):
    mask, padding = torch.ones(64, 64).triu(1).bool(), torch.arange(64).expand(len(h), 64) > 60
    return grid(part(tokens(h), tokens(h) * 2, tokens(h), key_padding_mask=padding, attn_mask=mask)[0])


def called_by_parameters(part, h):
    return torch.func.functional_call(part, dict(part.named_parameters()), (h,))


MODULES = {
    "lazy buffer": (lambda part, h: part(h), LazyBuffer()),
    "tied weights": (lambda part, h: part(h), Tied()),
    "orthogonal": (lambda part, h: part(h), nn.utils.parametrizations.orthogonal(nn.Conv2d(C, C, 1).double())),
    "old weight_norm": (lambda part, h: part(h), nn.utils.weight_norm(nn.Conv2d(C, C, 1).double())),
    "old spectral_norm": (lambda part, h: part(h), nn.utils.spectral_norm(nn.Conv2d(C, C, 1).double())),
    "functional_call": (called_by_parameters, nn.Conv2d(C, C, 1)),
    "compiled part": (lambda part, h: part(h), torch.compile(nn.Conv2d(C, C, 1), backend="eager")),
    "masked MultiheadAttention": (masked_attention, nn.MultiheadAttention(C, 2, batch_first=True, add_bias_kv=True)),
    "TransformerDecoderLayer": (
        lambda part, h: grid(part(tokens(h), tokens(h) * 0.5)),
        nn.TransformerDecoderLayer(C, 2, 12, batch_first=True),
    ),
    "checkpoint": (checkpointed, BLOCK),
    "weight_norm": (lambda part, h: part(h), nn.utils.parametrizations.weight_norm(nn.Conv2d(C, C, 3).double())),
    "spectral_norm": (lambda part, h: part(h), nn.utils.parametrizations.spectral_norm(nn.Conv2d(C, C, 3).double())),
    "LSTM": (recurrent, nn.LSTM(C, 3, batch_first=True, bidirectional=True)),
    "GRU": (recurrent, nn.GRU(C, C, batch_first=True)),
    "MultiheadAttention": (attention(False), nn.MultiheadAttention(C, 2, batch_first=True)),
    "MultiheadAttention with weights": (attention(True), nn.MultiheadAttention(C, 2, batch_first=True)),
    "TransformerEncoderLayer": (
        lambda part, h: grid(part(tokens(h))),
        nn.TransformerEncoderLayer(C, 2, 12, batch_first=True),
    ),
    "tokens first": (
        lambda part, h: part(h.flatten(2).permute(2, 0, 1)).permute(1, 2, 0).reshape(-1, C, 8, 8),
        nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C), nn.GELU()),
    ),
}
