"""What a FullGrad map costs, beside the published way and beside one plain pass; and how complete it is, by network.

    python benchmark.py                                     # both: about 10 minutes on 2 cores
    python benchmark.py --only speed --networks resnet50 --batches 1 8
    python benchmark.py --only completeness

Speed: in one process the sides take turns, and each figure is the median over the rounds. The published way explains
one image at a time, with a fresh extractor for each, and upsamples every channel of every layer. The plain pass is
the limit: forward, and backward to the images only, which is less than a step of training. Weights are random; the
time does not depend on them. Completeness: the largest error of two random images, with random weights and random
BatchNorm statistics. Prints tables and writes `speed.json` and `completeness.json`.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from explain_images import choose_device
from explained_networks import load_network
from full_grad import FullGrad
from interpret_fullgrad import command
from models import list_models
from s3net_common.command_line import run_script
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT, make_folder, write_json

PIECEWISE_LINEAR = (
    "alexnet", "vgg11", "vgg19", "vgg16_bn", "squeezenet1_0", "resnet18", "resnet50", "resnext50_32x4d",
    "wide_resnet50_2", "densenet121", "densenet169", "googlenet", "inception_v3", "mnasnet1_0", "shufflenet_v2_x1_0",
    "regnet_x_400mf",
)  # fmt: skip
SMOOTH = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "timm/ghostnet_100")  # fmt: skip  # noqa: E501
ATTENTION = ("swin_t", "vit_b_16")


@dataclass
class Args:
    """Measure the speed and the completeness of FullGrad."""

    only: Literal["all", "speed", "completeness"] = "all"
    """What to measure."""
    networks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="default: three for speed, every one that is named in the README for completeness")] = ()  # fmt: skip  # noqa: E501
    """Networks to measure."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Images in a batch."""
    rounds: int = 3
    """How often each side is timed."""
    image_size: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="default: 224 for speed, 96 for completeness")] = None  # fmt: skip  # noqa: E501
    """Height and width of the images."""
    device: Annotated[str | None, tyro.conf.arg(metavar="{cpu,cuda,cuda:N,mps}", help_behavior_hint="default: a GPU if there is one")] = None  # fmt: skip  # noqa: E501
    """Where to compute."""
    out: Path = ROOT / "runs" / "fullgrad_benchmark"
    """Folder for the JSON files."""


# ---- The sides ------------------------------------------------------------------------------------------------------


class PublishedExtractor:
    """Takes the gradients at the outputs of the modules that have explicit biases, as gradients of added zeros."""

    def __init__(self, model: nn.Module) -> None:
        kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
        self.places: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.handles = [m.register_forward_hook(self.add_zeros) for m in model.modules() if isinstance(m, kinds)]

    def add_zeros(self, module: nn.Module, _: tuple, output: Tensor) -> Tensor | None:
        """The forward hook."""
        bias = module.bias
        if isinstance(module, nn.BatchNorm2d):
            bias = module.bias - module.weight * module.running_mean / (module.running_var + module.eps).sqrt()
        if bias is None:
            return None
        self.places.append(torch.zeros_like(output, requires_grad=True))
        self.biases.append(bias.detach())
        return output + self.places[-1]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()


def published_saliency(model: nn.Module, images: Tensor) -> Tensor:
    """The published formula, literally: maps `(N, 1, H, W)` of images `(N, C, H, W)`, for a model in eval mode."""
    return torch.stack([_published_map(model, image[None]) for image in images])


def _published_map(model: nn.Module, image: Tensor) -> Tensor:
    extractor = PublishedExtractor(model)
    x = image.clone().requires_grad_()
    gradient, *gradients = torch.autograd.grad(model(x).max(), [x, *extractor.places])
    extractor.remove()
    saliency = _rescaled(gradient * image).sum(1)
    for place, bias in zip(gradients, extractor.biases, strict=True):
        if place.dim() == 4:
            channels = _rescaled(place * bias[:, None, None])
            saliency += F.interpolate(channels, image.shape[2:], mode="bilinear", align_corners=True).sum(1)
    return saliency


def _rescaled(terms: Tensor) -> Tensor:
    terms = terms.abs()
    terms = terms - terms.min()
    return terms / (terms.max() + 1e-6)


def plain_pass(model: nn.Module, images: Tensor) -> Tensor:
    """Forward, and backward to the images: what any gradient method must do."""
    x = images.clone().requires_grad_()
    return torch.autograd.grad(model(x).amax(1).sum(), x)[0]


# ---- Speed ----------------------------------------------------------------------------------------------------------


