"""--eval-only of the trainer and predict.py, compared with a plain loop over the image files."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import folder2lmdb
import predict
import train_s3net
from data.image_sets import DiskImages, open_source
from recipes import RECIPES
from s3net_common.checkpoints import pretrained_file, read_options, save_weights
from s3net_common.errors import InputError
from s3net_networks import create_network
from train_s3net import Args
from training.trained_network import read_trained_network

NAMES = sorted(["ant", "bee", "cow", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lynx"])
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
CIFAR = Path(__file__).parents[2] / "data" / "cifar100"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = create_network("s3net_cifar", 12, depth=7, growth_rate=4).eval()
    torch.nn.init.normal_(model.classifier.weight, std=3)
    return model


@pytest.fixture(scope="module")
def photographs():
    """36 images of noise that is larger than the network's input, three for each class."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 60, (36, 2))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def write_folders(root, photographs, folders, splits=("train", "val")):
    """Write the images of class i of NAMES into the folder with the i-th name; None leaves the class out."""
    for i, image in enumerate(photographs):
        if folders[i % 12] is not None:
            for split in splits:
                path = root / split / folders[i % 12] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    return root


def save_checkpoint(path, model, classes=NAMES, dataset="folder", image_size=24):
    metadata = {"model": "s3net_cifar", "model_options": {"depth": 7, "growth_rate": 4}, "num_classes": 12}
    metadata |= {"classes": classes, "mean": MEAN, "std": STD, "image_size": image_size, "dataset": dataset}
    save_weights(path, model.state_dict(), metadata)
    return path


def logits_of(model, image, mean=MEAN, std=STD, size=24):
    square = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    pixels = (np.asarray(square) / 255 - mean) / std
    with torch.no_grad():
        return model(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])[0].numpy()


def evaluate(tmp_path, checkpoint, data_dir, **flags):
    out = tmp_path / "evaluation"
    flags = {"dataset": "folder", "device": "cpu", "amp": False, "workers": 1} | flags
    arguments = Args(eval_only=True, checkpoint=checkpoint, data_dir=data_dir, out=out, overwrite=True, **flags)
    assert train_s3net.main(arguments) == 0
    return json.loads((out / "evaluation.json").read_text())


def plain_error(model, photographs, present=range(12), columns=range(12), **preparation):
    """Compute the error in percent over the images of some classes, with the logits of some outputs."""
    columns, wrong = list(columns), []
    for i, image in enumerate(photographs):
        if i % 12 in present:
            logits = logits_of(model, image, **preparation)[columns]
            wrong.append(columns[int(logits.argmax())] != i % 12)
    return 100 * np.mean(wrong)


def test_the_networks_own_classes(network, photographs, tmp_path, capsys):
    data = write_folders(tmp_path / "data", photographs, NAMES)
    results = evaluate(tmp_path, save_checkpoint(tmp_path / "best.safetensors", network), data)
    expected = plain_error(network, photographs)
    assert 0 < expected < 100 and results["val_error"] == pytest.approx(expected)
    colours = {"mean": MEAN, "std": STD, "interpolation": "bilinear"}
    assert results["preparation"] == {"resize": 24, "crop": 24, "image_size": 24, "method": "fit"} | colours
    assert sum(row["errors"] for row in results["classes"]) == pytest.approx(expected * 36 / 100)
    assert Image.open(tmp_path / "evaluation" / "confusion.png").size[0] > 500
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["val_error"] == results["val_error"]


def test_some_of_the_classes_give_both_errors(network, photographs, tmp_path, capsys):
    present = [8, 9, 10, 11]
    data = write_folders(tmp_path / "data", photographs, [n if i in present else None for i, n in enumerate(NAMES)])
    results = evaluate(tmp_path, save_checkpoint(tmp_path / "best.safetensors", network), data)
    assert results["val_error"] == pytest.approx(plain_error(network, photographs, present))
    restricted = plain_error(network, photographs, present, present)
    assert results["val_error_restricted"] == pytest.approx(restricted)
    printed = capsys.readouterr().out
    assert "the images have 4 of the network's 12 classes, matched by name (absent: ant, bee, cow" in printed
    assert f"restricted to the 4 classes of the images: error {restricted:.2f}%" in printed


