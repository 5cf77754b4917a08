"""Data sets in memory, and their batches."""

import hashlib
import pickle
import shutil
import tarfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import CIFAR100

from data.batches import EvaluationBatches, TrainingBatches, flip_and_crop
from data.datasets import load_dataset
from data.image_sets import ImageSet
from s3net_common.errors import InputError
from s3net_common.images import read_square

CPU = torch.device("cpu")
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # a normalisation that does not change the pixels


def random_set(count, size=8, classes=3):
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(count) % classes, [str(i) for i in range(classes)])


def numbered_set(count):
    """Image `i` has the value `i` in every pixel."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    return ImageSet(images, torch.arange(count), [str(i) for i in range(count)])


def training(data, batch_size, flip=False, crop_padding=0.0, **options):
    return TrainingBatches(data, batch_size, CPU, **PLAIN, flip=flip, crop_padding=crop_padding, **options)


# -- digits --


def test_digits_are_split_by_class_and_always_alike():
    train, val = load_dataset("digits", "unused")
    assert train.images.shape == (1437, 3, 32, 32) and val.images.shape == (360, 3, 32, 32)
    assert train.images.dtype == torch.uint8 and train.images.max() == 255
    assert val.labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    again = load_dataset("digits", "unused")[1]
    assert torch.equal(val.images, again.images) and torch.equal(val.labels, again.labels)
    assert not (train.images[:, None, 0, ::3, ::3] == val.images[None, :, 0, ::3, ::3]).flatten(2).all(2).any()


# -- folders --


@pytest.fixture
def folder(tmp_path):
    """Two classes; images of many modes and sizes."""
    modes = ["RGB", "L", "RGBA", "P", "CMYK", "1", "I;16", "LA"]
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i, mode in enumerate(modes):
                width, height = 20 + 3 * i, 40 - 2 * i
                if mode == "I;16":
                    image = Image.fromarray(np.full((height, width), 40_000, dtype=np.uint16))
                else:
                    image = Image.new("RGB", (width, height), (10 * i, 120, 200)).convert(mode)
                suffix = "tif" if mode == "CMYK" else "png"
                image.save(tmp_path / split / name / f"{i}.{suffix}")
    return tmp_path


def test_folder_accepts_images_of_any_mode_and_size(folder):
    train, val = load_dataset("folder", folder, image_size=16, workers=2)
    assert train.images.shape == (16, 3, 16, 16) and val.images.shape == (16, 3, 16, 16)
    assert train.classes == ["cat", "dog"] and train.labels.tolist() == [0] * 8 + [1] * 8
    assert train.images[0].unique(dim=1).flatten(1)[:, 0].tolist() == [0, 120, 200]
    assert train.images[6].unique().tolist() == [156]  # 16 bits: the upper 8 bits of 40,000


def test_images_are_cropped_at_the_centre_and_transparency_becomes_white(tmp_path):
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 250
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert read_square(tmp_path / "wide.png", 10).min() == 250
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_square(tmp_path / "clear.png", 8).min() == 255


def test_val_is_preferred_to_test(folder):
    (folder / "test").rename(folder / "val")
    assert len(load_dataset("folder", folder)[1]) == 16


def test_unreadable_images_are_reported_or_skipped(folder, capsys):
    broken = folder / "train" / "dog" / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"dog/broken.png cannot be read as an image.*--skip-unreadable"):
        load_dataset("folder", folder)
    train, val = load_dataset("folder", folder, skip_unreadable=True)
    assert (len(train), len(val)) == (16, 16)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out of {folder / 'train'}: unreadable images: 1 ({broken} (")
    broken.unlink()
    truncated = folder / "test" / "cat" / "0.png"
    truncated.write_bytes(truncated.read_bytes()[:60])
    with pytest.raises(InputError, match=r"cat/0.png"):
        load_dataset("folder", folder)


def test_folders_without_images_or_classes(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match=r"has no images: it needs train/<class>"):
        load_dataset("folder", empty)
    (empty / "train").mkdir()
    (empty / "val").mkdir()
    with pytest.raises(InputError, match="has no class folders"):
        load_dataset("folder", empty)
    (folder / "test" / "bird").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "test" / "bird" / "a.png")
    with pytest.raises(InputError, match=r"class 'bird' is in .*test but not in .*train"):
        load_dataset("folder", folder)


def test_one_error_names_all_unreadable_images(folder, capsys):
    broken = [folder / split / "dog" / f"broken{i}.png" for i, split in enumerate(("train", "train", "test"))]
    for file in broken:
        file.write_text("<html>")
    with pytest.raises(InputError, match=r"^3 images cannot be read: .*broken0.png \(an HTML.*broken1.*broken2.png \("):
        load_dataset("folder", folder)
    load_dataset("folder", folder, skip_unreadable=True)
    err = capsys.readouterr().err
    assert "train: unreadable images: 2 (" in err and "test: unreadable images: 1 (" in err
    for file in (folder / "train" / "dog").iterdir():
        file.write_text("<html>")
    with pytest.raises(InputError, match="no training image of these classes can be read: dog"):
        load_dataset("folder", folder, skip_unreadable=True)


def test_folders_without_images_are_no_classes(folder, capsys):
    (folder / "train" / "bird").mkdir()
    (folder / "train" / "bird" / "a.heic").touch()
    train, val = load_dataset("folder", folder)
    assert train.classes == val.classes == ["cat", "dog"] and train.labels.max() == 1
    assert "class folders without images: 1 (bird)" in capsys.readouterr().err
    for file in (folder / "test" / "dog").iterdir():
        file.unlink()
    train, val = load_dataset("folder", folder)  # a class without validation images
    assert val.classes == ["cat", "dog"] and val.labels.max() == 0


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.new("RGB", (20, 20))
    photo.paste((255, 255, 255), (0, 0, 10, 20))
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / folder).mkdir(parents=True)
        photo.save(tmp_path / folder / "0.png", exif=exif)
    train, _ = load_dataset("folder", tmp_path, image_size=20)
    assert train.images[0, 0, :10].min() == 255 and train.images[0, 0, 10:].max() == 0


def test_class_folders_without_images(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
    with pytest.raises(InputError, match=r"train has no images in its class folders \(AVIF, BMP"):
        load_dataset("folder", tmp_path)


def test_images_that_do_not_fit_into_memory(folder, monkeypatch):
    monkeypatch.setattr("data.memory.available_memory", lambda: 40_960)
    with pytest.raises(InputError, match=r"GiB of memory.*smaller --image-size.*folder2lmdb.py and pass --dataset"):
        load_dataset("folder", folder, image_size=512)


# -- CIFAR-100 --


def test_cifar100_in_class_folders(tmp_path):
    for split in ("train", "test"):
        for name in ("apple", "bear"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (1, 2, 3)).save(tmp_path / split / name / "0.webp", lossless=True)
    train, val = load_dataset("cifar100", tmp_path)
    assert len(train) == 2 and val.classes == ["apple", "bear"]
    assert train.images[1, :, 5, 5].tolist() == [1, 2, 3]


@pytest.fixture
def cifar_files(tmp_path, monkeypatch):
    """Return the folder of three training and three test images in the official format, and their pixels."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.arange(3 * 3072, dtype=np.uint32).astype(np.uint8).reshape(3, 3072)
    for split in ("train", "test"):
        (folder / split).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [2, 0, 1]}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b", "c"]}))
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR100, "_load_meta", lambda self: setattr(self, "classes", ["a", "b", "c"]))
    return folder, pixels


