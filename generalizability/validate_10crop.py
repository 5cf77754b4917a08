"""Top-1 and top-5 error of a network on the centre crop and on the mean of ten crops, the paper's final evaluation.

One process (on a GPU if there is one, else on the CPU), images from an LMDB file or from <class>/* folders:
    python generalizability/validate_10crop.py --checkpoint runs/imagenet/best.safetensors --images imagenet/val.lmdb

The checkpoint that the paper's authors published:
    python generalizability/validate_10crop.py --checkpoint model_best.pth.tar --model s3net_imagenet_small --images val
    (if the images belong to some of the 1000 classes only: --classes FILE with the wnid of each output, one per line)

Several GPUs; every image is counted once:
    torchrun --nproc_per_node=4 generalizability/validate_10crop.py --checkpoint ... --images ...

Preprocessing: short side resized to 256, TenCrop of 224, mean of the logits over the crops. The results are a JSON file
that compare_results.py reads.
"""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import torch
import tyro
from scipy.stats import binomtest
from torch import Tensor, nn

from data.batches import DiskEvaluationBatches
from data.image_sets import DiskImages, find_split, open_source
from data.ten_crops import CENTER_CROP, ten_crops
from distributed import Ranks, join_ranks
from recipes import IMAGENET_MEAN, IMAGENET_STD
from s3net_common.checkpoints import create_with_weights, read_metadata
from s3net_common.command_line import flag, given_flags, run_script
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.errors import InputError, nearest_names
from s3net_common.images import read_class_names
from s3net_common.output_files import default_out, make_folder, relative, run_record, write_json
from s3net_networks import create_network, list_networks
from s3net_networks.size import model_size
from training.engine import Precision, progress_bar, top_errors

RESULT_KIND = "validate_10crop"
CROPS = ("centre_crop", "ten_crops")
COUNTS = ("images", *(f"{crops}_top{k}" for crops in CROPS for k in (1, 5)))
CHECKPOINTS = "the checkpoint's"  # what --help says about a default


@dataclass
class Args:
    """Top-1 and top-5 error of a network, on the centre crop and on the mean of ten crops."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Weights: of this repository (best.safetensors, last.pt), a plain state dict, or published by the authors."""
    images: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """LMDB file, folder of <class>/*, or data folder that contains val.lmdb, val/ or test/."""
    model: flag(str, "NAME", CHECKPOINTS) = None
    """Network, if the checkpoint does not name it; train_s3net.py --list-models lists the names."""
    model_options: flag(str, "JSON", CHECKPOINTS) = None
    """Options of the network, if the checkpoint has none: '{"growth_rate": 24, "depth": 40}'."""
    num_classes: flag(int, "N", "the checkpoint's, or the number of class names") = None
    """Outputs of the network, if the checkpoint does not give their number."""
    classes: flag(Path, "FILE", CHECKPOINTS) = None
    """File with the class name of each output in order, one per line (text after a tab is ignored). The images may then
    belong to some of these classes only."""
    dataset: flag(str, "NAME", CHECKPOINTS) = None
    """Data set of the images, for compare_results.py: imagenet, tinyimagenet..."""

    resize: int = 256
    """Short side of the resized images, in pixels."""
    crop: int = 224
    """Height and width of the crops, in pixels."""
    limit: flag(int, "N", "all") = None
    """Evaluate on N of the images only, always the same ones."""
    skip_unreadable: bool = False
    """Skip images that cannot be read, and count them, instead of stopping."""

    batch_size: int = 16
    """Images per batch of a distributed rank, each with ten crops."""
    workers: int = 2
    """DataLoader workers of each rank, which decode images; 0 to decode them in the rank's own process."""
    device: flag(str, "{cpu,cuda,cuda:N,mps}", "a GPU if there is one") = None
    """Device to compute on. Under torchrun, each rank gets the GPU of its LOCAL_RANK."""
    amp: flag(bool, None, "if it is faster") = True
    """Mixed precision: bfloat16, or float16 on CUDA devices that lack it."""
    out: flag(Path, "FILE", "runs/validate_10crop/<folder>-<checkpoint>.json") = None
    """JSON file for the results."""
    overwrite: bool = False
    """Replace the file if it exists."""


