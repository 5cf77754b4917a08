"""The model, images and classes that `FullGrad` is given: checks, and a model's state during a pass."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from s3net_common.errors import InputError, shown

CONSTANT = (
    "the network's output does not depend on the images: FullGrad has nothing to explain. Look for torch.no_grad, "
    "detach, or a rounding on the way"
)

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def refuse_unusable(model: nn.Module) -> None:
    """Raise InputError for scripted or quantized modules, parameters made in inference mode, or what is no module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"FullGrad explains an nn.Module, and this is a {type(model).__name__}")
    for path, module in model.named_modules():
        place = f"its module {path}" if path else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"FullGrad cannot look inside this network: {place} is scripted. Give the plain nn.Module")
        if type(module).__module__.startswith(QUANTIZED):
            raise InputError(
                f"FullGrad cannot differentiate this network: {place} is quantized. Give the plain nn.Module"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise InputError(
                f"FullGrad cannot differentiate this network: {name} was made in torch.inference_mode. Make or load "
                "the network outside of it"
            )


def _modules_and_tensors(model: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """Return the model's modules, and their parameters and buffers."""
    modules = list(model.modules())
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        refuse_unusable(model)
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    return modules, tensors


def check_images(images: Tensor) -> None:
    """Raise InputError for images that are not `(N, C, H, W)` in floating point, with values."""
    if not isinstance(images, Tensor):
        raise InputError(f"images are a {type(images).__name__}: give a tensor of shape (N, channels, height, width)")
    if images.dim() != 4 or len(images) == 0:
        raise InputError(f"images have shape {tuple(images.shape)}: give (N, channels, height, width), N above 0")
    if not images.is_floating_point():
        raise InputError(f"images have type {images.dtype}: convert them to floating point and normalise them")
    if images.layout != torch.strided:
        raise InputError(f"images have layout {images.layout}: give a dense tensor")
    _check_values("images", images)


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor):
        raise InputError(f"{name}: these tensors hold no values (meta or fake): give a tensor on a real device")


def class_columns(target: object, images: int) -> Tensor | None:
    """Return the explained classes as `(N, K)`, or None.

    Raises:
        InputError: they are no whole numbers, or have a wrong shape.
    """
    if target is None:
        return None
    try:
        target = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"target is {shown(target)}: give whole class indices") from None
    _check_values("target", target)
    if target.numel() == 0:
        raise InputError("target names no class: give at least one")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise InputError(f"target has type {target.dtype}: give whole class indices")
    if target.dim() == 0:
        target = target.expand(images)
    if target.dim() > 2 or len(target) != images:
        raise InputError(f"target has shape {tuple(target.shape)} for {images} images: give (N,) or (N, K)")
    return target.reshape(images, -1).long()


def check_classes(target: Tensor | None, logits: Tensor) -> Tensor:
    """Return the explained classes `(N, K)`: by default the largest logit's. Raises InputError if there is no such."""
    classes = logits.shape[1]
    if target is None:
        return logits.detach().argmax(dim=1, keepdim=True)
    outside = target[(target < 0) | (target >= classes)]
    if len(outside):
        raise InputError(f"there is no class {outside[0].item()}: this network has the classes 0 to {classes - 1}")
    return target.to(logits.device)


def logits_of(output: object, images: int, constant: bool = False) -> Tensor:
    """Return the logits `(N, classes)` in a model's output: a tensor, or in a tuple, a dictionary or `.logits`.

    Args:
        output: what the model returned.
        images: N.
        constant: whether the logits may be independent of the images, as under `torch.no_grad`.

    Raises:
        InputError: there are none, or they do not depend on the images.
    """
    if isinstance(output, Tensor):
        candidates = [output]
    elif isinstance(getattr(output, "logits", None), Tensor):
        candidates = [output.logits]
    elif isinstance(output, Mapping):
        candidates = [output["logits"]] if "logits" in output else list(output.values())
    else:
        candidates = list(output) if isinstance(output, Sequence) and not isinstance(output, str) else []
    for tensor in candidates:
        if isinstance(tensor, Tensor) and tensor.dim() == 2 and len(tensor) == images and tensor.is_floating_point():
            if not (tensor.requires_grad or constant):
                raise InputError(CONSTANT)
            return tensor
    shapes = [
        f"{tuple(t.shape)} of type {t.dtype}" if isinstance(t, Tensor) else type(t).__name__ for t in candidates
    ] or [type(output).__name__]
    raise InputError(f"the model gave {', '.join(map(str, shapes))}: FullGrad explains logits of shape (N, classes)")


def run_model(model: nn.Module, images: Tensor) -> object:
    """Return the model's output.

    Raises:
        InputError: images and model have different devices or types, or the model uses a tensor of inference mode.
    """
    try:
        return model(images)
    except (RuntimeError, NotImplementedError) as error:
        tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
        devices = {tensor.device for tensor in tensors}
        if len(devices) == 1 and images.device not in devices:
            device = devices.pop()
            raise InputError(
                f"images are on {images.device}, and the network is on {device}: move one of them"
            ) from error
        if "Inference tensors cannot be saved for backward" in str(error):
            raise InputError(
                "FullGrad cannot differentiate this network: a tensor that it uses, no parameter or buffer, was made "
                "in torch.inference_mode"
            ) from error
        types = {tensor.dtype for tensor in tensors}
        if len(types) == 1 and images.dtype not in types:
            raise InputError(
                f"images have type {images.dtype}, and the network {types.pop()}: convert one of them"
            ) from error
        raise


def fingerprint(model: nn.Module) -> tuple:
    """Return what tells whether a model's modules, parameters or buffers have changed."""
    modules, tensors = _modules_and_tensors(model)
    return (
        tuple(map(id, modules)),
        tuple(
            (t.data_ptr(), t.shape, t.dtype, 0 if t.is_inference() else t._version) for t in tensors if not is_lazy(t)
        ),
    )


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode with constant parameters, in exact arithmetic. On leaving, all is as it was."""
    modules, tensors = _modules_and_tensors(model)
    with ExitStack() as undo:
        undo.callback(_set_modes, modules, [module.training for module in modules])
        undo.callback(_set_requires_grad, tensors, [tensor.requires_grad for tensor in tensors])
        try:
            model.eval()
        except NotImplementedError:  # torch.export has fixed the mode
            _set_modes(modules, [False] * len(modules))
        _set_requires_grad(tensors, [False] * len(tensors))  # only grad_x is needed: half of a backward pass
        _use_full_float32(undo)
        if "torch._dynamo" in sys.modules:  # functions of a compiled model cannot be seen
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        yield


def _set_modes(modules: Sequence[nn.Module], modes: Sequence[bool]) -> None:
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode


def _set_requires_grad(tensors: Sequence[Tensor], values: Sequence[bool]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        if tensor.requires_grad != value:
            tensor.requires_grad_(value)


def _use_full_float32(undo: ExitStack) -> None:
    """Turn off TensorFloat-32 and the like, which round to 10 bits: eq. 1 would miss by 1e-3."""
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):  # from PyTorch 2.9
        attribute, off = "fp32_precision", "ieee"
        switches = [part for backend in (backends.cudnn, backends.mkldnn) for part in (backend.conv, backend.rnn)]
        switches += [backends.cuda.matmul, backends.mkldnn.matmul]
    else:
        attribute, off = "allow_tf32", False
        switches = [backends.cudnn, backends.cuda.matmul]
    for switch in switches:
        undo.callback(setattr, switch, attribute, getattr(switch, attribute))
        setattr(switch, attribute, off)
