"""Code that the scripts share: flags for networks and images, FullGrad maps of images, and their faithfulness."""

import functools
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from explained_networks import PAPER_NETWORKS, Network, load_network
from faithfulness import area, deletion_curve, insertion_curve
from full_grad import FullGrad, IncompleteWarning
from map_scores import bootstrap, centred_gaussian, edge_map, interval, mask_map, random_map
from network_flags import NetworkArgs
from pictures import Picture, read_pictures, sample_crops, sample_pictures
from s3net_common.checkpoints import file_label, read_metadata, read_options
from s3net_common.errors import InputError
from s3net_common.framing import Preparation, usual_preparation
from s3net_common.images import find_images, limit_pixels
from s3net_common.progress import ProgressBar

DEFAULT_NETWORK = "s3net_cifar"  # its trained weights are in the repository
MOST_PROBABLE = 3  # classes listed for each image
Maps = dict[str, list[np.ndarray]]  # of each method by name: a map `(H, W)` of each picture


@dataclass
class PictureExplanation:
    """One network's explanation of one picture.

    Attributes:
        saliency: `(H, W)` float32.
        target: index of the explained class.
        probability: the network's probability of `target`.
        prediction: index of the most probable class.
        completeness_error: `FullGrad.completeness_error` of the picture.
        drawn: share of the sum of the absolute terms that the map shows, 0 to 1; the rest has no place in the image.
        seconds: computing time of the picture's batch divided by the number of its pictures.
        most_probable: the first `MOST_PROBABLE` classes by probability, with their probabilities.
    """

    saliency: np.ndarray
    target: int
    probability: float
    prediction: int
    completeness_error: float
    drawn: float
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
    networks, options = [], read_options(args.model_options)
    for label, name, checkpoint in chosen_networks(args):
        network = load_network(name, checkpoint, args.num_classes, args.random_weights, options)
        network.name = label or network.name
        if args.image_size is not None or checkpoint:  # a file may give any size, too
            check_image_size(network, network.preparation.image_size if args.image_size is None else args.image_size)
        if args.image_size is not None:
            network.preparation = network.preparation.with_image_size(args.image_size)
        if args.squash:
            network.preparation = network.preparation.squashed()
        network.target_index(args.target)  # an unknown name is reported before anything is computed
        network.model.to(device)
        networks.append(network)
    return networks


def chosen_networks(args: NetworkArgs) -> list[tuple[str | None, str, Path | None]]:
    """Return the networks of the command line: label, name and checkpoint (None: published weights) of each.

    The label is None for the only network of its name; several files of one network are labelled by their folders and
    names.
    """
    if args.random_weights and args.checkpoint:
        raise InputError("--random-weights loads no weights: leave out --checkpoint, or leave out --random-weights")
    files: dict[str, list[Path]] = {name: [] for name in args.networks}
    for text in args.checkpoint:
        name, equals, file = text.partition("=")
        if not equals or Path(text).is_file():  # no NAME=, or the equals sign is part of the path
            file = text
            name = args.networks[0] if len(args.networks) == 1 else read_metadata(file).get("model")
            if name is None:
                raise InputError(f"{file} does not name its network: pass --checkpoint NAME={file}")
        if args.networks and name not in args.networks:
            names = ", ".join(args.networks)
            raise InputError(f"--checkpoint {text}: {name} is none of --networks {names}: add it, or leave them out")
        files.setdefault(name, []).append(Path(file))
    if not files:
        files = {name: [] for name in (PAPER_NETWORKS if args.images else [DEFAULT_NETWORK])}
    chosen: list[tuple[str | None, str, Path | None]] = []
    for name, checkpoints in files.items():
        labels = [file_label(file) for file in checkpoints] if len(checkpoints) > 1 else [None]
        if len({*labels}) < len(labels):
            raise InputError(f"--checkpoint: two files are called {max(labels, key=labels.count)}: rename a folder")
        chosen += [(label, name, file) for label, file in zip(labels, checkpoints or [None], strict=True)]
    return chosen


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
            f"{network.name} cannot take images of {size}x{size}: pass another --image-size, or leave it out"
        ) from error


