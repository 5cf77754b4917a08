"""The trainer, as its users run it: a command in a shell."""

import json
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from image_trees import digit_photos, make_imagenet
from PIL import Image
from processes import ForkedScript, run_forked
from safetensors import safe_open
from safetensors.torch import load_file

import train_s3net
from s3net_common import output_files
from s3net_common.errors import InputError
from s3net_networks import create_network
from train_s3net import Args
from training import engine, optimization, run_folder
from training.training_loop import resume_command

SCRIPT = Path(__file__).parents[2] / "generalizability" / "train_s3net.py"
TINY = ["--dataset", "digits", "--growth-rate", "4", "--depth", "7", "--device", "cpu", "--drop-rate", "0.1"]
SMALL = [*TINY, "--limit-train", "300", "--limit-val", "90"]
WRITTEN = {"best.safetensors", "config.json", "curves.png", "last.pt", "metrics.jsonl"}


def command(*flags):
    return [str(SCRIPT), *map(str, flags)]


def run(arguments, **options):
    return run_forked(*arguments, **options)


def completed(arguments, **options):
    return run_forked(*arguments, check=True, **options)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def assert_same_run(folder, other):
    assert metrics(folder) == metrics(other)
    for name in ("model", "optimizer"):
        first, second = (torch.load(f / "last.pt", weights_only=True)[name] for f in (folder, other))
        if name == "optimizer":
            first, second = ({i: s["momentum_buffer"] for i, s in d["state"].items()} for d in (first, second))
        assert all(torch.equal(first[key], second[key]) for key in first)
    first, second = (load_file(f / "best.safetensors") for f in (folder, other))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run of 4 epochs."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    done = completed(command(*SMALL, "--epochs", 4, "--out", folder, "--tensorboard"))
    return folder, done.stdout


def test_a_run_writes_everything_it_should(reference):
    folder, printed = reference
    assert {path.name for path in folder.iterdir()} == WRITTEN | {"summary.json", "tensorboard"}
    assert printed.splitlines()[0].startswith("s3net_cifar growth_rate=4 depth=7 drop_rate=0.1: ")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert set(rows[0]) == set(engine.METRICS)
    assert all(0 <= row["val_top5_error"] <= row["val_error"] <= 100 for row in rows)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert Image.open(folder / "curves.png").size[0] > 800
    assert any((folder / "tensorboard").iterdir())


