"""Out of memory: one line that says which batch fits, instead of a traceback."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3net_common.errors import LocalError, first_line


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device's memory, or the processor's, is full."""
    texts = ("out of memory", "can't allocate memory")  # of MPS; of the processor
    is_full = isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)
    return isinstance(error, RuntimeError) and is_full


@contextlib.contextmanager
def out_of_memory_as_error(advice: str) -> Iterator[None]:
    """Raise a LocalError with the advice if memory is full inside the context."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise LocalError(f"out of memory ({first_line(error)}): {advice}") from error


def training_advice(
    model: nn.Module, images: Tensor, labels: Tensor, parts: int, world_size: int, autocast: AbstractContextManager
) -> str:
    """Return which flags make a step fit that was out of memory, after trying smaller parts of the batch.

    Args:
        model: the network. Its gradients and running statistics change.
        images: of this rank `(b, 3, H, W)`.
        labels: `(b,)`.
        parts: the number of parts in which the step was computed.
        world_size: number of distributed ranks.
        autocast: the context of the forward pass.
    """
    model.zero_grad(set_to_none=True)
    tried = fitting = -(-len(images) // parts)
    while fitting > 1:
        fitting //= 2
        if images.device.type == "cuda":
            torch.cuda.empty_cache()
        if _fits(model, images[:fitting], labels[:fitting], autocast):
            return (
                f"{tried} images at a time are too many for this device, and {fitting} fit; start a new run with "
                f"--accumulate {-(-len(images) // fitting)}, or with --batch-size {fitting * world_size}"
            )
    return (
        f"{tried} images at a time are too many for this device, and so is one; use a smaller --image-size or network"
    )


def _fits(model: nn.Module, images: Tensor, labels: Tensor, autocast: AbstractContextManager) -> bool:
    try:
        with autocast:
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    except ValueError:  # BatchNorm needs more than one value
        return False
    model.zero_grad(set_to_none=True)
    return True
