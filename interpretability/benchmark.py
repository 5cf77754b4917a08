"""Measure the time of FullGrad maps against the published method and a plain gradient, and their completeness.

    python interpretability/benchmark.py                          # both: about 10 minutes on 2 cores
    python interpretability/benchmark.py --only speed --networks resnet50 --batches 1 8
    python interpretability/benchmark.py --only completeness

Speed: the methods take turns in one process, and each time is the median over the rounds. The published method explains
one image at a time, with new hooks for each, and upsamples every channel of every layer. The plain gradient (one
forward pass, and one backward pass to the images only) is what every gradient method has to do. Weights are random,
because the time does not depend on them. Completeness: the larger error of two random images, with random weights and
random BatchNorm statistics. Prints tables, and writes `speed.json` and `completeness.json` into --out.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from explain_images import DEVICES, choose_device
from explained_networks import load_network
from full_grad import FullGrad
from s3net_common.command_line import flag, run_script
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT, claim_folder, run_record, write_json
from s3net_networks.own_models import models

SPEED_NETWORKS = ("s3net_imagenet_small", "resnet50", "densenet169")
PIECEWISE_LINEAR = (
    "alexnet", "vgg11", "vgg19", "vgg16_bn", "squeezenet1_0", "resnet18", "resnet50", "resnext50_32x4d",
    "wide_resnet50_2", "densenet121", "densenet169", "googlenet", "inception_v3", "mnasnet1_0", "shufflenet_v2_x1_0",
    "regnet_x_400mf",
)  # fmt: skip
SMOOTH = (
    "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "timm/ghostnet_100",
)  # fmt: skip
ATTENTION = ("swin_t", "vit_b_16")


@dataclass
class Args:
    """Measure the speed and the completeness of FullGrad."""

    only: Literal["all", "speed", "completeness"] = "all"
    """What to measure."""
    networks: flag(tuple[str, ...], "NAME ...", "three networks for speed, 32 for completeness") = ()
    """Networks to measure."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Batch sizes for speed."""
    rounds: int = 3
    """How many times each method is timed."""
    image_size: flag(int, "INT", "224 for speed, 96 for completeness") = None
    """Height and width of the images in pixels."""
    device: flag(str, DEVICES, "a GPU if there is one") = None
    """Device to compute on."""
    out: Path = ROOT / "runs" / "fullgrad_benchmark"
    """Folder to write the JSON files into. Those of an earlier run are replaced."""
    overwrite: bool = False
    """Replace files in --out that this script did not write."""


# ---- The methods ----------------------------------------------------------------------------------------------------


class PublishedHooks:
    """Hooks that add zeros to the outputs of the modules with explicit biases, to get the gradients there.

    Attributes:
        zeros: the added tensors, in the order of execution.
        biases: the bias of each, `(channels,)`.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
        self.zeros: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.handles = [m.register_forward_hook(self._add_zeros) for m in model.modules() if isinstance(m, kinds)]

    def _add_zeros(self, module: nn.Module, _: tuple, output: Tensor) -> Tensor | None:
        bias = module.bias
        if isinstance(module, nn.BatchNorm2d):
            bias = module.bias - module.weight * module.running_mean / (module.running_var + module.eps).sqrt()
        if bias is None:
            return None
        self.zeros.append(torch.zeros_like(output, requires_grad=True))
        self.biases.append(bias.detach())
        return output + self.zeros[-1]

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self.handles:
            handle.remove()


def published_saliency(model: nn.Module, images: Tensor) -> Tensor:
    """Compute maps `(N, 1, H, W)` of images `(N, C, H, W)` as published, for a model in evaluation mode."""
    return torch.stack([_published_map(model, image[None]) for image in images])


def _published_map(model: nn.Module, image: Tensor) -> Tensor:
    hooks = PublishedHooks(model)
    x = image.clone().requires_grad_()
    input_gradient, *gradients = torch.autograd.grad(model(x).max(), [x, *hooks.zeros])
    hooks.remove()
    saliency = _rescale(input_gradient * image).sum(1)
    for gradient, bias in zip(gradients, hooks.biases, strict=True):
        if gradient.dim() == 4:
            channels = _rescale(gradient * bias[:, None, None])
            saliency += F.interpolate(channels, image.shape[2:], mode="bilinear", align_corners=True).sum(1)
    return saliency


def _rescale(terms: Tensor) -> Tensor:
    terms = terms.abs()
    terms = terms - terms.min()
    return terms / (terms.max() + 1e-6)


def plain_gradient(model: nn.Module, images: Tensor) -> Tensor:
    """Compute the largest logit's gradient in the images: what any gradient method has to do at least."""
    x = images.clone().requires_grad_()
    return torch.autograd.grad(model(x).amax(1).sum(), x)[0]


