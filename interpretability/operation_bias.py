"""Watches every torch function of a forward pass, and pairs its bias (`bias_rules`) with its gradient.

`Operations` is a `TorchFunctionMode`: it sees the functions that a model calls inside and outside of its modules. It
takes b = f(z) - Df(z)[z] over all tensors z that depend on the image, and sets a hook on the function's output. In the
backward pass the hook hands b and the gradient to `sink`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_flatten

from bias_rules import (
    BATCH_NORM,
    FREE,
    METADATA,
    MULTI_HEAD_ATTENTION,
    RULES,
    Bias,
    Call,
    ChannelBias,
    differentiable_tensors,
    generic_biases,
)
from module_names import ModuleNames
from places import MOVING, Layout, Places
from s3net_common.errors import InputError


class BiasGradient(NamedTuple):
    """A bias, and the gradient of the explained logits at its place.

    Attributes:
        gradient: in the shape of the function's output.
        bias: a tensor of that shape, or one value for each channel.
        layout: how the output is split into images, and where in the image its elements are.
        name: of the function (see `module_names`), or None.
    """

    gradient: Tensor
    bias: Tensor | ChannelBias
    layout: Layout
    name: Any

    def term(self) -> Tensor:
        """Return the bias-gradient, element by element."""
        gradient, bias = self.gradient, self.bias
        if isinstance(bias, ChannelBias):
            shape = [1] * gradient.dim()
            shape[bias.axis] = -1
            return gradient * bias.values.view(shape)
        return (gradient.conj() * bias).real if gradient.is_complex() else gradient * bias


class Sink(Protocol):
    """What takes the bias-gradients of one backward pass."""

    def add(self, term: BiasGradient) -> None:
        """Take one bias-gradient."""


class Record(NamedTuple):
    """A function with a bias: its name, the shape of its output, and its layout."""

    function: str
    shape: torch.Size
    layout: Layout


class Move:
    """A call of a function that moves data: the function, and all of its arguments but tensors of floating point."""

    def __init__(self, func: Callable, args: tuple, kwargs: dict) -> None:
        leaves = tree_flatten((args, kwargs))[0]
        self.func = func
        self.sizes = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        self.indices = [
            leaf.clone() for leaf in leaves if isinstance(leaf, Tensor) and not leaf.dtype.is_floating_point
        ]

    def equals(self, other: "Move") -> bool:
        """Whether both move elements between the same positions."""
        return (
            self.func is other.func
            and self.sizes == other.sizes
            and len(self.indices) == len(other.indices)
            and all(map(torch.equal, self.indices, other.indices))
        )


class Flow(NamedTuple):
    """What a forward pass did: its functions with a bias, and those that move data, each in their order."""

    records: list[Record]
    moves: list[Move]


class ChangedError(Exception):
    """The model called other functions than in the pass from which the layouts come, or moved its data differently."""


class Operations(TorchFunctionMode):
    """Notes the bias of every function of a forward pass that depends on the image.

    Args:
        images: `(N, C, H, W)`, the tensor that the model is called with.
        known: an earlier pass with images of this shape. None finds the layouts in this pass.
        names: gives each function its name; None leaves the names out.

    Attributes:
        sink: takes the bias-gradients in a backward pass.
        flow: what this pass did.
        dtypes: of their outputs.
        transforms: whether the model used transforms of torch.func, which hide functions from this mode.
        custom_functions: the names of the custom `torch.autograd.Function`s.
    """

    def __init__(self, images: Tensor, known: Flow | None = None, names: ModuleNames | None = None) -> None:
        super().__init__()
        self.sink: Sink | None = None
        self.known = known
        self.flow = Flow([], [])
        self.names = names
        self.dtypes: set[torch.dtype] = {images.dtype}
        self.transforms = False
        self.custom_functions: set[str] = set()
        self.places = Places(images) if known is None else None

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run a function, and note its bias."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in METADATA or name in ("__set__", "__delete__") or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in FREE or name == "__get__":  # `__get__` is a property, such as `x.mT`
            return self.follow(func, args, kwargs, func(*args, **kwargs))
        if func is MULTI_HEAD_ATTENTION:  # a Python function that is best seen from inside
            with self:
                return _multi_head_attention(*args, **kwargs)
        if func is BATCH_NORM and len(args[0]) == 1:
            output = func(contiguous(args[0]), *args[1:], **kwargs)
            if output.requires_grad:
                output.register_hook(contiguous)
            return self.note(Call(func, args, kwargs), output)
        if func is torch.autograd.grad:
            raise InputError("FullGrad cannot explain this network: it computes a gradient in its forward pass")
        if func in RULES:
            return self.note(Call(func, args, kwargs), func(*args, **kwargs))
        return self.run_unknown(Call(func, args, kwargs))

    def run_unknown(self, call: Call) -> Any:
        """Run a function that is in no table, and note its bias."""
        versions = None if call.writes else _versions(call)
        output = call.func(*call.args, **call.kwargs)
        if versions is not None and versions != _versions(call):
            raise InputError(
                f"FullGrad cannot explain this network: {call.name} writes over its input, and its name does not end "
                "in _. Let it write into a copy"
            )
        return self.note(call, output)

    def is_active(self) -> bool:
        """Whether this mode sees functions now: not inside a function that it has seen."""
        return self in _get_current_function_mode_stack() and not torch._C._is_torch_function_all_disabled()

    def apply_custom(self, function: type, apply: Callable, args: tuple) -> Any:
        """Run a custom `torch.autograd.Function`, which never reaches `__torch_function__`, and note its bias."""
        self.custom_functions.add(function.__name__)
        call = Call(apply, args, {})
        call.name = function.__name__
        return self.run_unknown(call)

    def follow(self, func: Callable, args: tuple, kwargs: dict, output: Any) -> Any:
        """Note where the elements of a function's output come from. Returns the output."""
        if func in MOVING:
            self._note_move(Move(func, args, kwargs))
        if self.places is not None:
            with torch.no_grad():
                self.places.follow(func, args, kwargs, output)
        return output

    def _note_move(self, move: Move) -> None:
        index = len(self.flow.moves)
        if self.known is not None and not (index < len(self.known.moves) and move.equals(self.known.moves[index])):
            raise ChangedError
        self.flow.moves.append(move)

    def note(self, call: Call, output: Any) -> Any:
        """Take the bias of a call, and set a hook for its gradient. Returns the output."""
        target = call.args[0] if call.name == "__setitem__" else output
        tensors = differentiable_tensors(target)
        if torch._C._are_functorch_transforms_active():
            self.transforms = True
            return output
        if not any(tensor.requires_grad for tensor in tensors):
            return output
        self.follow(call.func, call.args, call.kwargs, target)
        with torch.no_grad(), saved_tensors_hooks(_same, _same):  # not the hooks of a checkpoint around the call
            biases = self._biases(call, target)
        for i, (tensor, bias) in enumerate(zip(tensors, biases, strict=True)):
            name = None if self.names is None else self.names.note(call.name, i)
            if bias is not None and tensor.requires_grad:
                self._watch(tensor, bias, call.name, name)
        return output

    def _biases(self, call: Call, target: Any) -> list[Bias]:
        rule = RULES.get(call.func)
        if rule is not None and isinstance(target, Tensor):
            bias = rule(call, target)
            if bias is not NotImplemented:
                return [bias]
        return [bias if bias.any() else None for bias in generic_biases(call)]

    def _watch(self, tensor: Tensor, bias: Tensor | ChannelBias, function: str, name: Any) -> None:
        layout = self._layout(tensor, function)
        self.dtypes.add(tensor.dtype)

        @torch.no_grad()
        def receive(gradient: Tensor) -> None:
            if self.sink is not None:
                self.sink.add(BiasGradient(gradient, bias, layout, name))

        base = tensor._base if tensor._is_view() else None
        if base is None or base.dtype != tensor.dtype:
            tensor.register_hook(receive)
            return
        # What is computed from the base goes past its view, and `linear` returns the view of a hidden base.
        strides, offset = base.stride(), tensor.storage_offset() - base.storage_offset()
        shape, view_strides = tensor.shape, tensor.stride()

        def receive_view(gradient: Tensor) -> None:
            if gradient.stride() != strides:
                same = torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device)
                gradient = same.copy_(gradient)
            receive(gradient.as_strided(shape, view_strides, gradient.storage_offset() + offset))

        base.register_hook(receive_view)

    def _layout(self, tensor: Tensor, function: str) -> Layout:
        """Return the layout of an output: from this pass, or from an earlier one, whose functions must be the same."""
        index = len(self.flow.records)
        if self.known is None:
            layout = self.places.layout(tensor)
        else:
            records = self.known.records
            if index >= len(records) or records[index][:2] != (function, tensor.shape):
                raise ChangedError
            layout = records[index].layout
        self.flow.records.append(Record(function, tensor.shape, layout))
        return layout