def main(args: Args) -> int:
    """Evaluate the checkpoint on the images, print the errors, and write them to a JSON file."""
    check_flags(args)
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    ranks = join_ranks(args.device)
    out = args.out or default_file(args.checkpoint)
    ranks.on_main_rank(lambda: check_out(out, args.overwrite))
    images, network = ranks.on_all_ranks(lambda: prepare(args, ranks.device))
    precision = Precision(ranks.device, given_flags(args).get("amp", Precision.is_faster(ranks.device)))
    started = time.perf_counter()
    counts = count_errors(args, images, network, precision, ranks)
    seconds = time.perf_counter() - started
    if ranks.is_main:
        results = describe(args, images, network, counts)
        results |= {
            "seconds": seconds,
            "images_per_second": len(images) / seconds,
            "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type,
            "processes": ranks.world_size,
            "precision": str(precision.dtype).removeprefix("torch."),
            **run_record(),
        }
        write_json(out, results)
        print(table(results))
        print(f"written to {relative(out)}", flush=True)
    return 0


def check_flags(args: Args) -> None:
    """Check names and ranges.

    Raises:
        InputError: a name is unknown (the message lists close matches) or a number is out of range.
    """
    if args.model is not None and args.model not in list_networks():
        raise InputError(f"there is no network {args.model!r}: {nearest_names(args.model, list_networks())}")
    for name, minimum in {"resize": 1, "crop": 1, "limit": 1, "batch_size": 1, "num_classes": 1, "workers": 0}.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise InputError(f"--{name.replace('_', '-')} {value} is not possible: give a number of {minimum} or more")
    if args.crop > args.resize:
        raise InputError(f"--crop {args.crop} does not fit into --resize {args.resize}: give a smaller one")


def default_file(checkpoint: Path) -> Path:
    """Return `runs/validate_10crop/<folder>-<file>.json`. The folder names the run: every run's file is `best`."""
    name = checkpoint.name.removesuffix(".tar").rsplit(".", 1)[0]
    return default_out("validate_10crop") / f"{checkpoint.resolve().parent.name}-{name}.json"


def check_out(out: Path, overwrite: bool) -> None:
    """Create the folder of the results, and check before the evaluation that the file can be written.

    Raises:
        InputError: it cannot, or it exists and must not be replaced.
    """
    make_folder(out.parent)
    if out.is_dir():
        raise InputError(f"{relative(out)} is a folder: pass --out with a file")
    if out.exists() and not overwrite:
        raise InputError(f"{relative(out)} exists already: pass --overwrite to replace it, or another --out")


# ---- The images and the network -----------------------------------------------------------------------------------


@dataclass
class Network:
    """The network of a checkpoint.

    Attributes:
        name: name of the network.
        options: options of `create_network`.
        outputs: number of outputs.
        model: the network with its weights.
        size: parameters and multiply-adds, from `model_size`.
        labels: for each class of the images, the index of its output.
        mean, std: normalisation of each colour channel, for pixels in [0, 1].
        dataset: data set on which the network was trained; None if the checkpoint does not name it.
    """

    name: str
    options: dict
    outputs: int
    model: nn.Module
    size: dict[str, int]
    labels: list[int]
    mean: list[float]
    std: list[float]
    dataset: str | None


def prepare(args: Args, device: torch.device) -> tuple[DiskImages, Network]:
    """Open the images and the checkpoint. Flags take precedence over the checkpoint's metadata.

    Raises:
        InputError: the images or the checkpoint cannot be read, or they do not match.
    """
    metadata = read_metadata(args.checkpoint)
    images = open_images(args.images, args.limit, args.skip_unreadable)
    names = output_names(args, metadata)
    labels = output_labels(names, images.classes, subset=args.classes is not None)
    network = load_network(args, metadata, names, labels)
    network.model.to(device, memory_format=torch.channels_last).eval()
    return images, network


def open_images(path: Path, limit: int | None = None, skip_unreadable: bool = False) -> DiskImages:
    """Open an LMDB file, a folder of `<class>/*`, or the `val.lmdb`, `val/` or `test/` of a data folder.

    Raises:
        InputError: the path does not exist, or contains no images.
    """
    if not path.exists():
        raise InputError(f"there is no {path}: pass --images with an LMDB file or a folder of <class>/*")
    source = open_source(find_split(path, "val") or find_split(path, "test") or path)
    return DiskImages(source, torch.arange(len(source)), skip_unreadable).subset(limit)


