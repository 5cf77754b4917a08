"""Put the images of class folders into one LMDB file, which is faster to read than a million small files.

    python generalizability/folder2lmdb.py --images imagenet/train --out data/imagenet/train.lmdb
    python generalizability/folder2lmdb.py --images imagenet/val --out data/imagenet/val.lmdb --classes wnids.txt
    python generalizability/folder2lmdb.py --verify --out data/imagenet/train.lmdb   # decode all, check the digest

The images are DIR/<class>/**. Labels follow the alphabetical order of the classes, or the order in --classes. Each
image is decoded once as a check; the LMDB file then stores the bytes of the image file unchanged (data/image_lmdb.py
describes the format). Until the file is finished, its name is FILE.partial. After Ctrl-C, a crash or a full disk, the
same command continues with that file and ends with the same bytes as an uninterrupted run.
"""

import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from s3net_common.command_line import answer_flags, flag, run_script
from s3net_common.errors import InputError, printable
from s3net_common.images import MAX_PIXELS, class_images, class_names, decode, limit_pixels, read_class_names
from s3net_common.limits import available_processors
from s3net_common.output_files import lock_exclusively, make_folder
from s3net_common.unused_files import LISTED, UnreadableImage, unreadable_images

# At most this much is lost if the process is killed. Decoding it takes far longer than the transaction's two fsyncs.
TRANSACTION_BYTES = 4 * 2**20

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass
class Args:
    """Put the images of class folders into one LMDB file, or verify such a file."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """LMDB file to write or verify."""
    images: flag(Path, "DIR", "build nothing") = None
    """Folder of the images: DIR/<class>/**."""
    classes: flag(Path, "FILE", "the class folders in alphabetical order") = None
    """File with one class name per line, in the order of the labels; text after a tab is ignored."""
    workers: int = 0
    """Threads that read and decode; 0 for one per processor."""
    skip_unreadable: bool = False
    """Skip images that cannot be decoded, and list them, instead of stopping."""
    max_pixels: flag(int, "N", f"{MAX_PIXELS:,}") = None
    """Refuse images of more pixels, which could be decompression bombs."""
    verify: bool = False
    """Decode every image of the finished file, and compare the records with the digest."""
    overwrite: bool = False
    """Replace a finished file. Start again if an unfinished file belongs to other images."""


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import lmdb

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
from s3net_common.progress import ProgressBar

# ---- Reading the image folder -------------------------------------------------------------------------------------


def read_classes(images: Path, file: Path | None) -> list[str]:
    """Return the class names in the order of their labels: from `file`, or the names of the class folders.

    Raises:
        InputError: the image folder is missing, or `file` cannot be read, is empty, contains a name twice, or lacks
            the name of a class folder. Without `file`: a class folder has no images. To leave it out would silently
            change the labels of the classes after it, which another file of the same classes may have.
    """
    if not images.is_dir():
        raise InputError(f"there is no folder {images}: pass --images DIR with the images in DIR/<class>/")
    folders = class_names(images)
    if file is None:
        if empty := sorted({*class_names(images, keep=None)} - {*folders}):
            names = ", ".join(printable(images / name) for name in empty)
            raise InputError(
                f"there are no images in {names}: add some, remove the folder, or pass --classes FILE with the classes "
                "in the order of their labels"
            )
        return folders
    classes = read_class_names(file)
    if unknown := sorted(set(folders) - set(classes)):
        raise InputError(f"{images / unknown[0]} is not one of the {len(classes):,} classes in {file}")
    return classes


def count_files(images: Path, classes: list[str]) -> int:
    """Count the image files.

    Raises:
        InputError: there are none.
    """
    files = ProgressBar(class_images(images, classes), desc="listing", unit="file", leave=False)
    return sum(1 for _ in files)


def list_entry(images: Path, path: Path) -> bytes:
    """Return the entry of a file in the listing's digest: its size, and its name relative to `images`."""
    try:
        size = path.stat().st_size
    except OSError:  # a broken link: it cannot be read, but it has a name
        size = -1
    return b"%d %s" % (size, os.fsencode(path.relative_to(images).as_posix()))


@dataclass
class ReadFile:
    """Result of reading an image file: its entry in the listing, and its record or an error message."""

    name: str
    label: int
    entry: bytes
    record: bytes = b""
    record_digest: bytes = b""
    error: UnreadableImage | None = None


def read_file(images: Path, path: Path, label: int) -> ReadFile:
    """Read an image file, and decode it as a check."""
    name, entry = path.relative_to(images).as_posix(), list_entry(images, path)
    try:
        encoded = path.read_bytes()
        decode(encoded)
    except (OSError, InputError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return ReadFile(name, label, entry, error=UnreadableImage(path, reason))
    record = make_record(name, label, encoded)
    return ReadFile(name, label, entry, record, hashlib.sha256(record).digest())


def map_in_threads(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield `work(item)` of each item in order, computed in threads.

    Unlike `ThreadPoolExecutor.map`, this takes items only as results are used: at most 4 per thread are pending.
    """
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
    """Build the file, or continue an unfinished one.

    Raises:
        InputError: the images, the classes or the output cannot be used, or an image cannot be decoded.
    """
    if args.out.is_dir():
        raise InputError(f"--out {args.out} is a folder: give the name of a file in it")
    if args.out.exists() and not args.overwrite:
        raise InputError(f"{args.out} exists already: pass --overwrite to replace it")
    classes = read_classes(args.images, args.classes)
    total = count_files(args.images, classes)
    make_folder(args.out.absolute().parent)
    partial = args.out.with_name(f"{args.out.name}.partial")
    with exclusive_access(partial):
        contents = open_partial(partial, args, classes)
        try:
            if not contents.complete:
                append_missing(partial, args, contents, total, workers)
            finish(partial, args.out)
        except (lmdb.Error, OSError) as error:
            # LMDB reports a write to a full disk as an input/output error.
            reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
            raise InputError(
                f"{partial} cannot be written ({reason}; is the disk full?): make room, and run the same command again "
                "to continue"
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
            raise InputError(f"{partial} is being written by another process: wait until that ends")
        yield


def open_partial(partial: Path, args: Args, classes: list[str]) -> Contents:
    """Return the contents of the unfinished file, or of a new one if there is none.

    Raises:
        InputError: the file is damaged, or belongs to other images, and --overwrite was not given.
    """
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
    """Check that the image files stored in the unfinished file are still the first ones of the folder.

    Raises:
        InputError: they are not.
    """
    listing, count = "", len(contents) + len(contents.skipped)
    if contents.complete:
        count += 1  # the folder must not have another image
    for path, _ in islice(class_images(images, classes, reports=False), count):
        listing = chain(listing, list_entry(images, path))
    if classes != contents.classes or listing != contents.listing:
        raise InputError(
            f"{images} or its classes have changed since {partial} was started: pass --overwrite to start again"
        )


def append_missing(partial: Path, args: Args, contents: Contents, total: int, workers: int) -> None:
    """Append the images that the unfinished file lacks, and mark it as complete.

    After an image that cannot be decoded and is not to be skipped, the other images are decoded only, so that one error
    names all such images.

    Raises:
        InputError: images cannot be decoded and are not to be skipped, or none of the images can be decoded.
    """
    done = len(contents) + len(contents.skipped)
    files = islice(class_images(args.images, contents.classes, reports=False), done, None)
    results = map_in_threads(lambda file: read_file(args.images, *file), files, workers)
    records, size, errors = [], 0, []
    with ProgressBar(results, initial=done, total=total, desc=args.out.name, unit="image") as progress:
        for file in progress:
            if file.error is not None:
                errors.append(file.error)
                progress.write(f"cannot be decoded: {file.error.name} ({file.error.reason})", file=sys.stderr)
            if errors and not args.skip_unreadable:
                continue
            contents.listing = chain(contents.listing, file.entry)
            if file.error is not None:
                contents.skipped.append(file.name)
                continue
            records.append(file.record)
            size += len(file.record)
            contents.counts[file.label] += 1
            contents.digest = chain(contents.digest, file.record_digest)
            if size >= TRANSACTION_BYTES:
                append_records(partial, records, contents)
                records, size = [], 0
    if errors and not args.skip_unreadable:
        raise unreadable_images(errors)
    if not len(contents):
        raise InputError(f"none of the {total:,} images in {args.images} can be decoded")
    contents.complete = True
    append_records(partial, records, contents)


# ---- Verifying ----------------------------------------------------------------------------------------------------


def verify(path: Path, workers: int) -> ImageFolderLMDB:
    """Decode every image of a finished file, and compare its labels and digest with its contents.

    Raises:
        InputError: a label or the digest is wrong, or an image cannot be decoded.
    """
    data = ImageFolderLMDB(path)
    labels, digest, bad = data.labels, "", 0
    results = map_in_threads(lambda index: check_record(data.record(index)), range(len(data)), workers)
    with ProgressBar(results, total=len(data), desc=f"verifying {path.name}", unit="image") as progress:
        for index, (name, label, record_digest, error) in enumerate(progress):
            digest = chain(digest, record_digest)
            if error is None and label != labels[index]:
                error = f"its label is {label} and should be {labels[index]}"
            if error is not None:
                bad += 1
                if bad <= LISTED:
                    progress.write(f"image {index}, {printable(name)}: {error}", file=sys.stderr)
    if bad:
        raise InputError(f"{bad:,} of {len(data):,} images in {path} cannot be used: build it again")
    if digest != data.digest:
        raise InputError(
            f"{path} is damaged: its records have the digest {digest[:12]}... and should have {data.digest[:12]}...; "
            "copy it again, or build it again"
        )
    return data


def check_record(record: bytes) -> tuple[str, int, bytes, str | None]:
    """Return a record's name, label and SHA-256, and an error message if its image cannot be decoded."""
    name, label, encoded = split_record(memoryview(record))
    error = None
    try:
        decode(bytes(encoded))
    except InputError as raised:
        error = f"cannot be decoded ({raised})"
    return name, label, hashlib.sha256(record).digest(), error


# ---- Command line -------------------------------------------------------------------------------------------------


def describe(path: Path, contents: Contents) -> str:
    """Return a summary of a finished file, in a few lines."""
    filled = sum(count > 0 for count in contents.counts)
    lines = [
        f"{path}: {len(contents):,} images of {filled:,} classes, {path.stat().st_size / 1e6:,.1f} MB",
        f"digest {contents.digest}",
    ]
    if filled < len(contents.classes):
        lines.append(f"{len(contents.classes) - filled:,} of the {len(contents.classes):,} classes have no images")
    if skipped := contents.skipped:
        names = ", ".join(map(printable, skipped[:LISTED]))
        lines.append(f"{len(skipped):,} images that cannot be decoded were skipped: {names}")
        lines[-1] += ", ..." if len(skipped) > LISTED else ""
    return "\n".join(lines)


def main(args: Args) -> int:
    """Build, verify, or both."""
    if args.workers < 0:
        raise InputError(f"--workers {args.workers} is below 0: give 0 for one per processor")
    limit_pixels(args.max_pixels)
    if args.images is None and not args.verify:
        raise InputError("there is nothing to do: pass --images DIR to build --out, or --verify to check it")
    workers = args.workers or available_processors()
    if args.images is not None:
        print(describe(args.out, build(args, workers)))
    if args.verify:
        data = verify(args.out, workers)
        print(f"{args.out} is sound: {len(data):,} images decoded, digest {data.digest}")
    return 0


if __name__ == "__main__":
    run_script(main, Args, __doc__, resume="run the same command again to continue")
