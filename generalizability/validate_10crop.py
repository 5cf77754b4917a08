"""Top-1 and top-5 error of a network on the centre crop and on the mean of ten crops, as the paper's final evaluation.

One process (a GPU if there is one, else the CPU); images from an LMDB file or from <class>/* folders:
    python validate_10crop.py --checkpoint runs/imagenet-s3net_imagenet_small-s0/best.safetensors --images val.lmdb

The checkpoint that the paper's authors published:
    python validate_10crop.py --checkpoint model_best.pth.tar --model s3net_imagenet_small --images imagenet/val
    (--classes FILE names its 1000 outputs, a wnid a line, where the images are of some of the classes only)

Several GPUs; every image is counted once:
    torchrun --nproc_per_node=4 validate_10crop.py --checkpoint ... --images ...

Preprocessing: short side to 256, TenCrop of 224, mean of the logits over the crops. compare_results.py takes the JSON
that this writes.
"""

import hashlib
import json
import math
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import Dataset

from data.batches import Normalization
from data.image_sets import random_subset
from data.ten_crops import CENTRE, CropBatch, TenCrops, crop_batches, open_images
from distributed import Ranks, join_ranks
from recipes import IMAGENET_MEAN, IMAGENET_STD
from s3net_common.checkpoints import load_weights, read_metadata
from s3net_common.command_line import flag, given_flags, run_script
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.errors import InputError, nearest_names
from s3net_common.images import read_class_names
from s3net_common.output_files import ROOT, make_folder, relative, write_atomically
from s3net_networks import create_network, list_networks
from s3net_networks.size import model_size
from training.engine import Precision, progress_bar, top_errors

RESULT_KIND = "validate_10crop"
SAID = "the checkpoint's"
NORMAL_95 = 1.959963984540054  # the normal distribution's 97.5% point


@dataclass
class Args:
    """Top-1 and top-5 error of a network, on the centre crop and on the mean of ten crops."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Weights: ours (best.safetensors, last.pt), a plain state dict, or the ones that the paper's authors published."""
    images: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """An LMDB file, <class>/* folders, or a data folder with val.lmdb, val/ or test/ in it."""
    model: flag(str, "NAME", SAID) = None
    """Network, for a checkpoint that doesn't say; train_s3net.py --list-models names them."""
    model_options: flag(str, "JSON", SAID) = None
    """The network's options, for a checkpoint that doesn't say: '{"growth_rate": 24, "depth": 40}'."""
    num_classes: flag(int, "N", "the checkpoint's, else as many as there are class names") = None
    """Outputs of the network, for a checkpoint that doesn't say."""
    classes: flag(Path, "FILE", SAID) = None
    """Class name of each output, one a line in their order (what follows a tab is left out). The images may then be
    of some of these classes only."""
    dataset: flag(str, "NAME", SAID) = None
    """Data set that the images are of, for compare_results.py: imagenet, tinyimagenet..."""

    resize: int = 256
    """Pixels that the short side is brought to."""
    crop: int = 224
    """Height and width of the crops in pixels."""
    limit: flag(int, "N", "all") = None
    """Evaluate on so many of the images only, the same ones each time."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and count them, instead of stopping."""

    batch_size: int = 16
    """Images classified at a time by each process; there are ten times as many crops."""
    workers: int = 2
    """Processes that read images, for each that classifies; 0 to read them in the same one."""
    device: flag(str, "{cpu,cuda,cuda:N,mps}", "a GPU if there is one") = None
    """Where to compute. Under torchrun, cuda gives each process the GPU of its LOCAL_RANK."""
    amp: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: where it is faster)")] = True
    """Mixed precision: bfloat16, or float16 on CUDA devices that lack it."""
    out: flag(Path, "FILE", "runs/validate_10crop/<folder>-<checkpoint>.json") = None
    """JSON file for the results."""
    overwrite: bool = False
    """Replace the file if it is already there."""


