"""Decoding at a reduced size and on a device, against decoding in full. Without a GPU, the device is the CPU."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image

from data.batches import DiskEvaluationBatches, DiskTrainingBatches
from data.datasets import load_dataset
from data.decoding import (
    Crop,
    CropDrawer,
    collate_encoded,
    decode_crops,
    draw_crop,
    jpeg_size,
    random_crop,
    reduced_random_crop,
)
from data.image_sets import ImageSet
from distributed import Ranks
from s3net_common.errors import InputError, LocalError
from training.config import check_device, check_flags, resolve_config

CPU = torch.device("cpu")
PHOTOGRAPH = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"  # 640 x 427


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    with Image.open(PHOTOGRAPH) as image:
        return image.convert("RGB")


@pytest.fixture(scope="module")
def tree(tmp_path_factory, photograph):
    """Two classes of parts of the photograph, as JPEG, PNG, grey JPEG and CMYK JPEG."""
    folder = tmp_path_factory.mktemp("tree")
    for half, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("left", "right")):
            (folder / half / name).mkdir(parents=True)
            for i in range(count):
                part = photograph.crop((200 * label + 20 * i, 10 * i, 200 * label + 20 * i + 300, 10 * i + 260))
                part = part.convert({3: "L", 4: "CMYK"}.get(i, "RGB"))
                part.save(folder / half / name / f"{i}.{'png' if i == 2 else 'jpg'}")
    return folder


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean difference of pixels, from 0 to 255."""
    assert first.shape == second.shape and first.dtype == second.dtype == torch.uint8
    return float((first.float() - second.float()).abs().mean())


