"""Find the training images and the validation images in a data folder, however much of the usual layout it has."""

import os
from pathlib import Path

from data.image_sets import find_split
from s3net_common.errors import InputError
from s3net_common.images import IMAGE_SUFFIXES

SPLITS = ("train", "val")
HALVES = {"train": ("train",), "val": ("val", "test")}  # names of their folders, the preferred one first
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def find_halves(data_dir: Path, splits: tuple[str, ...], lmdb: bool = False) -> list[Path]:
    """Return the path of each half: a folder of class folders or, with `lmdb`, an LMDB file if there is one.

    Args:
        data_dir: the data folder.
        splits: "train" and "val", or one of them. If it is "train" alone, its images are going to be split, and the
            folder may consist of class folders instead.
        lmdb: whether `<split>.lmdb` is taken, too.

    Raises:
        InputError: a half is missing; the message says what to do.
    """
    paths = {split: _find_half(data_dir, names, lmdb) for split, names in HALVES.items()}
    if splits == ("train",) and not any(paths.values()):
        return [_class_root(data_dir, lmdb)]
    if missing := next((split for split in splits if paths[split] is None), None):
        raise InputError(_missing_half(data_dir, missing, splits, paths, lmdb))
    return [paths[split] for split in splits]


def _find_half(data_dir: Path, names: tuple[str, ...], lmdb: bool) -> Path | None:
    """Return the path of a half, or None. Among class folders, a folder without subfolders is a class like them."""
    beside_classes = any(name.lower() not in SPLIT_NAMES for name in _folder_names(data_dir))
    for name in names:
        path = find_split(data_dir, name) if lmdb else data_dir / name
        if path is not None and path.exists() and not (beside_classes and _is_class(path)):
            return path
    return None


def _is_class(folder: Path) -> bool:
    """Return whether a folder holds images and no folders."""
    entries = list(os.scandir(folder)) if folder.is_dir() else []
    has_images = any(Path(entry.name).suffix.lower() in IMAGE_SUFFIXES for entry in entries)
    return has_images and not any(entry.is_dir() and not entry.name.startswith(".") for entry in entries)


def _class_root(data_dir: Path, lmdb: bool) -> Path:
    """Return `data_dir` if it consists of class folders.

    Raises:
        InputError: it does not.
    """
    names = _folder_names(data_dir)
    if not names:
        raise InputError(_no_images(data_dir, lmdb))
    if split_names := _split_names(data_dir, names):
        raise InputError(
            f"{data_dir} has {split_names[0]}/, which is no class: name the folder of the training images train/, and "
            "that of the validation images val/ or test/"
        )
    if len(names) == 1:
        raise InputError(
            f"{data_dir} has only one class folder, {names[0]}/: if that folder contains the classes, pass --data-dir "
            f"{data_dir / names[0]}"
        )
    return data_dir


def _split_names(data_dir: Path, names: list[str]) -> list[str]:
    return [name for name in names if name.lower() in SPLIT_NAMES and not _is_class(data_dir / name)]


def _folder_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _missing_half(
    data_dir: Path, missing: str, splits: tuple[str, ...], paths: dict[str, Path | None], lmdb: bool
) -> str:
    """Return the error message for a data folder without the half `missing`."""
    if "train" not in splits:
        return (
            f"{data_dir} has no val/<class>/* (or test/<class>/*) to evaluate: pass --data-dir, or the --hold-out of "
            "the training to evaluate the images that it held out"
        )
    hold_out = "pass --hold-out 0.1 to validate on a tenth of each class"
    if missing == "val":
        return f"{_no_images(data_dir, lmdb, 'val')}; or {hold_out}"
    names = _folder_names(data_dir)
    if len(names) > 1 and not any(paths.values()) and not _split_names(data_dir, names):
        return f"{data_dir} has class folders, but no train/ and val/: {hold_out}, or another --data-dir"
    return _no_images(data_dir, lmdb)


def _no_images(data_dir: Path, lmdb: bool, split: str = "train") -> str:
    if lmdb:
        return (
            f"{data_dir} has neither {split}.lmdb nor {split}/<class>/*: make the first with folder2lmdb.py, or pass "
            "--data-dir"
        )
    if split == "val":
        return f"{data_dir} has no validation images: it needs val/<class>/* or test/<class>/*; pass --data-dir"
    return f"{data_dir} has no images: it needs train/<class>/* and val/<class>/* (or test/<class>/*); pass --data-dir"
