"""A training step captured once as a CUDA graph: one launch replaces the hundreds of kernels that the host launches.

A small network leaves the device idle most of the time: launching a kernel takes the host longer than the kernel takes
the device. A graph needs fixed addresses, so the batch is copied into fixed inputs, and the learning rate is a tensor.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Computes a step from images, labels, weights and the size of the whole batch; returns sums as tensors on the device.
Step = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]

# Steps before the capture. In them cuDNN chooses its kernels, and the optimizer creates its state.
WARM_UP_STEPS = 3


class GraphedStep:
    """A training step that replays a CUDA graph; called as `step`, with the same results.

    The first `WARM_UP_STEPS` full batches are computed without the graph, and so is every smaller batch. If the images
    of full batches change their size, this begins again.

    Args:
        step: forward, backward and update of the weights, without a read by the host.
        batch_size: images in a full batch.
    """

    def __init__(self, step: Step, batch_size: int) -> None:
        self.step, self.batch_size = step, batch_size
        self.steps_before_capture = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()
        self.stream: torch.cuda.Stream | None = None
        self.shape: torch.Size | None = None

    def __call__(self, images: Tensor, labels: Tensor, weights: Tensor, whole_batch: int) -> tuple[Tensor, Tensor]:
        """Compute one step. The results are new tensors, which the next step does not overwrite."""
        if len(images) != self.batch_size:
            return self.step(images, labels, weights, whole_batch)
        if images.shape != self.shape:
            self._forget(images.shape)
        if self.steps_before_capture:
            self.steps_before_capture -= 1
            return self._beside(images, labels, weights, whole_batch)
        if self.graph is None:
            self._capture(images, labels, weights, whole_batch)
        for fixed, new in zip(self.inputs, (images, labels, weights), strict=True):
            fixed.copy_(new)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)

    def _forget(self, shape: torch.Size) -> None:
        """Free the graph, and begin again with images of another shape."""
        if self.graph is not None:
            torch.cuda.synchronize()  # until its last replay has ended
        self.shape, self.steps_before_capture = shape, WARM_UP_STEPS
        self.graph, self.inputs, self.outputs = None, (), ()

    def _beside(self, *batch) -> tuple[Tensor, Tensor]:
        """Compute a step on another stream, as capturing requires of the steps before it."""
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            sums = self.step(*batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return sums

    def _capture(self, images: Tensor, labels: Tensor, weights: Tensor, whole_batch: int) -> None:
        """Record the kernels of a step, without running them."""
        self.inputs = tuple(torch.empty_like(tensor) for tensor in (images, labels, weights))
        self.graph = torch.cuda.CUDAGraph()
        # Other threads (the one that pins the memory of batches) may allocate memory meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = self.step(*self.inputs, whole_batch)
