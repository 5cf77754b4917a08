"""What both scripts share: the flags that choose networks, and maps of images with what the network says of them."""

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from explained_networks import PAPER_NETWORKS, Network, load_network
from faithfulness import area, deletion_curve, insertion_curve
from full_grad import FullGrad, IncompleteWarning
from map_scores import centred_gaussian, edge_map
from pictures import Picture, find_images, read_pictures, sample_crops, sample_pictures
from s3net_common.checkpoints import read_metadata
from s3net_common.errors import InputError

OUR_NETWORK = "s3net_cifar"  # the one whose weights are in the repository
MOST_PROBABLE = 3

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="default: see above")]
Files = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]FILE ...", help_behavior_hint="default: published weights")]  # fmt: skip  # noqa: E501
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="default: the network's own")]


@dataclass
class NetworkArgs:
    """Which networks explain which images."""

    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE ...", help_behavior_hint="default: embedded images")] = ()  # fmt: skip  # noqa: E501
    """Image files, or folders of them."""
    networks: Names = ()
    """Networks to explain, by their names in models.py, torchvision or timm (timm/NAME where two have it)."""
    checkpoint: Files = ()
    """Weights: ours (.safetensors, .pt), the published S3-Net files, or a state dict; NAME= if there are several."""
    num_classes: OptionalInt = None
    """Outputs of the networks, where a checkpoint has another number than usual."""
    random_weights: bool = False
    """Keep initial weights (seed 0), to see the method run where there are no weights."""
    target: Annotated[int | None, tyro.conf.arg(metavar="CLASS", help_behavior_hint="default: the predicted one")] = None  # fmt: skip  # noqa: E501
    """Class index to explain in every image."""
    image_size: OptionalInt = None
    """Height and width that images are resized to."""
    batch_size: int = 8
    """Images in one pass."""
    device: Annotated[str | None, tyro.conf.arg(metavar="{cpu,cuda,cuda:N,mps}", help_behavior_hint="default: a GPU if there is one")] = None  # fmt: skip  # noqa: E501
    """Where to compute."""
    faithfulness: bool = False
    """Also measure insertion and deletion: faithfulness.png and faithfulness.json."""


@dataclass
class Explained:
    """One network's explanation of one picture.

    Attributes:
        saliency: `(H, W)` float32.
        target: the explained class, and its `probability`.
        prediction: the class of the largest logit.
        completeness_error: of eq. 1 in full_grad.py, relative.
        seconds: the batch's time divided by its images.
        most_probable: the first classes by probability, with their probabilities.
    """

    saliency: np.ndarray
    target: int
    probability: float
    prediction: int
    completeness_error: float
    seconds: float
    most_probable: list[tuple[int, float]]


