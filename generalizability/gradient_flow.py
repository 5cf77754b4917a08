"""Measure gradients along a deep block for four kinds of connection, and whether the deep networks still train.

    python generalizability/gradient_flow.py --jobs 2
    python generalizability/gradient_flow.py --only initial

The network is a stem, one block of L layers, and a linear classifier on the averaged features. The layers are S3-Net's.
They form a chain, or have sparse shortcuts (S3-Net), dense connections or residual connections. A fifth kind has
sparse shortcuts with a sum at the end, as in the paper's kernel experiment. The images are scikit-learn's digits at
their own size of 8x8.

    initial   The gradient of the loss with random weights, in float64, with BatchNorm and without. The decades of a
              block are log10 of the ratio of two gradient norms, that of the first layer to that of the last one.
    training  Short runs of the first four kinds with SGD and the one-cycle schedule, with BatchNorm. For each kind and
              depth, the peak learning rate is the one with the smallest training loss over the last 10 steps.

The results of each job are kept in --out/jobs. After an interruption, the same command runs only the missing jobs.
Writes gradient_flow.json, curves.json (gradients by layer, losses by step), gradient_flow.png and deep_training.png.
"""

import json
import math
import multiprocessing
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from s3net_common.command_line import OVERWRITE, THREADS, answer_flags, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import claim_folder, default_out, run_record, save_figure, write_json

NORMALISATIONS = ("BatchNorm", "none", "none, He initialisation")
PARTS = ("initial", "training")
SMALLEST_NORM = 1e-300  # smaller norms count as this, also that of a gradient of zeros
LAST_STEPS = 10  # the training loss is averaged over these
MAX_DEPTH = 1000
OTHER_FILES = ("curves.json", "gradient_flow.png", "deep_training.png")

Job = dict[str, Any]


@dataclass
class Args:
    """Flags of the measurement."""

    only: tuple[Literal["initial", "training"], ...] = PARTS
    """Parts to run."""
    depths: tuple[int, ...] = (10, 20, 50, 100, 200)
    """Numbers of layers of the block at initialisation, each at least 2."""
    seeds: int = 10
    """Networks for each kind, depth and normalisation at initialisation, at least 2."""
    growth_rate: int = 8
    """Channels of the stem and of each layer."""
    batch_size: int = 32
    """Images per step, at least 2."""
    training_depths: tuple[int, ...] = (25, 50, 100, 200)
    """Numbers of layers of the networks to train, each at least 2."""
    dense_depth: int = 100
    """Largest depth of the densely connected network, in both parts. Its time and memory grow with the square of the
    depth: 200 layers need about 8 GB at initialisation."""
    peaks: tuple[float, ...] = (0.05, 0.2, 0.8)
    """Peak learning rates."""
    training_seeds: int = 3
    """Runs for each kind, depth and peak learning rate, at least 1; with 2 or more there are intervals."""
    steps: int = 150
    """Training steps of each run, at least 20."""
    out: Path = field(default_factory=lambda: default_out("gradient_flow"))
    """Folder for the results. Finished jobs of an earlier call are kept; other results are replaced."""
    overwrite: OVERWRITE = False
    jobs: int = 1
    """Jobs at a time, each with one thread."""
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradient_figures
from s3net_common.cpu_kernels import keep_freed_memory, plain_operations
from s3net_common.progress import ProgressBar
from s3net_networks.connections import CONNECTIONS
from s3net_networks.own_models import models
from s3net_networks.shortcut_block import SumBlock

KINDS = {**CONNECTIONS, "sparse, sum": SumBlock}


# ---- Network and data ---------------------------------------------------------------------------------------------


def build_network(kind: str, depth: int, growth_rate: int, normalisation: str = "BatchNorm") -> models.S3Net:
    """Build the network with random weights.

    The stem has `growth_rate` channels, so that every layer of the residual network has a shortcut.

    Args:
        kind: one of `KINDS`.
        depth: number of layers of the block.
        growth_rate: channels of each layer.
        normalisation: one of `NORMALISATIONS`. Without BatchNorm, every BatchNorm of the network is removed.
    """
    network = models.S3Net(growth_rate, (depth,), growth_rate, num_classes=10, block=KINDS[kind])
    if normalisation != "BatchNorm":
        for module in list(network.modules()):
            if isinstance(module, models.NormReluConv | models.S3Net):
                module.norm = nn.Identity()
        network.stem["norm"] = nn.Identity()
    if "He" in normalisation:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    return network


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, then test images and labels: 1,437 and 360 images (N, 3, 8, 8), normalised."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    images = torch.tensor((pixels - pixels[train].mean()) / pixels[train].std(), dtype=torch.float32)
    images, labels = images.view(-1, 1, 8, 8).expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels)
    return images[train], labels[train], images[test], labels[test]