def picture_reader(args: NetworkArgs, masks: Path | None = None) -> Callable[[Preparation], list[Picture]]:
    """Return a function that reads the pictures of the command line as a network with a given preparation sees them.

    Without images on the command line it returns scikit-learn's photographs, or crops of them for the default network.
    Each way of framing is read once. The usual one is read at once: if a picture cannot be used, no network need be
    downloaded.

    Raises (the returned function, too):
        InputError: as `find_images` and `read_pictures`.
    """
    limit_pixels(args.max_pixels)
    files = find_images(args.images)
    default_network = not args.networks and not args.checkpoint

    @functools.cache
    def read_framed(preparation: Preparation) -> list[Picture]:
        if files:
            return read_pictures(files, preparation, masks, args.skip_unreadable)
        return sample_crops(preparation) if default_network else sample_pictures(preparation)

    def read(preparation: Preparation) -> list[Picture]:
        return read_framed(replace(preparation, mean=(), std=()))  # they do not matter for the framing

    if files:
        usual = usual_preparation("imagenet").with_image_size(max(1, args.image_size or 224))
        read(usual.squashed() if args.squash else usual)
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
        images = network_input(network, pictures[start : start + batch_size], device)
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
        drawn = result.drawn[:, 0].tolist()
        ranked = probabilities.topk(min(MOST_PROBABLE, probabilities.shape[1]))
        for i, target_class in enumerate(classes.tolist()):
            most_probable = list(zip(ranked.indices[i].tolist(), ranked.values[i].tolist(), strict=True))
            probability, prediction = probabilities[i, target_class].item(), most_probable[0][0]
            numbers = (target_class, probability, prediction, errors[i], drawn[i], seconds)
            explanations.append(PictureExplanation(maps[i], *numbers, most_probable))
        progress(len(images))
    return explanations


def network_input(network: Network, pictures: Sequence[Picture], device: torch.device) -> Tensor:
    """Return the normalised images `(N, 3, H, W)` of pictures that were read with the network's preparation."""
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).permute(0, 3, 1, 2)
    return network.preparation.normalization(device)(pixels.to(device))


def measure_faithfulness(
    network: Network, pictures: Sequence[Picture], targets: Sequence[int], methods: Maps, device: torch.device
) -> dict[str, dict]:
    """Measure insertion and deletion of each method's maps.

    Args:
        network: the network, on the device.
        pictures: the images.
        targets: the class of each, whose probability is measured.
        methods: the maps of each method, by name.
        device: the device to compute on.

    Returns:
        For each method, by name: `insertion` and `deletion`, the mean curves over the pictures; `insertion_area` and
        `deletion_area`, the mean area under the curves; `insertion_interval` and `deletion_interval`, the 95% interval
        of this mean from a bootstrap over the pictures.
    """
    images = network_input(network, pictures, device)
    target = torch.tensor(targets, device=device)
    results = {}
    for method, maps in ProgressBar(methods.items(), desc="insertion and deletion", unit="method", leave=False):
        stacked = torch.from_numpy(np.stack(maps)).to(device, images.dtype)[:, None]
        results[method] = {}
        for kind, measure in (("insertion", insertion_curve), ("deletion", deletion_curve)):
            curves = measure(network.model, images, stacked, target)
            results[method][kind] = curves.mean(0).tolist()
            areas = area(curves)
            results[method][f"{kind}_area"] = float(areas.mean())
            results[method][f"{kind}_interval"] = interval(bootstrap(areas[None]))
    return results


def baseline_maps(pictures: Sequence[Picture]) -> Maps:
    """Return the maps that any method must beat, by name: a centred Gaussian, and the edges of each image."""
    return {
        "centred Gaussian": [centred_gaussian(len(picture.pixels)) for picture in pictures],
        "edge map": [edge_map(picture.pixels) for picture in pictures],
    }


def rival_maps(
    network: Network, pictures: Sequence[Picture], targets: Sequence[int], batch_size: int, device: torch.device
) -> Maps:
    """Return the maps of the other gradient methods (`rival_maps.RIVALS`), of chance, and of the true masks, by name.

    Arguments are as in `measure_faithfulness`; `batch_size` is the number of images in one pass.
    """
    from rival_maps import RIVALS, rival_map  # captum takes seconds to import

    images, target = network_input(network, pictures, device), torch.tensor(targets, device=device)
    maps: Maps = {method: [] for method in RIVALS}
    batches = list(zip(images.split(batch_size), target.split(batch_size), strict=True))
    with ProgressBar(total=len(RIVALS) * len(batches), desc="other methods", unit="batch", leave=False) as bar:
        for method in RIVALS:
            for batch, classes in batches:
                maps[method] += [*rival_map(method, network.model, batch, classes).cpu().numpy()]
                bar.update()
    maps["random map"] = [random_map(len(picture.pixels), seed) for seed, picture in enumerate(pictures)]
    maps["true mask"] = [mask_map(picture.mask, seed) for seed, picture in enumerate(pictures)]
    return maps
