"""--export: the last epoch's weights, their record and their card."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_readme import wrong_numbers

import train_s3net
from s3net_common.checkpoints import load_weights, read_metadata
from s3net_common.errors import InputError
from s3net_networks import create_network
from train_s3net import Args
from training.export import error_line, trained_line
from training.run_folder import Run

TINY = {"dataset": "digits", "growth_rate": 4, "depth": 7, "device": "cpu", "limit_train": 64, "limit_val": 40}
TINY |= {"batch_size": 16, "epochs": 3, "seed": 5}
NEW_SETTINGS = ("init", "sync_bn", "decode", "augment", "norm_decay", "nesterov", "label_smoothing", "average_epochs")
NEW_SETTINGS += ("early_size", "early_epochs")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "tiny"
    assert train_s3net.main(Args(out=folder, **TINY)) == 0
    return folder


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Return a function that stops a run at one of its checkpoints: 4 steps are 5 saves an epoch."""

    def train(saves):
        count, save = [], Run.save

        def save_and_stop(self, state):
            save(self, state)
            count.append(1)
            if len(count) == saves:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Run, "save", save_and_stop)
            with pytest.raises(KeyboardInterrupt):
                train_s3net.main(Args(out=tmp_path / "run", checkpoint_every=1, **TINY))
        return tmp_path / "run"

    return train


def export(run, out, **flags):
    assert train_s3net.main(Args(export=run, out=out, **flags)) == 0
    return json.loads((out / "last.json").read_text()), (out / "README.md").read_text()


def refusal(**flags):
    with pytest.raises(InputError) as error:
        train_s3net.main(Args(**flags))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_finished_run(finished, tmp_path):
    record, card = export(finished, tmp_path)
    state = torch.load(finished / "last.pt", weights_only=True)
    weights = load_file(tmp_path / "last.safetensors")
    assert weights.keys() == state["model"].keys()
    assert all(torch.equal(weights[name], state["model"][name]) for name in weights)
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert (record["epoch"], record["val_error"], record["recipe"]["seed"]) == (3, last["val_error"], 5)
    low, high = record["val_error_interval"]
    assert low < last["val_error"] < high
    metadata = read_metadata(tmp_path / "last.safetensors")
    assert metadata["classes"] == [str(i) for i in range(10)] and metadata["model_options"]["depth"] == 7
    load_weights(create_network("s3net_cifar", 10, **metadata["model_options"]), tmp_path / "last.safetensors")
    assert record["training_command"] in card and "--seed 5" in card and "not finished" not in card
    assert f"{last['val_error']:.2f}% on 40 validation images (95% interval over the images {low:.2f}%" in card
    assert "| progress | epoch 3, the last one |" in card and "| licence | MIT |" in card
    assert wrong_numbers(tmp_path / "README.md", card) == []
    assert wrong_numbers(tmp_path / "README.md", card.replace("64 training", "65 training"))


@pytest.mark.parametrize(
    ("dataset", "hold_out", "images"),
    [("cifar100", 0, "test"), ("imagenet", 0, "validation"), ("cifar100", 5, "held-out training")],
)
def test_the_card_names_the_images_of_the_error(finished, dataset, hold_out, images):
    config = replace(Run(finished).read_config(), dataset=dataset, hold_out=hold_out)
    errors = {"val_error": 50.0, "val_error_interval": (35.0, 65.0), "val_top5_error": 9.0, "train_error": 1.0}
    assert f"50.00% on 40 {images} images (95% interval" in error_line(config, errors)


def test_the_stated_error_is_that_of_the_exported_weights(finished, tmp_path):
    record, _ = export(finished, tmp_path / "export")
    flags = {"checkpoint": tmp_path / "export" / "last.safetensors", "limit_val": 40, "device": "cpu"}
    train_s3net.main(Args(eval_only=True, out=tmp_path / "evaluation", **flags))
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert evaluation["val_error"] == pytest.approx(record["val_error"], abs=1e-9)


