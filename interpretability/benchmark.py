"""Measure the time of FullGrad maps against the published method and a plain gradient, and their completeness.

    python interpretability/benchmark.py                          # both: about 10 minutes on 2 cores
    python interpretability/benchmark.py --only speed --networks resnet50 --batches 1 8
    python interpretability/benchmark.py --only completeness

Speed: the methods take turns in one process, and each time is the median over the rounds. The published method explains
one image at a time, with new hooks for each, and upsamples every channel of every layer. The plain gradient (one
forward pass, and one backward pass to the images only) is what every gradient method has to do. Weights are random,
because the time does not depend on them. Completeness: the larger error of two random images, in one batch and image by
image, with random weights, no bias of 0, and random BatchNorm statistics; and the share of the absolute terms that the
maps show. Prints tables, and writes `speed.json` and `completeness.json` into --out.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from network_flags import DEVICES
from s3net_common.command_line import OVERWRITE, THREADS, answer_flags, flag, run_script
from s3net_common.errors import InputError, first_line
from s3net_common.output_files import ROOT, claim_folder, run_record, write_json

SPEED_NETWORKS = ("s3net_imagenet_small", "resnet50", "densenet169")
COMPLETENESS_NETWORKS = Path(__file__).with_name("completeness_networks.txt")
COMPLETE = {"float32": 1e-3, "float64": 1e-9}  # largest completeness error of a complete network
SMALL_IMAGES = 96  # pixels; networks that refuse them get their usual size


@dataclass
class Args:
    """Measure the speed and the completeness of FullGrad."""

    only: Literal["all", "speed", "completeness"] = "all"
    """What to measure."""
    networks: flag(
        tuple[str, ...], "NAME ...", "three for speed, those in completeness_networks.txt for completeness"
    ) = ()
    """Networks to measure."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Batch sizes for speed."""
    rounds: int = 3
    """How many times each method is timed."""
    image_size: flag(int, "INT", "224 for speed; for completeness 96, or the network's") = None
    """Height and width of the images in pixels."""
    workers: int = 1
    """Networks whose completeness is measured at the same time."""
    device: flag(str, DEVICES, "a GPU if there is one") = None
    """Device to compute on."""
    out: Path = ROOT / "runs" / "fullgrad_benchmark"
    """Folder to write the JSON files into. Those of an earlier run are replaced."""
    overwrite: OVERWRITE = False
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explain_images import choose_device
from explained_networks import load_network
from full_grad import FullGrad
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.progress import ProgressBar

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
    with ProgressBar(total=len(names) * (1 + len(args.batches) * args.rounds), unit="round") as bar:
        for name in names:
            bar.set_description(name)
            model = load_network(name, random_weights=True).model.to(device).requires_grad_(False)
            set_random_statistics(model)
            images = torch.randn(max(args.batches), 3, *[args.image_size or 224] * 2, device=device)
            expected = published_saliency(model, images[:1])
            explainer = FullGrad(model)  # one for all images: the first pass with a shape takes longer
            difference = (explainer.saliency(images[:1]) - expected).abs().max() / expected.max()
            bar.update()
            for batch in args.batches:
                methods = {
                    "plain": (plain_gradient, images[:batch]),
                    "ours": (lambda model, x, explainer=explainer: explainer.saliency(x), images[:batch]),
                    "published": (published_saliency, images[:1]),  # one image at a time, for any batch size
                }
                plain_gradient(model, images[:batch])  # the first pass with a shape chooses its kernels, ...
                explainer.saliency(images[:batch])  # ... and finds the places of all tensors
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


