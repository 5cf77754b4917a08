"""Data sets on disk, and their batches."""

import gc
import multiprocessing
import os
from functools import partial

import numpy as np
import pytest
import torch
from image_trees import digit_photos, make_imagenet
from PIL import Image
from torchvision import transforms

import train_s3net
from data.batches import DiskEvaluationBatches, DiskTrainingBatches
from data.datasets import load_dataset
from data.decoding import Decoder, random_crop
from data.image_sets import open_source
from s3net_common.errors import InputError, LocalError
from s3net_common.images import limit_pixels
from train_s3net import Args

CPU = torch.device("cpu")
PLAIN = {"device": CPU, "mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255), "image_size": 24}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_imagenet(tmp_path_factory.mktemp("imagenet"), digit_photos(60, (50, 40)))


@pytest.fixture
def halves(tree):
    return load_dataset("imagenet", tree)


def training(data, workers=0, **options):
    return DiskTrainingBatches(data, 8, workers=workers, flip=True, seed=3, **PLAIN, **options)


def test_folders_give_labels_and_classes(halves):
    train, val = halves
    assert (len(train), len(val)) == (40, 20) and train.classes == [f"class{d}" for d in range(10)]
    assert np.bincount(train.source.labels).tolist() == [4] * 10


def test_batches_depend_on_seed_epoch_and_step_only(halves):
    train, _ = halves
    batches = training(train)
    full_epoch = list(batches.epoch(1))
    assert [images.shape[0] for images, *_ in full_epoch] == [8] * 5 and [batch[3] for batch in full_epoch] == [8] * 5
    with_workers = training(train, workers=2)
    for repeated in (list(with_workers.epoch(1)), list(with_workers.epoch(1))):
        for batch, repeated_batch in zip(full_epoch, repeated, strict=True):
            assert all(torch.equal(batch[i], repeated_batch[i]) for i in range(3))
    late = list(batches.epoch(1, first_step=3))
    assert all(torch.equal(batch[0], late_batch[0]) for batch, late_batch in zip(full_epoch[3:], late, strict=True))
    parts = [list(training(train, rank=rank, world_size=3).epoch(1)) for rank in range(3)]
    for step, (images, labels, _, _) in enumerate(full_epoch):
        assert torch.equal(images, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[step][1] for part in parts]))
    assert not torch.equal(full_epoch[0][0], next(batches.epoch(2))[0])
    all_labels = torch.cat([labels for _, labels, _, _ in full_epoch])
    assert all_labels.bincount().tolist() == [4] * 10


def test_workers_end_with_the_batches(halves):
    others = {*multiprocessing.active_children()}  # of other tests
    gc.disable()
    try:
        batches = training(halves[0], workers=1)
        assert len(list(batches.epoch(0))) == 5
        assert len({*multiprocessing.active_children()} - others) == 1
        del batches
        assert {*multiprocessing.active_children()} <= others
    finally:
        gc.enable()


def test_a_run_and_an_evaluation_leave_no_workers(tree, tmp_path):
    """The interpreter would kill them at exit, and PyTorch would print a traceback."""
    flags = {"dataset": "imagenet", "data_dir": tree, "model": "s3net_cifar", "growth_rate": 4, "depth": 7}
    flags |= {"image_size": 16, "device": "cpu", "workers": 1}
    others = {*multiprocessing.active_children()}  # of other tests
    gc.disable()
    try:
        assert train_s3net.main(Args(**flags, epochs=1, out=tmp_path / "run")) == 0
        assert {*multiprocessing.active_children()} <= others
        flags |= {"eval_only": True, "checkpoint": tmp_path / "run" / "best.safetensors"}
        assert train_s3net.main(Args(**flags)) == 0
        assert {*multiprocessing.active_children()} <= others
    finally:
        gc.enable()


def test_reading_does_not_change_the_random_state(halves):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(training(halves[0]).epoch(0))
    assert torch.equal(torch.rand(3), expected)


def test_random_crops_equal_torchvisions(halves):
    train, _ = halves
    decoder = Decoder(train.source, partial(random_crop, size=24, flip=False))
    for index in range(10):
        pixels, _, problem = decoder[index, 100 + index]
        torch.manual_seed(100 + index)
        image = Image.open(train.source.name(index))
        expected = transforms.RandomResizedCrop(24, antialias=True)(image)
        difference = np.abs(np.asarray(expected, dtype=int) - pixels.permute(1, 2, 0).numpy())
        assert problem is None and difference.mean() < 2  # torchvision crops before it resizes: edges differ


def test_half_of_the_images_are_mirrored(halves):
    train, _ = halves
    original, flipped = (Decoder(train.source, partial(random_crop, size=24, flip=flip)) for flip in (False, True))
    mirrored = [not torch.equal(original[0, seed][0], flipped[0, seed][0]) for seed in range(200)]
    assert 70 < sum(mirrored) < 130


