"""Segment images by their saliency maps, and score the segmentations against true masks.

    python interpretability/plot_segmentation_map.py                              # digits beside clutter
    python interpretability/plot_segmentation_map.py my/images --masks my/masks   # the paper's networks
    python interpretability/plot_segmentation_map.py my/images --masks my/masks --networks resnet50 --faithfulness

A mask has the name of its image: masks/photo.png belongs to photo.jpg. The object is where the mask's alpha is above
127, or its grey value if it has no alpha channel. Files written into --out: `segmentation.png` with 6 images, further
images in `segmentation-2.png`, ..., `dice.png`, `dice.csv` (Dice at the percentiles 99 to 80) and `scores.json` (Dice,
IoU, pointing game, average precision). FullGrad is compared with two baseline maps: a centred Gaussian, which ignores
the image, and the image's edges, which ignore the network.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from network_flags import NetworkArgs, is_image
from s3net_common.command_line import answer_flags, flag, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT, claim_folder, csv_cell, run_record, write_atomically, write_json

DIGITS_FOLDER = ROOT / "runs" / "digits_network"
DIGIT_SCENES = 20


@dataclass
class Args(NetworkArgs):
    """Segment images by their saliency maps, and score the segmentations against true masks."""

    masks: flag(Path, "PATH", "none; images need masks") = None
    """Folder of the masks, or the mask if there is one image."""
    percentile: float = 90.0
    """Percentile of the map from which a pixel belongs to the segmentation, above 0 and below 100."""
    out: Path = ROOT / "runs" / "segmentation"
    """Folder to write the files into. Those of an earlier run are replaced."""
    overwrite: bool = False
    """Replace files in --out that this script did not write."""


if __name__ == "__main__":
    answer_flags(Args, __doc__, is_image)

import numpy as np
import torch

from digit_scenes import NETWORK, digits_checkpoint, scene_pictures
from explain_images import (
    baseline_maps,
    choose_device,
    explain_pictures,
    load_networks,
    measure_faithfulness,
    picture_reader,
)
from explained_networks import Network, load_network
from map_scores import PERCENTILES, score_map
from pictures import Picture
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.progress import ProgressBar
from saliency_figures import draw_dice, draw_faithfulness, draw_segmentations, page_names

Column = tuple[str, list[Picture], list[np.ndarray]]  # a method's name, its pictures and its maps
Scores = dict[str, dict[str, Any]]  # what score_map returns for each picture, by the picture's name


def main(args: Args) -> None:
    """Explain the pictures, score the maps, and write figures, tables and JSON files."""
    check_flags(args)
    device = choose_device(args.device)
    keep_freed_memory()
    files = (*page_names("segmentation.png"), "dice.png", "dice.csv")
    claim_folder(args.out, "scores.json", *files, overwrite=args.overwrite)
    if args.faithfulness:
        claim_folder(args.out, "faithfulness.json", "faithfulness.png", overwrite=args.overwrite)
    read_at_size, networks = pictures_and_networks(args, device)
    columns: list[Column] = []
    errors, faithfulness = {}, {}
    total = sum(len(read_at_size(network.image_size)) for network in networks)
    with ProgressBar(total=total, unit="map") as bar:
        for network in networks:
            bar.set_description(network.name)
            pictures = read_at_size(network.image_size)
            target = network.target_index(args.target)
            explanations = explain_pictures(network, pictures, target, args.batch_size, device, bar.update)
            columns.append((network.name, pictures, [explanation.saliency for explanation in explanations]))
            errors[network.name] = max(explanation.completeness_error for explanation in explanations)
            if args.faithfulness:
                faithfulness[network.name] = measure_faithfulness(network, pictures, explanations, device)
    pictures = read_at_size(networks[0].image_size)
    columns += [(name, pictures, maps) for name, maps in baseline_maps(pictures).items()]
    scores = {name: score_pictures(resized, maps, args.percentile) for name, resized, maps in columns}
    report = {
        "percentile": args.percentile,
        "images": len(pictures),
        "largest_completeness_error": errors,
        "mean": {name: mean_scores(method_scores) for name, method_scores in scores.items()},
        "by_image": scores,
    }
    write_json(args.out / "scores.json", run_record() | report)
    draw_segmentations(args.out / "segmentation.png", pictures, columns, args.percentile)
    draw_dice(args.out / "dice.png", {name: dice_curves(method_scores) for name, method_scores in scores.items()})
    write_atomically(args.out / "dice.csv", lambda path: write_dice(path, scores))
    if faithfulness:
        write_json(args.out / "faithfulness.json", run_record() | {"networks": faithfulness})
        draw_faithfulness(args.out / "faithfulness.png", faithfulness)
    print_table(report)
    print(f"written to {args.out}")


def check_flags(args: Args) -> None:
    """Check flags against each other and their ranges.

    Raises:
        InputError: they cannot be used.
    """
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size} is too small: give 1 or more")
    if not 0 < args.percentile < 100:
        raise InputError(f"--percentile {args.percentile} is not above 0 and below 100")
    if args.images and args.masks is None:
        raise InputError("there are images but no masks: pass --masks DIR, a folder with a mask of each image's name")
    if args.masks is not None and not args.masks.exists():
        raise InputError(f"there is no folder of masks {args.masks}")
    network_flags = (args.networks, args.checkpoint, args.num_classes, args.image_size, args.random_weights)
    if not args.images and (args.masks or any(network_flags)):
        raise InputError("there are no images: pass images and --masks, or leave out all flags for networks and masks")
    if args.masks is not None and args.masks.is_file() and (len(args.images) > 1 or args.images[0].is_dir()):
        raise InputError(f"{args.masks} is one mask for several images: pass a folder of masks")


def pictures_and_networks(args: Args, device: torch.device) -> tuple[Callable[[int], list[Picture]], list[Network]]:
    """Return a function from image size to pictures with masks, and the networks; both for digits without images.

    Without images the network is trained first, in about a minute, unless an earlier call did so.
    """
    if args.images:
        return picture_reader(args, args.masks), load_networks(args, device)
    network = load_network(NETWORK, digits_checkpoint(DIGITS_FOLDER, device))
    network.model.to(device)
    return lambda size: scene_pictures(DIGIT_SCENES), [network]


def score_pictures(pictures: list[Picture], maps: list[np.ndarray], percentile: float) -> Scores:
    """Return the scores of each picture's map against its mask, by the picture's name."""
    return {
        picture.name: score_map(saliency, picture.mask, percentile)
        for picture, saliency in zip(pictures, maps, strict=True)
    }


def dice_curves(scores: Scores) -> np.ndarray:
    """Return Dice coefficients `(pictures, percentiles)`."""
    return np.array([[row["dice"][p] for p in PERCENTILES] for row in scores.values()])


def mean_scores(scores: Scores) -> dict[str, float]:
    """Return the mean of each score over the pictures."""
    names = ("dice_at", "iou_at", "pointing", "average_precision")
    return {name: float(np.mean([row[name] for row in scores.values()])) for name in names}


def write_dice(path: Path, scores: dict[str, Scores]) -> None:
    """Write a line with the Dice coefficient of each method, image and percentile as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "image", "percentile", "dice"])
        for method, method_scores in scores.items():
            for image, row in method_scores.items():
                writer.writerows(
                    [csv_cell(method), csv_cell(image), p, f"{value:.6f}"] for p, value in row["dice"].items()
                )


def print_table(report: dict) -> None:
    """Print the mean scores of each method."""
    dice, iou = f"Dice at {report['percentile']:g} %", f"IoU at {report['percentile']:g} %"
    print(f"{'':28}{dice:>14}{iou:>14}{'pointing game':>16}{'average precision':>20}")
    for name, mean in report["mean"].items():
        print(
            f"{name:28}{mean['dice_at']:14.3f}{mean['iou_at']:14.3f}{mean['pointing']:16.2f}"
            f"{mean['average_precision']:20.3f}"
        )


if __name__ == "__main__":
    run_script(main, Args, __doc__, is_image)
