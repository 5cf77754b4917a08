"""Copies of batches from the processor's memory to the training device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. The copy overlaps with computation where that is safe: from pinned memory to CUDA.

    Other copies are waited for. Memory that is not pinned may be freed, and used again, before a copy that nobody waits
    for has read it; MPS does not order such copies with the allocator.
    """
    return tensor.to(device, non_blocking=device.type == "cuda" and tensor.device.type == "cpu" and tensor.is_pinned())
