"""Put the images of class folders into one LMDB file, which is read faster than a million small files.

    python folder2lmdb.py --images imagenet/train --out data/imagenet/train.lmdb
    python folder2lmdb.py --images imagenet/val --out data/imagenet/val.lmdb --classes wnids.txt
    python folder2lmdb.py --verify --out data/imagenet/train.lmdb       # decode everything again, check the digest

The images are DIR/<class>/**; the labels follow the alphabetical order of the classes, or the order of --classes. The
files' bytes go into the LMDB file untouched, after each image was decoded once to see that it can be (the format is
described in image_lmdb.py). Until it is finished the file is called FILE.partial. If the work is ended, by Ctrl-C, a
crash or a full disk, the same command goes on with that file, and ends with the same bytes as if nothing had happened.
"""

import hashlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, TypeVar

import lmdb
import tyro
from tqdm import tqdm

from data.image_lmdb import (
    Contents,
    ImageFolderLMDB,
    append_records,
    chain,
    finish,
    make_record,
    reopen_unfinished,
    split_record,
)
from s3net_common.command_line import flag, run_script
from s3net_common.errors import InputError
from s3net_common.images import class_images, class_names, decode, read_class_names
from s3net_common.output_files import lock_exclusively, make_folder

TRANSACTION_BYTES = 4 * 2**20  # what a kill can lose; decoding it takes far longer than the transaction's two fsyncs
NAMED = 10  # so many bad images are named one by one

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass
class Args:
    """Put the images of class folders into one LMDB file, or verify such a file."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The LMDB file."""
    images: flag(Path, "DIR", "nothing is built") = None
    """The folder with the images: DIR/<class>/**."""
    classes: flag(Path, "FILE", "the folders, in alphabetical order") = None
    """A file with a class name a line, in the order of the labels; what follows a tab is ignored."""
    workers: int = 0
    """Threads that read and decode; 0 for as many as there are processors."""
    skip_unreadable: bool = False
    """Leave out images that cannot be decoded, and name them, instead of stopping."""
    verify: bool = False
    """Decode every image of the finished file, and compare the records with the digest."""
    overwrite: bool = False
    """Replace a finished file, and begin again where an unfinished one does not fit."""


# ---- What there is to be read -------------------------------------------------------------------------------------


def read_classes(images: Path, file: Path | None) -> list[str]:
    """The class names in the order of their labels.

    Raises:
        InputError: there is no image folder, or `file` is missing, empty, names a class twice, or lacks a folder's.
    """
    if not images.is_dir():
        raise InputError(f"there is no folder {images}: pass --images DIR with the images in DIR/<class>/")
    folders = class_names(images)
    if file is None:
        return folders
    classes = read_class_names(file)
    if unknown := sorted(set(folders) - set(classes)):
        raise InputError(f"{images / unknown[0]} is not one of the {len(classes):,} classes in {file}")
    return classes


def count_files(images: Path, classes: list[str]) -> int:
    """The number of image files.

    Raises:
        InputError: there are none.
    """
    files = tqdm(class_images(images, classes), desc="listing", unit="file", disable=None, leave=False)
    return sum(1 for _ in files)


def list_entry(images: Path, path: Path) -> bytes:
    """What the digest of the listing takes of a file: its name, relative to `images`, and its size."""
    try:
        size = path.stat().st_size
    except OSError:  # a link to nowhere: unreadable, but it has a name
        size = -1
    return b"%d %s" % (size, os.fsencode(path.relative_to(images).as_posix()))


@dataclass
class ReadFile:
    """A file that was read and decoded: its record, or what is wrong with it."""

    name: str
    label: int
    entry: bytes
    record: bytes = b""
    record_digest: bytes = b""
    error: str | None = None


