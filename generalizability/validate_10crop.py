"""Top-1 and top-5 error of a network on the centre crop and on the mean of ten crops, the paper's final evaluation.

One process (on a GPU if there is one, else on the CPU), images from an LMDB file or from <class>/* folders:
    python generalizability/validate_10crop.py --checkpoint runs/imagenet/best.safetensors --images imagenet/val.lmdb

The checkpoint that the paper's authors published:
    python generalizability/validate_10crop.py --checkpoint model_best.pth.tar --model s3net_imagenet_small --images val
    (--classes FILE with the wnid of each output, one per line, if the images belong to some of the 1000 classes only)

Several GPUs; every image is counted once:
    torchrun --nproc_per_node=4 generalizability/validate_10crop.py --checkpoint ... --images ...

Preprocessing: for ImageNet, short side resized to 256, TenCrop of 224, mean of the logits over the crops; in general,
resized and normalised as the checkpoint says. The classes of the images are matched with the network's by name. The
results are a JSON file that compare_results.py reads, with errors by class and confusions; a picture shows these.
"""

import hashlib
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from s3net_common.class_names import match_classes
from s3net_common.command_line import THREADS, answer_flags, flag, given_flags, run_script
from s3net_common.errors import InputError, nearest_names
from s3net_common.images import MAX_PIXELS, limit_pixels
from s3net_common.launcher import is_first_rank
from s3net_common.output_files import default_out, make_folder, relative, run_record, write_json

RESULT_KIND = "validate_10crop"
CROPS = ("centre_crop", "ten_crops")
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
    """File with the class name of each output in order, one per line (text after a tab is ignored), if the checkpoint
    has no names. The images may belong to some of the classes only."""
    dataset: flag(str, "NAME", CHECKPOINTS) = None
    """Data set of the images, for compare_results.py: imagenet, tinyimagenet... If the checkpoint does not say how its
    images are prepared, they are prepared as for this data set."""

    resize: flag(int, "INT", CHECKPOINTS) = None
    """Short side of the resized images, in pixels."""
    crop: flag(int, "INT", CHECKPOINTS) = None
    """Height and width of the crops, in pixels."""
    limit: flag(int, "N", "all") = None
    """Evaluate on N of the images only, always the same ones."""
    skip_unreadable: bool = False
    """Skip images that cannot be read, and count them, instead of stopping."""
    max_pixels: flag(int, "N", f"{MAX_PIXELS:,}") = None
    """Refuse images of more pixels, which could be decompression bombs."""

    batch_size: int = 16
    """Images per batch of a distributed rank, each with ten crops."""
    workers: int = 2
    """DataLoader workers of each rank, which decode images; 0 to decode them in the rank's own process."""
    device: flag(str, "{cpu,cuda,cuda:N,mps}", "a GPU if there is one") = None
    """Device to compute on. Under torchrun, each rank gets the GPU of its LOCAL_RANK."""
    amp: flag(bool, None, "if it is faster") = True
    """Mixed precision: bfloat16, or float16 on CUDA devices that lack it. --no-amp: float32, whose products CUDA
    devices since Ampere compute in TF32."""
    out: flag(Path, "FILE", "runs/validate_10crop/<folder>-<checkpoint>.json") = None
    """JSON file for the results. The picture of the confusions is beside it."""
    overwrite: bool = False
    """Replace the files if they exist."""
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import torch
from torch import Tensor, nn

from comparison.intervals import wilson_interval
from data.batches import DiskEvaluationBatches
from data.image_sets import DiskImages, open_source
from data.splits import find_half
from data.ten_crops import CENTER_CROP, ten_crops
from distributed import Ranks, device_name, join_ranks
from s3net_common.checkpoints import file_label, read_options
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.framing import Preparation
from s3net_networks import list_networks
from s3net_networks.size import model_size
from training.confusion import ConfusionMatrix
from training.engine import Precision, progress_bar
from training.out_of_memory import out_of_memory_as_error
from training.trained_network import TrainedNetwork, read_trained_network


def main(args: Args) -> int:
    """Evaluate the checkpoint on the images, print the errors, and write them to a JSON file."""
    check_flags(args)
    limit_pixels(args.max_pixels)
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    ranks = join_ranks(args.device)
    out = args.out or default_file(args.checkpoint)
    ranks.on_main_rank(lambda: check_out(out, args.overwrite))
    images, network = ranks.on_all_ranks(lambda: prepare(args, ranks.device))
    precision = Precision(ranks.device, given_flags(args).get("amp", Precision.is_faster(ranks.device)))
    if ranks.is_main:
        for note in network.notes:
            print(note, flush=True)
    started = time.perf_counter()
    confusions = count_errors(args, images, network, precision, ranks)
    seconds = time.perf_counter() - started
    if ranks.is_main:
        results = describe(args, images, network, confusions)
        results |= {
            "seconds": seconds,
            "images_per_second": len(images) / seconds,
            "device": device_name(ranks.device),
            "processes": ranks.world_size,
            "precision": precision.name,
            **run_record(),
        }
        write_json(out, results)
        ten_crops_error = results["ten_crops"]["top1_error"]
        confusions["ten_crops"].draw(picture_of(out), f"{network.name}: error of ten crops {ten_crops_error:.2f}%")
        print(table(results))
        print(f"written to {relative(out)} and {relative(picture_of(out))}", flush=True)
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


