"""The command lines, run as a user runs them: from another folder, with small inputs."""

import csv
import json
import os
import subprocess
from pathlib import Path
from types import ModuleType
from urllib.error import URLError

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from processes import run_forked

import interpret_fullgrad
import plot_segmentation_map
from models import create_model
from s3net_common.checkpoints import save_weights
from s3net_common.errors import InputError
from scene_training import Training, digits_checkpoint

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "interpretability"


def run(script: str, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return run_forked(FOLDER / script, *arguments, cwd=cwd, env={"PYTHONPATH": path} | environment)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """images/{a.png, b.jpg} of 60x40 with a bright square, and masks/ of the square."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    for name, left in (("a.png", 5), ("b.jpg", 35)):
        pixels, mask = rng.integers(0, 90, (40, 60, 3), dtype=np.uint8), np.zeros((40, 60, 4), np.uint8)
        pixels[10:30, left : left + 20] += 150
        mask[10:30, left : left + 20, 3] = 255
        Image.fromarray(pixels).save(folder / "images" / name)
        Image.fromarray(mask).save(folder / "masks" / f"{name[0]}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save(create_model("s3net_tiny_k96", 3, growth_rate=4).state_dict(), path)
    return path


SMALL = ("--random-weights", "--networks", "squeezenet1_0", "resnet18", "--image-size", 64, "--device", "cpu")


def test_interpret_fullgrad_writes_maps_overlays_figure_and_json(photographs, tmp_path):
    process = run(
        "interpret_fullgrad.py", photographs / "images", *SMALL, "--faithfulness", "--out", "made", cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    out = tmp_path / "made"
    assert "resnet18" in process.stdout
    assert "2 maps" in process.stdout
    report = json.loads((out / "saliency.json").read_text())
    assert report["command"].startswith("python interpretability/interpret_fullgrad.py ")
    assert {"python", "torch"} <= report["versions"].keys()
    assert report["machine"] and report["device"] == "cpu"
    assert [(row["network"], row["image"]) for row in report["maps"]] == [
        (network, image) for network in ("squeezenet1_0", "resnet18") for image in ("a", "b")
    ]
    for row in report["maps"]:
        saliency = np.load(out / "maps" / row["network"] / f"{row['image']}.npy")
        assert saliency.shape == (64, 64)
        assert saliency.min() >= 0
        assert saliency.max() > 0
        assert Image.open(out / "overlays" / row["network"] / f"{row['image']}.png").size == (64, 64)
        assert row["completeness_error"] < 1e-4 and 0.5 < row["drawn"] <= 1
        assert row["target"] == row["prediction"] < 1000
        assert 0 < row["probability"] <= 1
        assert row["seconds"] > 0
    assert Image.open(out / "figure.png").size[0] > 600  # an image and two networks wide
    faithfulness = json.loads((out / "faithfulness.json").read_text())["networks"]["resnet18"]
    assert set(faithfulness) == {"FullGrad", "centred Gaussian", "edge map"}
    assert len(faithfulness["FullGrad"]["deletion"]) == 21
    low, high = faithfulness["edge map"]["insertion_interval"]
    assert low - 1e-9 <= faithfulness["edge map"]["insertion_area"] <= high + 1e-9
    probabilities = [row["probability"] for row in report["maps"] if row["network"] == "resnet18"]
    assert faithfulness["FullGrad"]["deletion"][0] == pytest.approx(np.mean(probabilities), rel=1e-4)
    assert faithfulness["FullGrad"]["insertion"][-1] == pytest.approx(np.mean(probabilities), rel=1e-4)
    assert not list(out.rglob(".*"))  # no temporary file is left


def test_target_and_checkpoint_with_another_number_of_classes(photographs, checkpoint, tmp_path):
    image = photographs / "images" / "a.png"
    model = create_model("s3net_tiny_k96", 3)
    torch.save(model.state_dict(), tmp_path / "full.pt")
    arguments = ("--num-classes", 3, "--target", 2, "--image-size", 32, "--device", "cpu", "--out", tmp_path / "out")
    arguments = ("--checkpoint", "s3net_tiny_k96=full.pt", "--squash", *arguments)
    process = run("interpret_fullgrad.py", image, *arguments, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    (row,) = json.loads((tmp_path / "out" / "saliency.json").read_text())["maps"]
    assert (row["target"], row["target_name"]) == (2, "class 2")
    with torch.no_grad():
        pixels = torch.from_numpy(np.asarray(Image.open(image).resize((32, 32), Image.Resampling.BILINEAR)) / 255.0)
        x = (pixels.permute(2, 0, 1).float() - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]
        ).view(3, 1, 1)
        expected = model.eval()(x[None]).softmax(1)[0, 2].item()
    assert row["probability"] == pytest.approx(expected, rel=1e-3)


def test_segmentation_scores(photographs, tmp_path):
    arguments = ("--masks", photographs / "masks", *SMALL, "--percentile", 85, "--out", tmp_path / "out")
    process = run("plot_segmentation_map.py", photographs / "images", *arguments, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "average precision" in process.stdout
    methods = ["squeezenet1_0", "resnet18", "centred Gaussian", "edge map"]
    with (tmp_path / "out" / "dice.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(methods) * 2 * 20
    assert {int(row["percentile"]) for row in rows} == set(range(80, 100))
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(scores["mean"]) == methods
    for method in methods:
        dice = [float(row["dice"]) for row in rows if row["method"] == method and row["percentile"] == "85"]
        assert scores["mean"][method]["dice_at"] == pytest.approx(np.mean(dice), abs=1e-6)
        assert scores["dice"][method]["85"] == pytest.approx(np.mean(dice), abs=1e-6)
    # the square is beside the image's centre, where the Gaussian has its maximum
    assert scores["mean"]["centred Gaussian"]["pointing"] == 0
    for name in ("segmentation.png", "dice.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 500


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """Copy the scripts, so that they use other weights/ and runs/. The digits network trains for one epoch."""
    folder = tmp_path_factory.mktemp("copy")
    for source in (*ROOT.glob("*.py"), *ROOT.glob("s3net_*/*.py"), *FOLDER.glob("*.py")):
        target = folder / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text()
        target.write_text(
            text.replace("epochs: int = 24", "epochs: int = 1").replace("TEST = DIGITS - TRAINING", "TEST = 20")
        )
    return folder


def run_copy(copy: Path, script: str, cwd: Path) -> subprocess.CompletedProcess:
    return run_forked(copy / "interpretability" / script, cwd=cwd, env={"PYTHONPATH": str(copy)})


def test_interpret_fullgrad_without_arguments_explains_photographs_by_s3net(copy, tmp_path):
    weights = copy / "weights" / "s3net_cifar" / "best.safetensors"
    metadata = {"model": "s3net_cifar", "model_options": {}, "num_classes": 100, "image_size": 32}
    metadata |= {"mean": [0.5] * 3, "std": [0.2] * 3, "classes": [f"thing {i}" for i in range(100)]}
    save_weights(weights, create_model("s3net_cifar").state_dict(), metadata)
    process = run_copy(copy, "interpret_fullgrad.py", tmp_path)
    assert process.returncode == 0, process.stderr
    out = copy / "runs" / "fullgrad"
    maps = json.loads((out / "saliency.json").read_text())["maps"]
    assert [row["image"] for row in maps] == ["temple", "roof", "lake", "tree", "flower", "petals"]
    for row in maps:
        assert np.load(out / "maps" / "s3net_cifar" / f"{row['image']}.npy").shape == (32, 32)
        names, probabilities = zip(*row["most_probable"], strict=True)
        assert len(names) == 3 and list(probabilities) == sorted(probabilities, reverse=True)
        assert (names[0], probabilities[0]) == (row["target_name"], row["probability"])
        assert names[0].startswith("thing ")
    width, height = Image.open(out / "figure.png").size  # six columns, three rows
    assert width > 1.5 * height
    assert list(tmp_path.iterdir()) == []


def test_plot_segmentation_map_without_arguments_trains_the_digits_network_once(copy, tmp_path):
    process = run_copy(copy, "plot_segmentation_map.py", tmp_path)
    assert process.returncode == 0, process.stderr
    assert Image.open(copy / "runs" / "segmentation" / "segmentation.png").size[0] > 400
    (weights,) = (copy / "runs" / "digits_network").iterdir()
    modified = weights.stat().st_mtime_ns
    assert digits_checkpoint(weights.parent, torch.device("cpu"), Training(epochs=1)) == weights
    assert weights.stat().st_mtime_ns == modified
    assert list(tmp_path.iterdir()) == []
    scores = json.loads((copy / "runs" / "segmentation" / "scores.json").read_text())
    assert scores["images"] == 20 and scores["cpu_seconds"] > 0 and 0 < scores["test_accuracy"] < 1
    rivals = ["gradient x input", "integrated gradients", "SmoothGrad", "gradient", "random map", "true mask"]
    assert list(scores["mean"]) == ["s3net_cifar", *rivals, "centred Gaussian", "edge map"]
    for method, mean in scores["mean"].items():
        low, high = scores["interval"][method]["dice_at"]
        assert low - 1e-9 <= mean["dice_at"] <= high + 1e-9
    assert scores["mean"]["true mask"]["average_precision"] == pytest.approx(1)
    assert "s3net_cifar" not in scores["difference"] and scores["difference"]["true mask"]["dice_at"][0] > 0


# ---- Bad input: one line, exit code 2 ----


@pytest.mark.parametrize("script", ["interpret_fullgrad.py", "plot_segmentation_map.py", "benchmark.py"])
def test_an_error_is_one_line_and_exit_code_2(script, tmp_path):
    process = run(script, "--device", "cuda:99", "--out", tmp_path / "out", cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr == "error: this machine has no device 'cuda:99': give cpu, or leave --device out\n"
    assert process.stdout == ""


def error_of(script: ModuleType, *arguments: object, cwd: Path) -> str:
    """Return the error message of a command line, run in this process."""
    words = [*map(str, arguments), "--device", "cpu", "--out", str(cwd / "out")]
    with pytest.raises(InputError) as raised:
        script.main(tyro.cli(script.Args, args=words))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_error_for_a_file_that_is_not_an_image(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    arguments = (tmp_path / "text.png", "--random-weights", "--networks", "squeezenet1_0")
    message = error_of(interpret_fullgrad, *arguments, cwd=tmp_path)
    assert (
        f"{tmp_path}/text.png cannot be read as an image (a text file that begins with 'not an image'): remove"
        in message
    )


def test_images_are_checked_before_weights_are_downloaded(photographs, tmp_path, monkeypatch):
    def no_download(*_, **__):
        raise AssertionError

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_download)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("<html>")
    paths = (photographs / "images", tmp_path / "empty.png", tmp_path / "text.png")
    message = error_of(interpret_fullgrad, *paths, "--networks", "squeezenet1_0", cwd=tmp_path)
    assert message.startswith(f"2 images cannot be read: {tmp_path}/empty.png (the file is empty), {tmp_path}/text.png")


def test_error_for_a_network_without_weights(photographs, tmp_path, monkeypatch):
    image = photographs / "images" / "a.png"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def no_network(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    message = error_of(interpret_fullgrad, image, "--networks", "squeezenet1_0", cwd=tmp_path)
    assert "the weights of squeezenet1_0 cannot be downloaded (urlopen error Name or service not known)" in message
    assert "https://download.pytorch.org/models/squeezenet1_0" in message
    assert f"put it in {tmp_path}/hub" in message
    assert "--checkpoint squeezenet1_0=FILE" in message
    message = error_of(interpret_fullgrad, image, "--networks", "s3net_imagenet_large", cwd=tmp_path)
    assert "there are no trained weights for s3net_imagenet_large" in message
    assert "or train it with generalizability/train_s3net.py" in message and message.endswith("(--checkpoint)")


def test_error_for_an_unknown_class(photographs, tmp_path):
    arguments = ("--random-weights", "--networks", "squeezenet1_0", "--image-size", 64, "--target", 1000)
    message = error_of(interpret_fullgrad, photographs / "images", *arguments, cwd=tmp_path)
    assert "there is no class 1000: this network has the classes 0 to 999" in message


def test_error_for_a_checkpoint_that_does_not_fit(photographs, checkpoint, tmp_path):
    arguments = ("--networks", "s3net_tiny_k96", "--checkpoint", checkpoint, "--num-classes", 3)
    message = error_of(interpret_fullgrad, photographs / "images", *arguments, cwd=tmp_path)
    assert f"{checkpoint} does not fit this network: blocks.0.layers.0.0.conv.weight has shape" in message


def test_error_for_a_mask_that_is_missing_or_has_another_aspect_ratio(photographs, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (60, 40), 255).save(masks / "a.png")
    arguments = (photographs / "images", "--masks", masks, "--random-weights", "--networks", "squeezenet1_0")
    message = error_of(plot_segmentation_map, *arguments, cwd=tmp_path)
    assert f"there is no mask for {photographs}/images/b.jpg: put one in {masks}/b.png" in message
    Image.new("L", (40, 40), 255).save(masks / "b.png")
    message = error_of(plot_segmentation_map, *arguments, cwd=tmp_path)
    assert f"{masks}/b.png is 40x40, but its image {photographs}/images/b.jpg is 60x40" in message
    message = error_of(plot_segmentation_map, photographs / "images", cwd=tmp_path)
    assert "there are images but no masks: pass --masks DIR" in message
    message = error_of(plot_segmentation_map, "--random-weights", cwd=tmp_path)
    assert "there are no images: pass images and --masks, or leave out all flags for networks and masks" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.jpg", "--networks", "squeezenet1_0"), "there is no image missing.jpg"),
        (("--networks", "resnet81"), "there is no network 'resnet81': did you mean resnet18"),
        (("--networks", "squeezenet1_0", "--checkpoint", "none.pt"), "there is no checkpoint none.pt"),
        (("--random-weights", "--batch-size", 0), "--batch-size 0 is too small"),
    ],
)
def test_error_for_other_bad_input(arguments, message, tmp_path):
    assert message in error_of(interpret_fullgrad, *arguments, cwd=tmp_path)


def test_benchmark_writes_times_and_completeness_errors(tmp_path):
    arguments = ("--networks", "squeezenet1_0", "--batches", 1, 2, "--rounds", 1, "--image-size", 64)
    process = run("benchmark.py", *arguments, "--device", "cpu", "--out", tmp_path / "out", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    speed = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [(row["network"], row["batch"]) for row in speed["rows"]] == [("squeezenet1_0", 1), ("squeezenet1_0", 2)]
    for row in speed["rows"]:
        seconds = row["seconds_a_map"]
        assert row["times_as_fast_as_published"] == pytest.approx(seconds["published"] / seconds["ours"])
        assert 0 < row["largest_difference"] < 1e-5  # the same formula, computed in another order
    completeness = json.loads((tmp_path / "out" / "completeness.json").read_text())
    row = completeness["networks"]["squeezenet1_0"]
    assert row["float32"] < 1e-4 and row["float32_image_by_image"] < 1e-4
    assert row["float64"] < 1e-9 and row["float64_image_by_image"] < 1e-9
    assert row["image_size"] == 64 and 0.5 < row["drawn"] <= 1
    assert completeness["summary"]["complete"] == completeness["summary"]["networks"] == 1
    assert "squeezenet1_0" in process.stdout


@pytest.mark.parametrize("script", ["benchmark.py", "interpret_fullgrad.py", "plot_segmentation_map.py"])
def test_an_unknown_flag_is_reported_in_one_line(script):
    process = run_forked(FOLDER / script, "--nope", 2)
    assert process.returncode == 2
    assert process.stderr.startswith("error: Unrecognized options: --nope") and len(process.stderr.splitlines()) == 1
