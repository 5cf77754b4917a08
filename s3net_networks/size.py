"""Size of a network: parameters, and multiply-adds for one image."""

from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from s3net_common.errors import InputError, first_line
from s3net_networks import create_network
from s3net_networks.own_models import models


def model_size(model: nn.Module, image_size: int, device: torch.device) -> dict[str, int]:
    """Return `parameters` and `multiply_adds` of a model on `device`, for one image `(3, image_size, image_size)`.

    Raises:
        InputError: as `count_multiply_adds`.
    """
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "multiply_adds": count_multiply_adds(model, image_size, device)}


def network_size(name: str, num_classes: int, options: dict, image_size: int) -> dict[str, int]:
    """Return `model_size` of a network by name, without allocating its weights or computing anything.

    Raises:
        InputError: the name or an option is unknown, the network is too large, or it cannot take images of that size.
    """
    meta = torch.device("meta")
    with meta:
        model = create_network(name, num_classes, **options)
    size = model_size(model, image_size, meta)
    if size["parameters"] > models.MOST_PARAMETERS:
        raise InputError(f"{name} with these options has {size['parameters']:,} parameters: give smaller ones")
    return size


@cache
def count_parameters(name: str, num_classes: int = 100, **options) -> int:
    """Return the number of parameters of a network by name; `options` are those of `create_network`."""
    with torch.device("meta"):
        model = create_network(name, num_classes, **options)
    return sum(p.numel() for p in model.parameters())


def count_multiply_adds(model: nn.Module, image_size: int, device: torch.device) -> int:
    """Count the multiply-adds of the convolutions and matrix products for one image. Leaves the model in eval mode.

    A convolution's products with its zero padding are counted. As is usual, element-wise operations (BatchNorm,
    activations, sums), pools and resizing are not.

    Raises:
        InputError: the network cannot take images of that size.
    """
    counter = FlopCounterMode(display=False)
    model.eval()
    try:
        with counter, torch.no_grad():
            model(torch.zeros(1, 3, image_size, image_size, device=device))
    except RuntimeError as error:
        raise InputError(
            f"this network cannot take images of {image_size}x{image_size} ({first_line(error)}): give it larger ones"
        ) from error
    return counter.get_total_flops() // 2
