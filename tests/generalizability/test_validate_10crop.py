"""The ten-crop evaluation, compared with a plain loop over the images."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import TORCHRUN, run_python
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision import transforms

import folder2lmdb
import validate_10crop
from data.ten_crops import CENTER_CROP, ten_crops
from distributed import Ranks
from models import create_model
from recipes import RECIPES
from s3net_common.checkpoints import load_weights
from s3net_common.errors import InputError
from s3net_common.framing import Normalization
from validate_10crop import Args

SCRIPT = Path(__file__).parents[2] / "generalizability" / "validate_10crop.py"
SHARED = Path(__file__).parents[3] / "shared"
CPU = torch.device("cpu")
CLASSES = ["ant", "bee", "cow", "dog", "eel", "fox", "gnu"]
OPTIONS = {"growth_rate": 4, "block_config": [1, 1], "num_init_features": 4, "bn_size": 1}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SIZES = {"resize": 48, "crop": 33, "batch_size": 4, "workers": 0, "device": "cpu"}


def save_checkpoint(path, classes=CLASSES, outputs=None):
    """Write a tiny network with random weights as the trainer does."""
    outputs = outputs or len(classes)
    torch.manual_seed(3)
    model = create_model("s3net_imagenet_small", outputs, **OPTIONS)
    noise = torch.nn.functional.interpolate(torch.randn(64, 3, 5, 5), size=33, mode="bicubic")
    with torch.no_grad():  # with these statistics and this bias, images of noise get different classes
        for _ in range(20):
            model.train()(noise)
        model.classifier.bias -= model.eval()(noise).mean(dim=0)
    metadata = {
        "model": "s3net_imagenet_small",
        "options": json.dumps(OPTIONS),
        "num_classes": str(outputs),
        "classes": json.dumps(classes),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "image_size": "32",
        "dataset": "imagenet",
    }
    save_file(model.state_dict(), path, metadata)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """val/ with 14 JPEGs of coloured noise, of many shapes, in 7 classes; and the weights of a network."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(14):
        path = folder / "val" / CLASSES[i % 7] / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (rng.integers(3, 9), rng.integers(3, 9), 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50 + 3 * i, 71 - i), Image.Resampling.BICUBIC).save(path)
    save_checkpoint(folder / "best.safetensors")
    return folder


def evaluate(folder, tmp_path, **flags):
    flags = {"checkpoint": folder / "best.safetensors", "images": folder, **SIZES} | flags
    out = tmp_path / "results.json"
    assert validate_10crop.main(Args(**flags, out=out, overwrite=True, amp=False)) == 0
    return json.loads(out.read_text())


def load_model(folder):
    return load_weights(create_model("s3net_imagenet_small", 7, **OPTIONS), folder / "best.safetensors").eval()


def plain_loop(folder):
    """Compute the errors in percent image by image: centre crop top-1, top-5, ten crops top-1, top-5."""
    model = load_model(folder)
    resize, normalize = transforms.Resize(48), transforms.Normalize(MEAN, STD)
    to_tensor = transforms.ToTensor()
    files = sorted((folder / "val").rglob("*.JPEG"))
    wrong = np.zeros(4)
    for file in files:
        image, label = resize(Image.open(file).convert("RGB")), CLASSES.index(file.parent.name)
        single = [transforms.CenterCrop(33)(image)]
        for i, crops in enumerate((single, transforms.TenCrop(33)(image))):
            with torch.no_grad():
                logits = sum(model(normalize(to_tensor(crop))[None])[0] for crop in crops) / len(crops)
            order = logits.argsort(descending=True).tolist()
            wrong[2 * i : 2 * i + 2] += [order[0] != label, label not in order[:5]]
    return (100 * wrong / len(files)).tolist()


def errors_of(results):
    return [results[crops][f"top{k}_error"] for crops in ("centre_crop", "ten_crops") for k in (1, 5)]