def test_the_summary_and_the_weights_describe_the_run(reference):
    folder, _ = reference
    summary, rows = json.loads((folder / "summary.json").read_text()), metrics(folder)
    best = min(rows, key=lambda row: row["val_error"])
    assert (summary["best_epoch"], summary["best_val_error"]) == (best["epoch"], best["val_error"])
    assert summary["last_val_error"] == rows[-1]["val_error"]
    assert summary["total_seconds"] > 0 and {"python", "torch", "torchvision"} <= set(summary["versions"])
    with safe_open(folder / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (
        metadata["model"] == "s3net_cifar"
        and metadata["num_classes"] == "10"
        and metadata["epoch"] == str(best["epoch"])
    )
    assert json.loads(metadata["options"]) == {"growth_rate": 4, "depth": 7, "drop_rate": 0.1}
    assert json.loads(metadata["mean"]) == [0.305] * 3
    model = create_network(metadata["model"], 10, **json.loads(metadata["options"]))
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    # Stem, 3 layers, 2 transitions and the classifier, counted by hand; no bias counts.
    expected = 1024 * 27 * 24 + 1024 * 24 * 9 * 4 + 256 * 28 * 28 + 256 * 28 * 9 * 4 + 64 * 32 * 32
    expected += 64 * 32 * 9 * 4 + 36 * 10
    assert summary["multiply_adds"] == expected


def test_killed_at_random_moments_and_resumed_it_is_the_same_run(reference, tmp_path):
    folder, kills, moments = tmp_path / "run", 0, random.Random(time.time())
    arguments = command(*SMALL, "--epochs", 4, "--out", folder, "--resume")
    while kills < 3:
        before = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
        with ForkedScript(*arguments) as process:
            process.wait_for("resuming", "starting")  # then training begins
            time.sleep(moments.uniform(0, 0.8))
        kills += 1
        if (folder / "metrics.jsonl").exists():
            assert (folder / "metrics.jsonl").read_text().startswith(before)
    completed(arguments)
    assert_same_run(folder, reference[0])
    assert {path.name for path in folder.iterdir()} == WRITTEN | {"summary.json"}


def test_the_run_folder_alone_says_what_to_resume(reference, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for path in filter(Path.is_file, reference[0].iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    assert train_s3net.main(Args(out=folder, resume=True, device="cpu")) == 0
    assert "digits: 300 training and 90 validation images" in capsys.readouterr().out
    assert_same_run(folder, reference[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_the_command_that_resumes_it(tmp_path, number):
    flags = [*TINY, "--limit-train", "800", "--limit-val", "60", "--epochs", "1", "--out", str(tmp_path / "run")]
    flags += ["--batch-size", "4"]
    with ForkedScript(*command(*flags)) as process:
        process.wait_for("starting")
        time.sleep(0.3)
        process.kill(number)
        done = process.wait()
    assert done.returncode == 128 + number and done.stderr == ""
    printed = done.stdout
    assert printed.splitlines()[-2] == "stopped; resume with"
    progress = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]
    assert progress["epoch"] == 0 and 0 < progress["step"] < 200
    if number == signal.SIGINT:
        resume = printed.splitlines()[-1].split()
        assert resume[0] == "python"
        completed(resume[1:])
        completed(command(*flags, "--out", tmp_path / "whole"))
        assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("nodes", "launcher"),
    [
        (1, "torchrun --nproc_per_node=4"),
        (2, "torchrun --nproc_per_node=4 --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=first:29500"),
    ],
)
def test_the_command_that_resumes_names_all_processes(monkeypatch, nodes, launcher):
    environment = {
        "TORCHELASTIC_RUN_ID": "7",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_WORLD_SIZE": str(nodes),
        "MASTER_ADDR": "first",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_s3net.py", "--resume", "--lr", "0.1"])
    expected = f"{launcher} train_s3net.py --lr 0.1 --out there --resume"
    assert resume_command({}, Path("there")) == expected


def test_a_kill_between_checkpoint_and_metrics_is_repaired(reference, tmp_path):
    folder = tmp_path / "run"
    run = run_folder.Run(folder)
    folder.mkdir()
    for path in reference[0].iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    state = run.read_checkpoint()
    state["progress"]["history"] = state["progress"]["history"][:2]
    state["progress"]["epoch"] = 2
    (folder / "metrics.jsonl").write_text("")
    (folder / "best.safetensors").unlink()
    state["progress"]["history"][1]["val_error"] = 0.0
    run.publish(state)
    assert [row["epoch"] for row in metrics(folder)] == [1, 2]
    with safe_open(folder / "best.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == "2"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    folder = tmp_path / "run"
    flags = [*SMALL, "--epochs", 6, "--lr", 1e20, "--schedule", "onecycle", "--out", folder]
    done = run(command(*flags))
    assert done.returncode == 1
    assert done.stderr.startswith("error: the loss at step ") and "Try a lower --lr" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    if (folder / "last.pt").exists():
        weights = torch.load(folder / "last.pt", weights_only=True)["model"]
        assert "last good checkpoint is" in done.stderr and len(weights) > 10


def test_it_runs_from_any_directory_on_own_images(tmp_path):
    for half in ("train", "val"):
        for label, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (tmp_path / "mine" / half / label).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (30 + i, 24), colour).save(tmp_path / "mine" / half / label / f"{i}.jpg")
    (tmp_path / "mine" / "train" / "red" / "broken.jpg").write_bytes(b"?")
    flags = ["--dataset", "folder", "--data-dir", "mine", "--image-size", 16, "--epochs", 1, "--out", "run"]
    flags += ["--batch-size", 4, "--growth-rate", 4, "--depth", 7, "--device", "cpu"]
    refused = run(command(*flags), cwd=tmp_path)
    assert refused.returncode == 2 and "broken.jpg cannot be read" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
    done = completed(command(*flags, "--skip-unreadable"), cwd=tmp_path)
    assert done.stderr.count("unreadable") == 1 and "train: unreadable images: 1 (" in done.stderr
    assert "unreadable" not in done.stdout
    assert "16 training and 16 validation images, 2 classes" in done.stdout
    assert (tmp_path / "run" / "best.safetensors").exists()


def test_images_on_disk_killed_in_mid_epoch_resume_exactly(tmp_path, monkeypatch):
    tree = make_imagenet(tmp_path / "data", digit_photos(60, (50, 40)))
    flags = {"dataset": "imagenet", "data_dir": tree, "image_size": 32, "model": "s3net_imagenet_small"}
    flags |= {"growth_rate": 4, "epochs": 3, "batch_size": 8, "drop_rate": 0.1, "device": "cpu", "workers": 1}
    assert train_s3net.main(Args(out=tmp_path / "whole", **flags)) == 0
    first, *_, last = metrics(tmp_path / "whole")
    assert last["train_loss"] < first["train_loss"]
    saves, save = [], run_folder.Run.save

    def save_and_die(self, state):
        save(self, state)
        saves.append(state["progress"]["step"])
        if len(saves) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_folder.Run, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_s3net.main(Args(out=tmp_path / "parts", checkpoint_every=2, **flags))
    assert saves == [2, 4, 5, 0, 2]  # 5: before the evaluation
    monkeypatch.undo()
    assert train_s3net.main(Args(out=tmp_path / "parts", resume=True, **flags)) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# -- Bad input: one line, exit code 2 --


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    done = run(command("--dataset", "digts"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no data set 'digts': did you mean digits?\n"


def refusal(tmp_path, **flags):
    flags = {"dataset": "digits", "device": "cpu", "out": tmp_path / "new"} | flags
    with pytest.raises(InputError) as error:
        train_s3net.main(Args(**flags))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "s3net_cifer"}, "there is no network 's3net_cifer': did you mean s3net_cifar"),
        ({"schedule": "stop"}, "there is no schedule 'stop': did you mean step"),
        ({"depth": 39}, "depth 39 is not possible, since depth - 4 must be a positive multiple of 3"),
        ({"model": "resnet20_cifar", "growth_rate": 12}, "resnet20_cifar has no option 'growth_rate'"),
        ({"epochs": 0}, "--epochs 0 is not possible: give a number of 1 or more"),
        ({"batch_size": 0}, "--batch-size 0 is not possible"),
        ({"image_size": 0}, "--image-size 0 is not possible: give a number of 4 or more"),
        ({"workers": -1}, "--workers -1 is not possible"),
        ({"momentum": float("inf")}, "--momentum inf is not possible"),
        ({"lr": float("nan")}, "--lr nan is not possible"),
        ({"limit_train": 0}, "--limit-train 0 is not possible"),
        ({"seed": 2**62}, "--seed 4611686018427387904 is not possible: give a number below 2^62"),
        ({"accumulate": 65}, "--accumulate 65 is too large: the batch has 64 images"),
        ({"checkpoint": Path("best.safetensors")}, "--checkpoint is for --eval-only: leave it out, or pass --resume"),
        ({"model": "octresnet50", "image_size": 8}, "this network cannot take images of 8x8"),
        ({"num_classes": 4}, "--num-classes 4 is too small: the data have 10 classes"),
        ({"dataset": "folder", "data_dir": Path("/nowhere/at/all")}, "/nowhere/at/all has no images"),
        ({"device": "gpu"}, "there is no device 'gpu'"),
        ({"eval_only": True}, "--eval-only needs the weights: pass --checkpoint FILE"),
        ({"eval_only": True, "checkpoint": Path("absent.pt")}, "there is no checkpoint absent.pt"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    assert message in refusal(tmp_path, **flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_gpu(tmp_path):
    assert refusal(tmp_path, device="cuda") == (
        "--device cuda: PyTorch finds no CUDA GPU here; pass --device cpu, or leave it out"
    )


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(tmp_path, out=tmp_path / "file" / "run")
    assert message.endswith("file is not a folder: pass another --out")
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory\): pass another --out"):
        output_files.make_folder(tmp_path / "file" / "run")


def test_one_process_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.2)
    first, second = run_folder.Run(tmp_path), run_folder.Run(tmp_path)
    first.hold()
    with pytest.raises(InputError, match=f"another process trains into {tmp_path}: wait until it has ended"):
        second.hold()
    first.release()
    second.hold()


def test_a_run_is_never_overwritten_unasked(reference, tmp_path):
    folder, _ = reference
    before = (folder / "last.pt").read_bytes()
    assert "already holds a run: pass --resume" in refusal(tmp_path, out=folder)
    assert (folder / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ({"lr": 0.3}, "--lr 0.3 "),
        ({"epochs": 9}, "--epochs 9 "),
        ({"growth_rate": 12}, "--growth-rate 12 "),
        ({"limit_train": 200}, "--limit-train 200 "),
        ({"seed": 1}, "--seed 1 "),
        ({"model": "resnet20_cifar"}, "--model resnet20_cifar "),
    ],
)
def test_resuming_with_another_recipe_names_the_flag(reference, tmp_path, flags, flag):
    message = refusal(tmp_path, out=reference[0], resume=True, **flags)
    assert message.startswith(flag + "changes the recipe of the run, which was started with")


def test_resuming_on_other_data_is_refused(reference, tmp_path):
    config = json.loads((reference[0] / "config.json").read_text())
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"train_images": 299}))
    assert "the data are not those that" in refusal(tmp_path, out=folder, resume=True)


