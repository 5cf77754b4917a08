"""Find the training images and the validation images in a data folder, however much of the usual layout it has."""

from pathlib import Path

from s3net_common.errors import InputError
from s3net_common.images import IMAGE_SUFFIXES, class_folders
from s3net_common.unused_files import Skipped

SPLITS = ("train", "val")
# Names of their folders in any case, the preferred one first.
HALVES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "test", "testing"),
}
SPLIT_NAMES = {*HALVES["train"], *HALVES["val"]}


def find_halves(data_dir: Path, splits: tuple[str, ...], lmdb: bool = False) -> list[Path]:
    """Return the path of each half: a folder of class folders or, with `lmdb`, an LMDB file if there is one.

    Prints which other folders are beside them.

    Args:
        data_dir: the data folder.
        splits: "train" and "val", or one of them. If it is "train" alone, its images are going to be split, and the
            folder may consist of class folders instead.
        lmdb: whether `<split>.lmdb` is taken, too.

    Raises:
        InputError: a half is missing; the message says what to do.
    """
    paths = {split: find_half(data_dir, split, lmdb) for split in SPLITS}
    if splits == ("train",) and not any(paths.values()):
        return [_class_root(data_dir, lmdb)]
    if missing := next((split for split in splits if paths[split] is None), None):
        raise InputError(_missing_half(data_dir, missing, splits, paths, lmdb))
    val = paths["val"]
    if splits == SPLITS and val.is_dir() and not class_folders(val):
        raise InputError(
            f"{val} has no class folders: put the images into {val}/<class>/, or pass --hold-out 0.1 to validate on a "
            "tenth of each class of the training images"
        )
    skipped = Skipped(data_dir)
    for name, path in class_folders(data_dir).items():
        if name.lower() not in SPLIT_NAMES:
            skipped.add("folders beside those of the splits", path)
    skipped.report()
    return [paths[split] for split in splits]


def find_half(data_dir: Path, split: str, lmdb: bool = False) -> Path | None:
    """Return the path of a half in a data folder, or None. For `lmdb` see `find_halves`.

    Among class folders, a folder without subfolders is a class like them, whatever its name. Of several folders for a
    half, one with class folders is preferred.
    """
    if not data_dir.is_dir():
        return None
    folders = class_folders(data_dir)
    beside_classes = any(name.lower() not in SPLIT_NAMES for name in folders)
    without_classes = None
    for half in HALVES[split]:
        if lmdb and (file := data_dir / f"{half}.lmdb").is_file():
            return file
        for path in (path for name, path in folders.items() if name.lower() == half):
            if class_folders(path):
                return path
            if not (beside_classes and _has_images(path)):
                without_classes = without_classes or path
    return without_classes


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())


def _class_root(data_dir: Path, lmdb: bool) -> Path:
    """Return `data_dir` if it consists of class folders.

    Raises:
        InputError: it does not.
    """
    folders = list(class_folders(data_dir).values()) if data_dir.is_dir() else []
    if not folders:
        raise InputError(_no_images(data_dir, lmdb))
    if len(folders) == 1:
        raise InputError(
            f"{data_dir} has only one class folder, {folders[0].name}/: if that folder contains the classes, pass "
            f"--data-dir {folders[0]}"
        )
    return data_dir


def _missing_half(
    data_dir: Path, missing: str, splits: tuple[str, ...], paths: dict[str, Path | None], lmdb: bool
) -> str:
    """Return the error message for a data folder without the half `missing`."""
    inner = list(class_folders(data_dir).values()) if data_dir.is_dir() else []
    if len(inner) == 1 and not any(paths.values()) and find_half(inner[0], missing, lmdb):
        return f"{data_dir} has no images itself: pass --data-dir {inner[0]}"
    if "train" not in splits:
        return (
            f"{data_dir} has no val/<class>/* (or test/<class>/*) to evaluate: pass --data-dir, or the --hold-out of "
            "the training to evaluate the images that it held out"
        )
    hold_out = "pass --hold-out 0.1 to validate on a tenth of each class"
    if missing == "val":
        return f"{_no_images(data_dir, lmdb, 'val')}; or {hold_out}"
    if len(inner) > 1 and not any(paths.values()):
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