def main(args: Args) -> int:
    """Do what the command line says; returns the exit code.

    Raises:
        InputError: something that the user gave cannot be used.
    """
    check_flags(args)
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    ranks = join_ranks(args.device)
    out = args.out or default_out(args.checkpoint)
    ranks.on_main_rank(lambda: check_out(out, args.overwrite))
    images, network, scorer = ranks.on_all_ranks(lambda: prepare(args, ranks.device))
    started = time.perf_counter()
    counts = count_errors(args, images, scorer, ranks)
    seconds = time.perf_counter() - started
    if ranks.is_main:
        results = describe_network(args, network) | describe_images(args, images, scorer, counts)
        results |= describe_work(counts, seconds, scorer.precision, ranks)
        write_atomically(out, lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))
        print(table(results))
        print(f"written to {relative(out)}", flush=True)
    return 0


# ---- What to evaluate ---------------------------------------------------------------------------------------------


def prepare(args: Args, device: torch.device) -> tuple[Dataset, "Network", "Scorer"]:
    """Open the images and the checkpoint; what the flags leave open, the checkpoint says.

    Raises:
        InputError: either cannot be read, or they do not fit together.
    """
    said = read_metadata(args.checkpoint)
    images = open_images(args.images, TenCrops(args.resize, args.crop))
    names = output_names(args, said)
    labels = output_labels(names, images.classes, some_only=args.classes is not None)
    network = make_network(args, said, names, images.classes)
    scorer = Scorer(
        network.model.to(device, memory_format=torch.channels_last).eval(),
        Precision(device, given_flags(args).get("amp", Precision.is_faster(device))),
        device,
        labels,
        said.get("mean", IMAGENET_MEAN),
        said.get("std", IMAGENET_STD),
    )
    return images, network, scorer


def check_flags(args: Args) -> None:
    """Raises InputError for a name that there is not, or a number out of its range."""
    if args.model is not None and args.model not in list_networks():
        raise InputError(f"there is no network {args.model!r}: {nearest_names(args.model, list_networks())}")
    for key, lowest in {"resize": 1, "crop": 1, "limit": 1, "batch_size": 1, "num_classes": 1, "workers": 0}.items():
        value = getattr(args, key)
        if value is not None and value < lowest:
            raise InputError(f"--{key.replace('_', '-')} {value} is not possible: give a number of {lowest} or more")
    if args.crop > args.resize:
        raise InputError(f"--crop {args.crop} does not fit into --resize {args.resize}: give a smaller one")


def default_out(checkpoint: Path) -> Path:
    """`runs/validate_10crop/<folder>-<file>.json`: the file of every run is `best`, so its folder says which it is."""
    name = checkpoint.name.removesuffix(".tar").rsplit(".", 1)[0]
    return ROOT / "runs" / "validate_10crop" / f"{checkpoint.resolve().parent.name}-{name}.json"


def check_out(out: Path, overwrite: bool) -> None:
    """Make the results' folder; raises InputError where they could not be written, before the long work."""
    make_folder(out.parent)
    if out.is_dir():
        raise InputError(f"{relative(out)} is a folder: pass --out with a file")
    if out.exists() and not overwrite:
        raise InputError(f"{relative(out)} is already there: pass --overwrite to replace it, or another --out")


def output_names(args: Args, said: dict) -> list[str] | None:
    """The class name of each output, from --classes or else from the checkpoint; None where neither says.

    Raises:
        InputError: the file cannot be read, names a class twice, or contradicts the checkpoint.
    """
    trained = said.get("classes")
    if args.classes is None:
        return trained
    names = read_class_names(args.classes)
    if trained and (difference := first_difference(trained, names)):
        label, theirs, ours = difference
        raise InputError(f"{args.classes} is not of this checkpoint: output {label} is {theirs} there and {ours} here")
    return names


def output_labels(names: list[str] | None, folders: list[str], some_only: bool) -> list[int]:
    """Which output of the network each class of the images stands for.

    Args:
        names: the outputs' class names; None where they are taken to be those of the images.
        folders: the classes of the images, in the order of their labels.
        some_only: whether the images may be of some of the classes, in any order.

    Raises:
        InputError: the classes do not match; the message names the first difference.
    """
    if names is None:
        return list(range(len(folders)))
    if some_only:
        known = {name: label for label, name in enumerate(names)}
        if unknown := [name for name in folders if name not in known]:
            raise InputError(f"the images' class {unknown[0]!r} is not among the {len(names)} of --classes")
        return [known[name] for name in folders]
    if difference := first_difference(names, folders):
        label, trained, found = difference
        raise InputError(
            f"the network was trained on other classes: class {label} is {trained} there and {found} in --images; to "
            "evaluate on some of its classes only, pass --classes FILE with the names of all its outputs in order"
        )
    return list(range(len(names)))