# ---- Gradients ----------------------------------------------------------------------------------------------------


def gradient_norms(network: models.S3Net, images: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Compute the loss, and add its gradient to `.grad` of all weights.

    Returns:
        log10 of the norm of the loss's gradient with respect to the output of each layer of the block, (L,), the same
        for the weights of each layer's convolution, (L,), and the loss.
    """
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    layers = network.blocks[0].layers
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    for hook in hooks:
        hook.remove()
    weights = [layer[-1].conv.weight.grad for layer in layers]
    of_outputs, of_weights = (
        np.log10(np.maximum([float(gradient.norm()) for gradient in gradients], SMALLEST_NORM))
        for gradients in ([output.grad for output in outputs], weights)
    )
    return of_outputs, of_weights, loss.item()


def measure_initial(job: Job) -> dict[str, Any]:
    """Return log10 of the gradient norms of a network with random weights, by layer, for outputs and weights."""
    torch.manual_seed(job["seed"])
    network = build_network(job["kind"], job["depth"], job["growth_rate"], job["normalisation"]).double()
    images, labels, _, _ = digits()
    batch = torch.randperm(len(images))[: job["batch_size"]]
    of_outputs, of_weights, _ = gradient_norms(network, images[batch].double(), labels[batch])
    return {"outputs": of_outputs.tolist(), "weights": of_weights.tolist()}


@plain_operations()
def train(job: Job) -> dict[str, Any]:
    """Train a network and return its losses, test error and decades.

    Returns:
        `losses`: a number per step; `test_error` in % after the last step; `decades`: log10 of the ratio of the
        gradient norms, first to last layer, by step, for outputs and weights; `failed_step`: the step at which the
        loss or a gradient was not finite, where the run ends, or None.
    """
    torch.manual_seed(job["seed"])
    images, labels, test_images, test_labels = digits()
    network = build_network(job["kind"], job["depth"], job["growth_rate"]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), job["peak"], momentum=0.9, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, job["peak"], total_steps=job["steps"], cycle_momentum=False
    )
    results: dict[str, Any] = {"losses": [], "decades": {"step": [], "outputs": [], "weights": []}, "failed_step": None}
    for step, batch in enumerate(batches(len(images), job["batch_size"], job["steps"])):
        network.train()
        optimizer.zero_grad()
        of_outputs, of_weights, loss = gradient_norms(network, images[batch], labels[batch])
        decades = [of_outputs[0] - of_outputs[-1], of_weights[0] - of_weights[-1]]
        if not np.isfinite([loss, *decades]).all():
            results["failed_step"] = step
            break
        results["losses"].append(round(loss, 5))
        for name, value in zip(("step", "outputs", "weights"), (step, *decades), strict=True):
            results["decades"][name].append(round(float(value), 3))
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.inference_mode():
        logits = network(test_images)
    wrong = (logits.argmax(dim=1) != test_labels) | ~logits.isfinite().all(dim=1)
    return results | {"test_error": 100 * wrong.double().mean().item()}


def batches(images: int, batch_size: int, steps: int) -> Iterator[Tensor]:
    """Yield the image numbers of `steps` batches, in a new random order in each epoch."""
    order = torch.randperm(0)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(images)
        yield order[:batch_size]
        order = order[batch_size:]


# ---- Jobs ---------------------------------------------------------------------------------------------------------


def initial_jobs(args: Args) -> list[Job]:
    """Return a job for each kind, normalisation, depth and seed."""
    common = {"part": "initial", "growth_rate": args.growth_rate, "batch_size": args.batch_size}
    return [
        {**common, "kind": kind, "normalisation": normalisation, "depth": depth, "seed": seed}
        for depth in sorted(set(args.depths))
        for normalisation in NORMALISATIONS
        for kind in KINDS
        if kind != "dense" or depth <= args.dense_depth
        for seed in range(args.seeds)
    ]


def training_jobs(args: Args) -> list[Job]:
    """Return a job for each kind, depth, peak and seed, seed by seed, and those that take longest at the end."""
    common = {"part": "training", "growth_rate": args.growth_rate, "batch_size": args.batch_size, "steps": args.steps}
    jobs = [
        {**common, "kind": kind, "depth": depth, "peak": peak, "seed": seed}
        for seed in range(args.training_seeds)
        for depth in sorted(set(args.training_depths))
        for peak in sorted(set(args.peaks))
        for kind in CONNECTIONS
        if kind != "dense" or depth <= args.dense_depth
    ]
    return sorted(jobs, key=lambda job: job["kind"] == "dense" and job["depth"] > 25)


def job_file(folder: Path, job: Job) -> Path:
    """Return the file of a job's results."""
    words = [job["part"], job["kind"], f"d{job['depth']}"]
    words += [f"lr{job['peak']:g}"] if job["part"] == "training" else [job["normalisation"]]
    return folder / ("-".join([*words, f"s{job['seed']}"]).replace(", ", "-").replace(" ", "-") + ".json")


def run_job(folder: Path, job: Job) -> dict[str, Any]:
    """Run a job with one thread, or read its results if it has finished, and return them with the job's settings."""
    file = job_file(folder, job)
    try:
        record = json.loads(file.read_text())
        if record["job"] == job:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    torch.set_num_threads(1)
    started = time.process_time()
    results = measure_initial(job) if job["part"] == "initial" else train(job)
    record = {"job": job, **results, "cpu_seconds": round(time.process_time() - started, 2)}
    write_json(file, record)
    return record


def run_jobs(folder: Path, jobs: list[Job], parallel: int) -> list[dict[str, Any]]:
    """Run the jobs that have not finished, `parallel` at a time, and return all results in the order of the jobs."""
    bar = ProgressBar(total=len(jobs), unit="job")
    if parallel == 1:
        records = []
        for job in jobs:
            bar.set_description(job_file(folder, job).stem)
            records.append(run_job(folder, job))
            bar.update()
        bar.close()
        return records
    context = multiprocessing.get_context("spawn")
    with bar, ProcessPoolExecutor(parallel, context, initializer=_start_worker) as pool:
        futures = [pool.submit(run_job, folder, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return [future.result() for future in futures]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent process, which ends the workers
    keep_freed_memory()


# ---- Results ------------------------------------------------------------------------------------------------------


def mean_and_interval(values: list[float]) -> dict[str, Any]:
    """Return `mean` and `ci95`, its 95% confidence interval by the t distribution; None for a single value."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) == 1:
        return {"mean": mean, "ci95": None}
    half_width = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return {"mean": mean, "ci95": [mean - float(half_width), mean + float(half_width)]}


def summarise_initial(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the decades of each kind, normalisation and depth."""
    rows = []
    for key, selected in grouped(records, "kind", "normalisation", "depth"):
        row = {"name": f"{key['depth']} layers, {key['normalisation']}", **key}
        for name in ("outputs", "weights"):
            row[name] = mean_and_interval([record[name][0] - record[name][-1] for record in selected])
        rows.append(row)
    return rows


def mean_curves(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean log10 norms by layer at the largest depth, relative to the last layer."""
    largest = max(record["job"]["depth"] for record in records)
    curves = []
    for key, selected in grouped(records, "kind", "normalisation", "depth"):
        if key["depth"] == largest:
            for name in ("outputs", "weights"):
                norms = np.array([record[name] for record in selected])
                key[name] = (norms - norms[:, -1:]).mean(axis=0).round(4).tolist()
            curves.append(key)
    return curves


def loss_curves(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the losses of each run by step."""
    return [{**record["job"], "losses": record["losses"], "failed_step": record["failed_step"]} for record in records]


def summarise_training(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each kind and depth, with the runs of the best peak learning rate and those of all peaks."""
    rows = []
    for key, selected in grouped(records, "kind", "depth"):
        runs = {peak["peak"]: runs for peak, runs in grouped(selected, "peak")}
        best = min(runs, key=lambda peak: np.mean([last_loss(run) for run in runs[peak]]))
        decades = {
            name: {
                str(step): mean_and_interval(values) | {"median": float(np.median(values))}
                for step in recorded_steps(runs[best])
                if (values := [run["decades"][name][step] for run in runs[best]])
            }
            for name in ("outputs", "weights")
        }
        rows.append(
            {
                "name": f"{key['depth']} layers",
                **key,
                "best_peak": best,
                "seeds": len(runs[best]),
                "test_error": mean_and_interval([run["test_error"] for run in runs[best]]),
                "test_errors": {f"{peak:g}": [run["test_error"] for run in runs[peak]] for peak in runs},
                "last_losses": {f"{peak:g}": [_or_none(last_loss(run)) for run in runs[peak]] for peak in runs},
                "decades": decades,
                "cpu_seconds": round(sum(run["cpu_seconds"] for run in selected), 1),
            }
        )
    return rows


def recorded_steps(runs: list[dict[str, Any]]) -> list[int]:
    """Return a few steps that all runs have reached, from the first to the last one."""
    reached = min(len(run["losses"]) for run in runs)
    return sorted({round(share * (reached - 1)) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)}) if reached else []


def last_loss(record: dict[str, Any]) -> float:
    """Return a run's mean training loss over its last steps; infinity if it failed."""
    return math.inf if record["failed_step"] is not None else float(np.mean(record["losses"][-LAST_STEPS:]))


def _or_none(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def grouped(records: list[dict[str, Any]], *names: str) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield the values of the named settings, and the records that have them."""
    keys = dict.fromkeys(tuple(record["job"][name] for name in names) for record in records)
    for key in keys:
        selected = [record for record in records if tuple(record["job"][name] for name in names) == key]
        yield dict(zip(names, key, strict=True)), selected


def check_args(args: Args) -> None:
    """Raise InputError if a flag is out of range."""
    if not args.only:
        raise InputError(f"--only needs one or both of {', '.join(PARTS)}")
    for name in ("depths", "training_depths"):
        values, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if not values or not 2 <= min(values) <= max(values) <= MAX_DEPTH:
            raise InputError(f"{flag} must be one or more whole numbers from 2 to {MAX_DEPTH}")
    if not args.peaks or not all(0 < peak < math.inf for peak in args.peaks):
        raise InputError("--peaks must be one or more learning rates above 0")
    for name, least in (("seeds", 2), ("training_seeds", 1), ("steps", 20), ("growth_rate", 1), ("jobs", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give {least} or more")
    if not 2 <= args.batch_size <= len(digits()[0]):
        raise InputError(f"--batch-size is {args.batch_size}: give 2 to {len(digits()[0]):,}, the training images")


def main(args: Args) -> None:
    """Run the missing jobs, and write the results and the pictures."""
    check_args(args)
    out = claim_folder(args.out, "gradient_flow.json", *OTHER_FILES, overwrite=args.overwrite)
    keep_freed_memory()
    jobs = initial_jobs(args) * ("initial" in args.only) + training_jobs(args) * ("training" in args.only)
    records = run_jobs(out / "jobs", jobs, args.jobs)
    curves: dict[str, Any] = {"cpu_seconds": round(sum(record["cpu_seconds"] for record in records), 1)}
    results: dict[str, Any] = curves | {"growth_rate": args.growth_rate, "batch_size": args.batch_size}
    initial = [record for record in records if record["job"]["part"] == "initial"]
    training = [record for record in records if record["job"]["part"] == "training"]
    if initial:
        results |= {"seeds": args.seeds, "initial": summarise_initial(initial)}
        curves["initial"] = mean_curves(initial)
    if training:
        results |= {"training_seeds": args.training_seeds, "steps": args.steps, "peaks": sorted(set(args.peaks))}
        results["training"] = summarise_training(training)
        curves["training"] = loss_curves(training)
    write_json(out / "gradient_flow.json", run_record() | results)
    write_json(out / "curves.json", run_record() | curves)
    if initial:
        save_figure(out / "gradient_flow.png", gradient_figures.draw_initial(results, curves))
    if training:
        save_figure(out / "deep_training.png", gradient_figures.draw_training(results, curves))
    print(format_report(results))
    print(f"Wrote {out / 'gradient_flow.json'}")


def format_report(results: dict[str, Any]) -> str:
    """Return the results as lines of text."""
    lines = [
        f"{row['kind']}, {row['normalisation']}, {row['depth']} layers: {row['outputs']['mean']:.2f} decades "
        f"(outputs), {row['weights']['mean']:.2f} (weights)"
        for row in results.get("initial", [])
    ]
    lines += [
        f"{row['kind']}, {row['depth']} layers: test error {row['test_error']['mean']:.1f}% after {results['steps']} "
        f"steps, peak {row['best_peak']:g}"
        for row in results.get("training", [])
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, Args, __doc__, resume="run the same command again to continue")
