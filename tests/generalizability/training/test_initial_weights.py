"""`--init`: training starts from weights."""

import json
import urllib.error
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import TORCHRUN, run_python
from torchvision.models import mobilenet_v2

import train_s3net
from s3net_common.checkpoints import save_weights
from s3net_common.errors import InputError
from s3net_networks import create_network
from train_s3net import Args
from training import training_loop
from training.initial_weights import matching_rows, start_from

GENERALIZABILITY = Path(train_s3net.__file__).parent
OPTIONS = {"growth_rate": 4, "depth": 7}
NAMES = ["ant", "bee", "cat", "dog"]


@pytest.fixture
def start(tmp_path):
    """Weights of a network with four classes."""
    torch.manual_seed(5)
    model = create_network("s3net_cifar", 4, **OPTIONS)
    model.norm.running_mean.normal_()
    metadata = {"model": "s3net_cifar", "model_options": OPTIONS, "num_classes": 4, "classes": NAMES}
    metadata |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "image_size": 16}
    save_weights(tmp_path / "start.safetensors", model.state_dict(), metadata)
    return tmp_path / "start.safetensors", model.state_dict()


@pytest.fixture
def images(tmp_path):
    """Images of three classes, two of which the weights know."""
    for half in ("train", "val"):
        for name, colour in (("cat", (200, 0, 0)), ("bee", (0, 200, 0)), ("yak", (0, 0, 200))):
            (tmp_path / "data" / half / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (16, 16), colour).save(tmp_path / "data" / half / name / f"{i}.png")
    return tmp_path / "data"


def args(images, start, out, **flags):
    flags = {"epochs": 1, "lr": 1e-9, "batch_size": 4, "device": "cpu"} | flags
    return Args(dataset="folder", data_dir=images, init=str(start), out=out, **flags)


