"""Reads the tensors and the metadata in a file of weights, without running code from it.

The format is recognised by the file's content, not by its name: safetensors, or PyTorch's zip archive or pickle. The
error for any other file says what it is.
"""

import argparse
import mmap
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from s3net_common.errors import InputError, first_line, shown
from s3net_common.pickle_check import check_storages

UNPACK, AGAIN = "unpack it, and give the file of weights in it", "get it again"
# Offset, first bytes, description, and what to do.
_KNOWN_FILES = [
    (0, b"version https://git-lfs", "a git-lfs pointer", "fetch the file itself with git lfs pull"),
    (0, b"\x1f\x8b", "a gzip archive", UNPACK),
    (0, b"BZh", "a bzip2 archive", UNPACK),
    (0, b"\xfd7zXZ", "an xz archive", UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"\x89HDF", "an HDF5 file", "save the weights with PyTorch"),
    (0, b"\x93NUMPY", "a NumPy array", "save a dict of tensors by name"),
    (0, b"\x89PNG", "a PNG image", "give the file of weights"),
    (0, b"\xff\xd8\xff", "a JPEG image", "give the file of weights"),
    (0, b"%PDF", "a PDF document", "give the file of weights"),
]


def existing_file(path: str | Path) -> Path:
    """Return the path of an existing file.

    Raises:
        InputError: `path` is no path, does not exist, is a folder, or cannot be read.
    """
    try:
        path = Path(path)
        if path.is_dir():
            raise InputError(f"{path} is a folder: give the file of weights in it")
        if path.is_file():
            return path
        exists = path.exists()
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{shown(path)} is no path of a file") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    raise InputError(f"{path} is no regular file" if exists else f"there is no checkpoint {path}")


def is_safetensors(path: Path) -> bool:
    """Whether a file is a safetensors file (True) or a PyTorch checkpoint (False), by its first bytes.

    Raises:
        InputError: it is neither; the message says what it is.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    if int.from_bytes(head[:8], "little") > 1 and head[8:9] == b"{":
        return True
    if head.startswith(b"PK"):
        if problem := _zip_problem(path):
            raise damaged(path, *problem)
        return False
    if head.startswith(b"\x80"):
        return False
    raise damaged(path, *_what_it_is(head))


def _what_it_is(head: bytes) -> tuple[str, str]:
    """Return a description of a file that begins with these bytes, and what to do."""
    if not head:
        return "it is empty", AGAIN
    for offset, magic, description, advice in _KNOWN_FILES:
        if head[offset:].startswith(magic):
            return f"it is {description}", advice
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head)", head, re.IGNORECASE):
        return "it is an HTML page", "download the file itself, not the page that links to it"
    text = head.decode("utf-8-sig", errors="ignore").strip()  # the last character may be cut
    if text and len(text.encode()) > len(head.strip()) - 7 and all(c.isprintable() or c.isspace() for c in text):
        return f"it is a text file that begins with {text.splitlines()[0][:40]!r}", "give the file of weights"
    return "its first bytes are those of no known format", AGAIN


def _zip_problem(path: Path) -> tuple[str, str] | None:
    """Return what is wrong with a zip archive, and what to do; None if `torch.save` may have written it."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # zipfile raises many kinds for damaged archives
        return "it is a truncated or damaged zip archive", AGAIN
    names = {entry.filename for entry in entries}
    if any(name.endswith("/constants.pkl") for name in names):
        return "it is a TorchScript program", "save the network's state_dict() instead"
    if not any(name.endswith("/data.pkl") for name in names):
        return "it is a zip archive without a PyTorch checkpoint", UNPACK
    if len(names) < len(entries) or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "it is a zip archive that torch.save did not write", "save the state dict with torch.save"
    return None


def damaged(path: Path, reason: str, advice: str = AGAIN) -> InputError:
    """Return the error for a file that is damaged or no file of weights."""
    kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
    return InputError(f"{path} is damaged or no {kind} ({reason}): {advice}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return load_file(path)
    except Exception as error:  # the library raises many kinds for damaged files
        raise damaged(path, first_line(error)) from error


def read_header(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, as stored: strings by name.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except Exception as error:
        raise damaged(path, first_line(error)) from error


def read_pickle(path: str | Path) -> object:
    """Return the content of a `torch.save` file, on the CPU.

    Only tensors, containers, numbers, strings and `argparse.Namespace` are loaded. No code from the file is run, and
    no more memory is allocated than the file is large.

    Raises:
        InputError: the file is missing, damaged, no checkpoint, or would run code when loaded.
    """
    path = existing_file(path)
    if is_safetensors(path):
        raise damaged(path, "it is a safetensors file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return _load_zip(path) if zipfile.is_zipfile(path) else _load_plain(path)
    except InputError as error:
        raise InputError(f"{path} holds {error}") from error
    except pickle.UnpicklingError as error:
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path} was not loaded: it would run code on loading ({forbidden[1]}); save a plain state dict instead"
            ) from error
        raise damaged(path, "its pickle cannot be read") from error
    except Exception as error:  # torch.load raises nearly every kind for damaged files
        raise damaged(path, first_line(error)) from error


def _load_zip(path: Path) -> object:
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        (name,) = (name for name in sizes if name.endswith("/data.pkl"))
        folder = name.removesuffix("data.pkl") + "data/"
        records = {key.removeprefix(folder): size for key, size in sizes.items() if key.startswith(folder)}
        check_storages(archive.read(name), records)
    with path.open("rb") as file:  # given the path, torch.load would choose the format by its suffix
        return torch.load(file, map_location="cpu", weights_only=True)


def _load_plain(path: Path) -> object:
    """Load the format before PyTorch 1.6: several pickles, then the tensors' bytes.

    A mapped file is read, because `read(n)` then allocates no more than is left, whatever n is.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(5):  # magic number, version, system, the object, and the keys of its storages
            check_storages(content, len(content))
        content.seek(0)
        return torch.load(content, map_location="cpu", weights_only=True)
