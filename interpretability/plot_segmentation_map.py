"""Segment images by their saliency maps, and score the segmentations against true masks.

    python interpretability/plot_segmentation_map.py                              # digits beside clutter
    python interpretability/plot_segmentation_map.py my/images --masks my/masks   # the paper's networks
    python interpretability/plot_segmentation_map.py my/images --masks my/masks --networks resnet50 --faithfulness

A mask has the name of its image: masks/photo.png belongs to photo.jpg. The object is where the mask's alpha is above
127, or its grey value if it has no alpha channel. Files written into --out: `segmentation.png` with 6 images, further
images in `segmentation-2.png`, ..., `dice.png`, `dice.csv` (Dice at the percentiles 99 to 80), `scores.csv` (Dice, IoU,
pointing game and average precision of each image) and `scores.json` (their means, with 95% intervals). FullGrad is
compared with two baseline maps: a centred Gaussian, which ignores the image, and the image's edges, which ignore the
network. With --rivals it is also compared with other gradient methods (gradient x input, integrated gradients,
SmoothGrad, gradient), with random maps, and with the true masks, the ceiling of the scores against them.

As for the paper's figures, the whole image is resized to a square; --no-squash prepares it as for the network instead.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from network_flags import TEST, NetworkArgs, is_image
from s3net_common.command_line import OVERWRITE, answer_flags, flag, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT, claim_folder, csv_cell, run_record, write_atomically, write_json

DIGITS_FOLDER = ROOT / "runs" / "digits_network"
FIGURE_SCENES = 6
RIVAL_BATCH = 16  # images in one pass of the other methods
SCORES = ("dice_at", "iou_at", "pointing", "average_precision")
OUTSIDE_FIGURE = ("random map", "true mask")  # methods that the figure of segmentations leaves out


@dataclass
class Args(NetworkArgs):
    """Segment images by their saliency maps, and score the segmentations against true masks."""

    masks: flag(Path, "PATH", "none; images need masks") = None
    """Folder of the masks, or the mask if there is one image."""
    squash: bool = True
    """Resize the whole image to a square, as for the paper's figures, instead of cropping its centre."""
    rivals: bool = False
    """Also score the maps of other gradient methods, random maps and the true masks, as for digits always."""
    scenes: int = TEST
    """Scenes of digits, if there are no images."""
    percentile: float = 90.0
    """Percentile of the map from which a pixel belongs to the segmentation, above 0 and below 100."""
    out: Path = ROOT / "runs" / "segmentation"
    """Folder to write the files into. Those of an earlier run are replaced."""
    overwrite: OVERWRITE = False


if __name__ == "__main__":
    answer_flags(Args, __doc__, is_image)

import numpy as np
import torch

from digit_scenes import scene_pictures
from explain_images import (
    baseline_maps,
    choose_device,
    explain_pictures,
    load_networks,
    measure_faithfulness,
    picture_reader,
    rival_maps,
)
from explained_networks import Network, load_network
from map_scores import PERCENTILES, bootstrap, interval, score_map
from pictures import Picture
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.framing import Preparation
from s3net_common.progress import ProgressBar
from saliency_figures import draw_dice, draw_faithfulness, draw_segmentations, page_names
from scene_training import NETWORK, accuracy_on_test_digits, digits_checkpoint

Column = tuple[str, list[Picture], list[np.ndarray]]  # a method's name, its pictures and its maps
Reader = Callable[[Preparation], list[Picture]]  # the pictures as a network with this preparation sees them
Scores = dict[str, dict[str, Any]]  # what score_map returns for each picture, by the picture's name


def main(args: Args) -> None:
    """Explain the pictures, score the maps, and write figures, tables and JSON files."""
    check_flags(args)
    device = choose_device(args.device)
    keep_freed_memory()
    files = (*page_names("segmentation.png"), "dice.png", "dice.csv", "scores.csv")
    claim_folder(args.out, "scores.json", *files, overwrite=args.overwrite)
    if args.faithfulness:
        claim_folder(args.out, "faithfulness.json", "faithfulness.png", overwrite=args.overwrite)
    read, networks = pictures_and_networks(args, device)
    columns: list[Column] = []
    errors, faithfulness = {}, {}
    total = sum(len(read(network.preparation)) for network in networks)
    with ProgressBar(total=total, unit="map") as bar:
        for network in networks:
            bar.set_description(network.name)
            pictures = read(network.preparation)
            target = network.target_index(args.target)
            explanations = explain_pictures(network, pictures, target, args.batch_size, device, bar.update)
            errors[network.name] = max(explanation.completeness_error for explanation in explanations)
            targets = [explanation.target for explanation in explanations]
            maps = {"FullGrad": [explanation.saliency for explanation in explanations]}
            if args.rivals or not args.images:
                maps |= rival_maps(network, pictures, targets, RIVAL_BATCH, device)
            columns += [(column_name(network, method, networks), pictures, maps[method]) for method in maps]
            if args.faithfulness:
                maps |= baseline_maps(pictures)
                faithfulness[network.name] = measure_faithfulness(network, pictures, targets, maps, device)
    pictures = read(networks[0].preparation)
    columns += [(name, pictures, maps) for name, maps in baseline_maps(pictures).items()]
    scores = {name: score_pictures(framed, maps, args.percentile) for name, framed, maps in columns}
    report = {
        "percentile": args.percentile,
        "images": len(pictures),
        "largest_completeness_error": errors,
        **accuracy_of(networks[0], pictures, args),
        **summary_of(scores, networks[0].name),
    }
    write_json(args.out / "scores.json", run_record() | report)
    drawn = pictures if args.images else pictures[:FIGURE_SCENES]
    titles = {name: name if name not in errors else f"FullGrad ({name})" for name in scores}
    shown = [(titles[name], *column) for name, *column in columns if name not in OUTSIDE_FIGURE]
    draw_segmentations(args.out / "segmentation.png", drawn, shown, args.percentile)
    draw_dice(args.out / "dice.png", {titles[name]: dice_curves(scores[name]) for name in scores})
    write_atomically(args.out / "dice.csv", lambda path: write_dice(path, scores))
    write_atomically(args.out / "scores.csv", lambda path: write_scores(path, scores))
    if faithfulness:
        write_json(args.out / "faithfulness.json", run_record() | {"networks": faithfulness})
        draw_faithfulness(args.out / "faithfulness.png", faithfulness)
    print_table(report)
    print(f"written to {args.out}")


