"""A file of weights as a network: its name and options, its classes, and how its images are prepared.

Evaluation, ten-crop evaluation and prediction build the network of `--checkpoint` here. What the user gives has
precedence over the file's metadata, except the normalisation, which the file knows best.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path

from torch import nn

from recipes import RECIPES
from s3net_common.checkpoints import create_with_weights, read_metadata
from s3net_common.class_names import composed
from s3net_common.errors import InputError
from s3net_common.framing import Preparation, dataset_preparation, stored_preparation, usual_dataset
from s3net_common.images import read_class_names
from s3net_networks import create_network


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
    notes, preparation = [], stored_preparation(metadata)
    if preparation is None:
        known = dataset in RECIPES and dataset != "folder"
        prepared_as = dataset if known else usual_dataset(name)
        settings = vars(RECIPES[prepared_as]) | metadata
        preparation = dataset_preparation(prepared_as, settings["image_size"], settings["mean"], settings["std"])
        notes.append(
            f"{file} does not say how its images are prepared: as for {prepared_as}, {settings['image_size']} pixels"
        )
    return TrainedNetwork(
        file=file,
        name=name,
        options=own_options | (options or {}),
        preparation=preparation,
        outputs=outputs,
        classes=names,
        dataset=metadata.get("dataset") or dataset,
        notes=notes,
    )


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