def test_a_run_of_an_earlier_version(finished, tmp_path):
    """Its configuration lacks the settings that were added since."""
    old = tmp_path / "old"
    old.mkdir()
    config = json.loads((finished / "config.json").read_text())
    state = torch.load(finished / "last.pt", weights_only=True)
    for name in NEW_SETTINGS:
        del config[name], state["config"][name]
    (old / "config.json").write_text(json.dumps(config))
    torch.save(state, old / "last.pt")
    record, card = export(old, tmp_path / "out")
    assert record["epoch"] == 3 and record["training_versions"] is None and "| trained with | 0.00" in card


def test_a_network_of_own_images_has_no_licence_yet(finished, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    config = json.loads((finished / "config.json").read_text()) | {"dataset": "folder"}
    state = torch.load(finished / "last.pt", weights_only=True)
    state["config"]["dataset"] = "folder"
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "last.pt")
    _, card = export(folder, tmp_path / "out")
    assert "licence" not in card and "| seed | 5; one run |" in card


def test_a_long_training_is_printed_without_an_exponent():
    record = {"training_versions": None, "training_hours": 123.4, "device": "cpu", "precision": None}
    assert trained_line(record) == "cpu, 123.40 hours"


def test_an_unfinished_run_is_exported_on_demand_only_and_its_card_says_so(interrupted, tmp_path):
    run = interrupted(5)  # the end of the first epoch
    message = refusal(export=run, out=tmp_path / "out")
    assert message.endswith("run has reached epoch 1 of 3: resume it, or pass --unfinished to export it as it is")
    assert not (tmp_path / "out").exists()
    record, card = export(run, tmp_path / "out", unfinished=True)
    assert "| progress | epoch 1 of 3: **the training is not finished** |" in card and "which has not ended" in card
    assert record["val_error"] is not None


def test_weights_within_an_epoch_have_no_error_of_their_own(interrupted, tmp_path):
    run = interrupted(8)
    (run / "NOTE.txt").write_text("Interrupted\nonce.")
    record, card = export(run, tmp_path / "out", unfinished=True)
    assert record["val_error"] is None and record["steps"] == 3
    assert "epoch 1 of 3 and 3 steps" in card and "not measured for these weights. After epoch 1: " in card
    assert "\n\nInterrupted once.\n\n" in card
    assert wrong_numbers(tmp_path / "out" / "README.md", card) == []


def test_files_are_replaced_with_overwrite_only(finished, tmp_path):
    (tmp_path / "README.md").write_text("of the user")
    message = refusal(export=finished, out=tmp_path)
    assert message == f"{tmp_path} already holds README.md: pass --overwrite to replace them"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    export(finished, tmp_path, overwrite=True)
    assert (tmp_path / "README.md").read_text().startswith("# s3net_cifar")


def test_what_cannot_be_exported(finished, interrupted, tmp_path):
    assert refusal(export=tmp_path / "absent") == f"there is no {tmp_path / 'absent'}: give the folder of a run"
    assert "config.json is missing or damaged" in refusal(export=tmp_path)
    assert "run has no finished epoch: resume it" in refusal(export=interrupted(2), unfinished=True)
    (tmp_path / "run" / "last.pt").unlink()
    assert "has no last.pt, which holds the weights" in refusal(export=tmp_path / "run")
    state = torch.load(finished / "last.pt", weights_only=True)
    for change, message in (
        ({"config": state["config"] | {"seed": 6}}, "is not the checkpoint of the run that config.json describes"),
        ({"model": {"a": torch.zeros(1)}}, "holds the weights of another network"),
        ({"progress": None}, "is damaged"),
    ):
        torch.save(state | change, tmp_path / "run" / "last.pt")
        (tmp_path / "run" / "config.json").write_bytes((finished / "config.json").read_bytes())
        assert message in refusal(export=tmp_path / "run", out=tmp_path / "out"), message
    assert refusal(export=finished, seed=3) == "--export takes the run as it is: leave out --seed"
    assert refusal(unfinished=True, **TINY) == "--unfinished is for --export: leave it out"