@pytest.mark.parametrize(("batch_size", "workers"), [(4, 0), (14, 2)])
def test_the_errors_equal_those_of_a_plain_loop(folder, tmp_path, capsys, batch_size, workers):
    expected = plain_loop(folder)
    assert 0 < expected[1] < expected[0] < 100 and expected[:2] != expected[2:]  # no number is trivial
    results = evaluate(folder, tmp_path, batch_size=batch_size, workers=workers)
    assert errors_of(results) == pytest.approx(expected, abs=1e-9)
    printed = capsys.readouterr().out
    assert f"{expected[0]:.2f}%" in printed and f"{expected[2]:.2f}%" in printed
    assert "14 images of 7 classes" in printed


def test_the_logits_are_those_of_single_crops(folder):
    model, file = load_model(folder), next((folder / "val").rglob("*.JPEG"))
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    image = transforms.Resize(48)(Image.open(file).convert("RGB"))
    with torch.no_grad():
        expected = torch.cat([model(prepare(crop)[None]) for crop in transforms.TenCrop(33)(image)])
        center = model(prepare(transforms.CenterCrop(33)(image))[None])[0]
    pixels = ten_crops(Image.open(file).convert("RGB"), resize=48, crop=33)
    crops = Normalization(CPU, MEAN, STD, 33)(pixels[None])
    logits = validate_10crop.ten_crop_logits(model, validate_10crop.Precision(CPU, mixed=False), crops)[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[CENTER_CROP], center, atol=1e-4, rtol=1e-4)


def test_the_results_describe_the_evaluation(folder, tmp_path):
    results = evaluate(folder, tmp_path)
    digest = hashlib.sha256((folder / "best.safetensors").read_bytes()).hexdigest()
    assert results["checkpoint"]["sha256"] == digest and results["kind"] == "validate_10crop"
    assert results["images"] == {"path": str(folder), "count": 14, "skipped": 0, "classes": 7, "limit": None}
    assert results["preprocessing"] == {"resize": 48, "crop": 33, "image_size": 33, "mean": MEAN, "std": STD}
    model = create_model("s3net_imagenet_small", 7, **OPTIONS)
    assert results["parameters"] == sum(p.numel() for p in model.parameters())
    assert (results["dataset"], results["model"], results["outputs"]) == ("imagenet", "s3net_imagenet_small", 7)
    assert {"python", "torch", "torchvision"} <= set(results["versions"]) and results["processes"] == 1
    assert results["command"].startswith("python ") and results["machine"]
    for crops in ("centre_crop", "ten_crops"):
        low, high = results[crops]["top1_interval"]
        assert low < results[crops]["top1_error"] < high


# -- Distributed ranks --


def test_the_counts_of_all_ranks_add_up(folder, monkeypatch):
    """Each of 3 ranks in turn, without torchrun. Batches of 4 images give 4, 4, 4 and 2 images."""
    args = Args(folder / "best.safetensors", folder, **SIZES)
    images, network = validate_10crop.prepare(args, CPU)
    precision = validate_10crop.Precision(CPU, mixed=False)

    def count_errors(rank, world_size):
        return validate_10crop.count_errors(args, images, network, precision, Ranks(rank, world_size, CPU))

    total = count_errors(0, 1)
    monkeypatch.setattr(Ranks, "on_all_ranks", lambda self, action: action())
    monkeypatch.setattr(Ranks, "reduce", lambda self, values: values)  # each rank keeps its own counts
    parts = [count_errors(rank, 3) for rank in range(3)]
    assert [part["ten_crops"].images for part in parts] == [6, 4, 4]
    for crops, confusion in total.items():
        assert sum(part[crops].counts for part in parts).equal(confusion.counts)
        for name in ("errors", "restricted_errors"):
            sums = tuple(map(sum, zip(*(getattr(part[crops], name) for part in parts), strict=True)))
            assert sums == getattr(confusion, name)


def test_torchrun_counts_every_image_once_and_writes_one_file(folder, tmp_path):
    out = tmp_path / "results.json"
    flags = ["--checkpoint", folder / "best.safetensors", "--images", folder, "--resize", 48, "--crop", 33]
    flags += ["--workers", 0, "--batch-size", 3, "--device", "cpu", "--no-amp", "--out", out]
    process = run_python(*TORCHRUN, "--nproc_per_node=2", SCRIPT, *flags, check=True)
    results = json.loads(out.read_text())
    assert (results["images"]["count"], results["processes"]) == (14, 2)
    assert errors_of(results) == pytest.approx(plain_loop(folder), abs=1e-9)
    assert process.stdout.count("written to") == 1