def choose_device(name: str | None) -> torch.device:
    """The device of that name; without one a GPU if there is one.

    Raises:
        InputError: there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device {name!r} here: give cpu, or leave --device out") from error
    return device


def load_networks(args: NetworkArgs, device: torch.device) -> list[Network]:
    """The networks of the command line, on the device.

    Without images, names and checkpoints it is the repository's S3-Net; with images only, the paper's.

    Raises:
        InputError: as `load_network`, a checkpoint is of none of the networks, or --image-size does not fit one.
    """
    names, files = list(args.networks), {}
    for text in args.checkpoint:
        name, equals, file = text.partition("=")
        if not equals or Path(text).is_file():
            path = Path(text)
            name = names[0] if len(names) == 1 else read_metadata(path).get("model")
            if name is None:
                raise InputError(f"{path} does not say which network it is for: pass --checkpoint NAME={path}")
            if not args.networks:
                names.append(name)
        else:
            path = Path(file)
            if not args.networks:
                names.append(name)
        if name not in names or name in files:
            raise InputError(f"--checkpoint {text}: the networks are {', '.join(names)}, each with one checkpoint")
        files[name] = path
    if not names:
        names = list(PAPER_NETWORKS) if args.images else [OUR_NETWORK]
    networks = []
    for name in dict.fromkeys(names):
        network = load_network(name, files.get(name), args.num_classes, args.random_weights)
        if args.image_size is not None:
            check_image_size(network, args.image_size)
            network.image_size = args.image_size
        network.model.to(device)
        networks.append(network)
    return networks


def check_image_size(network: Network, size: int) -> None:
    """Try the network, still on the CPU, on an empty image of that size.

    Raises:
        InputError: it does not take such images.
    """
    if size < 1:
        raise InputError(f"--image-size {size} is not possible: give 1 or more")
    try:
        with torch.no_grad():
            network.model(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"--image-size {size} does not fit {network.name}: leave it out, which takes {network.image_size}"
        ) from error


def picture_reader(args: NetworkArgs, masks: Path | None = None) -> Callable[[int], list[Picture]]:
    """A function from a size to the pictures of the command line; the embedded ones where it names none.

    Raises (also when called):
        InputError: as `read_pictures`.
    """
    read: dict[int, list[Picture]] = {}
    files = find_images(args.images)
    our_network = not args.networks and not args.checkpoint

    def pictures(size: int) -> list[Picture]:
        if size not in read:
            if files:
                read[size] = read_pictures(files, size, masks)
            else:
                read[size] = sample_crops(size) if our_network else sample_pictures(size)
        return read[size]

    return pictures


def explain_pictures(
    network: Network,
    pictures: Sequence[Picture],
    target: int | None,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int], object] = lambda images: None,
) -> list[Explained]:
    """FullGrad of every picture; what FullGrad warns of goes to stderr as one line.

    Args:
        network: on `device`.
        pictures: all of one size.
        target: the class to explain; None for the predicted one.
        batch_size: images in one pass.
        device: where to compute.
        progress: is told the number of images done, batch by batch.

    Raises:
        InputError: there is no such class.
    """
    explainer, explained = FullGrad(network.model, batch_size), []
    for start in range(0, len(pictures), batch_size):
        pixels = np.stack([picture.pixels for picture in pictures[start : start + batch_size]])
        images = network.normalise(pixels).to(device)
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", IncompleteWarning)
            result = explainer.explain(images, target)
        maps, classes = result.maps[:, 0].cpu().numpy(), result.target[:, 0]
        seconds = (time.perf_counter() - started) / len(images)
        for warning in (one for one in caught if issubclass(one.category, IncompleteWarning)):
            print(f"warning: {network.name}: {warning.message}", file=sys.stderr)
        probabilities, errors = result.logits.softmax(1).cpu(), result.completeness_error[:, 0].tolist()
        ranked = probabilities.topk(min(MOST_PROBABLE, probabilities.shape[1]))
        for i, target_class in enumerate(classes.tolist()):
            most_probable = list(zip(ranked.indices[i].tolist(), ranked.values[i].tolist(), strict=True))
            probability, prediction = probabilities[i, target_class].item(), most_probable[0][0]
            explained.append(
                Explained(maps[i], target_class, probability, prediction, errors[i], seconds, most_probable)
            )
        progress(len(images))
    return explained


def measure_faithfulness(
    network: Network, pictures: Sequence[Picture], explained: Sequence[Explained], device: torch.device
) -> dict[str, dict]:
    """Insertion and deletion of FullGrad's maps, and of the two maps that know nothing of the network.

    Returns:
        By method: `insertion` and `deletion`, the mean curves; `insertion_area` and `deletion_area`, by image.
    """
    images = network.normalise(np.stack([picture.pixels for picture in pictures])).to(device)
    target = torch.tensor([one.target for one in explained], device=device)
    methods = {"FullGrad": [one.saliency for one in explained]} | baseline_maps(pictures)
    results = {}
    for method, maps in methods.items():
        ranked = torch.from_numpy(np.stack(maps)).to(device, images.dtype)[:, None]
        results[method] = {}
        for kind, measure in (("insertion", insertion_curve), ("deletion", deletion_curve)):
            curves = measure(network.model, images, ranked, target)
            results[method][kind] = curves.mean(0).tolist()
            results[method][f"{kind}_area"] = area(curves).tolist()
    return results


def baseline_maps(pictures: Sequence[Picture]) -> dict[str, list[np.ndarray]]:
    """The maps that any method must beat, by name: a centred Gaussian, and the image's edges."""
    return {
        "centred Gaussian": [centred_gaussian(len(picture.pixels)) for picture in pictures],
        "edge map": [edge_map(picture.pixels) for picture in pictures],
    }
