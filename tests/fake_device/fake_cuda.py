"""Training steps, evaluations and FullGrad on fake CUDA tensors, on a machine without a GPU or a driver.

    python tests/fake_device/fake_cuda.py [--dtype float16] [--graphs] [--lines] [NAME ...]    # all networks by default

Prints JSON. For each network: the operations on the device and the copies between host and device, of a batch
and of a training step, and how often the host reads from the device in an epoch, an evaluation and a saliency map.

Every tensor is a FakeTensor: shapes, dtypes and devices are computed, and no kernel runs. An operation on tensors of
two devices raises an error. When the host reads a CUDA tensor, it gets a made-up value, and the read is counted: there
the host would wait for the GPU. A CUDA build of PyTorch cannot run `backward` without a driver, because the autograd
engine asks for the accelerator. Two functions of libtorch_cpu.so, which say that there is one, are therefore replaced
by a library that LD_PRELOAD loads.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT, ROOT / "generalizability", ROOT / "interpretability"]
SYMBOLS = ("_ZN2at11accelerator14getAcceleratorEb", "_ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE")
LIBRARY = f"""
/* std::optional<c10::DeviceType> at::accelerator::getAccelerator(bool): none */
short {SYMBOLS[0]}(_Bool checked) {{ (void)checked; return 0; }}
/* bool at::accelerator::isAccelerator(c10::DeviceType): false */
_Bool {SYMBOLS[1]}(signed char type) {{ (void)type; return 0; }}
"""


def restart_with_library() -> None:
    """Compile the library, and run this program again with it."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "fake.c"), Path(folder, "fake.so")
        source.write_text(LIBRARY)
        subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-o", library, source], check=True)
        environment = os.environ | {"FAKE_CUDA": "1", "LD_PRELOAD": str(library), "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, FOLDERS))
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)


if __name__ == "__main__" and "FAKE_CUDA" not in os.environ:
    restart_with_library()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

CUDA = torch.device("cuda", 0)
# Operations that launch no kernel.
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
    "is_pinned", "is_same_size", "lift_fresh", "new_empty", "new_empty_strided", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_local_scalar_dense",
    "prim::device",
}  # fmt: skip
reads: collections.Counter = collections.Counter()  # by line of the repository


class Counter(TorchDispatchMode):
    """Counts the operations that launch a kernel, by name, and the copies between host and device, by line."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.copies = collections.Counter(), collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        tensors = [t for t in tree_leaves((args, kwargs or {}, result)) if isinstance(t, Tensor)]
        kinds = {t.device.type for t in tensors}
        if "cuda" in kinds and name not in VIEWS:
            if name in ("_to_copy", "copy_") and kinds == {"cuda", "cpu"}:
                self.copies[line_of_repository()] += 1
            else:
                self.operations[name] += 1
        return result


def line_of_repository() -> str:
    """Return file and line of the innermost call in the repository's sources."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__).resolve() and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "elsewhere"


# ---- A fake device ------------------------------------------------------------------------------------------------


def pretend_cuda(bfloat16: bool) -> None:
    """Make PyTorch say that there is one GPU, and count the host's reads of its tensors."""
    torch.library.register_fake("aten::_fused_sgd_")(lambda *args, **kwargs: None)
    torch.library.register_fake("aten::_fused_sgd_.tensor_lr")(lambda *args, **kwargs: None)
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_bf16_supported": bfloat16,
        "mem_get_info": (80 << 30, 80 << 30),
        "get_device_capability": (8, 0),
        "get_device_name": "fake",
        "synchronize": None,
        "set_device": None,
        "current_stream": Stream(),
    }.items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    torch.cuda.Stream, torch.cuda.CUDAGraph, torch.cuda.Event = Stream, Graph, Event
    torch.cuda.stream = torch.cuda.graph = without_reads
    torch._utils.is_available = True
    for name, value in {
        "item": lambda t: 0.5 if t.is_floating_point() else 0,
        "tolist": made_up_list,
        "__bool__": lambda t: True,
        "__int__": lambda t: 0,
        "__float__": lambda t: 0.5,
        "__index__": lambda t: 0,
    }.items():
        setattr(Tensor, name, counted(name, value))
    FakeTensor.tolist = Tensor.tolist


def counted(name: str, value: Callable[[Tensor], object]) -> Callable:
    def read(self: Tensor, *args, **kwargs) -> object:
        if self.device.type == "cuda":
            reads[f"{line_of_repository()} {name}"] += 1
        return value(self)

    return read


def made_up_list(tensor: Tensor) -> object:
    value = 0.5 if tensor.is_floating_point() else 0
    for size in reversed(tensor.shape):
        value = [value] * size
    return value


class Stream:
    """A stream of the fake device."""

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)


class Event:
    """An event of the fake device."""

    def __init__(self, **kwargs) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Graph:
    """A graph of the fake device: counts its replays."""

    replays = 0

    def replay(self) -> None:
        type(self).replays += 1


@contextmanager
def without_reads(context: object, **kwargs):
    """Check that the host reads nothing on another stream, or while a graph is captured: it would be an error there."""
    assert isinstance(context, Stream | Graph)
    before = reads.total()
    yield
    assert reads.total() == before, f"a read in a graph: {reads}"


