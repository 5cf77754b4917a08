"""A damaged LMDB file is an error. Reading a page that is missing would kill the process with SIGBUS."""

import os
import random

import pytest
from image_trees import digit_photos, make_imagenet

import folder2lmdb
from data.image_lmdb import ImageFolderLMDB, promised_bytes, used_bytes
from s3net_common.errors import InputError

PAGE = 4096


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    tree = make_imagenet(folder / "tree", digit_photos(60, (50, 40)))
    assert folder2lmdb.main(folder2lmdb.Args(folder / "train.lmdb", tree / "train", workers=1)) == 0
    return folder / "train.lmdb"


def in_child(action):
    """Call an action in a child process. Return its error message, or "" without an error."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        try:
            action()
            message = ""
        except InputError as error:
            message = str(error)
        os.write(write, message.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as messages:
        message = messages.read()
    assert os.waitpid(process, 0)[1] == 0, "a signal killed the process"
    return message


def read_all(path):
    images = ImageFolderLMDB(path)
    for index in range(len(images)):
        images.encoded(index)


def test_the_header_promises_what_lmdb_says(file):
    images = ImageFolderLMDB(file)
    assert promised_bytes(file) == used_bytes(images._file.environment) == file.stat().st_size
    assert in_child(lambda: read_all(file)) == ""


def test_a_file_that_is_cut_anywhere(file, tmp_path):
    content, cut = file.read_bytes(), tmp_path / "cut.lmdb"

    sizes = [0, 1, 100, PAGE - 1, PAGE + 1, PAGE + 100, len(content) - 1]
    for size in [*sizes, *(page * PAGE for page in range(1, len(content) // PAGE))]:
        cut.write_bytes(content[:size])
        message = in_child(lambda: read_all(cut))
        if size < PAGE + 152:
            assert message == f"{cut} is not an LMDB file, or its beginning is damaged", size
        else:
            promised = f"{cut} is truncated: it has {size:,} of {len(content):,} bytes; copy it again, or build it"
            assert message.startswith(promised), size
        cut.unlink()


def test_a_file_that_is_cut_while_it_is_open(file, tmp_path):
    cut = tmp_path / "cut.lmdb"
    cut.write_bytes(file.read_bytes())
    images = ImageFolderLMDB(cut)
    os.truncate(cut, 5 * PAGE)
    message = in_child(lambda: images.encoded(len(images) - 1))  # a DataLoader worker opens the file again
    assert message.startswith(f"{cut} is truncated: it has {5 * PAGE:,} of ")


def test_a_damaged_header_never_kills_the_process(file, tmp_path):
    content, damaged, choose = file.read_bytes(), tmp_path / "damaged.lmdb", random.Random(1)
    refused = 0
    for _ in range(60):
        changed = bytearray(content)
        for first in (0, PAGE):  # both states of the file
            offset = first + choose.randrange(16, 152)
            changed[offset] = choose.randrange(256)
        damaged.write_bytes(changed)
        refused += in_child(lambda: read_all(damaged)) != ""
        damaged.unlink()
    assert refused > 5
