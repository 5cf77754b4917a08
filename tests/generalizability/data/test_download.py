"""Several processes that download and unpack into one folder."""

import hashlib
import io
import os
import tarfile
import threading
import time
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import extract_archive

from data import download
from s3net_common import output_files
from s3net_common.errors import InputError

CONTENT = b"0123456789" * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """Replaces the network: counts its downloads, each of which takes a moment, and sends `CONTENT`."""
    sent = []

    def send(url, folder, name):
        sent.append(name)
        with (Path(folder) / name).open("wb") as file:
            for part in (CONTENT[:5000], CONTENT[5000:]):
                file.write(part)
                file.flush()
                time.sleep(0.2)

    monkeypatch.setattr(download, "download_url", send)
    return sent


def fetch(folder):
    with download.one_at_a_time(folder):
        if not (folder / "file").exists():
            download.download("http://host/file", folder / "file", MD5)


def at_once(actions):
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_the_second_process_waits_and_finds_the_file(tmp_path, server, capsys):
    at_once([lambda: fetch(tmp_path / "data")] * 2)  # a lock is of an open file: two threads are like two processes
    assert len(server) == 1 and f"waiting for another process, which downloads or unpacks into {tmp_path}" in (
        capsys.readouterr().out
    )
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["file"]
    assert (tmp_path / "data" / "file").read_bytes() == CONTENT


def test_without_locks_each_process_renames_its_own_file(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "lock_exclusively", lambda *arguments: True)
    names = iter([tmp_path / "first", tmp_path / "second"])
    monkeypatch.setattr(download, "temporary_name", lambda path: next(names))
    at_once([lambda: fetch(tmp_path)] * 2)
    assert sorted(server) == ["first", "second"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == CONTENT


def test_a_file_with_a_wrong_checksum_is_not_kept(tmp_path, server):
    with pytest.raises(InputError, match="the checksum of what http://host/file sent is wrong: try again later"):
        download.download("http://host/file", tmp_path / "file", "0" * 32)
    assert not list(tmp_path.iterdir())


def test_the_temporary_name_is_of_this_process_alone(tmp_path):
    assert str(os.getpid()) in download.temporary_name(tmp_path / "file").name
    assert download.temporary_name(tmp_path / "file").parent == tmp_path


def test_unpacking_that_fails_leaves_nothing(tmp_path):
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as content:
        content.addfile(tarfile.TarInfo(f"{CIFAR100.base_folder}/train"), io.BytesIO())
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(Exception, match=r"end-of-stream|Compressed file ended"):
        download.unpack(lambda folder: extract_archive(str(archive), str(folder)), "x", tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["archive.tar.gz"]


def test_a_folder_without_locks_is_used_without_a_lock(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(output_files.fcntl, "flock", no_locks)
    with download.one_at_a_time(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