def measure_completeness(args: Args, device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """Measure the completeness error of each network. Write completeness.json after each.

    Returns:
        `networks`, by name: the image size, the larger error of two images by precision, in a batch and image by image,
        and the share drawn; or `failure`, why there is none. `summary`: how many are complete to `COMPLETE`.
    """
    lines = [line for line in COMPLETENESS_NETWORKS.read_text().splitlines() if not line.startswith("#")]
    names = list(args.networks or lines)
    rows: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        if args.workers == 1:
            measured = (_completeness_row(name, args.image_size, device) for name in names)
        else:
            pool = stack.enter_context(ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")))
            jobs = [pool.submit(_completeness_row, name, args.image_size, device) for name in names]
            measured = (job.result() for job in as_completed(jobs))
        for name, row in ProgressBar(measured, total=len(names), unit="network"):
            rows[name] = row
            in_order = {name: rows[name] for name in names if name in rows}
            results = {"complete_to": COMPLETE, "summary": completeness_summary(rows), "networks": in_order}
            write_json(args.out / "completeness.json", run_record() | settings | results)
    write_json(args.out / "completeness.json", run_record() | settings | results)  # with the workers' CPU time
    return results


def _completeness_row(name: str, image_size: int | None, device: torch.device) -> tuple[str, dict[str, Any]]:
    try:
        return name, _measure_network(name, image_size, device)
    except Exception as error:  # of any kind: that a network fails is a result
        return name, {"failure": f"{type(error).__name__}: {first_line(error)}"}


def _measure_network(name: str, image_size: int | None, device: torch.device) -> dict[str, Any]:
    network = load_network(name, random_weights=True)
    model = network.model.to(device)
    set_random_statistics(model)
    images = _accepted_images(model, [image_size or SMALL_IMAGES, network.preparation.image_size]).to(device)
    row: dict[str, Any] = {"image_size": images.shape[-1], "parameters": sum(p.numel() for p in model.parameters())}
    for precision in COMPLETE:
        dtype = getattr(torch, precision)
        explainer, x = FullGrad(model.to(dtype)), images.to(dtype)
        explanation = explainer.explain(x)
        row["drawn"] = explanation.drawn.mean().item()
        row[precision] = explanation.completeness_error.max().item()
        single = [explainer.completeness_error(image[None]).item() for image in x]
        row[f"{precision}_image_by_image"] = max(single)
    return row


def _accepted_images(model: nn.Module, sizes: list[int]) -> Tensor:
    """Return two random images of the first size that the model accepts."""
    for size in sizes:
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad():
                model(images.to(next(model.parameters()).device))
        except Exception as error:  # each network has its way of refusing a size
            refusal = error
        else:
            return images
    raise refusal


def completeness_summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return how many networks were measured, and how many are complete in both precisions."""
    measured = [row for row in rows.values() if "failure" not in row]

    def count(suffix: str) -> int:
        return sum(all(row[p + suffix] <= largest for p, largest in COMPLETE.items()) for row in measured)

    return {
        "networks": len(rows),
        "measured": len(measured),
        "complete": count(""),
        "complete_image_by_image": count("_image_by_image"),
        "incomplete": [
            name
            for name, row in rows.items()
            if "failure" in row or any(row[p] > largest for p, largest in COMPLETE.items())
        ],
    }


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
    if min(args.rounds, args.workers, *args.batches, len(args.batches)) < 1:
        raise InputError("--rounds, --workers and --batches must be 1 or more")
    device = choose_device(args.device)
    keep_freed_memory()
    for name in ("speed", "completeness"):
        if args.only in ("all", name):
            claim_folder(args.out, f"{name}.json", overwrite=args.overwrite)
    settings = {"device": str(device), "threads": torch.get_num_threads()}
    if args.only != "completeness":
        rows = measure_speed(args, device)
        print_speed(rows)
        results = settings | {"image_size": args.image_size or 224, "rows": rows}
        write_json(args.out / "speed.json", run_record() | results)
    if args.only != "speed":
        print_completeness(measure_completeness(args, device, settings))
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


def print_completeness(results: dict[str, Any]) -> None:
    """Print a line for each network."""
    print(f"\n{'completeness error':34}{'pixels':>7}{'float32':>10}{'float64':>10}{'one by one':>12}{'drawn':>7}")
    for name, row in results["networks"].items():
        if "failure" in row:
            print(f"{name:34}  {row['failure'][:90]}")
            continue
        print(
            f"{name:34}{row['image_size']:7}{row['float32']:10.1e}{row['float64']:10.1e}"
            f"{row['float64_image_by_image']:12.1e}{row['drawn']:7.2f}"
        )
    summary = results["summary"]
    print(f"{summary['complete']} of {summary['networks']} networks are complete")


if __name__ == "__main__":
    run_script(main, Args, __doc__)