def read_file(images: Path, path: Path, label: int) -> ReadFile:
    """Read a file, and decode it to see that it can be."""
    name, entry = path.relative_to(images).as_posix(), list_entry(images, path)
    try:
        encoded = path.read_bytes()
        decode(encoded)
    except (OSError, InputError) as error:
        return ReadFile(name, label, entry, error=getattr(error, "strerror", None) or str(error))
    record = make_record(name, label, encoded)
    return ReadFile(name, label, entry, record, hashlib.sha256(record).digest())


def ahead(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`work` of each item, in their order, by threads that are no more than a few items ahead."""
    items = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        pending = deque(pool.submit(work, item) for item in islice(items, 4 * workers))
        try:
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(work, item) for item in islice(items, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# ---- Building -----------------------------------------------------------------------------------------------------


def build(args: Args, workers: int) -> Contents:
    """Write the file, or go on with its unfinished part.

    Raises:
        InputError: the images, the classes or the output cannot be used, or an image cannot be decoded.
    """
    if args.out.is_dir():
        raise InputError(f"--out {args.out} is a folder: give the name of a file in it")
    if args.out.exists() and not args.overwrite:
        raise InputError(f"{args.out} is there already: pass --overwrite to replace it")
    classes = read_classes(args.images, args.classes)
    total = count_files(args.images, classes)
    make_folder(args.out.absolute().parent)
    partial = args.out.with_name(f"{args.out.name}.partial")
    with exclusive_access(partial):
        contents = begin(partial, args, classes)
        try:
            if not contents.complete:
                fill(partial, args, contents, total, workers)
            finish(partial, args.out)
        except (lmdb.Error, OSError) as error:
            # LMDB calls a write that a full disk cut short an input/output error
            reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
            raise InputError(
                f"{partial} cannot be written ({reason}; is the disk full?): make room, and run the same command again "
                "to go on"
            ) from error
    return contents


@contextmanager
def exclusive_access(partial: Path) -> Iterator[None]:
    """Lock a file for exclusive writing. The operating system releases the lock when the process ends."""
    try:
        file = partial.open("ab")
    except OSError as error:
        raise InputError(f"{partial} cannot be written ({error.strerror}): pass another --out") from error
    with file:
        if not lock_exclusively(file.fileno()):
            raise InputError(f"{partial} is being written by another process: wait until it has ended")
        yield


def begin(partial: Path, args: Args, classes: list[str]) -> Contents:
    """What the unfinished file holds, if it can be gone on with; a new one's contents if there is none."""
    try:
        contents = reopen_unfinished(partial)
        if contents is not None:
            check_listing(partial, contents, args.images, classes)
    except InputError:
        if not args.overwrite:
            raise
        contents = None
        os.truncate(partial, 0)
    return contents or Contents(classes, [0] * len(classes))


def check_listing(partial: Path, contents: Contents, images: Path, classes: list[str]) -> None:
    """That the files of which the unfinished file was made are still the first of the folder.

    Raises:
        InputError: they are not.
    """
    listing, taken = "", len(contents) + len(contents.skipped)
    if contents.complete:
        taken += 1  # there must not be another
    for path, _ in islice(class_images(images, classes), taken):
        listing = chain(listing, list_entry(images, path))
    if classes != contents.classes or listing != contents.listing:
        raise InputError(
            f"{images} or its classes are not those that {partial} was begun with: pass --overwrite to begin again"
        )


def fill(partial: Path, args: Args, contents: Contents, total: int, workers: int) -> None:
    """Append all images that the unfinished file does not have yet; at the end it is complete."""
    taken = len(contents) + len(contents.skipped)
    files = islice(class_images(args.images, contents.classes), taken, None)
    results = ahead(lambda file: read_file(args.images, *file), files, workers)
    records, size = [], 0
    with tqdm(results, initial=taken, total=total, desc=args.out.name, unit="image", disable=None) as progress:
        for file in progress:
            contents.listing = chain(contents.listing, file.entry)
            if file.error is not None:
                skip(file, args, progress)
                contents.skipped.append(file.name)
                continue
            records.append(file.record)
            size += len(file.record)
            contents.counts[file.label] += 1
            contents.digest = chain(contents.digest, file.record_digest)
            if size >= TRANSACTION_BYTES:
                append_records(partial, records, contents)
                records, size = [], 0
    if not len(contents):
        raise InputError(f"none of the {total:,} images in {args.images} can be decoded")
    contents.complete = True
    append_records(partial, records, contents)


def skip(file: ReadFile, args: Args, progress: tqdm) -> None:
    """Name an image that cannot be decoded.

    Raises:
        InputError: such images are not to be skipped.
    """
    text = f"{args.images / file.name} cannot be decoded ({file.error})"
    if not args.skip_unreadable:
        raise InputError(f"{text}: repair or remove it, or pass --skip-unreadable; the same command will go on")
    progress.write(f"left out: {text}", file=sys.stderr)


# ---- Verifying ----------------------------------------------------------------------------------------------------


def verify(path: Path, workers: int) -> ImageFolderLMDB:
    """Decode every image of a finished file, and compare labels and digest with what the file says of itself.

    Raises:
        InputError: something differs, or an image cannot be decoded.
    """
    data = ImageFolderLMDB(path)
    labels, digest, bad = data.labels, "", 0
    results = ahead(lambda index: check_record(data.record(index)), range(len(data)), workers)
    with tqdm(results, total=len(data), desc=f"verifying {path.name}", unit="image", disable=None) as progress:
        for index, (name, label, record_digest, error) in enumerate(progress):
            digest = chain(digest, record_digest)
            if error is None and label != labels[index]:
                error = f"its label is {label} and should be {labels[index]}"
            if error is not None:
                bad += 1
                if bad <= NAMED:
                    progress.write(f"image {index}, {name}: {error}", file=sys.stderr)
    if bad:
        raise InputError(f"{bad:,} of {len(data):,} images in {path} cannot be used: build it again")
    if digest != data.digest:
        raise InputError(
            f"the records in {path} have the digest {digest[:12]}... and should have {data.digest[:12]}...: "
            "it was damaged; copy it again, or build it again"
        )
    return data


def check_record(record: bytes) -> tuple[str, int, bytes, str | None]:
    """A record's name, label and SHA-256, and what is wrong with its image."""
    name, label, encoded = split_record(memoryview(record))
    error = None
    try:
        decode(bytes(encoded))
    except InputError as raised:
        error = f"cannot be decoded ({raised})"
    return name, label, hashlib.sha256(record).digest(), error


# ---- The command --------------------------------------------------------------------------------------------------


def describe(path: Path, contents: Contents) -> str:
    """What was built, in a few lines."""
    filled = sum(count > 0 for count in contents.counts)
    lines = [
        f"{path}: {len(contents):,} images of {filled:,} classes, {path.stat().st_size / 1e6:,.1f} MB",
        f"digest {contents.digest}",
    ]
    if filled < len(contents.classes):
        lines.append(f"{len(contents.classes) - filled:,} of the {len(contents.classes):,} classes have no images")
    if skipped := contents.skipped:
        lines.append(f"{len(skipped):,} images that cannot be decoded were left out: {', '.join(skipped[:NAMED])}")
        lines[-1] += ", ..." if len(skipped) > NAMED else ""
    return "\n".join(lines)


def main(args: Args) -> int:
    """Build, verify, or both."""
    if args.workers < 0:
        raise InputError(f"--workers {args.workers} is below 0: give 0 for as many as there are processors")
    if args.images is None and not args.verify:
        raise InputError("there is nothing to do: pass --images DIR to build --out, or --verify to check it")
    workers = args.workers or os.cpu_count() or 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.images is not None:
            print(describe(args.out, build(args, workers)))
        if args.verify:
            data = verify(args.out, workers)
            print(f"{args.out} is sound: {len(data):,} images decoded, digest {data.digest}")
    except KeyboardInterrupt:
        goes_on = ": run the same command again to go on" if args.images is not None else ""
        print(f"interrupted{goes_on}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    run_script(main, Args, __doc__)
