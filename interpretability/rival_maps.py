"""Saliency maps of other gradient methods, by captum, for comparison with FullGrad.

A map is the sum over the colours of the absolute attributions.
"""

from collections.abc import Callable

import torch
from captum.attr import InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor, nn

PATH_STEPS = 32  # of integrated gradients
NOISY_COPIES = 25  # of SmoothGrad
NOISE = 0.15  # standard deviation of SmoothGrad's noise, relative to the range of the image's values
INTERNAL_BATCH = 256  # images in one pass


def gradients(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of the target's logit with respect to each image, `(N, 3, H, W)`."""
    return Saliency(model).attribute(images.clone().requires_grad_(), target=target, abs=False).detach()


def _times_input(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    return InputXGradient(model).attribute(images.clone().requires_grad_(), target=target)


def _integrated(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Integrate gradients from the mean colour (0 of a normalised image) to the image."""
    return IntegratedGradients(model).attribute(
        images, target=target, n_steps=PATH_STEPS, internal_batch_size=max(INTERNAL_BATCH, len(images))
    )


def _smooth(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Average the gradients of noisy copies of each image (Smilkov et al. 2017)."""
    smoothed = []
    for image, column in zip(images, target, strict=True):  # the noise depends on the range of the image's values
        deviation = NOISE * float(image.max() - image.min())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            smoothed.append(
                NoiseTunnel(Saliency(model)).attribute(
                    image[None].clone().requires_grad_(),
                    nt_type="smoothgrad",
                    nt_samples=NOISY_COPIES,
                    stdevs=deviation,
                    target=column[None],
                    abs=False,
                )
            )
    return torch.cat(smoothed)


RIVALS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "gradient x input": _times_input,
    "integrated gradients": _integrated,
    "SmoothGrad": _smooth,
    "gradient": gradients,
}


def rival_map(method: str, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Compute the maps of one of `RIVALS`.

    Args:
        method: a name in `RIVALS`.
        model: in evaluation mode; returns logits.
        images: `(N, 3, H, W)`, normalised so that 0 is the mean colour.
        target: `(N,)` class indices.

    Returns:
        `(N, H, W)`, not negative.
    """
    return RIVALS[method](model, images, target).detach().abs().sum(dim=1)