def test_outputs_in_another_order_than_the_folders(network, photographs, tmp_path, capsys):
    """Evaluated with the file's names, output i is the folder of this name, in memory and on disk."""
    order = [5, 3, 11, 0, 2, 1, 4, 10, 9, 8, 7, 6]
    names = [NAMES[i] for i in order]
    checkpoint = save_checkpoint(tmp_path / "best.safetensors", network, names)
    data = write_folders(tmp_path / "data", photographs, names)
    expected = plain_error(network, photographs)
    assert evaluate(tmp_path, checkpoint, data)["val_error"] == pytest.approx(expected)
    assert "differ in order: they are matched by name" in capsys.readouterr().out
    for split in ("train", "val"):
        folder2lmdb.main(folder2lmdb.Args(images=data / split, out=tmp_path / "lmdb" / f"{split}.lmdb"))
    on_disk = evaluate(tmp_path, checkpoint, tmp_path / "lmdb", dataset="imagenet")
    assert abs(on_disk["val_error"] - expected) < 6  # resized by other functions


def test_folders_of_numbers_and_a_file_without_names(network, photographs, tmp_path, capsys):
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    data = write_folders(tmp_path / "data", photographs, [str(i) for i in range(12)])
    flags = {"depth": 7, "growth_rate": 4}
    results = evaluate(tmp_path, tmp_path / "plain.pt", data, **flags)
    recipe = train_s3net.RECIPES["cifar100"]  # the network is called s3net_cifar
    expected = plain_error(network, photographs, mean=recipe.mean, std=recipe.std, size=32)
    assert results["val_error"] == pytest.approx(expected)
    assert "the folders 0 to 11 are the outputs of these numbers" in capsys.readouterr().out


def test_folders_of_numbers_and_a_file_with_other_names_are_refused(network, photographs, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "best.safetensors", network)
    data = write_folders(tmp_path / "data", photographs, [str(i) for i in range(12)])
    with pytest.raises(InputError, match=r"the network does not have: 0, 1, 10, 11, 2 and 7 more \(12 of 12\); the 12"):
        evaluate(tmp_path, checkpoint, data)
    assert not (tmp_path / "evaluation").exists()


def test_weights_trained_on_imagenet_keep_its_margin(network, photographs, tmp_path):
    """--dataset folder reads 27 pixels, of which the centre of 24 is the network's input."""
    checkpoint = save_checkpoint(tmp_path / "best.safetensors", network, dataset="imagenet")
    data = write_folders(tmp_path / "data", photographs, NAMES)
    results = evaluate(tmp_path, checkpoint, data)
    assert (results["preparation"]["resize"], results["preparation"]["crop"]) == (27, 24)


def test_an_evaluation_in_a_given_folder_is_replaced_on_request_only(network, photographs, tmp_path):
    data = write_folders(tmp_path / "data", photographs, NAMES)
    checkpoint = save_checkpoint(tmp_path / "best.safetensors", network)
    evaluate(tmp_path, checkpoint, data)
    with pytest.raises(InputError, match=r"evaluation\.json exists already: pass --overwrite"):
        train_s3net.main(Args(eval_only=True, checkpoint=checkpoint, data_dir=data, out=tmp_path / "evaluation"))