def contiguous(tensor: Tensor) -> Tensor:
    """Return one image's tensor in contiguous memory.

    On a CPU, PyTorch's batch_norm in evaluation mode returns a wrong gradient for one image if the input and the
    gradient have different memory layouts (seen in 2.14).
    """
    return tensor.contiguous()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _versions(call: Call) -> list[int]:
    return [leaf._version for leaf in call.leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


# The function asks `has_torch_function` first and would hand itself to the mode again.
_multi_head_attention = FunctionType(
    MULTI_HEAD_ATTENTION.__code__,
    {**MULTI_HEAD_ATTENTION.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=MULTI_HEAD_ATTENTION.__defaults__,
)
_multi_head_attention.__kwdefaults__ = MULTI_HEAD_ATTENTION.__kwdefaults__

_patch_lock = threading.RLock()


@contextmanager
def watched(operations: Operations) -> Iterator[None]:
    """Let `operations` see the functions of this thread, custom `torch.autograd.Function`s too."""
    function = torch.autograd.Function
    thread = threading.get_ident()

    with _patch_lock:  # passes of several threads take turns
        original = function.__dict__.get("apply")

        def apply(cls: type, *args: Any) -> Any:
            bound = original.__get__(None, cls)
            if threading.get_ident() != thread or not torch.is_grad_enabled() or not operations.is_active():
                return bound(*args)
            with torch._C.DisableTorchFunction():
                return operations.apply_custom(cls, bound, args)

        function.apply = classmethod(apply)
        try:
            with operations:
                yield
        finally:
            function.apply = original
