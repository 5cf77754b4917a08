"""Weight decay, Nesterov momentum, label smoothing, averaged weights and smaller images, and resuming with them."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import train_s3net
from data.batches import TrainingBatches
from data.image_sets import ImageSet
from distributed import Ranks
from recipes import RunConfig
from s3net_common.errors import InputError
from train_s3net import Args
from training.config import config_from_json, shell_command_of
from training.engine import Progress
from training.optimization import make_trainer
from training.run_folder import Run

CPU = torch.device("cpu")
TINY = {"dataset": "digits", "growth_rate": 4, "depth": 7, "device": "cpu", "limit_train": 64, "limit_val": 40}
TINY |= {"batch_size": 16, "epochs": 3}
ALL = {"norm_decay": False, "nesterov": True, "label_smoothing": 0.1, "average_epochs": 2}
ALL |= {"early_size": 16, "early_epochs": 1}


def config(**changes):
    values = {"dataset": "digits", "model": "s3net_cifar", "model_options": {}, "num_classes": 3, "epochs": 2}
    values |= {
        "batch_size": 8,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.1,
        "schedule": "step",
        "milestones": [1.0],
    }
    values |= {"mean": [0.5] * 3, "std": [0.3] * 3, "flip": False, "crop_padding": 0.0, "image_size": 8, "seed": 0}
    values |= {"amp": False, "limit_train": None, "limit_val": None, "train_images": 16, "val_images": 4}
    return RunConfig(**values | {"classes": ["a", "b", "c"]} | changes)


def trainer_and_batches(**changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    model = model.extend([nn.Flatten(), nn.Linear(4, 3)])
    images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    data = ImageSet(images, torch.arange(16) % 3, ["a", "b", "c"])
    batches = TrainingBatches(data, 8, CPU, (0.5,) * 3, (0.3,) * 3, flip=False, crop_padding=0.0, seed=2)
    return make_trainer(model, config(**changes), 2, compiled=False, ranks=Ranks(0, 1, CPU)), batches


def test_batchnorm_and_biases_can_do_without_weight_decay():
    trainer, _ = trainer_and_batches()
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1]
    trainer, _ = trainer_and_batches(norm_decay=False)
    shapes = {g["weight_decay"]: [p.ndim for p in g["params"]] for g in trainer.optimizer.param_groups}
    assert shapes == {0.1: [4, 2], 0.0: [1, 1, 1]}


def test_two_steps_with_every_setting_are_those_of_the_equations():
    trainer, batches = trainer_and_batches(norm_decay=False, nesterov=True, label_smoothing=0.2)
    expected, _ = trainer_and_batches()
    model = expected.model
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for images, labels, _, _ in batches.epoch(0, 0):
        loss = 0.8 * F.cross_entropy(model(images), labels) - 0.2 * F.log_softmax(model(images), 1).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                g = g + 0.1 * p if p.ndim > 1 else g
                v.mul_(0.9).add_(g)
                p -= 0.1 * (g + 0.9 * v)  # Nesterov, as PyTorch defines it
    trainer.train_epoch(batches, Progress())
    for p, q in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_the_average_is_the_mean_over_the_steps_of_the_last_epochs():
    trainer, batches = trainer_and_batches(epochs=2, average_epochs=1)
    step, weights, statistics = trainer._step, [], []

    def recorded(*batch):
        sums = step(*batch)
        weights.append(trainer.model[0].weight.detach().clone())
        statistics.append(trainer.model[1].running_mean.clone())
        return sums

    trainer._step, progress = recorded, Progress()
    trainer.train_epoch(batches, progress)
    assert trainer.evaluated_model is trainer.model
    progress.epoch, progress.step = 1, 0
    trainer.train_epoch(batches, progress)
    average = trainer.evaluated_model
    assert average is not trainer.model and len(weights) == 4
    assert torch.allclose(average[0].weight, (weights[2] + weights[3]) / 2, atol=1e-7)
    assert torch.allclose(average[1].running_mean, (statistics[2] + statistics[3]) / 2, atol=1e-7)
    assert torch.equal(trainer.model[0].weight, weights[3])


def test_images_are_smaller_in_the_first_epochs_only():
    trainer, batches = trainer_and_batches(early_size=4, early_epochs=1)
    sizes, progress = [], Progress()
    trainer.model.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-1]))
    trainer.train_epoch(batches, progress)
    progress.epoch, progress.step = 1, 0
    trainer.train_epoch(batches, progress)
    assert sizes == [4, 4, 8, 8]


# -- A run --


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert train_s3net.main(Args(out=folder, **TINY, **ALL)) == 0
    return folder


def state_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def test_the_settings_are_recorded_and_name_the_command(reference):
    values = json.loads((reference / "config.json").read_text())
    assert {name: values[name] for name in ALL} == ALL
    words = shell_command_of(config_from_json(values, reference)).split()
    assert "--no-norm-decay" in words and "--nesterov" in words
    assert words[words.index("--early-size") + 1] == "16" and words[words.index("--average-epochs") + 1] == "2"


@pytest.mark.parametrize("last_save", [2, 6, 7, 11])  # in the first epoch, around its end, and in the average
def test_an_interrupted_run_ends_with_the_same_bits(reference, tmp_path, monkeypatch, last_save):
    saves, save = [], Run.save

    def save_and_stop(self, state):
        save(self, state)
        saves.append(state["progress"]["step"])
        if len(saves) == last_save:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_s3net.main(Args(out=tmp_path, checkpoint_every=1, **TINY, **ALL))
    monkeypatch.undo()
    assert train_s3net.main(Args(out=tmp_path, resume=True)) == 0
    first, second = state_of(tmp_path), state_of(reference)
    for name in ("model", "average"):
        assert all(torch.equal(first[name][key], second[name][key]) for key in second[name])
    momenta = [[s["momentum_buffer"] for s in state["optimizer"]["state"].values()] for state in (first, second)]
    assert all(map(torch.equal, *momenta))
    assert first["average"]["n_averaged"] == 8
    rows = [[row["val_error"] for row in state["progress"]["history"]] for state in (first, second)]
    assert rows[0] == rows[1] and len(rows[0]) == 3


def test_the_averaged_weights_are_the_best_ones(tmp_path):
    flags = TINY | ALL | {"epochs": 1, "average_epochs": 1}
    assert train_s3net.main(Args(out=tmp_path, **flags)) == 0
    state, best = state_of(tmp_path), load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(best[key], state["average"][f"module.{key}"]) for key in best)
    assert any(not torch.equal(state["model"][key], state["average"][f"module.{key}"]) for key in best)


@pytest.mark.parametrize("change", ["missing", "other names", "shape", "no tensor"])
def test_a_damaged_average_is_an_error(reference, tmp_path, change):
    state = state_of(reference)
    state["progress"] |= {"epoch": 2, "history": state["progress"]["history"][:2]}
    state["scheduler"]["last_epoch"] = 8
    average, name = state["average"], "module.classifier.bias"
    if change == "missing":
        del state["average"]
    elif change == "other names":
        average["module.other"] = average.pop(name)
    else:
        average[name] = average[name][:1] if change == "shape" else 3.0
    for file in ("config.json", "metrics.jsonl"):
        (tmp_path / file).write_bytes((reference / file).read_bytes())
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"does not fit") as error:
        train_s3net.main(Args(out=tmp_path, resume=True))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"label_smoothing": 1.0}, "--label-smoothing 1.0 is not possible: give a number below 1"),
        ({"label_smoothing": -0.1}, "--label-smoothing -0.1 is not possible: give a number of 0 or more"),
        ({"average_epochs": 4}, "--average-epochs 4 is too large: the run has 3 epochs"),
        ({"early_size": 16}, "--early-size and --early-epochs belong together"),
        ({"early_epochs": 1}, "--early-size and --early-epochs belong together"),
        ({"early_size": 32, "early_epochs": 1}, "--early-size 32 is not smaller than the images, 32 pixels"),
        ({"early_size": 16, "early_epochs": 4}, "--early-epochs 4 is too large"),
        ({"nesterov": True, "momentum": 0.0}, "--nesterov needs a --momentum above 0"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        train_s3net.main(Args(out=tmp_path / "run", **TINY | flags))
    assert not (tmp_path / "run").exists()


def test_a_setting_cannot_change_on_resuming(reference):
    with pytest.raises(
        InputError, match=r"--label-smoothing 0.2 changes the recipe of the run, which was started with 0.1"
    ):
        train_s3net.main(Args(out=reference, resume=True, label_smoothing=0.2))