@pytest.mark.parametrize(
    ("size", "reductions"), [(224, {1.0}), (100, {1.0, 2.0, 4.0}), (32, {4.0, 8.0}), (8, {8.0})], ids=str
)
def test_a_draft_is_as_small_as_the_crop_allows(photograph, monkeypatch, size, reductions):
    encoded = encode(photograph, "jpeg", quality=95)
    decoded = []
    of_image = Crop.of_image

    def record(crop, image, reduction=1):
        decoded.append((crop, image.size, reduction))
        return of_image(crop, image, reduction)

    differences = []
    for seed in range(12):
        torch.manual_seed(seed)
        full = random_crop(Image.open(io.BytesIO(encoded)).convert("RGB"), size, flip=True)
        with monkeypatch.context() as context:
            context.setattr(Crop, "of_image", record)
            torch.manual_seed(seed)
            differences.append(difference(reduced_random_crop(encoded, "", size, flip=True), full))
        crop, (width, height), reduction = decoded[-1]
        assert (width, height) == (-(-640 // reduction), -(-427 // reduction))
        assert min(crop.width, crop.height) >= reduction * size or reduction == 1  # the crop is not enlarged
        assert reduction == 8 or min(crop.width, crop.height) < 2.1 * reduction * size
    assert {reduction for *_, reduction in decoded} == reductions
    assert max(differences) < 6 and sum(differences) / 12 < 4
    torch.manual_seed(0)
    mirrored = reduced_random_crop(encoded, "", size, flip=True).flip(2)
    torch.manual_seed(0)
    assert difference(mirrored, reduced_random_crop(encoded, "", size, flip=True)) > 6


def test_other_formats_are_decoded_in_full(photograph):
    encoded = encode(photograph, "png")
    torch.manual_seed(1)
    expected = random_crop(photograph, 32, flip=True)
    torch.manual_seed(1)
    assert torch.equal(reduced_random_crop(encoded, "", 32, flip=True), expected)
    with pytest.raises(InputError, match="broken"):
        reduced_random_crop(encoded[:1000], "broken.png", 32, flip=True)


@pytest.mark.parametrize("decode", ["draft", "gpu"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_full_decoding(tree, decode, workers):
    train, _ = load_dataset("imagenet", tree)
    options = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "image_size": 32, "flip": True, "seed": 4}
    batches = [DiskTrainingBatches(train, 5, CPU, workers=workers, decode=kind, **options) for kind in ("cpu", decode)]
    for (full, labels, weights, count), (other, *rest) in zip(*(b.epoch(1) for b in batches), strict=True):
        assert other.shape == full.shape and torch.equal(rest[0], labels) and torch.equal(rest[1], weights)
        assert rest[2] == count
        distance = (full - other).abs().mean(dim=(1, 2, 3))  # in units of a pixel's 256 values
        assert distance.max() < 8 and distance.mean() < 4
    for made in batches:
        made.close()


def test_the_header_says_which_files_a_device_decodes(photograph):
    assert jpeg_size(encode(photograph, "jpeg")) == (640, 427)
    assert jpeg_size(encode(photograph.convert("L"), "jpeg")) == (640, 427)
    for kind, mode in (("png", "RGB"), ("jpeg", "CMYK")):
        assert jpeg_size(encode(photograph.convert(mode), kind)) is None
    assert jpeg_size(b"no image") is None


def test_a_crop_of_pixels_is_that_of_the_image(photograph):
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
    torch.manual_seed(2)
    for _ in range(4):
        crop = draw_crop(640, 427, 48, flip=True)
        assert difference(crop.of_pixels(pixels), crop.of_image(photograph)) < 0.6


def encoded_batch(tree, damage: bool):
    train, _ = load_dataset("imagenet", tree)
    items = [CropDrawer(train.source, 32, True)[i, i] for i in range(6)]
    batch, _, readable, problems = collate_encoded(items)
    assert readable.all() and not problems
    assert [crop is None for crop in batch.crops] == [False, False, True, False, True, False]  # PNG and CMYK
    if damage:
        start = sum(shape.numel() for shape in batch.shapes[:3])
        batch.content[start + 10 : start + batch.shapes[3].numel()] = 0
    return batch


def test_a_damaged_jpeg_is_named_and_the_rest_of_its_batch_decoded(tree):
    whole, problems = decode_crops(encoded_batch(tree, damage=False), CPU)
    assert problems == [None] * 6 and whole.shape == (6, 3, 32, 32)
    pixels, problems = decode_crops(encoded_batch(tree, damage=True), CPU)
    assert [problem is None for problem in problems] == [True, True, True, False, True, True]
    assert "3.jpg" in str(problems[3]) and not pixels[3].any()
    for i in (0, 1, 2, 4, 5):
        assert difference(pixels[i], whole[i]) < 1


@pytest.mark.parametrize("skip", [False, True])
def test_a_jpeg_that_only_the_device_finds_damaged(tree, tmp_path, skip):
    folder = tmp_path / "damaged"
    for path in sorted(tree.rglob("*.*")):
        (folder / path.relative_to(tree).parent).mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(tree)).write_bytes(path.read_bytes())
    file = folder / "train" / "left" / "0.jpg"
    file.write_bytes(file.read_bytes()[:700] + b"\0" * 400)
    train, _ = load_dataset("imagenet", folder, skip_unreadable=skip)
    options = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "image_size": 32, "flip": True, "seed": 4}
    batches = DiskTrainingBatches(train, 12, CPU, workers=0, decode="gpu", **options)
    if not skip:
        with pytest.raises(LocalError, match=r"left.0\.jpg"):
            list(batches.epoch(0))
    else:
        (_, _, weights, count) = next(batches.epoch(0))
        assert (weights.sum(), count) == (11, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "digits", "decode": "draft"}, "--decode draft is for images on disk, --dataset imagenet"),
        (
            {"dataset": "imagenet", "decode": "gpu"},
            "--decode gpu needs a CUDA GPU, and a torchvision with decode_jpeg: pass --decode draft",
        ),
    ],
)
def test_where_a_decoder_cannot_be_used(settings, message):
    with pytest.raises(InputError, match=f"^{message}"):
        check_device(SimpleNamespace(sync_bn=False, augment=True, **settings), {}, Ranks(0, 1, CPU))
    with pytest.raises(InputError, match="there is no decoder 'drafts': did you mean draft"):
        check_flags({"decode": "drafts"})


def test_without_augmentation_the_crops_are_those_of_an_evaluation(tree):
    train, _ = load_dataset("imagenet", tree)
    options = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "image_size": 32}
    plain = DiskTrainingBatches(train, 12, CPU, workers=0, flip=False, seed=4, augment=False, **options)
    (images, labels, _, _) = next(plain.epoch(0))
    (expected, in_order) = next(DiskEvaluationBatches(train, 12, CPU, workers=0, **options).part())
    order = [int((images[i] - expected).abs().sum(dim=(1, 2, 3)).argmin()) for i in range(12)]
    assert sorted(order) == list(range(12)) and torch.equal(images, expected[order])
    assert torch.equal(labels, in_order[order])


def test_the_recipe_without_augmentation():
    halves = [ImageSet(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0]), ["a", "b"])] * 2
    flags = {"dataset": "cifar100", "seed": 1}
    configs = [resolve_config(flags | more, halves, CPU, {}) for more in ({}, {"augment": False})]
    assert [(c.augment, c.flip, c.crop_padding) for c in configs] == [(True, True, 0.125), (False, False, 0.0)]
    with pytest.raises(InputError, match=r"^--decode draft decodes random crops: leave out --no-augment, or --decode"):
        check_device(
            SimpleNamespace(sync_bn=False, augment=False, dataset="imagenet", decode="draft"), {}, Ranks(0, 1, CPU)
        )