def test_evaluation_uses_the_centre_crop_of_every_image_once(halves):
    _, val = halves
    preprocess = transforms.Compose([transforms.Resize(27), transforms.CenterCrop(24), transforms.PILToTensor()])
    expected = torch.stack([preprocess(Image.open(val.source.name(i))) for i in range(20)]).float()
    for workers, world_size in ((0, 1), (2, 2)):
        batches = DiskEvaluationBatches(val, 6, workers=workers, **PLAIN)
        parts = [list(batches.part(rank, world_size)) for rank in range(world_size)]
        in_order = [parts[step % world_size][step // world_size] for step in range(4)]
        assert torch.equal(torch.cat([images for images, _ in in_order]), expected)
        assert torch.cat([labels for _, labels in in_order]).tolist() == val.source.labels.tolist()


def test_hold_out_and_subset(halves):
    train, _ = halves
    train_part, val_part = train.hold_out(10)
    assert sorted(torch.cat([train_part.indices, val_part.indices]).tolist()) == list(range(40))
    assert sorted(train.source.labels[val_part.indices]) == list(range(10))
    assert len(train.subset(7)) == 7 and len(set(train.subset(7).indices.tolist())) == 7
    ((_, labels),) = DiskEvaluationBatches(val_part, 10, workers=0, **PLAIN).part()
    assert sorted(labels.tolist()) == list(range(10))
    with pytest.raises(InputError, match="--hold-out 5 is not possible: give a number from 10"):
        train.hold_out(5)


def test_an_unreadable_image_is_an_error_or_has_no_weight(tmp_path):
    tree = make_imagenet(tmp_path, digit_photos(30, (50, 40)))
    for split in ("train", "val"):
        (tree / split / "class3" / "broken.JPEG").write_bytes(b"?")
    train, val = load_dataset("imagenet", tree)
    for workers in (0, 1):
        with pytest.raises(LocalError, match=r"class3/broken.JPEG cannot be read as an image") as error:
            list(training(train, workers).epoch(0))
        assert "\n" not in str(error.value)
    train, val = load_dataset("imagenet", tree, skip_unreadable=True)
    weights = torch.cat([weights for _, _, weights, _ in training(train).epoch(0)])
    assert weights.tolist().count(0.0) == 1 and len(weights) == 21
    evaluated = [labels for _, labels in DiskEvaluationBatches(val, 4, workers=0, **PLAIN).part()]
    assert sum(map(len, evaluated)) == 10 and len(val) == 11


def test_one_error_names_all_unreadable_images_on_disk(tmp_path):
    tree = make_imagenet(tmp_path, digit_photos(30, (50, 40)))
    for name in ("a.png", "b.png"):
        (tree / "val" / "class5" / name).write_bytes(b"")
        (tree / "val" / "class9" / name).write_bytes(b"")
    _, val = load_dataset("imagenet", tree)
    for workers in (0, 1):
        with pytest.raises(LocalError, match=r"^4 images cannot be read: .*class5/a.png .*class9/b.png"):
            list(DiskEvaluationBatches(val, 4, workers=workers, **PLAIN).part())


def test_images_on_disk_are_not_turned_and_may_have_any_name(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(folder / "0.jpg", exif=exif)
    os.rename(folder / "0.jpg", os.fsencode(folder) + b"/caf\xe9.jpg")  # noqa: PTH104
    source = open_source(tmp_path / "train")
    pixels, _, problem = Decoder(source, transforms.PILToTensor())[0, None]
    assert problem is None and pixels.shape == (3, 20, 40)


def test_workers_have_the_limit_of_pixels(tmp_path):
    tree = make_imagenet(tmp_path, digit_photos(30, (50, 40)))
    _, val = load_dataset("imagenet", tree)
    limit_pixels(1999)
    try:
        batches = DiskEvaluationBatches(val, 4, workers=1, **PLAIN)
        batches.loader.multiprocessing_context = "spawn"
        with pytest.raises(LocalError, match=r"10 images cannot be read.*its 2,000 pixels exceed the limit of 1,999"):
            list(batches.part())
    finally:
        limit_pixels(None)


def test_missing_or_different_training_and_validation_images(tmp_path, tree):
    with pytest.raises(InputError, match=r"has neither train.lmdb nor train/<class>/\*"):
        load_dataset("imagenet", tmp_path)
    (tmp_path / "train").symlink_to(tree / "train")
    with pytest.raises(InputError, match=r"has neither val\.lmdb"):
        load_dataset("imagenet", tmp_path)
    (tmp_path / "val" / "class0").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "val" / "class0" / "a.png")
    with pytest.raises(InputError, match=r"class 'class1' is in .*train but not in .*val"):
        load_dataset("imagenet", tmp_path)
