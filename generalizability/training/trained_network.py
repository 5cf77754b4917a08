"""A file of weights as a network: its name and options, its classes, and how its images are prepared.

Evaluation, ten-crop evaluation and prediction build the network of `--checkpoint` here. What the user gives has
precedence over the file's metadata, except the normalisation, which the file knows best.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import functional as transforms

from data.tiny_imagenet import IMAGE_SIZE as TINY_IMAGENET_SIZE
from recipes import RECIPES
from s3net_common.checkpoints import are_options, create_with_weights, read_metadata
from s3net_common.class_names import composed
from s3net_common.errors import InputError
from s3net_common.images import read_class_names
from s3net_networks import create_network


@dataclass(frozen=True)
class Preparation:
    """How images become the input of a network, as in its training without the random augmentation.

    Attributes:
        resize: length of the short side in pixels, to which an image is resized first.
        crop: height and width of the crop of its centre.
        image_size: height and width of the network's input, to which the crop is resized.
        mean, std: normalisation of each colour channel, for pixels in [0, 1].
    """

    resize: int
    crop: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def with_image_size(self, size: int) -> "Preparation":
        """Return this preparation for a network's input of another size, with a margin of the same proportion."""
        if self.crop != self.image_size:
            return replace(self, image_size=size)
        return replace(self, resize=round(size * self.resize / self.crop), crop=size, image_size=size)

    def pixels(self, image: Image.Image) -> Tensor:
        """Convert an RGB image to uint8 `(3, crop, crop)`."""
        if self.resize > self.crop:
            resized = transforms.resize(image, self.resize)
            return transforms.pil_to_tensor(transforms.center_crop(resized, self.crop))
        square = ImageOps.fit(image, (self.crop, self.crop), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)

    def crop_centre(self, images: Tensor) -> Tensor:
        """Crop the centre of uint8 images `(N, 3, resize, resize)`. Images of another size are returned unchanged."""
        if images.shape[-1] != self.resize or self.resize == self.crop:
            return images
        return transforms.center_crop(images, self.crop)


def dataset_preparation(dataset: str | None, image_size: int, mean: list[float], std: list[float]) -> Preparation:
    """Return how the trainer prepares the validation images of a data set."""
    resize = crop = image_size
    if dataset == "imagenet":
        resize = round(image_size * 256 / 224)
    elif dataset == "tinyimagenet":  # they are read in their own size, and enlarged batch by batch
        resize = crop = TINY_IMAGENET_SIZE
    return Preparation(resize, crop, image_size, tuple(mean), tuple(std))


@dataclass
class TrainedNetwork:
    """What is known about a file of weights.

    Attributes:
        file: the file of weights.
        name: name of the network.
        options: options of `create_network`.
        preparation: how its images are prepared.
        outputs: number of outputs; None if unknown.
        classes: class names in the order of the outputs; None if unknown.
        dataset: data set on which it was trained; None if unknown.
        notes: lines for the user about what was assumed.
    """

    file: Path
    name: str
    options: dict
    preparation: Preparation
    outputs: int | None = None
    classes: list[str] | None = None
    dataset: str | None = None
    notes: list[str] = field(default_factory=list)

    def build(self, outputs: int, report: Callable[[str], None] | None = None) -> nn.Module:
        """Build the network with this number of outputs and load its weights, on the CPU, in evaluation mode.

        Raises:
            InputError: the weights do not fit the network, or the network lacks one of the options.
        """
        try:
            create = partial(create_network, self.name, outputs, **self.options)
            return create_with_weights(create, self.file, report).eval()
        except InputError as error:
            if self.outputs is not None:
                raise
            raise InputError(
                f"{error}; {outputs} outputs were assumed: if the network has others, pass --num-classes N"
            ) from error


def read_trained_network(
    file: Path,
    name: str | None = None,
    options: dict | None = None,
    num_classes: int | None = None,
    classes: Path | None = None,
    dataset: str | None = None,
    default_name: str | None = None,
) -> TrainedNetwork:
    """Return what is known about a file of weights from its metadata and from what the user says about it.

    Args:
        file: the file of weights.
        name: name of the network.
        options: options of `create_network` that replace the file's.
        num_classes: number of outputs.
        classes: file with the class name of each output.
        dataset: data set on which the network was trained, if the file does not name it.
        default_name: name of the network, if neither `name` nor the file gives one.

    Raises:
        InputError: a file cannot be read, the network's name is unknown, or what the user says contradicts the file.
    """
    metadata = read_metadata(file)
    name = name or metadata.get("model") or default_name
    if name is None:
        raise InputError(f"{file} does not name its network: pass --model NAME")
    own_options = metadata.get("model_options", {}) if name == metadata.get("model", name) else {}
    names = metadata.get("classes") or None
    if classes is not None:
        names = _names_from_file(classes, names)
    outputs = num_classes or metadata.get("num_classes") or (len(names) if names else None)
    if names and len(names) > outputs:
        raise InputError(
            f"there are {len(names)} class names for {outputs} outputs: correct --classes or --num-classes"
        )
    notes, settings, prepared_as = [], metadata, metadata.get("dataset")
    if not {"mean", "std", "image_size"} <= metadata.keys():
        known = dataset in RECIPES and dataset != "folder"
        prepared_as = dataset if known else "cifar100" if name.endswith("_cifar") else "imagenet"
        settings = vars(RECIPES[prepared_as]) | metadata
        notes.append(
            f"{file} does not say how its images are prepared: as for {prepared_as}, {settings['image_size']} pixels"
        )
    return TrainedNetwork(
        file=file,
        name=name,
        options=own_options | (options or {}),
        preparation=dataset_preparation(prepared_as, settings["image_size"], settings["mean"], settings["std"]),
        outputs=outputs,
        classes=names,
        dataset=metadata.get("dataset") or dataset,
        notes=notes,
    )


def read_options(text: str | None) -> dict:
    """Parse the value of --model-options.

    Raises:
        InputError: it is not a JSON object of options.
    """
    try:
        if are_options(options := json.loads(text or "{}")):
            return options
    except (ValueError, RecursionError):
        pass
    raise InputError(f"--model-options {text} is no JSON object of options: write '{{\"growth_rate\": 24}}'")


def file_label(checkpoint: Path) -> str:
    """Return `<folder>-<file>` of a file of weights, for names of outputs. The folder names the run."""
    name = checkpoint.name.removesuffix(".tar").rsplit(".", 1)[0]
    return f"{checkpoint.resolve().parent.name}-{name}"


def _names_from_file(file: Path, trained: list[str] | None) -> list[str]:
    """Return the names of a file of --classes, which must be those of the checkpoint if it has names."""
    names = read_class_names(file)
    for output, (trained_name, name) in enumerate(zip_longest(trained or names, names)):
        if None in (trained_name, name) or composed(trained_name) != name:
            in_checkpoint, in_file = ("missing" if text is None else repr(text) for text in (trained_name, name))
            raise InputError(
                f"{file} does not fit this checkpoint: output {output} is {in_checkpoint} in the checkpoint and "
                f"{in_file} in the file"
            )
    return names