@pytest.mark.skipif(not CIFAR.is_dir(), reason="CIFAR-100 is missing")
def test_the_shipped_weights_on_the_last_12_classes(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for folder in sorted((CIFAR / "test").iterdir())[-12:]:
            (tmp_path / "data" / split / folder.name).symlink_to(folder)
    results = evaluate(tmp_path, pretrained_file("s3net_cifar"), tmp_path / "data")
    assert 25 < results["val_error"] < 35 and 4 < results["val_error_restricted"] < 8


# -- Resuming --


def test_a_run_is_resumed_on_classes_in_another_order(photographs, tmp_path, monkeypatch, capsys):
    """The images are the same, in an LMDB file that was written anew with another --classes."""
    data = write_folders(tmp_path / "data", photographs, NAMES)
    flags = {"dataset": "imagenet", "model": "s3net_cifar", "depth": 7, "growth_rate": 4, "image_size": 16}
    flags |= {"device": "cpu", "workers": 0, "epochs": 1, "out": tmp_path / "run", "batch_size": 12}
    assert train_s3net.main(Args(data_dir=data, **flags)) == 0
    (tmp_path / "names.txt").write_text("\n".join(reversed(NAMES)))
    for split in ("train", "val"):
        out = tmp_path / "lmdb" / f"{split}.lmdb"
        folder2lmdb.main(folder2lmdb.Args(images=data / split, out=out, classes=tmp_path / "names.txt"))
    seen = []
    monkeypatch.setattr(train_s3net, "train", lambda *arguments: seen.append(arguments[-3]) or 0)
    assert train_s3net.main(Args(data_dir=tmp_path / "lmdb", resume=True, **flags)) == 0
    assert "matched by name" in capsys.readouterr().out
    assert seen[0][0].classes == NAMES and sorted(seen[0][0].source.labels) == sorted(list(range(12)) * 3)
    source = seen[0][0].source
    assert all(NAMES[source.encoded(i)[1]] in source.name(i) for i in range(len(source)))
    (tmp_path / "data" / "train" / "lynx").rename(tmp_path / "data" / "train" / "puma")
    (tmp_path / "data" / "val" / "lynx").rename(tmp_path / "data" / "val" / "puma")
    with pytest.raises(InputError, match="does not have: puma"):
        train_s3net.main(Args(data_dir=data, resume=True, **flags))


def test_images_on_disk_with_other_classes(photographs, tmp_path):
    source = open_source(write_folders(tmp_path / "data", photographs, NAMES) / "val")
    names = list(reversed(NAMES))
    images = DiskImages(source, torch.arange(36)).with_classes(names, [names.index(name) for name in NAMES])
    assert images.classes == names
    assert all(names[images.source.labels[i]] == Path(images.source.name(i)).parent.name for i in range(36))


# -- Prediction --


def run_predict(tmp_path, *images, **flags):
    out = tmp_path / "predictions.csv"
    flags = {"device": "cpu", "out": out, "overwrite": True} | flags
    assert predict.main(predict.Args(images=tuple(map(Path, images)), **flags)) == 0
    with out.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_predictions_are_the_networks_probabilities(network, photographs, tmp_path, capsys):
    data = write_folders(tmp_path / "data", photographs, NAMES)
    checkpoint = save_checkpoint(tmp_path / "best.safetensors", network)
    rows = run_predict(tmp_path, data / "val", checkpoint=checkpoint, batch_size=5, top=2)
    assert len(rows) == 36 and list(rows[0]) == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    wrong = 0
    for row in rows:
        path = Path(row["image"])
        probabilities = torch.tensor(logits_of(network, Image.open(path))).softmax(0)
        values, indices = probabilities.topk(2)
        assert [row["class_1"], row["class_2"]] == [NAMES[i] for i in indices]
        assert [float(row["probability_1"]), float(row["probability_2"])] == pytest.approx(values.tolist(), abs=2e-4)
        wrong += row["class_1"] != path.parent.name
    assert 100 * wrong / 36 == pytest.approx(evaluate(tmp_path, checkpoint, data)["val_error"])
    printed = capsys.readouterr().out
    assert rows[0]["class_1"] in printed and "36 images: written to" in printed


def test_a_photograph_is_rotated_as_its_exif_orientation_says(network, tmp_path):
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, :30] = (255, 80, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "stored.jpg", exif=exif, quality=95)
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "upright.jpg", quality=95)
    checkpoint = save_checkpoint(tmp_path / "best.safetensors", network)
    stored, upright = run_predict(tmp_path, tmp_path / "stored.jpg", tmp_path / "upright.jpg", checkpoint=checkpoint)
    assert stored["class_1"] == upright["class_1"]
    assert float(stored["probability_1"]) == pytest.approx(float(upright["probability_1"]), abs=0.02)


def test_files_folders_and_patterns_give_each_image_once(photographs, tmp_path):
    folder = write_folders(tmp_path / "data", photographs[:6], NAMES, splits=("[all]",))
    hidden = folder / "[all]" / ".thumbnails" / "1.png"
    hidden.parent.mkdir()
    hidden.write_bytes(b"")
    files = sorted((folder / "[all]").glob("*/*.png"))
    files.remove(hidden)
    assert predict.find_files([folder / "[all]"]) == files
    assert predict.find_files([files[2], folder, files[2]]) == [files[2], *(f for f in files if f != files[2])]
    assert set(predict.find_files([folder / "*" / "*" / "*.png"])) == set(files)
    assert set(predict.find_files([tmp_path / "d*"])) == set(files)
    for missing in ("nowhere", "*.tif"):
        with pytest.raises(InputError, match="there is no image or folder"):
            predict.find_files([tmp_path / missing])


def test_unreadable_images_stop_the_prediction_or_are_listed(network, photographs, tmp_path, capsys):
    data = write_folders(tmp_path / "data", photographs[:4], NAMES)
    checkpoint = save_checkpoint(tmp_path / "best.safetensors", network)
    broken = data / "val" / "ant" / "b\x1b[31m.png"
    broken.write_text("<html>")
    with pytest.raises(InputError, match="cannot be read as an image"):
        run_predict(tmp_path, data / "val", checkpoint=checkpoint)
    assert not (tmp_path / "predictions.csv").exists()
    assert len(run_predict(tmp_path, data / "val", checkpoint=checkpoint, skip_unreadable=True, batch_size=1)) == 4
    assert "left out, unreadable: " in (printed := capsys.readouterr().err)
    assert "\x1b" not in printed and "b\\x1b[31m.png" in printed
    with pytest.raises(InputError, match="cannot be read as an image"):
        run_predict(tmp_path, broken, checkpoint=checkpoint, skip_unreadable=True)