def on_fake_cuda(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network on the fake GPU in the channels-last format; `Module.to` cannot move fake parameters."""
    with CUDA:
        model = build()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 4:
                data = parameter.detach().to(memory_format=torch.channels_last)
                module._parameters[name] = nn.Parameter(data)
    return model


# ---- What is run on it --------------------------------------------------------------------------------------------


def train_epoch(trainer, batches) -> None:
    """Train an epoch in which the host reads the losses at the end only, as if it took less than two seconds."""
    from training.engine import Progress

    trainer.agreement.interval = len(batches)
    trainer.train_epoch(batches, Progress())


def run_training(name: str, batch_size: int, size: int, classes: int, accumulate: int, graphs: bool) -> dict:
    """Train for an epoch of 5 full batches and a smaller one, and evaluate, as train_s3net.py does."""
    from data.batches import EvaluationBatches, TrainingBatches
    from data.image_sets import ImageSet
    from distributed import Ranks
    from recipes import RunConfig, recipe_for
    from s3net_networks import create_network
    from training.engine import evaluate
    from training.optimization import make_trainer

    recipe = vars(recipe_for("cifar100", name))
    config = {name: recipe[name] for name in RunConfig.__dataclass_fields__ if name in recipe}
    images = 5 * batch_size + 3
    config |= {"dataset": "cifar100", "model_options": {}, "num_classes": classes, "seed": 0, "amp": True}
    config |= {"batch_size": batch_size, "accumulate": accumulate, "limit_train": None, "limit_val": None}
    config |= {"train_images": images, "val_images": images, "classes": [str(i) for i in range(classes)]}
    config = RunConfig(**config)
    pixels = torch.randint(256, (images, 3, size, size), dtype=torch.uint8)
    data = ImageSet(pixels, torch.randint(classes, (images,)), config.classes)
    model = on_fake_cuda(lambda: create_network(name, classes))
    trainer = make_trainer(model, config, 6, compiled=False, ranks=Ranks(0, 1, CUDA), graphs=graphs)
    options = {"flip": config.flip, "crop_padding": config.crop_padding, "seed": 0}
    batches = TrainingBatches(data, batch_size, CUDA, config.mean, config.std, **options)
    evaluation = EvaluationBatches(data, batch_size, CUDA, config.mean, config.std)

    result = {}
    model.train()
    stream = batches.epoch(0)
    for _ in range(5):  # the first creates the optimizer's state; with graphs, the fourth is captured
        fetched, stepped = Counter(), Counter()
        with fetched:
            batch = next(stream)
        with stepped:
            trainer._step(*batch)
    for part, counter in {"batch": fetched, "step": stepped}.items():
        result[part] = {"operations": counter.operations.total(), "copies": counter.copies.total()}
        result[part]["by_name"] = dict(counter.operations.most_common()) | dict(counter.copies)
    result["precision"], result["replays"] = trainer.precision.name, Graph.replays
    result["step"]["reads"], result["reads_of_steps"] = reads.total(), dict(reads)
    for part, run in {
        "epoch": lambda: train_epoch(trainer, batches),
        "evaluation": lambda: evaluate(model, evaluation, trainer),
    }.items():
        reads.clear()
        run()
        result[part] = {"reads": reads.total(), "lines": dict(reads)}
    return result


def run_fullgrad(name: str, size: int, classes: int) -> dict:
    """Compute a saliency map and a decomposition."""
    import explained_model
    from full_grad import FullGrad
    from s3net_networks import create_network

    explained_model._check_values = lambda name, tensor: None  # which refuses tensors without values
    with CUDA:
        model = create_network(name, classes)
    model.eval()
    reads.clear()
    images = torch.randn(2, 3, size, size, device=CUDA)
    explainer = FullGrad(model)
    maps = explainer.saliency(images)
    assert maps.device == CUDA and maps.shape == (2, 1, size, size)
    explainer.decompose(images)
    return {"reads": reads.total(), "lines": dict(reads)}


def main() -> int:
    """Run every network that is named, and print the results. Return the number of failures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument(
        "--lines", action="store_true", help="also print operations by name, and lines that read or copy"
    )
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    pretend_cuda(args.dtype == "bfloat16")
    from s3net_common.output_files import run_record
    from s3net_networks import list_networks

    failures, results = 0, []
    for name in args.names or list_networks():
        size, batch_size, classes = (32, 64, 100) if name.endswith("_cifar") else (224, 8, 1000)
        result = {"network": name}
        reads.clear()
        Graph.replays = 0
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                result |= run_training(name, batch_size, size, classes, args.accumulate, args.graphs)
            with FakeTensorMode(allow_non_fake_inputs=True):
                result["saliency"] = run_fullgrad(name, size, classes)
        except Exception:
            failures += 1
            result["error"] = traceback.format_exc()
        if not args.lines:
            for part in ("batch", "step", "epoch", "evaluation", "saliency"):
                for detail in ("by_name", "lines"):
                    result.get(part, {}).pop(detail, None)
        results.append(result)
        print(f"{name}: {'failed' if 'error' in result else 'done'}", file=sys.stderr, flush=True)
    print(json.dumps(run_record() | {"networks": results}, indent=1))
    return failures


if __name__ == "__main__":
    sys.exit(main())
