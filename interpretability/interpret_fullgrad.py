"""FullGrad saliency maps of images, for one network or several side by side.

    python interpret_fullgrad.py                                     # the repository's S3-Net, on parts of photographs
    python interpret_fullgrad.py my/images dog.jpg                   # the paper's networks, published weights
    python interpret_fullgrad.py dog.jpg --networks resnet50 timm/ghostnet_100 --target 207 --faithfulness
    python interpret_fullgrad.py dog.jpg --checkpoint s3net_imagenet_large=model_best.pth.tar
    python interpret_fullgrad.py my/images --checkpoint runs/my-run/best.safetensors

Writes into --out: `figure.png` (a row an image, up to 6, a column a network; without arguments a column an image),
`maps/<network>/<image>.npy`, `overlays/<network>/<image>.png` and `saliency.json`; with --faithfulness also
`faithfulness.png` and `.json`.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from explain_images import (
    Explained,
    NetworkArgs,
    choose_device,
    explain_pictures,
    load_networks,
    measure_faithfulness,
    picture_reader,
)
from explained_networks import Network
from pictures import Picture
from s3net_common.command_line import run_script
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT, make_folder, write_atomically, write_json
from saliency_figures import draw_crops, draw_faithfulness, draw_maps, save_overlay


@dataclass
class Args(NetworkArgs):
    """Draw FullGrad saliency maps."""

    out: Path = ROOT / "runs" / "fullgrad"
    """Folder for everything that is written."""


def main(args: Args) -> None:
    """Read, explain, draw and write.

    Raises:
        InputError: something that the user gave cannot be used.
    """
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size} is too small: give 1 or more")
    device = choose_device(args.device)
    keep_freed_memory()
    make_folder(args.out)
    pictures = picture_reader(args)
    networks = load_networks(args, device)
    columns = []
    with tqdm(total=sum(len(pictures(n.image_size)) for n in networks), unit="map", disable=None) as bar:
        for network in networks:
            bar.set_description(network.name)
            own = pictures(network.image_size)
            explained = explain_pictures(network, own, args.target, args.batch_size, device, bar.update)
            columns.append((network, own, explained))
            write_maps(args.out, network, own, explained)
    network, first, explained = columns[0]
    if first[0].original is None:
        draw_maps(args.out / "figure.png", first, columns)
    else:
        draw_crops(args.out / "figure.png", network, first, explained)
    write_json(args.out / "saliency.json", report(columns, device))
    if args.faithfulness:
        faithfulness = {network.name: measure_faithfulness(network, own, e, device) for network, own, e in columns}
        draw_faithfulness(args.out / "faithfulness.png", faithfulness)
        write_json(args.out / "faithfulness.json", {"command": command(), "networks": faithfulness})
    for network, _, explained in columns:
        worst = max(one.completeness_error for one in explained)
        seconds = np.mean([one.seconds for one in explained])
        print(f"{network.name:28} {len(explained)} maps, {seconds:.3f} s each, completeness error at most {worst:.1e}")
    print(f"written to {args.out}")


def write_maps(out: Path, network: Network, pictures: list[Picture], explained: list[Explained]) -> None:
    """Each map as an array and as an overlay."""
    for picture, one in zip(pictures, explained, strict=True):
        file, saliency = out / "maps" / network.name / f"{picture.name}.npy", one.saliency
        write_atomically(file, lambda temporary, saliency=saliency: np.save(temporary, saliency))
        save_overlay(out / "overlays" / network.name / f"{picture.name}.png", picture, saliency)


def report(columns: list[tuple[Network, list[Picture], list[Explained]]], device: torch.device) -> dict:
    """The content of saliency.json."""
    maps = [
        {
            "network": network.name,
            "image": picture.name,
            "target": one.target,
            "target_name": network.class_name(one.target),
            "probability": one.probability,
            "prediction": one.prediction,
            "prediction_name": network.class_name(one.prediction),
            "most_probable": [[network.class_name(index), probability] for index, probability in one.most_probable],
            "completeness_error": one.completeness_error,
            "seconds": one.seconds,
        }
        for network, pictures, explained in columns
        for picture, one in zip(pictures, explained, strict=True)
    ]
    return {"command": command(), "torch": torch.__version__, "device": device.type, "maps": maps}


def command() -> str:
    """The command line, for the files that it made."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


if __name__ == "__main__":
    run_script(main, Args, __doc__)