def default_file(checkpoint: Path) -> Path:
    """Return `runs/validate_10crop/<folder>-<file>.json`."""
    return default_out("validate_10crop") / f"{file_label(checkpoint)}.json"


def picture_of(out: Path) -> Path:
    """Return the path of the picture of the confusions, beside the JSON file `out`."""
    return out.with_name(f"{out.name.removesuffix('.json')}.png")


def check_out(out: Path, overwrite: bool) -> None:
    """Create the folder of the results, and check before the evaluation that its two files can be written.

    Raises:
        InputError: they cannot, or one of them exists and must not be replaced.
    """
    make_folder(out.parent)
    if out.is_dir():
        raise InputError(f"{relative(out)} is a folder: pass --out with a file")
    for path in (out, picture_of(out)):
        if path.exists() and not overwrite:
            raise InputError(f"{relative(path)} exists already: pass --overwrite to replace it, or another --out")


# ---- The images and the network -----------------------------------------------------------------------------------


@dataclass
class Network:
    """The network of a checkpoint.

    Attributes:
        name, options: of `create_network`.
        outputs: name of each output.
        present: indices of the outputs of the classes that the images have.
        subset: whether the images have some of the network's classes only.
        model: the network with its weights.
        size: parameters and multiply-adds, from `model_size`.
        preparation: how the images are prepared; its crop is the height and width of each of the ten crops.
        dataset: data set on which the network was trained; None if unknown.
        notes: lines for the user about what was assumed.
    """

    name: str
    options: dict
    outputs: list[str]
    present: list[int]
    subset: bool
    model: nn.Module
    size: dict[str, int]
    preparation: Preparation
    dataset: str | None
    notes: list[str]


def prepare(args: Args, device: torch.device) -> tuple[DiskImages, Network]:
    """Open the images and the checkpoint. The images get the network's classes.

    Raises:
        InputError: the images or the checkpoint cannot be read, or they do not match.
    """
    trained = read_trained_network(
        args.checkpoint, args.model, read_options(args.model_options), args.num_classes, args.classes, args.dataset
    )
    images = open_images(args.images, args.limit, args.skip_unreadable)
    outputs = trained.outputs or len(images.classes)
    match = match_classes(images.classes, trained.classes, outputs, trained.file)
    preparation = crop_preparation(trained, args.resize, args.crop)
    model = trained.build(outputs, print if is_first_rank() else None)
    network = Network(
        name=trained.name,
        options=trained.options,
        outputs=match.names,
        present=match.outputs,
        subset=match.subset,
        model=model,
        size=model_size(model, preparation.image_size, torch.device("cpu")),
        preparation=preparation,
        dataset=trained.dataset,
        notes=[*trained.notes, *filter(None, [match.note])],
    )
    model.to(device, memory_format=torch.channels_last)
    return images.with_classes(match.names, match.outputs), network


def crop_preparation(trained: TrainedNetwork, resize: int | None, crop: int | None) -> Preparation:
    """Return the preparation of the ten crops. Where `resize` or `crop` is missing, the checkpoint decides.

    Raises:
        InputError: the crop is larger than the resized image.
    """
    preparation = trained.preparation
    if crop is not None:
        margin = preparation.resize / preparation.crop
        preparation = replace(preparation, resize=round(crop * margin), crop=crop, image_size=crop)
    if resize is not None:
        preparation = replace(preparation, resize=resize)
    if preparation.crop > preparation.resize:
        raise InputError(
            f"--crop {preparation.crop} does not fit into --resize {preparation.resize}: give a smaller one"
        )
    return preparation


def open_images(path: Path, limit: int | None = None, skip_unreadable: bool = False) -> DiskImages:
    """Open an LMDB file, a folder of `<class>/*`, or the `val.lmdb`, `val/` or `test/` of a data folder.

    Raises:
        InputError: the path does not exist, or contains no images.
    """
    if not path.exists():
        raise InputError(f"there is no {path}: pass --images with an LMDB file or a folder of <class>/*")
    # Class folders without images count, too: without class names in the checkpoint, the folders number the outputs.
    source = open_source(find_half(path, "val", lmdb=True) or path, keep=None)
    return DiskImages(source, torch.arange(len(source)), skip_unreadable).subset(limit)