def output_names(args: Args, metadata: dict) -> list[str] | None:
    """Return the class name of each output from --classes or the checkpoint's metadata, or None if neither has them.

    Raises:
        InputError: the file of --classes cannot be read, contains a name twice, or contradicts the checkpoint.
    """
    trained = metadata.get("classes")
    if args.classes is None:
        return trained
    names = read_class_names(args.classes)
    if trained and (difference := first_difference(trained, names)):
        output, in_checkpoint, in_file = difference
        raise InputError(
            f"{args.classes} does not fit this checkpoint: output {output} is {in_checkpoint} in the checkpoint and "
            f"{in_file} in the file"
        )
    return names


def output_labels(names: list[str] | None, folders: list[str], subset: bool) -> list[int]:
    """Return the index of the output that belongs to each class of the images.

    Args:
        names: class name of each output; None if the outputs are the classes of the images.
        folders: classes of the images, in the order of their labels.
        subset: whether the images may belong to some of the classes only, in any order.

    Raises:
        InputError: the classes do not match; the message names the first difference.
    """
    if names is None:
        return list(range(len(folders)))
    if subset:
        index = {name: output for output, name in enumerate(names)}
        if unknown := [name for name in folders if name not in index]:
            raise InputError(f"the images' class {unknown[0]!r} is not among the {len(names)} of --classes")
        return [index[name] for name in folders]
    if difference := first_difference(names, folders):
        output, in_checkpoint, in_images = difference
        raise InputError(
            f"the network was trained on other classes: class {output} is {in_checkpoint} in the checkpoint and "
            f"{in_images} in --images; to evaluate on some of its classes only, pass --classes FILE with the names of "
            "all its outputs in order"
        )
    return list(range(len(names)))


def first_difference(first: list[str], second: list[str]) -> tuple[int, str, str] | None:
    """Return the first index at which two lists of names differ, and both entries; None if the lists are equal."""
    for i, names in enumerate(zip_longest(first, second)):
        if names[0] != names[1]:
            return i, *("missing" if name is None else repr(name) for name in names)
    return None


def load_network(args: Args, metadata: dict, names: list[str] | None, labels: list[int]) -> Network:
    """Build the network from the flags and the checkpoint's metadata, and load its weights on the CPU.

    Args:
        args: the flags.
        metadata: of the checkpoint.
        names: from `output_names`.
        labels: from `output_labels`.

    Raises:
        InputError: the network's name is not known, the weights do not fit it, or the crops are too small for it.
    """
    name = args.model or metadata.get("model")
    if name is None:
        raise InputError(f"{args.checkpoint} does not name its network: pass --model NAME")
    options = metadata.get("model_options", {}) if name == metadata.get("model", name) else {}
    options = options | read_options(args.model_options or "{}")
    classes = len(names or labels)
    outputs = args.num_classes or metadata.get("num_classes") or classes
    if outputs < classes:
        raise InputError(f"the network has {outputs} outputs and there are {classes} classes")
    report = print if os.environ.get("RANK", "0") == "0" else None
    try:
        model = create_with_weights(partial(create_network, name, outputs, **options), args.checkpoint, report)
    except InputError as error:
        if names is not None or args.num_classes is not None:
            raise
        raise InputError(
            f"{error}; one output was assumed for each of the {outputs} classes of the images: if the network has "
            "others, pass --classes FILE with the class names of all its outputs in order"
        ) from error
    mean, std = metadata.get("mean", IMAGENET_MEAN), metadata.get("std", IMAGENET_STD)
    size = model_size(model, args.crop, torch.device("cpu"))
    return Network(name, options, outputs, model, size, labels, mean, std, metadata.get("dataset"))


def read_options(text: str) -> dict:
    """Parse the value of --model-options.

    Raises:
        InputError: it is not a JSON object.
    """
    try:
        if isinstance(options := json.loads(text), dict):
            return options
    except ValueError:
        pass
    raise InputError(f"--model-options {text} is no JSON object: write '{{\"growth_rate\": 24}}'")


# ---- Evaluation ---------------------------------------------------------------------------------------------------


