"""An image folder as one LMDB file: the format, the writer, and the reader `ImageFolderLMDB`.

Format "image-folder-lmdb", version 1. The file is an LMDB environment (no subdirectory, no lock file) with:

- In the main database the key `info`, a JSON object: `format`, `version`, and the fields of `Contents`.
- In the database `images` one record per image. Its key is the image's index, 8 bytes, big-endian. Its value is

      offset  size  content
      0       4     label, unsigned, little-endian: an index into the info's `classes`
      4       2     n, the size of the name, unsigned, little-endian
      6       n     the image file's name relative to the image folder, as in "n01440764/n01440764_18.JPEG",
                    in UTF-8 unless the file system has other bytes
      6 + n   ...   the image file's bytes, untouched

Images are sorted by class, and by name within a class. All labels therefore follow from `counts`, the number of images
of each class, and a reader's memory does not grow with the number of images.

The digest covers all records r_0, r_1, ... (the values above): d_0 = sha256(sha256(r_0)), d_i = sha256(d_{i-1} +
sha256(r_i)). The same images give the same bytes of the file, given the same version of LMDB and the same page size;
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

from s3net_common.class_names import composed
from s3net_common.errors import InputError, printable
from s3net_common.images import decode
from s3net_common.output_files import rename_durably

FORMAT, VERSION = "image-folder-lmdb", 1
KEY = struct.Struct(">Q")
HEADER = struct.Struct("<IH")
INFO, IMAGES = b"info", b"images"


@dataclass
class Contents:
    """Description of a file's content, stored in the file.

    Attributes:
        classes: names of the classes, in the order of their labels.
        counts: number of images of each class.
        skipped: names of the images that were skipped because they cannot be decoded.
        digest: digest of the records, in hexadecimal; empty if there are none.
        listing: digest of the names and sizes of all image files stored or skipped so far.
        complete: whether the file is finished.
    """

    classes: list[str]
    counts: list[int]
    skipped: list[str] = field(default_factory=list)
    digest: str = ""
    listing: str = ""
    complete: bool = False

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(self.counts)


def chain(digest: str, item: bytes) -> str:
    """Return the next digest of a chain, in hexadecimal. A later process can continue it, unlike a running SHA-256."""
    return hashlib.sha256(bytes.fromhex(digest) + item).hexdigest()


# ---- Records ------------------------------------------------------------------------------------------------------


def make_record(name: str, label: int, encoded: bytes) -> bytes:
    """Return the record of an image: its name relative to the image folder, its label, and its file's bytes."""
    name_bytes = os.fsencode(name)
    return b"".join((HEADER.pack(label, len(name_bytes)), name_bytes, encoded))


def split_record(record: memoryview) -> tuple[str, int, memoryview]:
    """Return a record's name, label and image bytes; the inverse of `make_record`."""
    label, name_size = HEADER.unpack_from(record)
    start = HEADER.size + name_size
    return os.fsdecode(bytes(record[HEADER.size : start])), label, record[start:]


# ---- Writing ------------------------------------------------------------------------------------------------------


