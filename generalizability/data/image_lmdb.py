"""An image folder as one LMDB file: the format, how it is written, and `ImageFolderLMDB`, which reads it.

Format "image-folder-lmdb", version 1. The file is an LMDB environment (no subdirectory, no lock file) with:

- In the main database the key `info`, a JSON object: `format`, `version`, and the fields of `Contents`.
- In the database `images` a record an image. Its key is the image's index, 8 bytes, big-endian. Its value is

      offset  size  content
      0       4     label, unsigned, little-endian: an index into the info's `classes`
      4       2     n, the size of the name, unsigned, little-endian
      6       n     the image file's name, relative to the image folder, in UTF-8, as in "n01440764/n01440764_18.JPEG"
      6 + n   ...   the image file's bytes, untouched

Images lie in the order of their classes, and within a class in the order of their names. So `counts`, the number of
images of each class, says all labels; nothing that a reader holds in memory grows with the number of images.

The digest is over all records r_0, r_1, ... (the values above): d_0 = sha256(sha256(r_0)), d_i = sha256(d_{i-1} +
sha256(r_i)). The same images give the same bytes of the file, with the same version of LMDB and the same page size:
see `append_records`.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from weakref import WeakValueDictionary

import lmdb
import numpy as np
from torch.utils.data import Dataset

from s3net_common.errors import InputError
from s3net_common.images import decode
from s3net_common.output_files import rename_durably

FORMAT, VERSION = "image-folder-lmdb", 1
KEY = struct.Struct(">Q")
HEADER = struct.Struct("<IH")
INFO, IMAGES = b"info", b"images"


@dataclass
class Contents:
    """What a file holds, finished or not.

    Attributes:
        classes: the classes' names, in the order of their labels.
        counts: the number of images of each class.
        skipped: the names of the images that were left out, since they cannot be decoded.
        digest: the digest of the records, in hexadecimal; empty where there are none.
        listing: the digest of the names and sizes of all files that were taken or skipped so far.
        complete: whether the file is finished.
    """

    classes: list[str]
    counts: list[int]
    skipped: list[str] = field(default_factory=list)
    digest: str = ""
    listing: str = ""
    complete: bool = False

    def __len__(self) -> int:
        """The number of images."""
        return sum(self.counts)


def chain(digest: str, item: bytes) -> str:
    """The next of a series of digests, in hexadecimal; unlike one running SHA-256, it can be gone on with later."""
    return hashlib.sha256(bytes.fromhex(digest) + item).hexdigest()


# ---- Records ------------------------------------------------------------------------------------------------------


def make_record(name: str, label: int, encoded: bytes) -> bytes:
    """An image's record: the bytes `encoded` of its file, its label, and its name relative to the image folder."""
    name_bytes = os.fsencode(name)
    return b"".join((HEADER.pack(label, len(name_bytes)), name_bytes, encoded))


def split_record(record: memoryview) -> tuple[str, int, memoryview]:
    """A record's name, label and image bytes; the inverse of `make_record`."""
    label, name_size = HEADER.unpack_from(record)
    start = HEADER.size + name_size
    return os.fsdecode(bytes(record[HEADER.size : start])), label, record[start:]


# ---- Writing ------------------------------------------------------------------------------------------------------