def test_a_damaged_run_is_refused(reference, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_bytes((reference[0] / "config.json").read_bytes())
    (folder / "last.pt").write_bytes((reference[0] / "last.pt").read_bytes()[:5000])
    assert "damaged" in refusal(tmp_path, out=folder, resume=True)
    (folder / "config.json").write_text("{")
    assert "config.json is missing or damaged" in refusal(tmp_path, out=folder, resume=True)


def test_weights_of_another_network_are_refused(reference, tmp_path):
    message = refusal(tmp_path, eval_only=True, checkpoint=reference[0] / "best.safetensors", growth_rate=6)
    assert "does not fit this network: " in message and "(4, 24, 3, 3)" in message and "(6, 24, 3, 3)" in message


@pytest.mark.parametrize(
    ("flag", "finder", "message"),
    [
        ("tensorboard", "find_spec", "TensorBoard is not installed: pip install tensorboard, or leave out --tensorboard"),  # noqa: E501
        ("compile", "shutil.which", "--compile on a CPU needs a C++ compiler, and there is none: leave it out"),
    ],
)  # fmt: skip
def test_tools_that_are_not_installed(tmp_path, monkeypatch, flag, finder, message):
    monkeypatch.setattr(f"train_s3net.{finder}", lambda name: None)
    assert refusal(tmp_path, **{flag: True}) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lrr", "3"], "error: Unrecognized options: --lrr"),
        (["--epochs", "many"], "error: Error parsing --epochs: invalid literal for int() with base 10: 'many'"),
    ],
)
def test_flags_that_cannot_be_parsed(monkeypatch, flags, message):
    done = run(command(*flags))
    assert done.returncode == 2 and done.stderr.startswith(message)
    assert done.stderr.endswith("; see --help\n") and len(done.stderr.splitlines()) == 1


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    target = tmp_path / "last.pt"
    target.write_bytes(b"good")

    def fill_the_disk(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"last.pt cannot be written \(No space left on device\)"):
        output_files.write_atomically(target, fill_the_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"] and target.read_bytes() == b"good"


def test_the_paper_recipe_is_the_default():
    recipe = train_s3net.RECIPES["cifar100"]
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.momentum, recipe.weight_decay) == (
        200,
        64,
        0.2,
        0.9,
        1e-4,
    )
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr)
    steps = 782
    schedule = optimization.SCHEDULES[recipe.schedule](optimizer, recipe, recipe.epochs * steps)
    rates = []
    for _ in range(recipe.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        for _ in range(steps):
            optimizer.step()
            schedule.step()
    assert rates[:50] == [0.2] * 50
    for epoch, rate in ((50, 0.02), (99, 0.02), (100, 0.002), (149, 0.002), (150, 0.0002), (199, 0.0002)):
        assert rates[epoch] == pytest.approx(rate)


def test_list_models_prints_every_name(capsys):
    assert train_s3net.main(Args(list_models=True)) == 0
    assert capsys.readouterr().out.split() == train_s3net.list_networks()


def test_help_explains_every_flag():
    printed = completed(command("--help")).stdout
    for flag in (
        "--dataset",
        "--amp, --no-amp",
        "--compile, --no-compile",
        "--limit-val N",
        "--eval-only",
        "--checkpoint",
    ):
        assert flag in printed
