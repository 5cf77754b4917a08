"""Classes by name: which output of a network belongs to each class of the images. Imports no torch."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s3net_common.errors import InputError, nearest_names, printable

LISTED = 5  # names that a message lists; it counts the others


@dataclass(frozen=True)
class ClassMatch:
    """Which output of a network belongs to each class of the images.

    Attributes:
        outputs: for each class of the images, the index of its output.
        names: name of each output; "output I" if it has none.
        note: a line for the user that says how the classes were matched; None if they are the network's, in its order.
        subset: whether the images lack some of the network's classes.
    """

    outputs: list[int]
    names: list[str]
    note: str | None = None
    subset: bool = False


def match_classes(classes: Sequence[str], trained: Sequence[str] | None, outputs: int, file: Path) -> ClassMatch:
    """Match the classes of the images with the outputs of a network, by name.

    Args:
        classes: classes of the images, in the order of their labels.
        trained: names of the network's classes, in the order of its outputs; None if its file names none. Folders
            named 0 to N - 1 are then the outputs of these numbers, and other folders the outputs in their order.
        outputs: number of the network's outputs. The last ones may have no name.
        file: the network's file of weights, for messages.

    Raises:
        InputError: the network has no class of such a name; the message lists these names. If the file names no
            classes: it cannot be known which output belongs to which class.
    """
    if trained is None:
        indices, note = _match_in_order(classes, outputs, file)
        names = [f"output {i}" for i in range(outputs)]
        for name, index in zip(classes, indices, strict=True):
            names[index] = name
        return ClassMatch(indices, names, note, subset=len(classes) < outputs)
    if len(trained) > outputs:
        raise InputError(f"{file} names {len(trained)} classes, but the network has {outputs} outputs")
    indices = _match_by_name(classes, trained, file)
    names = [*trained, *(f"output {i}" for i in range(len(trained), outputs))]
    absent = [name for i, name in enumerate(trained) if i not in set(indices)]
    note = None
    if absent:
        note = (
            f"the images have {len(classes)} of the network's {len(trained)} classes, matched by name "
            f"(absent: {list_names(absent)})"
        )
    elif indices != list(range(len(trained))):
        note = "the classes of the images and those of the network differ in order: they are matched by name"
    return ClassMatch(indices, names, note, subset=bool(absent))


def find_class(target: str, names: Sequence[str] | None) -> int:
    """Return the index of the class that a user asks for by its name or, if no class has this name, by its index.

    Args:
        target: a class name or an index.
        names: names of the network's classes; None if they are unknown.

    Raises:
        InputError: there is no such class (the message lists close matches), or several have this name.
    """
    indices = [i for i, name in enumerate(names or ()) if composed(name) == composed(target)]
    if len(indices) > 1:
        raise InputError(f"{len(indices)} classes are called {target!r}: give an index, {_any_of(indices)}")
    if indices:
        return indices[0]
    if _is_number(target):
        return int(target)
    if names is None:
        raise InputError(f"the network's class names are unknown: give the index of a class instead of {target!r}")
    close = nearest_names(target, names)
    hint = close if close.startswith("did you mean") else f"its classes are {list_names(names)}"
    raise InputError(f"the network has no class {target!r}: {hint}")


def list_names(names: Sequence[str]) -> str:
    """Return the first names, safe to print, and the number of the others."""
    shown = ", ".join(map(printable, names[:LISTED]))
    return shown if len(names) <= LISTED else f"{shown} and {len(names) - LISTED} more"


def _match_by_name(classes: Sequence[str], trained: Sequence[str], file: Path) -> list[int]:
    if list(classes) == list(trained):
        return list(range(len(trained)))
    known = [composed(name) for name in trained]
    index, count = {name: i for i, name in enumerate(known)}, Counter(known)
    names = [composed(name) for name in classes]
    if unknown := [name for name in classes if composed(name) not in index]:
        count_text = f" ({len(unknown)} of {len(classes)})" if len(unknown) > LISTED else ""
        raise InputError(
            f"the images have classes that the network does not have: {list_names(unknown)}{count_text}; the "
            f"{len(trained)} classes of {file} are {list_names(trained)}: name the class folders as these, or train a "
            "network on these images"
        )
    if double := next((name for name in names if count[name] > 1), None):
        raise InputError(
            f"{file} has {count[double]} classes that are called {double!r}: it cannot be evaluated by name"
        )
    return [index[name] for name in names]


def _match_in_order(classes: Sequence[str], outputs: int, file: Path) -> tuple[list[int], str]:
    if len(classes) > outputs:
        raise InputError(f"the weights in {file} are for {outputs} classes, and the images have {len(classes)}")
    if (numbers := class_numbers(classes)) is not None:
        return numbers, f"{file} names no classes: the folders 0 to {len(classes) - 1} are the outputs of these numbers"
    unclear = ""
    if len(classes) < outputs:
        unclear = f"the network has {outputs} outputs, and the images have {len(classes)} classes"
    elif all(map(_is_number, classes)):
        unclear = f"the class folders are numbers, but not 0 to {outputs - 1}"
    if unclear:
        raise InputError(
            f"{file} names no classes, and {unclear} ({list_names(classes)}): name the folders by the outputs, from 0 "
            "on, or pass --classes FILE with the class name of each output to validate_10crop.py"
        )
    order = "alphabetical order" if list(classes) == sorted(classes) else "this order"
    return list(range(outputs)), f"{file} names no classes: its outputs are taken in {order} as {list_names(classes)}"


def class_numbers(classes: Sequence[str]) -> list[int] | None:
    """Return the names of classes as numbers if they are exactly 0 to N - 1 ("007" is 7), else None."""
    numbers = [int(name) for name in classes if _is_number(name)]
    return numbers if sorted(numbers) == list(range(len(classes))) else None


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 20


def composed(name: str) -> str:
    """Return a name with composed accents (NFC). macOS decomposes them in the names of files."""
    return unicodedata.normalize("NFC", name)


def _any_of(indices: Sequence[int]) -> str:
    return f"{', '.join(map(str, indices[:-1]))} or {indices[-1]}"