def append_records(path: Path, records: Sequence[bytes], contents: Contents) -> None:
    """Append records to an unfinished file, and note its contents, in one transaction.

    The environment is opened anew for each transaction. What a transaction writes then depends on the file and on
    its records alone, not on pages that are left in memory from the one before: if it is cut off and repeated, the
    file gets the same bytes.

    Args:
        path: the file; it is created if it is not there.
        records: from `make_record`, in the order of their classes.
        contents: what the file holds with these records.

    Raises:
        lmdb.Error: the file cannot be written; it is as it was before.
    """
    info = json.dumps({"format": FORMAT, "version": VERSION, **asdict(contents)}).encode()
    first = len(contents) - len(records)
    with lmdb.open(str(path), subdir=False, lock=False, max_dbs=1, mode=0o666) as environment:
        page = environment.stat()["psize"]
        needed = sum(map(len, records)) + len(info) + (2 * len(records) + 64) * page  # at most: each starts a page
        environment.set_mapsize(used_bytes(environment) + -(-needed // page) * page)
        with environment.begin(write=True) as transaction:
            images = environment.open_db(IMAGES, txn=transaction)
            for index, record in enumerate(records, first):
                transaction.put(KEY.pack(index), record, db=images, append=True)
            transaction.put(INFO, info)


def reopen_unfinished(path: Path) -> Contents | None:
    """What an unfinished file holds, and remove what a transaction that was cut off has left at its end.

    Returns:
        None where the file is missing, or no transaction was finished.

    Raises:
        InputError: it is damaged or no file of this format and version.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None
    with _open_readonly(path) as environment:
        contents = _read_contents(environment, path) if environment.stat()["entries"] else None
        used = used_bytes(environment)
    os.truncate(path, used)
    return contents


def finish(path: Path, target: Path) -> None:
    """Move a complete file to its final name, once it is on the disk."""
    with _open_readonly(path) as environment:
        used = used_bytes(environment)
    os.truncate(path, used)
    rename_durably(path, target)


# ---- Opening ------------------------------------------------------------------------------------------------------


def used_bytes(environment: lmdb.Environment) -> int:
    """The size of the part of the file that is in use: it ends with the last page that the header knows of."""
    return (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]


def _open_readonly(path: Path) -> lmdb.Environment:
    """The environment of a file that has all its pages (touching one that is missing would end the process).

    Readahead stays on: py-lmdb touches each page of a record, and without readahead each is a disk request of 4 KiB,
    27 for a 110 kB image that is not in the page cache; with Linux's usual readahead of 128 KiB it is two or three.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, not an LMDB file")
    try:
        environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, max_dbs=1)
    except lmdb.Error as error:
        if not os.access(path, os.R_OK):
            raise InputError(f"{path} cannot be read: you have no permission") from error
        raise InputError(f"{path} is not an LMDB file, or its beginning is damaged") from error
    used, size = used_bytes(environment), path.stat().st_size
    if size < used:
        environment.close()
        raise InputError(f"{path} is truncated: it has {size:,} of {used:,} bytes; copy it again, or build it again")
    return environment


def _read_contents(environment: lmdb.Environment, path: Path) -> Contents:
    other = InputError(f"{path} was not written by folder2lmdb.py: build it from the images with that script")
    try:
        with environment.begin() as transaction:
            info = json.loads(transaction.get(INFO, b"null"))
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            raise other
        if info.get("version") != VERSION:
            raise InputError(
                f"{path} has version {info.get('version')} of its format and this program reads version {VERSION}: "
                "build it again with folder2lmdb.py"
            )
        contents = Contents(**{name.name: info[name.name] for name in fields(Contents)})
        if len(contents.classes) != len(contents.counts) or min(contents.counts) < 0:
            raise other
        return contents
    except (lmdb.Error, ValueError, KeyError, TypeError) as error:
        raise error if isinstance(error, InputError) else other from error


class _OpenFile:
    """A file's environment in this process. LMDB wants one a process, so all that read the file here share it."""

    def __init__(self, path: Path) -> None:
        self.process = os.getpid()
        self.environment = _open_readonly(path)
        try:
            self.contents = _read_contents(self.environment, path)
            if not self.contents.complete:
                raise InputError(f"{path} is not finished: run folder2lmdb.py again as before, it will go on")
            self.images = self.environment.open_db(IMAGES, create=False)
        except InputError:
            self.environment.close()
            raise


_open_files: WeakValueDictionary[tuple[int, int], _OpenFile] = WeakValueDictionary()  # by device and inode


def _open_here(path: Path) -> _OpenFile:
    for identity, file in list(_open_files.items()):
        if file.process != os.getpid():  # inherited through a fork: not to be used here
            file.environment.close()
            del _open_files[identity]
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be opened ({error.strerror}): build it with folder2lmdb.py") from error
    identity = (status.st_dev, status.st_ino)
    file = _open_files.get(identity)
    if file is None:
        file = _open_files[identity] = _OpenFile(path)
    return file


# ---- Reading ------------------------------------------------------------------------------------------------------


class ImageFolderLMDB(Dataset):
    """The images of a file that `folder2lmdb.py` has written, as a data set for PyTorch's DataLoader.

    Item `i` is `(image, label)`: the image as an RGB `PIL.Image`, or what `transform` makes of it, and the label as
    an int. Each process that reads opens the file itself, whether it was forked or spawned.

    Args:
        path: the file.
        transform: what to do with each RGB image.

    Attributes:
        classes: the classes' names, in the order of their labels.
        class_to_idx: class name -> label.
        skipped: the names of the image files that were left out in building.
        digest: the digest of all records, in hexadecimal.

    Raises:
        InputError: the file is missing, truncated, unfinished, of another version, or written by something else.
    """

    def __init__(self, path: Path | str, transform: Callable | None = None) -> None:
        self.path, self.transform = Path(path), transform
        self._file: _OpenFile | None = _open_here(self.path)
        contents = self._file.contents
        self.classes, self.skipped, self.digest = contents.classes, contents.skipped, contents.digest
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self._counts, self._length = contents.counts, len(contents)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[object, int]:
        encoded, label = self.encoded(index)
        try:
            image = decode(encoded)
        except InputError as error:
            raise InputError(f"{self.name(index)} in {self.path} cannot be decoded: {error}") from error
        return (image if self.transform is None else self.transform(image)), label

    @property
    def labels(self) -> np.ndarray:
        """The labels of all images, int64 `(N,)`, made when asked for."""
        return np.repeat(np.arange(len(self._counts)), self._counts)

    def encoded(self, index: int) -> tuple[bytes, int]:
        """An image file's bytes, copied once from the page cache, and its label."""
        with self._record(index) as record:
            _, label, image = split_record(record)
            return bytes(image), label

    def name(self, index: int) -> str:
        """The name of an image's file, relative to the folder that the file was built from."""
        with self._record(index) as record:
            return split_record(record)[0]

    def record(self, index: int) -> bytes:
        """A whole record, as the format has it."""
        with self._record(index) as record:
            return bytes(record)

    @contextmanager
    def _record(self, index: int) -> Iterator[memoryview]:
        """A record in the memory map; it must not be used after the context.

        Raises:
            InputError: it is damaged, as far as can be seen without decoding its image; or the file was replaced.
        """
        position = range(self._length)[index]  # negative as in a list; raises IndexError
        if self._file is None or self._file.process != os.getpid():
            self._file = _open_here(self.path)
            if self._file.contents.digest != self.digest:
                raise InputError(f"{self.path} was replaced by another file while it was in use: start again")
        with self._file.environment.begin(db=self._file.images, buffers=True) as transaction:
            try:
                record = transaction.get(KEY.pack(position), b"")
            except lmdb.Error:
                record = b""
            label, name_size = HEADER.unpack_from(record) if len(record) >= HEADER.size else (0, 0)
            if not name_size or label >= len(self.classes):
                raise InputError(
                    f"{self.path} is damaged: image {position} is missing, or not as it was written; copy it again, or "
                    "build it again"
                )
            yield record

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}