def first_difference(one: list[str], other: list[str]) -> tuple[int, str, str] | None:
    """The first place where two lists of names differ, and what stands there in each; None where they are equal."""
    for i in range(max(len(one), len(other))):
        pair = [repr(names[i]) if i < len(names) else "missing" for names in (one, other)]
        if pair[0] != pair[1]:
            return i, *pair
    return None


@dataclass
class Network:
    """The checkpoint's network with its weights, how it was built, and the data set that it was trained on.

    `facts` are those of `reporting.model_size`.
    """

    name: str
    options: dict
    outputs: int
    model: nn.Module
    facts: dict[str, int]
    dataset: str | None


def make_network(args: Args, said: dict, names: list[str] | None, folders: list[str]) -> Network:
    """Build the network that the flags, or else the checkpoint, name, and load its weights.

    Raises:
        InputError: it is not known which network it is, or the weights do not fit it.
    """
    name = args.model or said.get("model")
    if name is None:
        raise InputError(f"{args.checkpoint} doesn't say which network it is of: pass --model NAME")
    options = said.get("model_options", {}) if name == said.get("model", name) else {}
    options = options | read_options(args.model_options or "{}")
    outputs = args.num_classes or said.get("num_classes") or len(names or folders)
    if outputs < len(names or folders):
        raise InputError(f"the network has {outputs} outputs and there are {len(names or folders)} classes")
    try:
        model = create_network(name, outputs, **options)
    except TypeError as error:
        raise InputError(f"--model-options: {name} cannot be built with {options} ({error})") from error
    try:
        load_weights(model, args.checkpoint)
    except InputError as error:
        if names is not None or args.num_classes is not None:
            raise
        raise InputError(
            f"{error}; it was taken to have the {outputs} classes of the images as outputs: if it has others, pass "
            "--classes FILE with the class names of all of them in order"
        ) from error
    facts = model_size(model, args.crop, torch.device("cpu"))  # also finds out that crops are too small for it
    return Network(name, options, outputs, model, facts, said.get("dataset"))


