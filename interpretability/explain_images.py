"""Code that the scripts share: flags for networks and images, FullGrad maps of images, and their faithfulness."""

import functools
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from explained_networks import PAPER_NETWORKS, Network, load_network
from faithfulness import area, deletion_curve, insertion_curve
from full_grad import FullGrad, IncompleteWarning
from map_scores import centred_gaussian, edge_map
from network_flags import NetworkArgs
from pictures import Picture, read_pictures, sample_crops, sample_pictures
from s3net_common.checkpoints import read_metadata
from s3net_common.errors import InputError
from s3net_common.images import find_images, limit_pixels

DEFAULT_NETWORK = "s3net_cifar"  # its trained weights are in the repository
USUAL_SIZE = 224  # image size of most networks
MOST_PROBABLE = 3  # classes listed for each image


@dataclass
class PictureExplanation:
    """One network's explanation of one picture.

    Attributes:
        saliency: `(H, W)` float32.
        target: index of the explained class.
        probability: the network's probability of `target`.
        prediction: index of the most probable class.
        completeness_error: `FullGrad.completeness_error` of the picture.
        seconds: computing time of the picture's batch divided by the number of its pictures.
        most_probable: the first `MOST_PROBABLE` classes by probability, with their probabilities.
    """

    saliency: np.ndarray
    target: int
    probability: float
    prediction: int
    completeness_error: float
    seconds: float
    most_probable: list[tuple[int, float]]


def choose_device(name: str | None) -> torch.device:
    """Return the device of this name; for None a GPU if there is one, else the CPU.

    Raises:
        InputError: this machine has no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"this machine has no device {name!r}: give cpu, or leave --device out") from error
    return device


def load_networks(args: NetworkArgs, device: torch.device) -> list[Network]:
    """Return the networks of the command line, on the device.

    Without --networks and --checkpoint these are the paper's networks, or S3-Net if there are no images either.

    Raises:
        InputError: as `load_network`; also if a checkpoint's network is unclear, or --image-size does not fit.
    """
    networks = []
    for name, checkpoint in chosen_networks(args).items():
        network = load_network(name, checkpoint, args.num_classes, args.random_weights)
        if args.image_size is not None:
            check_image_size(network, args.image_size)
            network.image_size = args.image_size
        network.target_index(args.target)  # an unknown name is reported before anything is computed
        network.model.to(device)
        networks.append(network)
    return networks


def chosen_networks(args: NetworkArgs) -> dict[str, Path | None]:
    """Return the checkpoint of each network of the command line, by the network's name. None: published weights."""
    if args.random_weights and args.checkpoint:
        raise InputError("--random-weights loads no weights: leave out --checkpoint, or leave out --random-weights")
    checkpoints: dict[str, Path | None] = dict.fromkeys(args.networks)
    for text in args.checkpoint:
        name, equals, file = text.partition("=")
        if not equals or Path(text).is_file():  # no NAME=, or the equals sign is part of the path
            file = text
            name = args.networks[0] if len(args.networks) == 1 else read_metadata(file).get("model")
            if name is None:
                raise InputError(f"{file} does not name its network: pass --checkpoint NAME={file}")
        if checkpoints.get(name) or (args.networks and name not in args.networks):
            names = ", ".join(checkpoints)
            raise InputError(f"--checkpoint {text}: give each of these networks at most one checkpoint: {names}")
        checkpoints[name] = Path(file)
    return checkpoints or dict.fromkeys(PAPER_NETWORKS if args.images else [DEFAULT_NETWORK])


def check_image_size(network: Network, size: int) -> None:
    """Check that the network, on the CPU, takes images of this size, by running it on a black one.

    Raises:
        InputError: it does not.
    """
    if size < 1:
        raise InputError(f"--image-size {size} is not possible: give 1 or more")
    try:
        with torch.no_grad():
            network.model(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"--image-size {size} does not fit {network.name}: leave it out to use {network.image_size}"
        ) from error


