"""Tiny ImageNet: reading its folder, downloading and unpacking its zip."""

import hashlib
import http.server
import json
import shutil
import threading
import zipfile

import pytest
import torch
import torch.nn.functional as F
from image_trees import digit_photos, make_tiny_imagenet, real_photos

import train_s3net
from data import tiny_imagenet
from data.batches import EvaluationBatches
from data.datasets import load_dataset
from s3net_common.errors import InputError
from train_s3net import Args


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tiny_imagenet(tmp_path_factory.mktemp("tiny"), digit_photos(40, (64, 64)))


@pytest.fixture
def archive(tree, tmp_path, monkeypatch):
    """The folder as a zip in another place, with the expected checksum."""
    path = tmp_path / "server" / "tiny-imagenet-200.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as content:
        for file in filter(lambda f: f.is_file(), sorted(tree.rglob("*"))):
            content.write(file, file.relative_to(tree.parent))
    monkeypatch.setattr(tiny_imagenet, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_labels_come_from_the_folders_and_the_annotations(tree):
    train, val = load_dataset("tinyimagenet", tree)
    assert train.images.shape == (20, 3, 64, 64) and val.images.shape == (20, 3, 64, 64)
    assert train.classes == val.classes == [f"n{d:08d}" for d in range(10)]
    lines = [line.split("\t") for line in (tree / "val" / "val_annotations.txt").read_text().splitlines()]
    assert val.labels.tolist() == [int(wnid[1:]) for _, wnid, *_ in lines]
    assert train.labels.tolist() == sorted(2 * list(range(10)))


@pytest.mark.parametrize("place", ["{}", "{}/images", "images/{}"])
@pytest.mark.parametrize("leftovers", [False, True])
def test_validation_images_sorted_into_folders_by_class(tree, tmp_path, place, leftovers):
    root = tmp_path / "tiny-imagenet-200"
    shutil.copytree(tree, root)
    for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        folder = root / "val" / place.format(wnid)
        folder.mkdir(parents=True, exist_ok=True)
        (root / "val" / "images" / name).rename(folder / name)
    if not leftovers:
        (root / "val" / "val_annotations.txt").unlink()
        if place != "images/{}":
            (root / "val" / "images").rmdir()
    (expected,) = load_dataset("tinyimagenet", tree, splits=("val",))
    (val,) = load_dataset("tinyimagenet", tmp_path, splits=("val",))
    order, expected_order = (half.labels.argsort(stable=True) for half in (val, expected))
    assert val.classes == expected.classes and val.labels.tolist() == sorted(expected.labels.tolist())
    images, expected_images = val.images[order], expected.images[expected_order]
    assert sorted(images.sum((1, 2, 3)).tolist()) == sorted(expected_images.sum((1, 2, 3)).tolist())
    shutil.rmtree(root / "train")
    (val,) = load_dataset("tinyimagenet", tmp_path, splits=("val",))
    assert val.classes == expected.classes


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_annotations_with_a_byte_order_mark_and_windows_line_ends(tmp_path, encoding):
    tree = make_tiny_imagenet(tmp_path, digit_photos(40, (64, 64)))
    annotations = tree / "val" / "val_annotations.txt"
    expected = load_dataset("tinyimagenet", tree, splits=("val",))[0].labels
    annotations.write_bytes(annotations.read_text().replace("\n", "\r\n").encode(encoding))
    assert torch.equal(load_dataset("tinyimagenet", tree, splits=("val",))[0].labels, expected)


def test_images_are_resized_to_the_networks_input(tree):
    _, val = load_dataset("tinyimagenet", tree.parent)  # the parent folder also works
    batches = EvaluationBatches(val, 20, torch.device("cpu"), (0.0,) * 3, (1 / 255,) * 3, image_size=96)
    ((images, _),) = batches.part()
    expected = F.interpolate(val.images.float(), (96, 96), mode="bilinear", align_corners=False)
    assert images.shape == (20, 3, 96, 96) and torch.allclose(images, expected, atol=1e-3)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_s3net_learns_real_images(tmp_path, capsys):
    tree = make_tiny_imagenet(tmp_path, real_photos(4, (64, 64)))
    flags = {"dataset": "tinyimagenet", "data_dir": tree, "growth_rate": 8, "image_size": 64, "epochs": 3}
    flags |= {"batch_size": 16, "schedule": "onecycle", "device": "cpu", "out": tmp_path / "run"}
    assert train_s3net.main(Args(**flags)) == 0
    assert "s3net_tiny_k108 growth_rate=8: " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 0.2


def test_a_zip_is_checked_and_unpacked(archive, tree):
    train, _ = load_dataset("tinyimagenet", archive.parent)
    assert torch.equal(train.images, load_dataset("tinyimagenet", tree)[0].images)
    assert sorted(path.name for path in archive.parent.iterdir()) == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


def test_the_zip_is_downloaded_on_request(archive, tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: QuietHandler(*args, directory=archive.parent)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(tiny_imagenet, "URL", f"http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip")
    try:
        train, val = load_dataset("tinyimagenet", tmp_path / "data", download=True)
        assert len(train) == 20 and len(val) == 20
        monkeypatch.setattr(tiny_imagenet, "URL", f"http://127.0.0.1:{server.server_port}/absent.zip")
        with pytest.raises(InputError, match=r"could not be downloaded .*404.*in another way"):
            load_dataset("tinyimagenet", tmp_path / "other", download=True)
    finally:
        server.shutdown()
        server.server_close()
    assert not list((tmp_path / "other").iterdir())


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_a_wrong_checksum(archive):
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"checksum of .*zip is wrong.*delete it and pass --download"):
        load_dataset("tinyimagenet", archive.parent)
    assert [path.name for path in archive.parent.iterdir()] == ["tiny-imagenet-200.zip"]


def test_a_file_that_is_no_zip(archive, monkeypatch):
    archive.write_bytes(b"no zip")
    monkeypatch.setattr(tiny_imagenet, "MD5", hashlib.md5(b"no zip").hexdigest())
    with pytest.raises(InputError, match="cannot be unpacked"):
        load_dataset("tinyimagenet", archive.parent)
    assert [path.name for path in archive.parent.iterdir()] == ["tiny-imagenet-200.zip"]


def test_a_data_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file cannot be written \(.*\): pass another --data-dir"):
        load_dataset("tinyimagenet", tmp_path / "file", download=True)


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def interrupted_download(url, folder, name):
        (tmp_path / name).write_bytes(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr("data.download.download_url", interrupted_download)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("tinyimagenet", tmp_path, download=True)
    assert not list(tmp_path.iterdir())


def test_validation_images_or_their_annotations_cannot_be_read(tmp_path):
    tree = make_tiny_imagenet(tmp_path, digit_photos(40, (64, 64)))
    annotations = tree / "val" / "val_annotations.txt"
    annotations.write_bytes(b"\xff\xfe\0")
    with pytest.raises(InputError, match=r"val_annotations.txt is not a text file: unpack tiny-imagenet-200.zip again"):
        load_dataset("tinyimagenet", tree)
    annotations.unlink()
    with pytest.raises(InputError, match=r"val_annotations.txt cannot be read \(No such file or directory\): unpack"):
        load_dataset("tinyimagenet", tree)
    annotations.touch()
    (tree / "val" / "images").rename(tree / "val" / "pictures")
    with pytest.raises(InputError, match=r"val/images cannot be read \(No such file or directory\): unpack"):
        load_dataset("tinyimagenet", tree)


def test_missing_data(tmp_path):
    with pytest.raises(InputError, match=r"Tiny ImageNet is not in .*: pass --download"):
        load_dataset("tinyimagenet", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("absent.JPEG\tn00000000\t0\t0\t1\t1\n", "line 21: .*absent.JPEG is missing"),
        ("val_1.JPEG n00000000\n", "line 21: expected a file name, a tab and a wnid"),
        ("{first}\tn00000077\t0\t0\t1\t1\n", "class 'n00000077' is in .*val_annotations.txt but not in .*train"),
    ],
)
def test_wrong_annotations(tmp_path, line, message):
    tree = make_tiny_imagenet(tmp_path, digit_photos(40, (64, 64)))
    annotations = tree / "val" / "val_annotations.txt"
    text = annotations.read_text()
    annotations.write_text(text + line.format(first=text.split("\t")[0]))
    with pytest.raises(InputError, match=message):
        load_dataset("tinyimagenet", tree)