def test_a_size_that_the_network_cannot_take(network, photographs, tmp_path):
    photographs[0].save(tmp_path / "a.png")
    checkpoint = save_checkpoint(tmp_path / "a.safetensors", network, image_size=2)
    with pytest.raises(InputError, match="this network cannot take images of 2x2"):
        run_predict(tmp_path, tmp_path / "a.png", checkpoint=checkpoint)


def test_cells_of_the_csv_file_are_no_formulas(network, photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photographs[0].save("=1+1.png")
    classes = [f"@{name}\x1b" for name in NAMES]
    (row,) = run_predict(tmp_path, "=1+1.png", checkpoint=save_checkpoint(tmp_path / "b.safetensors", network, classes))
    assert row["image"] == "'=1+1.png" and row["class_1"][:2] == "'@" and row["class_1"][-4:] == "\\x1b"


@pytest.mark.parametrize("lacking", ["mean", "std", "image_size"])
def test_what_a_foreign_file_does_not_say_about_its_images(network, tmp_path, lacking):
    """A dict "config" may be another program's, with some of the trainer's keys."""
    config = {"model": "s3net_cifar", "model_options": {}, "mean": MEAN, "std": STD, "image_size": 24}
    torch.save({"config": {key: config[key] for key in config.keys() - {lacking}}}, tmp_path / "a.pt")
    trained = read_trained_network(tmp_path / "a.pt")
    cifar = RECIPES["cifar100"]
    for name in ("mean", "std", "image_size"):
        expected = getattr(cifar, name) if name == lacking else config[name]
        assert getattr(trained.preparation, name) == (expected if name == "image_size" else tuple(expected))
    (note,) = trained.notes
    assert "does not say how its images are prepared: as for cifar100" in note


def test_a_plain_file_needs_the_networks_name(network, photographs, tmp_path, capsys):
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    photographs[0].save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"plain\.pt does not name its network: pass --model NAME"):
        run_predict(tmp_path, tmp_path / "a.png", checkpoint=tmp_path / "plain.pt")
    flags = {"model": "s3net_cifar", "model_options": '{"depth": 7, "growth_rate": 4}'}
    with pytest.raises(InputError, match="100 outputs were assumed: if the network has others, pass --num-classes N"):
        run_predict(tmp_path, tmp_path / "a.png", checkpoint=tmp_path / "plain.pt", **flags)
    (row,) = run_predict(tmp_path, tmp_path / "a.png", checkpoint=tmp_path / "plain.pt", num_classes=12, **flags)
    assert row["class_1"].startswith("output ")
    for options in ('{"num_classes": 12}', '{"pretrained": true}', "[1]", "{"):
        with pytest.raises(InputError, match=r"--model-options .* is no JSON object of options"):
            read_options(options)
    flags |= {"classes": tmp_path / "names.txt", "checkpoint": tmp_path / "plain.pt"}
    with pytest.raises(InputError, match="there are 12 class names for 4 outputs: correct --classes or --num-classes"):
        run_predict(tmp_path, tmp_path / "a.png", num_classes=4, **flags)
    (named,) = run_predict(tmp_path, tmp_path / "a.png", **flags)
    assert named["class_1"] == NAMES[int(row["class_1"].split()[1])]
    assert "does not say how its images are prepared: as for cifar100, 32 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "the weights are missing: pass --checkpoint FILE"),
        ({"checkpoint": Path("a.pt"), "images": ()}, "the images are missing"),
        ({"checkpoint": Path("a.pt"), "top": 0}, "--top 0 is not possible"),
        ({"checkpoint": Path("a.pt"), "model": "s3net_cifer"}, "did you mean s3net_cifar"),
        ({"checkpoint": Path("a.pt"), "out": Path(os.devnull).parent}, "is a folder: pass --out with a file"),
    ],
)
def test_bad_flags(flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        predict.main(predict.Args(**({"images": (tmp_path,), "device": "cpu", "out": tmp_path / "o.csv"} | flags)))


def test_the_csv_file_is_replaced_on_request_only(tmp_path):
    (tmp_path / "o.csv").write_text("kept")
    with pytest.raises(InputError, match="exists already: pass --overwrite to replace it, or another --out"):
        predict.main(predict.Args((tmp_path,), Path("a.pt"), device="cpu", out=tmp_path / "o.csv"))
    assert (tmp_path / "o.csv").read_text() == "kept"
