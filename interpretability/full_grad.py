"""FullGrad saliency (Srinivas and Fleuret 2019), complete on any network that is made of functions of torch.

A network of affine and piecewise-linear functions gives, at every image x, exactly

    f(x) = grad_x f . x  +  sum over functions m of  (grad of f at the output of m) . b_m                        (1)

with b_m the bias of m. FullGrad draws both parts: what the pixels carry, and what the biases carry at each place of
each feature map. Here one rule gives b_m for every function z -> m(z) that the network calls, inside of its modules and
outside:

    b_m = m(z) - Dm(z)[z]                                                                                        (2)

It is the bias of a convolution, beta - gamma * mean / sqrt(var + eps) of a BatchNorm, 0 of a ReLU or a pool, the
position embedding where a transformer adds one, and the implicit bias of whatever is smooth (SiLU, GELU, LayerNorm,
attention). So (1) also holds where a network has no explicit biases, and `completeness_error` measures how well.

    explainer = FullGrad(model)
    maps = explainer.saliency(images)                         # (N, 1, H, W), for the largest logit of each image
    maps = explainer.saliency(images, target=7)
    input_gradient, bias_gradients = explainer.decompose(images)
    errors = explainer.completeness_error(images)             # (N,), about 1e-6 in float32
"""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bias_sums import SaliencySum, Terms, Total, joined_terms, psi
from blind_spots import cause_of_incompleteness
from explained_model import (
    CONSTANT,
    check_classes,
    check_images,
    class_columns,
    fingerprint,
    logits_of,
    prepared,
    refuse_unusable,
    run_model,
)
from module_names import ModuleNames
from operation_bias import ChangedError, Flow, Operations, watched
from places import Layout
from s3net_common.errors import InputError

__all__ = ["Explanation", "FullGrad", "IncompleteWarning", "psi"]

# Relative error of eq. 1 from which `saliency` warns, by the coarsest type that the network computes in.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.25}


class IncompleteWarning(UserWarning):
    """Eq. 1 does not hold on a network, so its maps leave something out; or it holds image by image only."""


class Explanation(NamedTuple):
    """What one pass gives for N images and K targets each.

    Attributes:
        maps: `(N, K, H, W)` saliency, not negative, not normalised.
        logits: `(N, classes)`.
        target: `(N, K)` the explained classes.
        completeness_error: `(N, K)` `|f(x) - right side of eq. 1|`, relative to the image's largest absolute logit.
        drawn: `(N, K)` the share of the sum of eq. 1's absolute terms that the maps show. The rest has no place in the
            image: class tokens, classifiers, squeeze-and-excitation.
    """

    maps: Tensor
    logits: Tensor
    target: Tensor
    completeness_error: Tensor
    drawn: Tensor


