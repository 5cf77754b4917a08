"""Data folders with and without a split, and the images that --hold-out takes from them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import train_s3net
from data.datasets import load_dataset
from data.image_sets import ImageSet, stratified_split
from s3net_common.errors import InputError
from train_s3net import Args

SMALL = {"growth_rate": 4, "depth": 7, "image_size": 16, "epochs": 1, "batch_size": 8, "device": "cpu"}


def write_images(folder, counts):
    """Write `counts[name]` images of the class `name`; each image has a grey level of its own."""
    level = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (level, level, level)).save(folder / name / f"{i}.png")
            level += 1
    return folder


def images_on_disk(dataset, half):
    if dataset == "imagenet":
        return [half.source.name(i) for i in half.indices]
    return half.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
@pytest.mark.parametrize("inside", ["", "train"])
def test_a_fraction_of_each_class_is_held_out(tmp_path, dataset, inside):
    write_images(tmp_path / inside, {"train" if not inside else "tree": 20, "bird": 9, "cat": 2})
    (images,) = load_dataset(dataset, tmp_path, splits=("train",))
    train, val = images.hold_out(0.1)
    labels = [
        np.asarray(half.source.labels)[half.indices] if dataset == "imagenet" else half.labels for half in (train, val)
    ]
    assert [np.bincount(part).tolist() for part in labels] == [[8, 1, 18], [1, 1, 2]]
    names = [images_on_disk(dataset, half) for half in (train, val)]
    assert len({*names[0], *names[1]}) == 31
    assert names == [images_on_disk(dataset, half) for half in images.hold_out(0.1)]


def test_a_whole_number_is_a_count_of_images():
    labels = torch.arange(100) % 4
    assert [len(part) for part in stratified_split(labels, 8, list("abcd"))] == [92, 8]
    assert labels[stratified_split(labels, 8, list("abcd"))[1]].bincount().tolist() == [2] * 4


def test_a_class_of_one_image_cannot_be_split():
    data = ImageSet(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 0, 1]), ["cat", "dog"])
    with pytest.raises(InputError, match=r"--hold-out 0.5 is not possible: class 'dog' has fewer than two images"):
        data.hold_out(0.5)


@pytest.mark.parametrize(
    ("folders", "splits", "message"),
    [
        (("a", "b"), ("train", "val"), "has class folders, but no train/ and val/: pass --hold-out 0.1"),
        (("train/a", "train/b"), ("train", "val"), "has no validation images: .*; or pass --hold-out 0.1 to validate"),
        (("train/a", "train/b"), ("val",), "has no val/<class>/. .*or the --hold-out of the training"),
        (("a", "b"), ("val",), "has no val/<class>/. .*or the --hold-out of the training"),
        (("val/a", "val/b"), ("train",), r"has no images: it needs train/<class>/\\*"),
        (("train/a", "train/b", "test"), ("train", "val"), "test has no class folders: .*, or pass --hold-out 0.1"),
        (("set/train/a", "set/val/a"), ("train", "val"), "has no images itself: pass --data-dir .*/set"),
        (("set/train/a", "set/val/a"), ("val",), "has no images itself: pass --data-dir .*/set"),
        (("train/a", "val/a"), ("train", "val"), "the training images have only one class, a: give two"),
        (("photos/a", "photos/b"), ("train",), "only one class folder, photos/: .* pass --data-dir .*photos"),
        (("train", "val"), ("train",), "train has no class folders: put the images into .*train/<class>/"),
        ((), ("train",), "has no images: it needs train/<class>"),
    ],
)
def test_a_missing_half_is_reported_with_what_to_do(tmp_path, folders, splits, message):
    write_images(tmp_path, dict.fromkeys(folders, 2))
    with pytest.raises(InputError, match=message):
        load_dataset("folder", tmp_path, splits=splits)


@pytest.mark.parametrize("dataset", ["folder", "imagenet", "cifar100"])
@pytest.mark.parametrize(
    ("train", "val", "others"),
    [
        ("Train", "Val", ["TEST/a", "TEST/b"]),
        ("training", "validation", []),
        ("train", "valid", ["test/a", "test/b", "test/c"]),  # as Roboflow exports
        ("train", "test/labelled", ["valid"]),  # no class folders in valid/
        ("train", "Testing", ["annotations"]),
    ],
)
def test_usual_names_of_the_splits(tmp_path, capsys, dataset, train, val, others):
    val = val.partition("/")[0]
    write_images(tmp_path / train, {"a": 3, "b": 2})
    write_images(tmp_path / val, {"a": 1, "b": 1})
    write_images(tmp_path, dict.fromkeys(others, 4))
    assert [len(half) for half in load_dataset(dataset, tmp_path)] == [5, 2]
    (only,) = load_dataset(dataset, tmp_path, splits=("val",))
    assert len(only) == 2
    line = "folders beside those of the splits: 1 (annotations)"
    assert (line in capsys.readouterr().err) == ("annotations" in others)


@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
def test_class_folders_whose_accents_are_stored_in_different_forms(tmp_path, dataset):
    """On macOS "é" becomes "e" with an accent. Both forms of a name are one class."""
    write_images(tmp_path / "train", {"caf\u00e9": 2, "cafz": 3})
    write_images(tmp_path / "val", {"cafe\u0301": 4, "cafz": 5})
    train, val = load_dataset(dataset, tmp_path)
    assert train.classes == val.classes == ["cafz", "caf\u00e9"]
    labels = val.source.labels if dataset == "imagenet" else val.labels
    assert np.bincount(labels).tolist() == [5, 4]


def test_classes_are_trained_without_a_split_and_their_held_out_images_are_evaluated(tmp_path, capsys):
    data = write_images(tmp_path / "data", {"cat": 20, "dog": 30})
    flags = {"dataset": "folder", "data_dir": data, "hold_out": 0.1} | SMALL
    assert train_s3net.main(Args(out=tmp_path / "run", **flags)) == 0
    assert "45 training and 5 validation images, 2 classes" in capsys.readouterr().out
    evaluation = {"eval_only": True, "checkpoint": tmp_path / "run" / "best.safetensors", "device": "cpu"}
    evaluation |= {"out": tmp_path / "evaluation"}
    assert train_s3net.main(Args(data_dir=data, hold_out=0.1, **evaluation)) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert results["images"] == 5 and results["val_error"] == metrics["val_error"]


def test_evaluation_opens_the_validation_images_only(tmp_path, capsys):
    data = write_images(tmp_path / "data" / "train", {"cat": 8, "dog": 8}).parent
    write_images(data / "test", {"cat": 3, "dog": 4})
    assert train_s3net.main(Args(dataset="folder", data_dir=data, out=tmp_path / "run", **SMALL)) == 0
    (data / "train" / "cat" / "0.png").write_bytes(b"no image")
    evaluation = {"eval_only": True, "checkpoint": tmp_path / "run" / "best.safetensors", "device": "cpu"}
    evaluation |= {"out": tmp_path / "evaluation", "overwrite": True, "data_dir": data}
    for _ in range(2):
        assert train_s3net.main(Args(**evaluation)) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 7
        (data / "train").rename(tmp_path / f"train{_}") if (data / "train").exists() else None


@pytest.mark.parametrize("value", [0, 0.0, 1.5, -0.1, 300.0, float("nan")])
def test_hold_out_takes_a_count_or_a_fraction(tmp_path, value):
    with pytest.raises(InputError, match=r"give a number of images of 1 or more, or a fraction below 1"):
        train_s3net.main(Args(dataset="digits", hold_out=value, out=tmp_path, device="cpu"))