# ---- Evaluation ---------------------------------------------------------------------------------------------------


def count_errors(
    args: Args, images: DiskImages, network: Network, precision: Precision, ranks: Ranks
) -> dict[str, ConfusionMatrix]:
    """Count the errors of `CROPS` over all ranks. Each image is counted once.

    All ranks do the same number of steps and share errors after each step, so that no rank waits for one that failed.

    Raises:
        InputError: an image cannot be read and is not to be skipped, or none can be read.
    """
    preparation = network.preparation
    transform = partial(ten_crops, resize=preparation.resize, crop=preparation.crop)
    options = {"image_size": preparation.image_size, "workers": args.workers, "transform": transform}
    batches = DiskEvaluationBatches(images, args.batch_size, ranks.device, preparation.mean, preparation.std, **options)
    part = batches.part(ranks.rank, ranks.world_size)
    confusions = {crops: ConfusionMatrix(network.outputs, network.present) for crops in CROPS}

    def step() -> None:
        crops, labels = next(part, (None, ()))
        if len(labels):
            logits = ten_crop_logits(network.model, precision, crops)
            confusions["centre_crop"].add(logits[:, CENTER_CROP], labels)
            confusions["ten_crops"].add(logits.mean(dim=1), labels)

    steps = -(-len(batches) // ranks.world_size)
    try:
        with progress_bar(ranks, "10 crops", steps) as bar:
            for _ in range(steps):
                with out_of_memory_as_error("pass a smaller --batch-size"):
                    ranks.on_all_ranks(step)
                bar.update()
                so_far = confusions["ten_crops"]
                bar.set_postfix_str(f"error {100 * so_far.errors[0] / max(1, so_far.images):.1f}%")
    finally:
        part.close()  # ends the workers, together with the next line
        batches.close()
    for confusion in confusions.values():
        confusion.reduce(ranks)
    if not confusions["ten_crops"].images:
        raise InputError(f"none of the {len(images)} images in {args.images} can be read")
    return confusions


@torch.inference_mode()
def ten_crop_logits(model: nn.Module, precision: Precision, crops: Tensor) -> Tensor:
    """Return the float32 logits `(N, 10, outputs)` of normalised crops `(N, 10, 3, H, W)`."""
    with precision.autocast():
        logits = model(crops.flatten(0, 1))
    return logits.float().unflatten(0, crops.shape[:2])


# ---- Results ------------------------------------------------------------------------------------------------------


def describe(args: Args, images: DiskImages, network: Network, confusions: dict[str, ConfusionMatrix]) -> dict:
    """Return the results: the network, the images, the errors with their 95% intervals in percent, and confusions."""
    count, preparation = confusions["ten_crops"].images, network.preparation
    results = {
        "kind": RESULT_KIND,
        "checkpoint": {
            "path": str(args.checkpoint),
            "sha256": hashlib.sha256(args.checkpoint.read_bytes()).hexdigest(),
        },
        "dataset": args.dataset or network.dataset,
        "model": network.name,
        "model_options": network.options,
        "outputs": len(network.outputs),
        **network.size,
        "images": {
            "path": str(args.images),
            "count": count,
            "skipped": len(images) - count,
            "classes": len(network.present),
            "limit": args.limit,
        },
        "preprocessing": {
            "resize": preparation.resize,
            "crop": preparation.crop,
            "image_size": preparation.image_size,
            "mean": [*preparation.mean],
            "std": [*preparation.std],
        },
        "interval": "95%, Wilson score",
    }
    for crops, confusion in confusions.items():
        kinds = {"": confusion.errors}
        if network.subset:
            kinds["restricted_"] = confusion.restricted_errors
        results[crops] = {}
        for prefix, counts in kinds.items():
            for k, errors in zip((1, 5), counts, strict=True):
                results[crops][f"{prefix}top{k}_error"] = 100 * errors / count
                results[crops][f"{prefix}top{k}_interval"] = wilson_interval(errors, count)
    return results | confusions["ten_crops"].as_json()


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
    restricted = "restricted_top1_error" in results["ten_crops"]
    for prefix in ("", "restricted_") if restricted else ("",):
        if prefix:
            lines.append(f"with the logits restricted to the {images['classes']} classes of the images:")
        for crops in CROPS:
            row = f"{crops.replace('_', ' '):12}"
            for k, width in ((1, 12), (5, 14)):
                low, high = results[crops][f"{prefix}top{k}_interval"]
                error = results[crops][f"{prefix}top{k}_error"]
                row += f"{error:{width - 1}.2f}%{f'{low:.2f} to {high:.2f}%':>20}"
            lines.append(row)
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