@pytest.mark.parametrize("layout", ["outer", "inner", "renamed"])
def test_cifar100_in_the_official_format(tmp_path, cifar_files, layout):
    folder, pixels = cifar_files
    data_dir = {"outer": tmp_path, "inner": folder, "renamed": tmp_path / "cifar"}[layout]
    if layout == "renamed":
        folder.rename(data_dir)
    train, val = load_dataset("cifar100", data_dir)
    assert train.labels.tolist() == [2, 0, 1] and val.classes == ["a", "b", "c"]
    assert torch.equal(train.images.flatten(1), torch.from_numpy(pixels))


def test_cifar100_is_evaluated_without_its_training_file(tmp_path, cifar_files):
    folder, pixels = cifar_files
    (folder / "train").unlink()
    (val,) = load_dataset("cifar100", tmp_path, splits=("val",))
    assert torch.equal(val.images.flatten(1), torch.from_numpy(pixels))


@pytest.mark.parametrize("give_file", [False, True])
def test_cifar100_as_the_universitys_archive(tmp_path, cifar_files, monkeypatch, give_file):
    folder, pixels = cifar_files
    archive = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as content:
        content.add(folder, "cifar-100-python")
    shutil.rmtree(folder)
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: folder.is_dir())
    with pytest.raises(InputError, match=r"checksum of .*tar.gz is wrong: it is damaged or another file; delete it"):
        load_dataset("cifar100", tmp_path)
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    train, val = load_dataset("cifar100", archive if give_file else tmp_path)
    assert torch.equal(train.images.flatten(1), torch.from_numpy(pixels)) and len(val) == 3


