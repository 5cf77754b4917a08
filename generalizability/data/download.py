"""Downloads and unpacking that several processes may attempt at once, also on nodes that share a disk."""

import contextlib
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from torchvision.datasets.utils import check_integrity, download_url

from s3net_common.errors import InputError
from s3net_common.output_files import lock_exclusively


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process at a time fill a folder. The next one must look again whether something is missing.

    On a file system without locks, all processes fill it at once; each renames its own complete files.

    Raises:
        InputError: the folder cannot be written.
    """
    lock = folder / ".download.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): pass another --data-dir") from error
    with file:
        if not lock_exclusively(file.fileno()):
            print(f"waiting for another process, which downloads or unpacks into {folder}", flush=True)
            lock_exclusively(file.fileno(), math.inf)
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):  # Windows removes no open file
                lock.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return a hidden path beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")


def download(url: str, path: Path, md5: str) -> None:
    """Download a file, with a progress bar. It appears at `path` once it is complete and its checksum is right.

    Raises:
        InputError: the checksum is wrong.
        OSError, RuntimeError: the download failed.
    """
    temporary = temporary_name(path)
    try:
        download_url(url, str(temporary.parent), temporary.name)
        if not check_integrity(str(temporary), md5):
            raise InputError(
                f"the checksum of what {url} sent is wrong: try again later, or get the file in another way"
            )
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # also after Ctrl-C
            temporary.unlink()


def unpack(extract: Callable[[Path], object], name: str, folder: Path) -> None:
    """Unpack an archive. `folder` appears once it is complete.

    Args:
        extract: unpacks the archive into the folder that it gets.
        name: of the archive's top folder.
        folder: the result.

    Raises:
        Exception: of `extract`.
        OSError: the result cannot be renamed.
    """
    temporary = temporary_name(folder)
    try:
        extract(temporary)
        if not folder.exists():  # another process may have been quicker, on a file system without locks
            (temporary / name).replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