def picture_reader(args: NetworkArgs, masks: Path | None = None) -> Callable[[int], list[Picture]]:
    """Return a function that reads the pictures of the command line in a given size.

    Without images on the command line it returns scikit-learn's photographs, or crops of them for the default network.
    Each size is read once. The usual size is read at once: if a picture cannot be used, no network need be downloaded.

    Raises (the returned function, too):
        InputError: as `find_images` and `read_pictures`.
    """
    limit_pixels(args.max_pixels)
    files = find_images(args.images)
    default_network = not args.networks and not args.checkpoint

    @functools.cache
    def read(size: int) -> list[Picture]:
        if files:
            return read_pictures(files, size, masks, args.skip_unreadable)
        return sample_crops(size) if default_network else sample_pictures(size)

    if files:
        read(max(1, args.image_size or USUAL_SIZE))
    return read


def explain_pictures(
    network: Network,
    pictures: Sequence[Picture],
    target: int | None,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int], object] = lambda images: None,
) -> list[PictureExplanation]:
    """Compute a FullGrad map of every picture. Warnings of FullGrad are printed to stderr, each as one line.

    Args:
        network: a network on `device`.
        pictures: pictures of one size.
        target: the class to explain; None for the predicted one.
        batch_size: images in one pass.
        device: the device to compute on.
        progress: called after each batch with the number of its images.

    Raises:
        InputError: the network has no such class.
    """
    explainer, explanations = FullGrad(network.model, batch_size), []
    for start in range(0, len(pictures), batch_size):
        pixels = np.stack([picture.pixels for picture in pictures[start : start + batch_size]])
        images = network.normalise(pixels).to(device)
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", IncompleteWarning)
            result = explainer.explain(images, target)
        maps, classes = result.maps[:, 0].cpu().numpy(), result.target[:, 0]
        seconds = (time.perf_counter() - started) / len(images)
        for warning in caught:
            if issubclass(warning.category, IncompleteWarning):
                print(f"warning: {network.name}: {warning.message}", file=sys.stderr)
        probabilities, errors = result.logits.softmax(1).cpu(), result.completeness_error[:, 0].tolist()
        ranked = probabilities.topk(min(MOST_PROBABLE, probabilities.shape[1]))
        for i, target_class in enumerate(classes.tolist()):
            most_probable = list(zip(ranked.indices[i].tolist(), ranked.values[i].tolist(), strict=True))
            probability, prediction = probabilities[i, target_class].item(), most_probable[0][0]
            explanations.append(
                PictureExplanation(maps[i], target_class, probability, prediction, errors[i], seconds, most_probable)
            )
        progress(len(images))
    return explanations


def measure_faithfulness(
    network: Network, pictures: Sequence[Picture], explanations: Sequence[PictureExplanation], device: torch.device
) -> dict[str, dict]:
    """Measure insertion and deletion of FullGrad's maps and of the two baseline maps.

    Returns:
        For each method, by name: `insertion` and `deletion`, the mean curves over the pictures; `insertion_area` and
        `deletion_area`, a list with the area of each picture's curve.
    """
    images = network.normalise(np.stack([picture.pixels for picture in pictures])).to(device)
    target = torch.tensor([explanation.target for explanation in explanations], device=device)
    methods = {"FullGrad": [explanation.saliency for explanation in explanations]} | baseline_maps(pictures)
    results = {}
    for method, maps in methods.items():
        stacked = torch.from_numpy(np.stack(maps)).to(device, images.dtype)[:, None]
        results[method] = {}
        for kind, measure in (("insertion", insertion_curve), ("deletion", deletion_curve)):
            curves = measure(network.model, images, stacked, target)
            results[method][kind] = curves.mean(0).tolist()
            results[method][f"{kind}_area"] = area(curves).tolist()
    return results


def baseline_maps(pictures: Sequence[Picture]) -> dict[str, list[np.ndarray]]:
    """Return the maps that any method must beat, by name: a centred Gaussian, and the edges of each image."""
    return {
        "centred Gaussian": [centred_gaussian(len(picture.pixels)) for picture in pictures],
        "edge map": [edge_map(picture.pixels) for picture in pictures],
    }