# -- Classes --


def test_images_of_some_classes_are_matched_by_name_with_both_errors(folder, tmp_path, capsys):
    names = ["hen", *reversed(CLASSES)]
    whole, part = reordered(folder, names), save_checkpoint(tmp_path / "part.safetensors", names, outputs=8)
    save_file(whole.state_dict(), part, metadata_of(part))
    results = evaluate(folder, tmp_path, checkpoint=part)
    assert "the images have 7 of the network's 8 classes, matched by name (absent: hen)" in capsys.readouterr().out
    assert (results["outputs"], results["images"]["classes"], results["images"]["count"]) == (8, 7, 14)
    # The logit of the absent class is the largest for all images: all are errors, but not among the classes present.
    assert results["ten_crops"]["top1_error"] == results["centre_crop"]["top1_error"] == 100
    expected = plain_loop(folder)
    assert results["centre_crop"]["restricted_top1_error"] == pytest.approx(expected[0], abs=1e-9)
    assert results["ten_crops"]["restricted_top5_error"] == pytest.approx(expected[3], abs=1e-9)
    assert results["confused_pairs"][0]["predicted"] == "hen"


def reordered(folder, names):
    """Return the network of `folder` with outputs in another order, and new ones whose logit is always the largest."""
    old = load_model(folder)
    model = create_model("s3net_imagenet_small", len(names), **OPTIONS)
    model.load_state_dict(
        {key: value for key, value in old.state_dict().items() if "classifier" not in key}, strict=False
    )
    with torch.no_grad():
        for i, name in enumerate(names):
            known = name in CLASSES
            model.classifier.weight[i] = old.classifier.weight[CLASSES.index(name)] if known else 0
            model.classifier.bias[i] = old.classifier.bias[CLASSES.index(name)] if known else 1e4
    return model


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_classes_in_another_order_are_matched_by_name(folder, tmp_path, capsys):
    """A plain state dict with --classes, and a file with names: the outputs have another order than the folders."""
    names = [CLASSES[i] for i in (3, 1, 6, 0, 5, 2, 4)]
    model = reordered(folder, names)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    (tmp_path / "names.txt").write_text("\n".join(names))
    flags = {"model": "s3net_imagenet_small", "model_options": json.dumps(OPTIONS), "classes": tmp_path / "names.txt"}
    results = evaluate(folder, tmp_path, checkpoint=tmp_path / "plain.pt", **flags)
    assert results["preprocessing"]["mean"] == [0.485, 0.456, 0.406] and results["dataset"] is None
    printed = capsys.readouterr().out
    assert "differ in order: they are matched by name" in printed
    assert "plain.pt does not say how its images are prepared: as for imagenet" in printed
    named = save_checkpoint(tmp_path / "named.safetensors", names)
    save_file(model.state_dict(), named, metadata_of(named))
    assert errors_of(evaluate(folder, tmp_path, checkpoint=named)) == pytest.approx(plain_loop(folder), abs=1e-9)


def test_the_checkpoint_says_how_its_images_are_prepared(folder, tmp_path):
    results = evaluate(folder, tmp_path, resize=None, crop=None)  # trained on imagenet with 32 pixels
    assert results["preprocessing"] == {"resize": 37, "crop": 32, "image_size": 32, "mean": MEAN, "std": STD}
    results = evaluate(folder, tmp_path, resize=None, crop=28)
    assert (results["preprocessing"]["resize"], results["preprocessing"]["crop"]) == (32, 28)


def test_a_file_without_metadata_is_prepared_as_for_the_data_set(folder, tmp_path):
    torch.save(load_model(folder).state_dict(), tmp_path / "plain.pt")
    flags = {"checkpoint": tmp_path / "plain.pt", "model": "s3net_imagenet_small", "model_options": json.dumps(OPTIONS)}
    results = evaluate(folder, tmp_path, dataset="cifar100", resize=None, crop=None, **flags)
    recipe = RECIPES["cifar100"]
    assert results["preprocessing"]["mean"] == list(recipe.mean) and results["preprocessing"]["std"] == list(recipe.std)
    assert results["preprocessing"]["resize"] == results["preprocessing"]["crop"] == 32