def test_cifar100_without_data_and_network(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr("data.download.download_url", no_network)
    with pytest.raises(InputError, match=r"CIFAR-100 is not in .* run with network access, or pass --data-dir"):
        load_dataset("cifar100", tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_cifar100_is_not_overwritten(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "test").write_bytes(b"half a file")
    with pytest.raises(InputError, match="are damaged or incomplete: delete them"):
        load_dataset("cifar100", tmp_path)


def test_the_error_of_an_unknown_name_lists_close_ones():
    with pytest.raises(InputError, match="there is no data set 'cifar10': did you mean cifar100"):
        load_dataset("cifar10", "x")


# -- Batches --


def test_flip_and_crop_equals_pil():
    data, padding = random_set(24, size=12), 3
    generator = torch.Generator().manual_seed(1)
    flips = torch.rand(24, generator=generator) < 0.5
    offsets = torch.randint(2 * padding + 1, (2, 24), generator=generator)
    cropped = flip_and_crop(data.images, flips, offsets, padding)
    for i in range(24):
        image = transforms.functional.pad(transforms.functional.to_pil_image(data.images[i]), [padding] * 4)
        top, left = offsets[:, i].tolist()
        image = transforms.functional.crop(image, top, left, 12, 12)
        image = transforms.functional.hflip(image) if flips[i] else image
        assert torch.equal(cropped[i], transforms.functional.pil_to_tensor(image))


def test_normalisation_equals_torchvisions():
    data, mean, std = random_set(5), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    batches = EvaluationBatches(data, 5, CPU, mean, std)
    ((images, labels),) = batches.part()
    expected = transforms.functional.normalize(data.images / 255, mean, std)
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=1e-5)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, data.labels)


def test_each_image_is_augmented_by_seed_and_epoch():
    same = random_set(1).images.expand(64, -1, -1, -1).contiguous()
    data = ImageSet(same, torch.zeros(64, dtype=torch.int64), ["0"])

    def images(seed, epoch):
        return next(training(data, 64, flip=True, crop_padding=0.25, seed=seed).epoch(epoch))[0]

    first = images(0, 0)
    assert len(first.flatten(1).unique(dim=0)) > 20  # of 2 * 5 * 5 possible results
    assert torch.equal(first, images(0, 0))
    assert not torch.equal(first, images(0, 1)) and not torch.equal(first, images(1, 0))
    assert not torch.equal(images(0, 1), images(1, 0))


def test_without_augmentation_images_are_unchanged():
    data = random_set(6)
    images, labels, weights, count = next(training(data, 6, seed=0).epoch(0))
    order = [int((data.images == image).flatten(1).all(1).nonzero()) for image in images.round().to(torch.uint8)]
    assert sorted(order) == list(range(6)) and count == 6
    assert torch.equal(labels, data.labels[order]) and weights.tolist() == [1.0] * 6


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_training_image_is_used_once_for_any_number_of_ranks(world_size):
    data = numbered_set(22)  # batches of 10, 10 and 2
    ranks = [list(training(data, 10, seed=3, rank=r, world_size=world_size).epoch(4)) for r in range(world_size)]
    single_rank = list(training(data, 10, seed=3).epoch(4))
    used = []
    for step in range(3):
        parts = [steps[step] for steps in ranks]
        labels = torch.cat([labels[weights > 0] for _, labels, weights, _ in parts])
        assert torch.equal(labels, single_rank[step][1])
        assert all(len(labels) >= 1 for _, labels, _, _ in parts)
        used += labels.tolist()
    assert sorted(used) == list(range(22))


def test_an_epoch_can_start_at_any_step():
    batches = training(random_set(30), 8, flip=True, crop_padding=0.25, seed=1)
    epoch, rest = list(batches.epoch(2)), list(batches.epoch(2, first_step=2))
    assert len(rest) == 2
    for (images, *_), (repeated, *_) in zip(epoch[2:], rest, strict=True):
        assert torch.equal(images, repeated)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_evaluation_image_is_counted_once_in_the_same_batches(world_size):
    batches = EvaluationBatches(numbered_set(23), 5, CPU, **PLAIN)
    parts = [labels.tolist() for r in range(world_size) for _, labels in batches.part(r, world_size)]
    assert sorted(parts) == [list(range(i, min(i + 5, 23))) for i in range(0, 23, 5)]


def test_a_subset_has_the_same_images_each_time_and_all_classes():
    data = random_set(300)
    subset = data.subset(60)
    assert len(subset) == 60 and subset.labels.bincount().min() > 10
    assert torch.equal(subset.images, data.subset(60).images)
    assert data.subset(None) is data
    with pytest.raises(InputError, match="limit of 0"):
        data.subset(0)