def append_records(path: Path, records: Sequence[bytes], contents: Contents) -> None:
    """Append records to an unfinished file, and update its contents, in one transaction.

    The environment is opened again for each transaction. The bytes that a transaction writes then depend on the file
    and the records only, not on pages in memory from the transaction before: an interrupted and repeated transaction
    gives the same file.

    Args:
        path: the file; it is created if it is missing.
        records: from `make_record`, sorted by class.
        contents: the file's contents including these records.

    Raises:
        lmdb.Error: the file cannot be written; it is unchanged.
    """
    info = json.dumps({"format": FORMAT, "version": VERSION, **asdict(contents)}).encode()
    first = len(contents) - len(records)
    with lmdb.open(str(path), subdir=False, lock=False, max_dbs=1, mode=0o666) as environment:
        page = environment.stat()["psize"]
        needed = sum(map(len, records)) + len(info) + (2 * len(records) + 64) * page  # each record starts a page
        environment.set_mapsize(used_bytes(environment) + -(-needed // page) * page)
        with environment.begin(write=True) as transaction:
            images = environment.open_db(IMAGES, txn=transaction)
            for index, record in enumerate(records, first):
                transaction.put(KEY.pack(index), record, db=images, append=True)
            transaction.put(INFO, info)


def reopen_unfinished(path: Path) -> Contents | None:
    """Remove what an interrupted transaction left at the end of an unfinished file, and return the file's contents.

    Returns:
        None if the file is missing, or no transaction was finished.

    Raises:
        InputError: the file is damaged, or of another format or version.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None
    with _open_readonly(path) as environment:
        contents = _read_contents(environment, path) if environment.stat()["entries"] else None
        used = used_bytes(environment)
    os.truncate(path, used)
    return contents


def finish(path: Path, target: Path) -> None:
    """Rename a complete file to its final name, after its content has reached the disk."""
    with _open_readonly(path) as environment:
        used = used_bytes(environment)
    os.truncate(path, used)
    rename_durably(path, target)


# ---- Opening ------------------------------------------------------------------------------------------------------


def used_bytes(environment: lmdb.Environment) -> int:
    """Return the size of the used part of the file, which ends with the last page in its header."""
    return (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]


# A page's header, then number and version of the format, two fields without use here, the first database (whose first
# field is the page size), the rest of it and the second one, the last page, and the number of the transaction.
_META = struct.Struct("<16x II 16x I 92x QQ")
_MAGIC, _LMDB_VERSION = 0xBEEFC0DE, 1


def promised_bytes(path: Path) -> int | None:
    """Return the size of the used part of an LMDB file by its header, without LMDB, or None if the header is damaged.

    Each of the first two pages holds a state of the file. The one with the higher transaction number is the current
    one.
    """
    with path.open("rb") as file:
        first = file.read(_META.size)
        page = _META.unpack(first)[2] if len(first) == _META.size else 0
        if not 512 <= page <= 2**16 or page & (page - 1):
            return None
        file.seek(page)
        second = file.read(_META.size)
    states = [_META.unpack(state) for state in (first, second) if len(state) == _META.size]
    valid = [state for state in states if state[:3] == (_MAGIC, _LMDB_VERSION, page)]
    if len(valid) < 2:
        return None
    last_page = max(valid, key=lambda state: state[4])[3]
    return (last_page + 1) * page


def _open_readonly(path: Path) -> lmdb.Environment:
    """Open a file, after checking that no page is missing (reading a missing page would kill the process).

    The check needs no LMDB: opening a file whose first pages are missing would kill the process, too.

    Readahead stays on: py-lmdb touches each page of a record. Without readahead each page is a disk request of 4 KiB,
    27 for a 110 kB image that is not in the page cache; with Linux's default readahead of 128 KiB there are 2 or 3.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder, not an LMDB file")
    try:
        used, size = promised_bytes(path), path.stat().st_size
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: you have no permission") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    if used is None:
        raise InputError(f"{path} is not an LMDB file, or its beginning is damaged")
    if size < used:
        raise InputError(f"{path} is truncated: it has {size:,} of {used:,} bytes; copy it again, or build it again")
    try:
        return lmdb.open(str(path), subdir=False, readonly=True, lock=False, max_dbs=1)
    except lmdb.Error as error:
        raise InputError(f"{path} is not an LMDB file, or its beginning is damaged") from error


def _read_contents(environment: lmdb.Environment, path: Path) -> Contents:
    wrong_format = InputError(f"{path} was not written by folder2lmdb.py: build it from the images with that script")
    try:
        with environment.begin() as transaction:
            info = json.loads(transaction.get(INFO, b"null"))
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            raise wrong_format
        if info.get("version") != VERSION:
            raise InputError(
                f"{path} has version {info.get('version')} of its format and this program reads version {VERSION}: "
                "build it again with folder2lmdb.py"
            )
        contents = Contents(**{attribute.name: info[attribute.name] for attribute in fields(Contents)})
        if len(contents.classes) != len(contents.counts) or min(contents.counts) < 0:
            raise wrong_format
        return contents
    except (lmdb.Error, ValueError, KeyError, TypeError) as error:
        raise error if isinstance(error, InputError) else wrong_format from error


class _OpenFile:
    """An open file. LMDB allows one environment per file and process, so all readers in a process share this object."""

    def __init__(self, path: Path) -> None:
        self.process = os.getpid()
        self.environment = _open_readonly(path)
        try:
            self.contents = _read_contents(self.environment, path)
            if not self.contents.complete:
                raise InputError(f"{path} is not finished: run the same folder2lmdb.py command again")
            self.images = self.environment.open_db(IMAGES, create=False)
        except (InputError, lmdb.Error) as error:
            self.environment.close()
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is damaged: it has no images; copy it again, or build it again") from error


_open_files: WeakValueDictionary[tuple[int, int], _OpenFile] = WeakValueDictionary()  # by device and inode number


def _open_shared(path: Path) -> _OpenFile:
    """Return this process's `_OpenFile` of a file; open it if there is none."""
    for identity, file in list(_open_files.items()):
        if file.process != os.getpid():  # LMDB forbids using it after a fork
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
    """Images of a file written by `folder2lmdb.py`, as a data set for PyTorch's DataLoader.

    Item `i` is `(image, label)`: the RGB `PIL.Image`, or the result of `transform`, and the label as an int. Each
    process opens the file itself, whether it was forked or spawned.

    Args:
        path: the file.
        transform: applied to each RGB image.

    Attributes:
        classes: names of the classes, in the order of their labels.
        class_to_idx: label by class name.
        skipped: names of the image files that were skipped when the file was built.
        digest: digest of all records, in hexadecimal.

    Raises:
        InputError: the file is missing, truncated, unfinished, or of another format or version.
    """

    def __init__(self, path: Path | str, transform: Callable | None = None) -> None:
        self.path, self.transform = Path(path), transform
        self._file: _OpenFile | None = _open_shared(self.path)
        contents = self._file.contents
        self.classes = [composed(name) for name in contents.classes]  # as class folders are named
        self.skipped, self.digest = contents.skipped, contents.digest
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self._counts, self._length = contents.counts, len(contents)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[object, int]:
        encoded, label = self.encoded(index)
        try:
            image = decode(encoded)
        except InputError as error:
            name = printable(self.name(index))
            raise InputError(f"{name} in {printable(self.path)} cannot be decoded: {error}") from error
        return (image if self.transform is None else self.transform(image)), label

    @property
    def labels(self) -> np.ndarray:
        """Labels of all images, int64 `(N,)`, computed at each access."""
        return np.repeat(np.arange(len(self._counts)), self._counts)

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Return an image file's content, copied once from the page cache, and its label."""
        with self._record(index) as record:
            _, label, image = split_record(record)
            return bytes(image), label

    def name(self, index: int) -> str:
        """Return the name of an image file, relative to the image folder."""
        with self._record(index) as record:
            return split_record(record)[0]

    def record(self, index: int) -> bytes:
        """Return a whole record of the format above."""
        with self._record(index) as record:
            return bytes(record)

    @contextmanager
    def _record(self, index: int) -> Iterator[memoryview]:
        """Return a context with a record in the memory map, which must not be used after the context.

        Raises:
            InputError: the record is missing or its header damaged, or another file has replaced this one.
        """
        position = range(self._length)[index]  # negative as in a list; raises IndexError
        if self._file is None or self._file.process != os.getpid():
            self._file = _open_shared(self.path)
            if self._file.contents.digest != self.digest:
                raise InputError(f"another file has replaced {self.path} while it was in use: start again")
        with self._file.environment.begin(db=self._file.images, buffers=True) as transaction:
            try:
                record = transaction.get(KEY.pack(position), b"")
            except lmdb.Error:
                record = b""
            label, name_size = HEADER.unpack_from(record) if len(record) >= HEADER.size else (0, 0)
            if not name_size or label >= len(self.classes):
                raise InputError(
                    f"{self.path} is damaged: image {position} is missing or has a wrong header; copy it again, or "
                    "build it again"
                )
            yield record

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}