def test_errors_by_class_and_confusions(folder, tmp_path):
    results = evaluate(folder, tmp_path)
    rows = results["classes"]
    assert [row["name"] for row in rows] == CLASSES and [row["images"] for row in rows] == [2] * 7
    errors = sum(row["errors"] for row in rows)
    assert 100 * errors / 14 == pytest.approx(results["ten_crops"]["top1_error"])
    matrix = np.array(results["confusion_matrix"]["images"])
    assert matrix.sum() == 14 and matrix.sum() - np.trace(matrix) == errors
    assert Image.open(tmp_path / "results.png").size[0] > 500


def error_message(folder, tmp_path, **flags):
    with pytest.raises(InputError) as error:
        evaluate(folder, tmp_path, **flags)
    assert "\n" not in str(error.value) and not (tmp_path / "results.json").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        (
            ["ant", "bee", "cat", *CLASSES[3:]],
            "the images have classes that the network does not have: cow; the 7 classes of",
        ),
        (CLASSES[:6], "does not have: gnu; the 6 classes of"),
        ([str(i) for i in range(7)], "does not have: ant, bee, cow, dog, eel and 2 more (7 of 7); the 7 classes of"),
    ],
)
def test_unknown_classes_are_listed_and_refused(folder, tmp_path, trained, message):
    checkpoint = save_checkpoint(tmp_path / "other.safetensors", trained)
    assert message in error_message(folder, tmp_path, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["ant", "bee"],
            "names.txt does not fit this checkpoint: output 2 is 'cow' in the checkpoint and missing in the file",
        ),
        (["ant", "ant"], "names.txt contains 'ant' twice"),
        ([], "names.txt is empty"),
    ],
)
def test_wrong_files_of_class_names(folder, tmp_path, lines, message):
    (tmp_path / "names.txt").write_text("\n".join(lines))
    assert message in error_message(folder, tmp_path, classes=tmp_path / "names.txt")


def test_a_class_folder_without_an_output(folder, tmp_path):
    torch.save(load_model(folder).state_dict(), tmp_path / "plain.pt")
    (tmp_path / "names.txt").write_text("\n".join(["ant", "bee", "cow", "dog", "eel", "fox", "hen"]))
    flags = {"model": "s3net_imagenet_small", "model_options": json.dumps(OPTIONS), "classes": tmp_path / "names.txt"}
    message = error_message(folder, tmp_path, checkpoint=tmp_path / "plain.pt", **flags)
    assert message.startswith("the images have classes that the network does not have: gnu; the 7 classes of")


def test_more_outputs_than_the_images_have_classes(tmp_path, folder):
    checkpoint = save_checkpoint(tmp_path / "more.safetensors", CLASSES, outputs=9)  # as trained with --num-classes 9
    results = evaluate(folder, tmp_path, checkpoint=checkpoint)
    assert results["outputs"] == 9 and "restricted_top1_error" not in results["ten_crops"]
    (tmp_path / "results.json").unlink()
    torch.save(create_model("s3net_imagenet_small", 9, **OPTIONS).state_dict(), tmp_path / "plain.pt")
    flags = {"model": "s3net_imagenet_small", "model_options": json.dumps(OPTIONS)}
    message = error_message(folder, tmp_path, checkpoint=tmp_path / "plain.pt", **flags)
    assert "classifier.weight has shape (9, " in message and message.endswith("others, pass --num-classes N")
    message = error_message(folder, tmp_path, checkpoint=tmp_path / "plain.pt", num_classes=9, **flags)
    assert "names no classes, and the network has 9 outputs, and the images have 7 classes" in message
    assert "pass --classes FILE" in message


# -- Other input --


def test_limit_uses_the_same_images_each_time(folder, tmp_path):
    results = evaluate(folder, tmp_path, limit=5)
    assert (results["images"]["count"], results["images"]["limit"]) == (5, 5)
    first = errors_of(results)
    (tmp_path / "results.json").unlink()
    assert errors_of(evaluate(folder, tmp_path, limit=5)) == first