# ---- Speed ----------------------------------------------------------------------------------------------------------


def measure_speed(args: Args, device: torch.device) -> list[dict[str, Any]]:
    """Return the rows of speed.json: the times of each network and batch size."""
    names = args.networks or SPEED_NETWORKS
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
                methods = {
                    "plain": (plain_gradient, images[:batch]),
                    "ours": (lambda model, x: FullGrad(model).saliency(x), images[:batch]),
                    "published": (published_saliency, images[:1]),  # one image at a time, for any batch size
                }
                plain_gradient(model, images[:batch])  # the first pass with a shape chooses its kernels
                seconds: dict[str, list[float]] = {method: [] for method in methods}
                for _ in range(args.rounds):
                    for method, (function, x) in methods.items():
                        seconds[method].append(_time(function, model, x, device) / len(x))
                    bar.update()
                rows.append(_speed_row(name, batch, seconds) | {"largest_difference": difference.item()})
    return rows


def _speed_row(name: str, batch: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    medians = {method: statistics.median(rounds) for method, rounds in seconds.items()}
    return {
        "network": name,
        "batch": batch,
        "seconds_a_map": medians,
        "times_as_fast_as_published": medians["published"] / medians["ours"],
        "times_the_plain_pass": medians["ours"] / medians["plain"],
        "seconds_by_round": seconds,
    }


def _time(function: Callable, model: nn.Module, images: Tensor, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    function(model, images)
    synchronize()
    return time.perf_counter() - started


# ---- Completeness ---------------------------------------------------------------------------------------------------


def measure_completeness(args: Args, device: torch.device) -> dict[str, dict[str, float]]:
    """Return the larger completeness error of two random images, by network and precision."""
    names = args.networks or (*models.list_models(), *PIECEWISE_LINEAR, *SMOOTH, *ATTENTION)
    errors = {}
    bar = tqdm(names, unit="network", disable=None)
    for name in bar:
        bar.set_description(name)
        model = load_network(name, random_weights=True).model.to(device)
        set_random_statistics(model)
        size = 224 if name == "vit_b_16" else args.image_size or 96  # vit_b_16 takes no other size
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
        errors[name] = {}
        for dtype in (torch.float32, torch.float64):
            error = FullGrad(model.to(dtype)).completeness_error(images.to(dtype)).max().item()
            errors[name][str(dtype).removeprefix("torch.")] = error
    return errors


@torch.no_grad()
def set_random_statistics(model: nn.Module) -> None:
    """Set BatchNorm's statistics and every constant parameter (biases of 0, scales of 1) to random values.

    After training none of them is constant, and biases of 0 would make completeness easy.
    """
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
    """Measure speed and completeness; print the tables and write the JSON files."""
    if args.rounds < 1 or not args.batches or min(args.batches) < 1:
        raise InputError("--rounds and --batches must be 1 or more")
    device = choose_device(args.device)
    keep_freed_memory()
    for name in ("speed", "completeness"):
        if args.only in ("all", name):
            claim_folder(args.out, f"{name}.json", overwrite=args.overwrite)
    record = run_record() | {"device": str(device), "threads": torch.get_num_threads()}
    if args.only != "completeness":
        rows = measure_speed(args, device)
        print_speed(rows)
        write_json(args.out / "speed.json", record | {"image_size": args.image_size or 224, "rows": rows})
    if args.only != "speed":
        errors = measure_completeness(args, device)
        print_completeness(errors)
        write_json(args.out / "completeness.json", record | {"image_size": args.image_size or 96, "errors": errors})
    print(f"\nwritten to {args.out}")


def print_speed(rows: list[dict[str, Any]]) -> None:
    """Print a line for each network and batch size."""
    print(f"\n{'seconds a map':24}{'batch':>6}{'published':>11}{'ours':>9}{'plain':>9}{'speed-up':>10}{'of plain':>10}")
    for row in rows:
        seconds = row["seconds_a_map"]
        print(
            f"{row['network']:24}{row['batch']:6}{seconds['published']:11.3f}{seconds['ours']:9.3f}"
            f"{seconds['plain']:9.3f}{row['times_as_fast_as_published']:10.1f}{row['times_the_plain_pass']:10.2f}"
        )
    difference = max(row["largest_difference"] for row in rows)
    print(f"largest difference between our maps and the published method's: {difference:.1e} of the largest value")


def print_completeness(errors: dict[str, dict[str, float]]) -> None:
    """Print a line for each network."""
    print(f"\n{'completeness error':28}{'float32':>12}{'float64':>12}")
    for name, error in errors.items():
        print(f"{name:28}{error['float32']:12.1e}{error['float64']:12.1e}")


if __name__ == "__main__":
    run_script(main, Args, __doc__)