def read_options(text: str) -> dict:
    """The value of --model-options."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise InputError(f"--model-options {text} is no JSON: write '{{\"growth_rate\": 24}}'") from error
    if not isinstance(options, dict):
        raise InputError(f"--model-options {text} is no JSON object: write '{{\"growth_rate\": 24}}'")
    return options


# ---- Evaluation ---------------------------------------------------------------------------------------------------

CROPS = ("centre_crop", "ten_crops")
COUNTS = ("images", "skipped", *(f"{crops}_top{k}" for crops in CROPS for k in (1, 5)))


@dataclass
class Scorer:
    """A network and what it needs to count its errors.

    Attributes:
        model: in evaluation mode, on the device.
        precision: number format of the forward pass; logits are averaged in float32.
        device: where the model is.
        labels: the output that each class of the images stands for.
        mean, std: normalisation of each colour channel, for pixels in [0, 1].
    """

    model: nn.Module
    precision: Precision
    device: torch.device
    labels: list[int]
    mean: list[float]
    std: list[float]

    @torch.inference_mode()
    def logits(self, crops: Tensor) -> Tensor:
        """float32 logits `(N, 10, outputs)` of uint8 crops `(N, 10, 3, H, W)`."""
        normalize = Normalization(self.device, self.mean, self.std, crops.shape[-1])
        x = normalize(crops.to(self.device, non_blocking=True).flatten(0, 1))
        with self.precision.autocast():
            logits = self.model(x)
        return logits.float().unflatten(0, crops.shape[:2])

    def errors(self, batch: CropBatch) -> dict[str, int]:
        """`COUNTS` of one batch."""
        counts = dict.fromkeys(COUNTS, 0) | {"skipped": len(batch.unreadable)}
        if batch.crops is None:
            return counts
        counts["images"] = len(batch.labels)
        logits = self.logits(batch.crops)
        labels = torch.tensor(self.labels)[batch.labels].to(self.device)
        for crops, scores in zip(CROPS, (logits[:, CENTRE], logits.mean(dim=1)), strict=True):
            counts[f"{crops}_top1"], counts[f"{crops}_top5"] = top_errors(scores, labels)
        return counts


def count_errors(args: Args, images: Dataset, scorer: Scorer, ranks: Ranks) -> dict[str, int]:
    """`COUNTS` over the images, each counted once whatever the number of processes.

    Every process does the same number of steps, the last perhaps without an image, and hears of the others' errors
    after each: so none is left waiting.

    Raises:
        InputError: an image cannot be read and is not to be skipped; or none can be read.
    """
    chosen = random_subset(len(images), args.limit).tolist()
    mine = chosen[ranks.rank :: ranks.world_size]
    steps = -(-len(chosen) // (ranks.world_size * args.batch_size))
    pin = ranks.device.type == "cuda"
    batches = iter(crop_batches(images, mine, args.batch_size, args.workers, pin))
    totals = dict.fromkeys(COUNTS, 0)

    def step() -> None:
        if (batch := next(batches, None)) is None:
            return
        if batch.unreadable and not args.skip_unreadable:
            raise InputError(batch.unreadable[0])
        for name, count in scorer.errors(batch).items():
            totals[name] += count

    try:
        with progress_bar(ranks, "10 crops", steps) as bar:
            for _ in range(steps):
                ranks.on_all_ranks(step)
                bar.update()
                bar.set_postfix_str(f"error {100 * totals['ten_crops_top1'] / max(1, totals['images']):.1f}%")
    finally:
        batches = None  # ends its reading processes now; left to the garbage collector, that can take 5 s
    summed = dict(zip(COUNTS, map(int, ranks.reduce([float(totals[name]) for name in COUNTS])), strict=True))
    if not summed["images"]:
        raise InputError(f"none of the {summed['skipped']} images in {args.images} can be read")
    return summed


# ---- Results ------------------------------------------------------------------------------------------------------


def wilson_interval(errors: int, count: int) -> tuple[float, float]:
    """The 95% interval of a proportion, in percent: Wilson's score interval (1927).

    Unlike the one of the normal approximation it stays within 0 and 100% and holds for few images and rare errors.
    """
    share, z2 = errors / count, NORMAL_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def describe_network(args: Args, network: Network) -> dict:
    """What the JSON file says of the network."""
    return {
        "kind": RESULT_KIND,
        "command": shlex.join(["python", *sys.argv]),
        "checkpoint": {"path": str(args.checkpoint), "sha256": file_digest(args.checkpoint)},
        "dataset": args.dataset or network.dataset,
        "model": network.name,
        "model_options": network.options,
        "outputs": network.outputs,
        **network.facts,
    }


def describe_images(args: Args, images: Dataset, scorer: Scorer, counts: dict[str, int]) -> dict:
    """What it says of the images, and of the errors on them: in percent, with their 95% intervals."""
    count = counts["images"]
    said = {
        "images": {
            "path": str(args.images),
            "count": count,
            "skipped": counts["skipped"],
            "classes": len(images.classes),
            "limit": args.limit,
        },
        "preprocessing": {
            "resize": args.resize,
            "crop": args.crop,
            "mean": list(scorer.mean),
            "std": list(scorer.std),
        },
        "interval": "95%, Wilson score",
    }
    for crops in CROPS:
        said[crops] = {}
        for k in (1, 5):
            errors = counts[f"{crops}_top{k}"]
            said[crops][f"top{k}_error"] = 100 * errors / count
            said[crops][f"top{k}_interval"] = wilson_interval(errors, count)
    return said


def describe_work(counts: dict[str, int], seconds: float, precision: Precision, ranks: Ranks) -> dict:
    """What it says of how the results were computed."""
    device = ranks.device
    return {
        "seconds": seconds,
        "images_per_second": (counts["images"] + counts["skipped"]) / seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": ranks.world_size,
        "precision": str(precision.dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "torchvision")}},
    }


def table(results: dict) -> str:
    """The results as lines for the terminal."""
    images = results["images"]
    left_out = f", {images['skipped']} unreadable ones left out" if images["skipped"] else ""
    lines = [
        f"{results['model']}: {results['parameters']:,} parameters, {results['outputs']} outputs; "
        f"{images['count']:,} images of {images['classes']} classes{left_out}; "
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


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    run_script(main, Args, __doc__)