def test_crops_that_are_too_small_for_the_network(folder, tmp_path):
    assert "this network cannot take images of 1x1" in error_message(folder, tmp_path, resize=2, crop=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_reported_or_skipped(folder, tmp_path, workers):
    for path in (folder / "val").rglob("*.JPEG"):
        copy = tmp_path / "val" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    broken = tmp_path / "val" / "cow" / "2.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    message = error_message(folder, tmp_path, images=tmp_path / "val", workers=workers)
    assert message.startswith(f"{broken} cannot be read as an image") and "--skip-unreadable" in message
    results = evaluate(folder, tmp_path, images=tmp_path / "val", workers=workers, skip_unreadable=True)
    assert (results["images"]["count"], results["images"]["skipped"]) == (13, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"images": Path("/nowhere/at/all")},
            "there is no /nowhere/at/all: pass --images with an LMDB file or a folder",
        ),
        ({"checkpoint": Path("absent.pt")}, "there is no checkpoint absent.pt"),
        ({"crop": 64}, "--crop 64 does not fit into --resize 48"),
        ({"limit": 0}, "--limit 0 is not possible: give a number of 1 or more"),
        ({"model": "s3net_imagenet_smal"}, "there is no network 's3net_imagenet_smal': did you mean s3net_imagenet_"),
        ({"model_options": "k=4"}, "--model-options k=4 is no JSON"),
        ({"model_options": '{"growth": 4}'}, "s3net_imagenet_small has no option 'growth'"),
        ({"model_options": '{"growth_rate": 6}'}, "does not fit this network"),
    ],
)
def test_bad_flags(folder, tmp_path, flags, message):
    assert message in error_message(folder, tmp_path, **flags)


def test_folders_without_images_or_classes(folder, tmp_path):
    (tmp_path / "images").mkdir()
    assert "has no class folders" in error_message(folder, tmp_path, images=tmp_path / "images")
    (tmp_path / "images" / "ant").mkdir()
    assert "has no images in its class folders (" in error_message(folder, tmp_path, images=tmp_path / "images")


def test_results_are_overwritten_on_request_only(folder, tmp_path):
    out = tmp_path / "results.json"
    out.write_text("kept")
    args = Args(folder / "best.safetensors", folder, **SIZES, out=out)
    with pytest.raises(InputError, match=r"exists already: pass --overwrite to replace it, or another --out"):
        validate_10crop.main(args)
    assert out.read_text() == "kept"
    (tmp_path / "other.png").write_text("kept")
    with pytest.raises(InputError, match=r"other\.png exists already"):
        validate_10crop.main(Args(folder / "best.safetensors", folder, **SIZES, out=tmp_path / "other.json"))


def test_the_default_file_has_the_names_of_run_and_checkpoint():
    assert validate_10crop.default_file(Path("runs/imagenet-x-s0/best.safetensors")).name == "imagenet-x-s0-best.json"
    assert validate_10crop.default_file(Path("/a/b/model_best.pth.tar")).name == "b-model_best.json"


def test_an_lmdb_file_and_its_folder_give_the_same_errors(folder, tmp_path):
    folder2lmdb.main(folder2lmdb.Args(images=folder / "val", out=tmp_path / "val.lmdb"))
    expected = errors_of(evaluate(folder, tmp_path))
    for images in (tmp_path, tmp_path / "val.lmdb"):
        assert errors_of(evaluate(folder, tmp_path, images=images, workers=2)) == expected


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published checkpoint is missing")
def test_the_authors_checkpoint_on_real_images(tmp_path):
    folders = sorted((SHARED / "data" / "imagenet_sample").iterdir())[:10]
    (tmp_path / "val").mkdir()
    for folder in folders:
        (tmp_path / "val" / folder.name).symlink_to(folder)
    options = {"growth_rate": 8, "block_config": [2, 2, 2], "num_init_features": 8, "bn_size": 2}
    results = evaluate(
        tmp_path,
        tmp_path,
        checkpoint=SHARED / "reference" / "authors_imagenet_k8_b222_i8_bn2.pth.tar",
        model="s3net_imagenet_small",
        model_options=json.dumps(options),
        resize=73,
        crop=64,
    )
    assert (results["outputs"], results["images"]["count"]) == (10, len(list((tmp_path / "val").glob("*/*"))))