def summary_of(scores: dict[str, Scores], reference: str) -> dict[str, Any]:
    """Return the mean scores of each method, their intervals, and the differences from the method `reference`."""
    return {
        "mean": {name: mean_scores(method_scores) for name, method_scores in scores.items()},
        "interval": intervals(scores),
        "difference": intervals(scores, reference),
        "dice": {name: mean_dice(method_scores) for name, method_scores in scores.items()},
    }


def column_name(network: Network, method: str, networks: list[Network]) -> str:
    """Return a method's name in tables: the network's for FullGrad, and with the network's if there are several."""
    if method == "FullGrad":
        return network.name
    return method if len(networks) == 1 else f"{network.name}: {method}"


def accuracy_of(network: Network, pictures: list[Picture], args: Args) -> dict[str, float]:
    """Return `test_accuracy` on the scenes of all test digits, or nothing for other images."""
    return {} if args.images else {"test_accuracy": accuracy_on_test_digits(network.model)}


def check_flags(args: Args) -> None:
    """Check flags against each other and their ranges.

    Raises:
        InputError: they cannot be used.
    """
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size} is too small: give 1 or more")
    if not 0 < args.percentile < 100:
        raise InputError(f"--percentile {args.percentile} is not above 0 and below 100")
    if not 1 <= args.scenes <= TEST:
        raise InputError(f"--scenes {args.scenes} is not possible: give 1 to {TEST}")
    if args.images and args.masks is None:
        raise InputError("there are images but no masks: pass --masks DIR, a folder with a mask of each image's name")
    if args.masks is not None and not args.masks.exists():
        raise InputError(f"there is no folder of masks {args.masks}")
    network_flags = (args.networks, args.checkpoint, args.num_classes, args.image_size, args.random_weights)
    if not args.images and (args.masks or any(network_flags)):
        raise InputError("there are no images: pass images and --masks, or leave out all flags for networks and masks")
    if args.masks is not None and args.masks.is_file() and (len(args.images) > 1 or args.images[0].is_dir()):
        raise InputError(f"{args.masks} is one mask for several images: pass a folder of masks")


def pictures_and_networks(args: Args, device: torch.device) -> tuple[Reader, list[Network]]:
    """Return a function from a preparation to pictures with masks, and the networks; both for digits without images.

    Without images the network is trained first, in about a minute, unless an earlier call did so.
    """
    if args.images:
        return picture_reader(args, args.masks), load_networks(args, device)
    network = load_network(NETWORK, digits_checkpoint(DIGITS_FOLDER, device))
    network.model.to(device)
    pictures = scene_pictures(args.scenes)
    return lambda preparation: pictures, [network]


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
    return {name: float(np.mean([row[name] for row in scores.values()])) for name in SCORES}


def mean_dice(scores: Scores) -> dict[int, float]:
    """Return the mean Dice coefficient over the pictures, by percentile."""
    return dict(zip(PERCENTILES, dice_curves(scores).mean(0).tolist(), strict=True))


def intervals(scores: dict[str, Scores], reference: str | None = None) -> dict[str, dict[str, list[float]]]:
    """Return the 95% interval of each method's mean scores, from a bootstrap over the pictures.

    With `reference`, the intervals are of the paired differences to this method.
    """
    names = list(next(iter(scores.values())))

    def means(method: str, score: str) -> np.ndarray:
        return bootstrap(np.array([[scores[method][name][score] for name in names]], dtype=float))

    return {
        method: {
            score: interval(means(method, score) - (means(reference, score) if reference else 0)) for score in SCORES
        }
        for method in scores
        if method != reference
    }


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


def write_scores(path: Path, scores: dict[str, Scores]) -> None:
    """Write a line with the scores of each method and image as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "image", *SCORES])
        for method, method_scores in scores.items():
            for image, row in method_scores.items():
                writer.writerow([csv_cell(method), csv_cell(image), *(f"{row[score]:.6f}" for score in SCORES)])


def print_table(report: dict) -> None:
    """Print the mean scores of each method with their 95% intervals."""
    percentile = f"at {report['percentile']:g} %"
    titles = (f"Dice {percentile}", f"IoU {percentile}", "pointing game", "average precision")
    print(f"{'':28}" + "".join(f"{title:>24}" for title in titles))
    for name, mean in report["mean"].items():
        bounds = report["interval"][name].items()
        cells = (f"{mean[score]:.3f} [{low:.3f}, {high:.3f}]" for score, (low, high) in bounds)
        print(f"{name:28}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    run_script(main, Args, __doc__, is_image)