def test_classes_of_the_same_name_keep_their_rows(start, images, tmp_path, capsys):
    file, weights = start
    assert train_s3net.main(args(images, file, tmp_path / "run")) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("starting from ") and line.endswith(
        "start.safetensors: loaded all 41 tensors before the classifier; rows of the classifier: 2 kept (bee, cat), "
        "1 new (yak)"
    )
    # The learning rate is so small that only running statistics change.
    trained = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
    torch.testing.assert_close(trained["stem.conv.weight"], weights["stem.conv.weight"])
    torch.testing.assert_close(trained["classifier.weight"][:2], weights["classifier.weight"][[1, 2]])
    assert not any(torch.allclose(trained["classifier.weight"][2], row) for row in weights["classifier.weight"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["init"] == str(file) and config["model_options"] == OPTIONS
    assert (config["mean"], config["std"], config["image_size"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 16)


def test_resuming_never_reads_the_file_again(start, images, tmp_path, monkeypatch):
    file, _ = start
    assert train_s3net.main(args(images, file, tmp_path / "whole", epochs=2)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "train_and_evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_s3net.main(args(images, file, tmp_path / "parts", epochs=2))
    file.unlink()
    assert train_s3net.main(args(images, file, tmp_path / "parts", epochs=2, resume=True)) == 0
    first, second = (torch.load(tmp_path / f / "last.pt", weights_only=True)["model"] for f in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(InputError, match="--init pretrained changes the recipe of the run"):
        train_s3net.main(Args(init="pretrained", resume=True, out=tmp_path / "parts"))
    assert train_s3net.main(Args(resume=True, out=tmp_path / "parts", data_dir=images, device="cpu")) == 0


def test_a_run_continues_with_more_epochs_from_its_own_weights(start, images, tmp_path):
    file, _ = start
    out = tmp_path / "run"
    assert train_s3net.main(args(images, file, out)) == 0
    with pytest.raises(InputError, match=r"another --out, which may begin with .*: --init .*run/best\.safetensors"):
        train_s3net.main(Args(resume=True, out=out, epochs=9))
    assert train_s3net.main(args(images, out / "best.safetensors", out, overwrite=True)) == 0  # read, then replaced


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"growth_rate": 6}, r"has shape \(4, 24, 3, 3\) in the file and \(6, 24, 3, 3\) in the network"),
        ({"init": "absent.pt"}, "there is no checkpoint .*absent.pt"),
        ({"init": "pretrained", "model": "densenet_cifar"}, "there are no trained weights for densenet_cifar"),
        ({"eval_only": True}, "--init is for training: to evaluate weights, pass them as --checkpoint FILE"),
    ],
)
def test_weights_that_cannot_be_started_from(start, images, tmp_path, flags, message):
    values = vars(args(images, start[0], tmp_path / "run")) | flags
    with pytest.raises(InputError, match=message):
        train_s3net.main(Args(**values))
    assert not (tmp_path / "run").exists()


class Config:
    def __init__(self, *classes):
        self.classes = list(classes)


@pytest.mark.parametrize(
    ("classes", "names", "rows"),
    [
        (("cat", "ant"), NAMES, [(0, 2), (1, 0)]),
        (("cat", "yak"), NAMES, [(0, 2)]),
        (("0", "1", "2"), None, [(0, 0), (1, 1), (2, 2)]),
        (("0", "1", "2", "3", "4"), None, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (("0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"), None, [(0, 0), (1, 1), (3, 2), (4, 3)]),
        (("00", "01", "02"), None, [(0, 0), (1, 1), (2, 2)]),
        (("1", "2", "3"), None, []),
        (("caf\u00e9",), ["tree", "cafe\u0301"], [(0, 1)]),  # the accent stored in two forms
        (("cat", "ant"), None, []),
        (("0", "1"), NAMES, []),
    ],
)
def test_rows_of_the_classifier_are_matched_by_name(classes, names, rows):
    assert matching_rows(Config(*classes), names, outputs=4) == rows


def test_a_file_without_a_classifier(start, tmp_path):
    _, weights = start
    torch.save({name: t for name, t in weights.items() if "classifier" not in name}, tmp_path / "body.pt")
    model = create_network("s3net_cifar", 3, **OPTIONS)
    before = model.classifier.weight.clone()
    line = start_from(tmp_path / "body.pt", {}, model, Config("0", "1", "2"))
    assert line.endswith("loaded all 41 tensors before the classifier; rows of the classifier: 3 new (0, 1, 2)")
    assert torch.equal(model.classifier.weight, before)
    assert torch.equal(model.stem.conv.weight, weights["stem.conv.weight"])


def test_a_classifier_of_other_shapes_starts_anew(start, tmp_path):
    _, weights = start
    for bad in ({"classifier.bias": torch.zeros(2)}, {"classifier.weight": torch.zeros(4, 7)}):
        torch.save(weights | bad, tmp_path / "odd.pt")
        line = start_from(
            tmp_path / "odd.pt", {"classes": NAMES}, create_network("s3net_cifar", 4, **OPTIONS), Config(*NAMES)
        )
        assert line.endswith("4 new (ant, bee, cat, dog)")


def test_pretrained_weights_of_the_repository(images, tmp_path, capsys):
    flags = {"init": "pretrained", "growth_rate": None, "depth": None, "image_size": 8}
    values = vars(args(images, "", tmp_path / "run")) | flags
    assert train_s3net.main(Args(**values)) == 0
    assert "weights/s3net_cifar/last.safetensors: loaded all" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init"] == "pretrained"


def test_pretrained_weights_of_a_library(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    values = vars(args(images, "pretrained", tmp_path / "run", model="mobilenet_v2", image_size=32, batch_size=3))
    with pytest.raises(InputError, match=r"the weights of mobilenet_v2 cannot be downloaded \(.*no route.*put it in"):
        train_s3net.main(Args(**values))
    torch.save(mobilenet_v2().state_dict(), tmp_path / "hub" / "checkpoints" / "mobilenet_v2-b0353104.pth")
    assert train_s3net.main(Args(**values)) == 0
    printed = capsys.readouterr().out
    assert "mobilenet_v2-b0353104.pth: loaded all 312 tensors before the classifier" in printed


def test_two_ranks_start_from_the_same_weights(start, images, tmp_path):
    file, weights = start
    program = tmp_path / "two.py"
    program.write_text(
        f"import sys, torch; sys.path.insert(0, {str(GENERALIZABILITY)!r}); sys.argv[0] = 'train_s3net.py'\n"
        "from train_s3net import *; import train_s3net\n"
        "def train(flags, run, config, model, size, data, ranks, workers):\n"
        f"    torch.save(model.state_dict(), {str(tmp_path)!r} + f'/rank{{ranks.rank}}.pt')\n"
        "    ranks.gather(0)\n"
        "    return 0\n"
        "train_s3net.train = train; run_script(main, Args, '')\n"
    )
    flags = ["--dataset", "folder", "--data-dir", images, "--init", file, "--out", tmp_path / "run", "--device", "cpu"]
    done = run_python(*TORCHRUN, "--nproc_per_node=2", program, *flags, check=True)
    assert done.stdout.count("starting from ") == 1
    for name, buffer in torch.load(tmp_path / "rank1.pt").items():  # DDP sends the parameters
        if "running" in name:
            assert torch.equal(buffer, weights[name])