def count_errors(
    args: Args, images: DiskImages, network: Network, precision: Precision, ranks: Ranks
) -> dict[str, int]:
    """Count images and errors (`COUNTS`) over all ranks. Each image is counted once.

    All ranks do the same number of steps and share errors after each step, so that no rank waits for one that failed.

    Raises:
        InputError: an image cannot be read and is not to be skipped, or none can be read.
    """
    transform = partial(ten_crops, resize=args.resize, crop=args.crop)
    options = {"image_size": args.crop, "workers": args.workers, "transform": transform}
    batches = DiskEvaluationBatches(images, args.batch_size, ranks.device, network.mean, network.std, **options)
    part = batches.part(ranks.rank, ranks.world_size)
    outputs = torch.tensor(network.labels, device=ranks.device)
    counts = dict.fromkeys(COUNTS, 0)

    def step() -> None:
        if (batch := next(part, None)) is not None:
            crops, labels = batch
            add_errors(counts, ten_crop_logits(network.model, precision, crops), outputs[labels])

    steps = -(-len(batches) // ranks.world_size)
    try:
        with progress_bar(ranks, "10 crops", steps) as bar:
            for _ in range(steps):
                ranks.on_all_ranks(step)
                bar.update()
                bar.set_postfix_str(f"error {100 * counts['ten_crops_top1'] / max(1, counts['images']):.1f}%")
    finally:
        part.close()  # ends the workers, together with the next line
        batches.close()
    totals = dict(zip(COUNTS, map(int, ranks.reduce([float(counts[name]) for name in COUNTS])), strict=True))
    if not totals["images"]:
        raise InputError(f"none of the {len(images)} images in {args.images} can be read")
    return totals


@torch.inference_mode()
def ten_crop_logits(model: nn.Module, precision: Precision, crops: Tensor) -> Tensor:
    """Return the float32 logits `(N, 10, outputs)` of normalised crops `(N, 10, 3, H, W)`."""
    with precision.autocast():
        logits = model(crops.flatten(0, 1))
    return logits.float().unflatten(0, crops.shape[:2])


def add_errors(counts: dict[str, int], logits: Tensor, labels: Tensor) -> None:
    """Add a batch to `COUNTS`: logits `(N, 10, outputs)`, and the correct outputs `(N,)`."""
    counts["images"] += len(labels)
    for crops, scores in zip(CROPS, (logits[:, CENTER_CROP], logits.mean(dim=1)), strict=True):
        top1, top5 = top_errors(scores, labels)
        counts[f"{crops}_top1"] += top1
        counts[f"{crops}_top5"] += top5


# ---- Results ------------------------------------------------------------------------------------------------------


def wilson_interval(errors: int, count: int) -> tuple[float, float]:
    """Return the 95% confidence interval of an error rate in percent (Wilson's score interval, 1927)."""
    low, high = binomtest(errors, count).proportion_ci(method="wilson")
    return 100 * float(low), 100 * float(high)


def describe(args: Args, images: DiskImages, network: Network, counts: dict[str, int]) -> dict:
    """Return the results: the network, the images, and the errors with their 95% intervals in percent."""
    count = counts["images"]
    results = {
        "kind": RESULT_KIND,
        "checkpoint": {
            "path": str(args.checkpoint),
            "sha256": hashlib.sha256(args.checkpoint.read_bytes()).hexdigest(),
        },
        "dataset": args.dataset or network.dataset,
        "model": network.name,
        "model_options": network.options,
        "outputs": network.outputs,
        **network.size,
        "images": {
            "path": str(args.images),
            "count": count,
            "skipped": len(images) - count,
            "classes": len(images.classes),
            "limit": args.limit,
        },
        "preprocessing": {"resize": args.resize, "crop": args.crop, "mean": [*network.mean], "std": [*network.std]},
        "interval": "95%, Wilson score",
    }
    for crops in CROPS:
        results[crops] = {}
        for k in (1, 5):
            errors = counts[f"{crops}_top{k}"]
            results[crops][f"top{k}_error"] = 100 * errors / count
            results[crops][f"top{k}_interval"] = wilson_interval(errors, count)
    return results


def table(results: dict) -> str:
    """Return the results as lines for the terminal."""
    images = results["images"]
    skipped = f", {images['skipped']} unreadable ones skipped" if images["skipped"] else ""
    lines = [
        f"{results['model']}: {results['parameters']:,} parameters, {results['outputs']} outputs; "
        f"{images['count']:,} images of {images['classes']} classes{skipped}; "
        f"{results['images_per_second']:.1f} images/s",
        f"{'':12}{'top-1 error':>12}{'95% interval':>20}{'top-5 error':>14}{'95% interval':>20}",
    ]
    for crops in CROPS:
        row = f"{crops.replace('_', ' '):12}"
        for k, width in ((1, 12), (5, 14)):
            low, high = results[crops][f"top{k}_interval"]
            row += f"{results[crops][f'top{k}_error']:{width - 1}.2f}%{f'{low:.2f} to {high:.2f}%':>20}"
        lines.append(row)
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