def measure_speed(args: Args, device: torch.device) -> list[dict]:
    """Seconds a map of each side, by network and batch, and how far the maps lie apart."""
    names = args.networks or ("s3net_imagenet_small", "resnet50", "densenet169")
    rows = []
    with tqdm(total=len(names) * (1 + len(args.batches) * args.rounds), unit="round", disable=None) as bar:
        for name in names:
            bar.set_description(name)
            model = load_network(name, random_weights=True).model.to(device).requires_grad_(False)
            set_random_statistics(model)
            images = torch.randn(max(args.batches), 3, *[args.image_size or 224] * 2, device=device)
            expected = published_saliency(model, images[:1])
            difference = (FullGrad(model).saliency(images[:1]) - expected).abs().max() / expected.max()
            bar.update()
            for batch in args.batches:
                sides = {
                    "plain": (plain_pass, images[:batch]),
                    "ours": (lambda m, x: FullGrad(m).saliency(x), images[:batch]),
                    "published": (published_saliency, images[:1]),  # one image at a time, whatever the batch
                }
                plain_pass(model, images[:batch])  # the first pass of a shape chooses its kernels
                seconds: dict[str, list[float]] = {side: [] for side in sides}
                for _ in range(args.rounds):
                    for side, (run, x) in sides.items():
                        seconds[side].append(_seconds(run, model, x, device) / len(x))
                    bar.update()
                rows.append(_speed_row(name, batch, seconds) | {"largest_difference": difference.item()})
    return rows


def _speed_row(name: str, batch: int, seconds: dict[str, list[float]]) -> dict:
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "network": name,
        "batch": batch,
        "seconds_a_map": medians,
        "times_as_fast_as_published": medians["published"] / medians["ours"],
        "times_the_plain_pass": medians["ours"] / medians["plain"],
        "seconds_by_round": seconds,
    }


def _seconds(run: Callable, model: nn.Module, images: Tensor, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    run(model, images)
    synchronize()
    return time.perf_counter() - started


# ---- Completeness ---------------------------------------------------------------------------------------------------


def measure_completeness(args: Args, device: torch.device) -> dict[str, dict[str, float]]:
    """The largest completeness error of two images, by network and precision."""
    names = args.networks or (*list_models(), *PIECEWISE_LINEAR, *SMOOTH, *ATTENTION)
    errors = {}
    bar = tqdm(names, unit="network", disable=None)
    for name in bar:
        bar.set_description(name)
        model = load_network(name, random_weights=True).model.to(device)
        set_random_statistics(model)
        size = 224 if name == "vit_b_16" else args.image_size or 96
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
        errors[name] = {}
        for dtype in (torch.float32, torch.float64):
            error = FullGrad(model.to(dtype)).completeness_error(images.to(dtype)).max().item()
            errors[name][str(dtype).removeprefix("torch.")] = error
    return errors


@torch.no_grad()
def set_random_statistics(model: nn.Module) -> None:
    """Leave no bias at 0 and no scale at 1, as after training: BatchNorm's statistics and every constant parameter."""
    generator = torch.Generator().manual_seed(2)

    def fill(tensor: Tensor, low: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            fill(module.running_mean, -0.5)
            fill(module.running_var, 0.5)
    for parameter in model.parameters():
        first = parameter.flatten()[0]
        if (parameter == first).all():
            fill(parameter, -0.5 if first == 0 else 0.5)


# ---- The command line -----------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    """Measure, print and write.

    Raises:
        InputError: something that the user gave cannot be used.
    """
    if args.rounds < 1 or not args.batches or min(args.batches) < 1:
        raise InputError("--rounds and --batches must be 1 or more")
    device = choose_device(args.device)
    keep_freed_memory()
    make_folder(args.out)
    facts = {
        "command": command(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
    if args.only != "completeness":
        rows = measure_speed(args, device)
        print_speed(rows)
        write_json(args.out / "speed.json", facts | {"image_size": args.image_size or 224, "rows": rows})
    if args.only != "speed":
        errors = measure_completeness(args, device)
        print(f"\n{'completeness error':28}{'float32':>12}{'float64':>12}")
        for name, error in errors.items():
            print(f"{name:28}{error['float32']:12.1e}{error['float64']:12.1e}")
        write_json(args.out / "completeness.json", facts | {"image_size": args.image_size or 96, "errors": errors})
    print(f"\nwritten to {args.out}")


def print_speed(rows: list[dict]) -> None:
    """The speed table."""
    print(f"\n{'seconds a map':24}{'batch':>6}{'published':>11}{'ours':>9}{'plain':>9}{'speed-up':>10}{'of plain':>10}")
    for row in rows:
        seconds = row["seconds_a_map"]
        print(
            f"{row['network']:24}{row['batch']:6}{seconds['published']:11.3f}{seconds['ours']:9.3f}"
            f"{seconds['plain']:9.3f}{row['times_as_fast_as_published']:10.1f}{row['times_the_plain_pass']:10.2f}"
        )
    print(f"maps equal to {max(row['largest_difference'] for row in rows):.1e} of their largest value")


if __name__ == "__main__":
    run_script(main, Args, __doc__)
