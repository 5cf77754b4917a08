"""Draw FullGrad saliency maps of images, for one network or for several side by side.

    python interpretability/interpret_fullgrad.py                      # S3-Net on crops of two photographs
    python interpretability/interpret_fullgrad.py photo.jpg            # the paper's networks, published weights
    python interpretability/interpret_fullgrad.py photo.jpg --networks resnet50 timm/ghostnet_100 --target 207
    python interpretability/interpret_fullgrad.py photo.jpg --checkpoint runs/my-run/best.safetensors
    python interpretability/interpret_fullgrad.py photo.jpg --checkpoint s3net_imagenet_large=model_best.pth.tar

Files written into --out: `figure.png`, `saliency.json`, and for each network and image `maps/<network>/<image>.npy` and
`overlays/<network>/<image>.png`; with --faithfulness also `faithfulness.png` and `faithfulness.json`. The figure has a
row for each image, 6 on a page (`figure.png`, `figure-2.png`, ...), and a column for each network; without arguments it
has a column for each crop.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from network_flags import NetworkArgs, is_image
from s3net_common.command_line import OVERWRITE, answer_flags, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT, claim_folder, run_record, write_atomically, write_json


@dataclass
class Args(NetworkArgs):
    """Draw FullGrad saliency maps."""

    out: Path = ROOT / "runs" / "fullgrad"
    """Folder to write the files into. Those of an earlier run are replaced."""
    overwrite: OVERWRITE = False


if __name__ == "__main__":
    answer_flags(Args, __doc__, is_image)

import numpy as np
import torch

from explain_images import (
    PictureExplanation,
    baseline_maps,
    choose_device,
    explain_pictures,
    load_networks,
    measure_faithfulness,
    picture_reader,
)
from explained_networks import Network
from pictures import Picture
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.progress import ProgressBar
from saliency_figures import draw_crops, draw_faithfulness, draw_maps, page_names, save_overlay

Column = tuple[Network, list[Picture], list[PictureExplanation]]  # of the figure


def main(args: Args) -> None:
    """Explain the pictures by each network; write maps, overlays, figure and JSON files."""
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size} is too small: give 1 or more")
    device = choose_device(args.device)
    keep_freed_memory()
    claim_files(args)
    read = picture_reader(args)
    networks = load_networks(args, device)
    columns: list[Column] = []
    total = sum(len(read(network.preparation)) for network in networks)
    with ProgressBar(total=total, unit="map") as bar:
        for network in networks:
            bar.set_description(network.name)
            pictures = read(network.preparation)
            target = network.target_index(args.target)
            explanations = explain_pictures(network, pictures, target, args.batch_size, device, bar.update)
            columns.append((network, pictures, explanations))
            write_maps(args.out, network, pictures, explanations)
    draw_figure(args.out / "figure.png", columns)
    write_json(args.out / "saliency.json", run_record() | {"device": device.type, "maps": map_rows(columns)})
    if args.faithfulness:
        faithfulness = {column[0].name: faithfulness_of(*column, device) for column in columns}
        write_json(args.out / "faithfulness.json", run_record() | {"networks": faithfulness})
        draw_faithfulness(args.out / "faithfulness.png", faithfulness)
    print_summary(columns)
    print(f"written to {args.out}")


def faithfulness_of(
    network: Network, pictures: list[Picture], explanations: list[PictureExplanation], device: torch.device
) -> dict[str, dict]:
    """Measure insertion and deletion of the network's maps and of the baseline maps."""
    targets = [explanation.target for explanation in explanations]
    maps = {"FullGrad": [explanation.saliency for explanation in explanations]} | baseline_maps(pictures)
    return measure_faithfulness(network, pictures, targets, maps, device)


def claim_files(args: Args) -> None:
    """Check that no file of something else would be replaced, and write a first saliency.json without maps.

    Raises:
        InputError: as `claim_folder`.
    """
    record = args.out / "saliency.json"
    claim_folder(args.out, record.name, *page_names("figure.png"), "maps", "overlays", overwrite=args.overwrite)
    if args.faithfulness:
        claim_folder(args.out, "faithfulness.json", "faithfulness.png", overwrite=args.overwrite)
    if not record.exists():
        write_json(record, run_record() | {"maps": []})


def write_maps(out: Path, network: Network, pictures: list[Picture], explanations: list[PictureExplanation]) -> None:
    """Write each map as an array and as an overlay on its image."""
    for picture, explanation in zip(pictures, explanations, strict=True):
        file, saliency = out / "maps" / network.name / f"{picture.name}.npy", explanation.saliency
        write_atomically(file, lambda temporary, saliency=saliency: np.save(temporary, saliency))
        save_overlay(out / "overlays" / network.name / f"{picture.name}.png", picture, saliency)


def draw_figure(path: Path, columns: list[Column]) -> None:
    """Draw the maps of all networks, or, for crops of photographs, those of the one network that explains them."""
    network, pictures, explanations = columns[0]
    if pictures[0].original is None:
        draw_maps(path, pictures, columns)
    else:
        draw_crops(path, network, pictures, explanations)


def map_rows(columns: list[Column]) -> list[dict[str, Any]]:
    """Return `maps` of saliency.json: what is known about each map except its pixels."""
    return [
        {
            "network": network.name,
            "image": picture.name,
            "target": explanation.target,
            "target_name": network.class_name(explanation.target),
            "probability": explanation.probability,
            "prediction": explanation.prediction,
            "prediction_name": network.class_name(explanation.prediction),
            "most_probable": [[network.class_name(i), probability] for i, probability in explanation.most_probable],
            "completeness_error": explanation.completeness_error,
            "drawn": explanation.drawn,
            "seconds": explanation.seconds,
        }
        for network, pictures, explanations in columns
        for picture, explanation in zip(pictures, explanations, strict=True)
    ]


def print_summary(columns: list[Column]) -> None:
    """Print for each network: number of maps, seconds for one, largest completeness error, and least share drawn."""
    for network, _, explanations in columns:
        error = max(explanation.completeness_error for explanation in explanations)
        seconds = np.mean([explanation.seconds for explanation in explanations])
        drawn = min(explanation.drawn for explanation in explanations)
        print(
            f"{network.name:28} {len(explanations)} maps, {seconds:.3f} s each, "
            f"completeness error at most {error:.1e}, "
            f"{drawn:.0%} of the terms drawn or more"
        )


if __name__ == "__main__":
    run_script(main, Args, __doc__, is_image)