class FullGrad:
    """FullGrad of a classifier that maps images `(N, C, H, W)` to logits `(N, classes)`.

    The model runs in evaluation mode and is handed back as it was: mode, hooks, `requires_grad` and gradients, also
    after an exception. It may return the logits in a tuple, a dictionary, or an object with an attribute `logits`.

    Args:
        model: any `nn.Module`; its parameters and the images are on one device.
        batch_size: images a pass, which bounds the memory however many images come.
        composites: without effect, accepted for earlier programs.

    Raises:
        InputError: the model is no nn.Module, or holds a scripted or quantized module, or parameters that were made in
            inference mode.
    """

    def __init__(self, model: nn.Module, batch_size: int = 16, composites: object = None) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: give 1 or more")
        if composites is not None:
            warnings.warn("composites has no effect: FullGrad now sees inside of every module", stacklevel=2)
        self.model = model
        self.batch_size = batch_size
        self._forget()

    def saliency(self, images: Tensor, target: int | Tensor | None = None) -> Tensor:
        """Saliency maps `(N, 1, H, W)`, not negative: the larger, the more the pixel's place matters.

        Args:
            images: `(N, C, H, W)`, floating point, normalised as the model expects.
            target: the class to explain: None for each image's largest logit, one class for all images, `(N,)`
                classes, or `(N, K)` for K maps an image, which come back as `(N, K, H, W)`.

        Raises:
            InputError: images, target or the model's output have another shape, a class is out of range, or the output
                does not depend on the images.

        Warns once, with the cause, if eq. 1 misses by more than rounding on this network (`TOLERANCE`).
        """
        return self.explain(images, target).maps

    def explain(self, images: Tensor, target: int | Tensor | None = None) -> Explanation:
        """As `saliency`, with the logits, classes, completeness errors and shares drawn of the same pass."""
        parts = []
        for chunk in self._passes(images, target, SaliencySum):
            maps = [sink.saliency(chunk.images, gradient) for sink, gradient in chunk.results]
            drawn = [sink.drawn_share(chunk.images, gradient) for sink, gradient in chunk.results]
            parts.append(
                (torch.cat(maps, 1), chunk.logits, chunk.target, chunk.completeness_error(), torch.stack(drawn, 1))
            )
        explanation = Explanation(*(torch.cat(values) for values in zip(*parts, strict=True)))
        self._warn_if_incomplete(images, explanation.target, explanation.completeness_error)
        return explanation

    def decompose(self, images: Tensor, target: int | Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms of eq. 1, for one class an image.

        Args:
            images: `(N, C, H, W)`.
            target: None, one class, or `(N,)` classes.

        Returns:
            `grad_x f` as `(N, C, H, W)`, and the bias-gradients `(grad of f at m's output) * b_m` in the shape of the
            output of m, by the path of the module that called m: `layer1.0.conv1`. A module's second and later runs
            are `conv1#2`, `conv1#3`, ... If a module calls several functions that may have a bias, their names follow:
            `layer1.0.se:sigmoid`. Functions whose b_m is 0 by their kind (ReLU, pools, convolutions without a bias)
            are left out.

        Raises:
            InputError: as `saliency`.

        Warns as `saliency`.
        """
        if isinstance(target, Tensor) and target.dim() > 1:
            raise InputError("decompose takes one class an image: call it once for each")
        chunks = list(self._passes(images, target, Terms))
        errors, targets = (
            torch.cat(parts) for parts in zip(*((c.completeness_error(), c.target) for c in chunks), strict=True)
        )
        self._warn_if_incomplete(images, targets, errors)
        return torch.cat([chunk.results[0][1] for chunk in chunks]), joined_terms([chunk.terms() for chunk in chunks])

    def completeness_error(self, images: Tensor, target: int | Tensor | None = None) -> Tensor:
        """By how much eq. 1 misses `f(x)`, relative to the image's largest absolute logit: `(N,)` (`(N, K)` for K)."""
        errors = torch.cat([chunk.completeness_error() for chunk in self._passes(images, target, Total)])
        return errors if isinstance(target, Tensor) and target.dim() == 2 else errors[:, 0]

    # ---- Passes ----

    def _passes(self, images: Tensor, target: int | Tensor | None, kind: type[Total]) -> Iterator["_Pass"]:
        """Forward and backward, `batch_size` images at a time, or one at a time where a batch cannot be split."""
        check_images(images)
        columns = class_columns(target, len(images))
        if fingerprint(self.model) != self._fingerprint:
            self._forget()
        for start in range(0, len(images), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            yield from self._chunk(images[chosen], None if columns is None else columns[chosen], kind)

    def _chunk(self, images: Tensor, target: Tensor | None, kind: type[Total]) -> list["_Pass"]:
        whole = None
        if len(images) == 1 or not self._one_by_one:
            whole = self._pass(images, target, kind)
            if len(images) == 1 or self._one_by_one is False:
                return [whole]
            if self._is_complete(whole) and not self._images_interact(whole):
                return [whole]
        single = [
            self._pass(images[i : i + 1], None if target is None else target[i : i + 1], kind)
            for i in range(len(images))
        ]
        if self._one_by_one is None:  # the first batch that is not complete decides
            self._one_by_one = not whole.splits or all(map(self._is_complete, single))
            if not self._one_by_one:
                return [whole]
            self._warn_if_images_interact(whole.logits, torch.cat([chunk.logits for chunk in single]))
        return single

    def _pass(self, images: Tensor, target: Tensor | None, kind: type[Total]) -> "_Pass":
        key = images.shape, images.dtype
        try:
            result, flow = self._run(images, target, kind, self._flows.get(key))
        except ChangedError:  # the model's flow depends on the images
            result, flow = self._run(images, target, kind, None)
        self._flows[key] = flow
        return result

    def _run(
        self, images: Tensor, target: Tensor | None, kind: type[Total], known: Flow | None
    ) -> tuple["_Pass", Flow]:
        names = ModuleNames(self.model) if kind is Terms else None
        with prepared(self.model):
            images = images.detach().as_subclass(Tensor).clone()
            x = images.clone().requires_grad_()
            copy = x.clone()  # a model may write over its input
            operations = Operations(copy, known, names)
            with nullcontext() if names is None else names.watch(), watched(operations):
                output = run_model(self.model, copy)
            logits = logits_of(output, len(images))
            target = check_classes(target, logits)
            sinks, gradients = [], []
            for column in target.unbind(dim=1):
                operations.sink = kind(images)
                f = logits.gather(1, column[:, None]).sum()  # images do not interact: one backward pass serves all
                keep = len(sinks) + 1 < target.shape[1]
                (gradient,) = torch.autograd.grad(f, x, retain_graph=keep, allow_unused=True)
                if gradient is None:
                    raise InputError(CONSTANT)
                sinks.append(operations.sink)
                gradients.append(gradient.detach())
        self._tolerance = max(self._tolerance, *(TOLERANCE.get(dtype, 0.0) for dtype in operations.dtypes))
        names = None if names is None else names.names()
        return _Pass(images, logits.detach(), target, list(zip(sinks, gradients, strict=True)), names), operations.flow

    # ---- What is known about the model ----

    def _forget(self) -> None:
        """Drop all that was found out about the model: it is new, or has changed."""
        refuse_unusable(self.model)
        self._fingerprint = fingerprint(self.model)
        self._flows: dict[tuple, Flow] = {}
        self._checked = False
        self._one_by_one: bool | None = None
        self._independent: bool | None = None
        self._tolerance = 0.0

    def _is_complete(self, result: "_Pass") -> bool:
        return result.splits and bool((result.completeness_error() <= self._tolerance).all())

    def _warn_if_incomplete(self, images: Tensor, target: Tensor, errors: Tensor) -> None:
        if not self._checked and not (errors <= self._tolerance).all():
            worst = int(errors.nan_to_num(torch.inf).amax(1).argmax())
            cause = cause_of_incompleteness(self.model, images[worst : worst + 1])
            warnings.warn(
                f"FullGrad is not complete on this network: its terms miss the output by {errors.max():.2g} of it, so "
                f"the maps leave something out. {cause}",
                IncompleteWarning,
                stacklevel=4,
            )
        self._checked = True

    def _images_interact(self, whole: "_Pass") -> bool:
        """Whether the first image has other logits alone than in its batch. Warns if they differ from run to run."""
        if self._independent is None:
            self._independent, changing = True, False
            with prepared(self.model), torch.no_grad(), suppress(Exception):  # a network may need this size of batch
                outputs = (run_model(self.model, whole.images[:1].clone()) for _ in range(2))
                first, second = (logits_of(output, 1, constant=True) for output in outputs)
                changing = self._differ(first, second)
                self._independent = changing or not self._differ(whole.logits[:1], first)
            if changing:
                warnings.warn(
                    "the network gives the same image other logits each time, because it is random or keeps a state: "
                    "each map explains one run",
                    IncompleteWarning,
                    stacklevel=6,
                )
        return not self._independent

    def _differ(self, logits: Tensor, others: Tensor) -> bool:
        scale = others.abs().amax(dim=1, keepdim=True)
        return not ((logits - others).abs() <= self._tolerance * scale).all()

    def _warn_if_images_interact(self, together: Tensor, separate: Tensor) -> None:
        if self._differ(together, separate):
            warnings.warn(
                "the images of a batch interact in this network, as in BatchNorm without running statistics: FullGrad "
                "explains each image by itself",
                IncompleteWarning,
                stacklevel=5,
            )


class _Pass(NamedTuple):
    images: Tensor
    logits: Tensor
    target: Tensor
    results: list[tuple[Total, Tensor]]  # for each column of target: what the sink gathered, and grad_x f
    names: list[str] | None

    @property
    def splits(self) -> bool:
        """Whether every bias-gradient could be split into images."""
        return all(sink.splits for sink, _ in self.results)

    def completeness_error(self) -> Tensor:
        """`(N, K)`."""
        sums = [
            sink.total + (gradient * self.images).sum((1, 2, 3), dtype=sink.total.dtype)
            for sink, gradient in self.results
        ]
        missed = (self.logits.gather(1, self.target) - torch.stack(sums, dim=1)).abs()
        return missed / self.logits.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(self.logits.dtype).tiny)

    def terms(self) -> tuple[int, dict[str, tuple[Tensor, Layout]]]:
        """The number of images, and the bias-gradients with their layouts by name."""
        return len(self.images), {self.names[index]: term for index, term in self.results[0][0].terms.items()}
