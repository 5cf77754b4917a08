"""Saliency maps as segmentations: what they mark beside the true masks, and how well it fits.

    python plot_segmentation_map.py                                            # digits among clutter
    python plot_segmentation_map.py my/images --masks my/masks                 # the paper's networks
    python plot_segmentation_map.py my/images --masks my/masks --networks resnet50 densenet169 --faithfulness

A mask has its image's name (photo.jpg, masks/photo.png); the object is where its alpha, or without alpha its grey
value, is above 127. Writes into --out: `segmentation.png`, `dice.png` and `dice.csv` (Dice at the percentiles 99 to
80), and `scores.json` (also IoU, pointing game and average precision). Two maps stand beside FullGrad that any method
must beat: a centred Gaussian, which never saw the image, and the image's edges, which never saw the network.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from tqdm import tqdm

from digit_scenes import NETWORK, digits_checkpoint, scene_pictures
from explain_images import (
    NetworkArgs,
    baseline_maps,
    choose_device,
    explain_pictures,
    load_networks,
    measure_faithfulness,
    picture_reader,
)
from explained_networks import Network, load_network
from interpret_fullgrad import command
from map_scores import PERCENTILES, score_map
from pictures import Picture
from s3net_common.command_line import run_script
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT, make_folder, write_atomically, write_json
from saliency_figures import draw_dice, draw_faithfulness, draw_segmentations

DIGITS_FOLDER = ROOT / "runs" / "digits_network"
EMBEDDED_SCENES = 20


@dataclass
class Args(NetworkArgs):
    """Segment images by their saliency maps, and score them against true masks."""

    masks: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="needed with images")] = None
    """Folder of the masks (or the mask, for one image)."""
    percentile: float = 90.0
    """Percentile of the map from which a pixel belongs to the segmentation, above 0 and below 100."""
    out: Path = ROOT / "runs" / "segmentation"
    """Folder for everything that is written."""


Column = tuple[str, list[Picture], list[np.ndarray]]  # a method's name, its pictures and its maps


def main(args: Args) -> None:
    """Read, explain, score, draw and write.

    Raises:
        InputError: something that the user gave cannot be used.
    """
    check(args)
    device = choose_device(args.device)
    keep_freed_memory()
    make_folder(args.out)
    if args.images:
        pictures, networks = picture_reader(args, args.masks), load_networks(args, device)
    else:
        pictures, networks = lambda size: scene_pictures(EMBEDDED_SCENES), [digits_network(device)]
    columns: list[Column] = []
    errors, faithfulness = {}, {}
    with tqdm(total=sum(len(pictures(n.image_size)) for n in networks), unit="map", disable=None) as bar:
        for network in networks:
            bar.set_description(network.name)
            own = pictures(network.image_size)
            explained = explain_pictures(network, own, args.target, args.batch_size, device, bar.update)
            columns.append((network.name, own, [one.saliency for one in explained]))
            errors[network.name] = max(one.completeness_error for one in explained)
            if args.faithfulness:
                faithfulness[network.name] = measure_faithfulness(network, own, explained, device)
    first = pictures(networks[0].image_size)
    columns += [(name, first, maps) for name, maps in baseline_maps(first).items()]
    scores = {name: score(own, maps, args.percentile) for name, own, maps in columns}

    draw_segmentations(args.out / "segmentation.png", first, columns, args.percentile)
    draw_dice(args.out / "dice.png", {name: dice_curves(rows) for name, rows in scores.items()})
    write_atomically(args.out / "dice.csv", lambda path: write_dice(path, scores))
    report = {
        "command": command(),
        "torch": torch.__version__,
        "percentile": args.percentile,
        "images": len(first),
        "largest_completeness_error": errors,
        "mean": {name: means(rows) for name, rows in scores.items()},
        "by_image": scores,
    }
    write_json(args.out / "scores.json", report)
    if faithfulness:
        draw_faithfulness(args.out / "faithfulness.png", faithfulness)
        write_json(args.out / "faithfulness.json", {"command": command(), "networks": faithfulness})
    print_table(report)
    print(f"written to {args.out}")


def digits_network(device: torch.device) -> Network:
    """The network of the embedded scenes; trained now, in about a minute, where it is not there yet."""
    network = load_network(NETWORK, digits_checkpoint(DIGITS_FOLDER, device))
    network.model.to(device)
    return network


def check(args: Args) -> None:
    """Raise InputError for flags that make no sense."""
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size} is too small: give 1 or more")
    if not 0 < args.percentile < 100:
        raise InputError(f"--percentile {args.percentile} is not above 0 and below 100")
    if args.images and args.masks is None:
        raise InputError("there are images but no masks: pass --masks DIR, with a mask of each image's name in it")
    if args.masks is not None and not args.masks.exists():
        raise InputError(f"there is no folder of masks {args.masks}")
    of_networks = (args.networks, args.checkpoint, args.num_classes, args.image_size, args.random_weights)
    if not args.images and (args.masks or any(of_networks)):
        raise InputError("there are no images: pass images and --masks, or nothing at all for the embedded digits")
    if args.masks is not None and args.masks.is_file() and (len(args.images) > 1 or args.images[0].is_dir()):
        raise InputError(f"{args.masks} is one mask for several images: pass a folder of masks")


def score(pictures: list[Picture], maps: list[np.ndarray], percentile: float) -> dict[str, dict]:
    """Scores by image."""
    return {
        picture.name: score_map(saliency, picture.mask, percentile)
        for picture, saliency in zip(pictures, maps, strict=True)
    }


def dice_curves(rows: dict[str, dict]) -> np.ndarray:
    """`(images, percentiles)`."""
    return np.array([[row["dice"][p] for p in PERCENTILES] for row in rows.values()])


def means(rows: dict[str, dict]) -> dict[str, float]:
    """The mean of each score over the images."""
    names = ("dice_at", "iou_at", "pointing", "average_precision")
    return {name: float(np.mean([row[name] for row in rows.values()])) for name in names}


def write_dice(path: Path, scores: dict[str, dict[str, dict]]) -> None:
    """dice.csv: a line for each method, image and percentile."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "image", "percentile", "dice"])
        for method, rows in scores.items():
            for image, row in rows.items():
                writer.writerows([method, image, p, f"{value:.6f}"] for p, value in row["dice"].items())


def print_table(report: dict) -> None:
    """The mean scores, a line a method."""
    at = f"{report['percentile']:g} %"
    print(f"{'':28}{'Dice at ' + at:>14}{'IoU at ' + at:>14}{'pointing game':>16}{'average precision':>20}")
    for name, mean in report["mean"].items():
        print(
            f"{name:28}{mean['dice_at']:14.3f}{mean['iou_at']:14.3f}{mean['pointing']:16.2f}"
            f"{mean['average_precision']:20.3f}"
        )


if __name__ == "__main__":
    run_script(main, Args, __doc__)
