"""Finds why FullGrad is not complete on a network: functions of the forward pass that it cannot see."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from explained_model import logits_of, prepared, run_model
from module_names import ModuleNames
from operation_bias import Operations, watched


class Inspection(Operations):
    """Notes the functions whose input was computed by something that `Operations` did not see.

    Attributes:
        unseen: for each such input the step of the backward pass that leads out of it, and which function and module
            took it.
        custom: a custom `torch.autograd.Function` among them.
        foreign: whether tensors require gradients that are neither parameters nor buffers.
    """

    def __init__(self, images: Tensor, names: ModuleNames) -> None:
        super().__init__(images, None, names)
        self.unseen: list[str] = []
        self.foreign = False
        self.custom: type | None = None
        self._seen: set[Any] = set()
        self._see(images)

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run a function, and look where its inputs came from."""
        self.check(getattr(func, "__name__", str(func)), (args, kwargs))
        output = super().__torch_function__(func, types, args, kwargs)
        self._see((args, output))
        return output

    def apply_custom(self, function: type, apply: Callable, args: tuple) -> Any:
        """Run a custom `torch.autograd.Function`, and look where its inputs came from."""
        self.check(function.__name__, args)
        output = super().apply_custom(function, apply, args)
        self._see((args, output))
        return output

    def check(self, function: str, inputs: object) -> None:
        """Note the inputs of a function that nothing seen has computed."""
        for tensor in _tensors_with_gradients(inputs):
            if tensor.grad_fn is None:
                self.foreign = True
            elif tensor.grad_fn not in self._seen and not (tensor._is_view() and tensor._base.grad_fn in self._seen):
                where = f" in module {self.names.running}" if self.names.running else ""
                self.unseen.append(f"{function}{where} takes the result of {tensor.grad_fn.name()}")
                self.custom = self.custom or getattr(tensor.grad_fn, "_forward_cls", None)
                self._seen.add(tensor.grad_fn)

    def origin(self) -> str:
        """Where functions that were not seen come from."""
        if self.custom is not None:
            name = self.custom.__name__
            return f"a custom torch.autograd.Function whose apply was stored: call {name}.apply in the forward pass"
        if self.transforms:
            return "torch.vmap or another transform of torch.func"
        return "a scripted function, an extension, compiled code or another thread"

    def _see(self, tree: object) -> None:
        for tensor in _tensors_with_gradients(tree):
            self._seen.add(tensor.grad_fn)
            if tensor._is_view():
                self._seen.add(tensor._base.grad_fn)


def _tensors_with_gradients(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]


def cause_of_incompleteness(model: nn.Module, images: Tensor) -> str:
    """Return a sentence that says why eq. 1 does not hold on a network.

    Args:
        model: the network.
        images: `(N, C, H, W)`.
    """
    with prepared(model):
        copy = images.detach().clone().requires_grad_().clone()
        names = ModuleNames(model)
        inspection = Inspection(copy, names)
        with names.watch(), watched(inspection):
            output = run_model(model, copy)
        logits = logits_of(output, len(images))
        if not logits.isfinite().all():
            return "The network's output is not finite"
        inspection.check("the output", logits)
    if inspection.unseen:
        more = len(inspection.unseen) - 1
        others = f" (and {more} more)" if more else ""
        return (
            f"FullGrad did not see every function of the network: {inspection.unseen[0]}{others}, which comes from "
            f"{inspection.origin()}"
        )
    if inspection.foreign:
        return "The network uses tensors that require gradients and are neither parameters nor buffers"
    if inspection.custom_functions:
        functions = ", ".join(sorted(inspection.custom_functions))
        return (
            f"The gradient of a custom torch.autograd.Function may be wrong, or have no derivative itself: {functions}"
        )
    return "FullGrad saw all of its functions: one of them is random, or its gradient is wrong or imprecise"
