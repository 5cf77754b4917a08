"""A step in parts, and checkpoints in mid-epoch."""

import json
import math

import pytest
import torch
from torch import nn

import recipes
from data import datasets
from data.batches import TrainingBatches
from data.image_sets import ImageSet
from distributed import Ranks
from s3net_common.errors import InputError, LocalError
from s3net_networks import connections
from training import optimization
from training.engine import NonFiniteError, Precision, Progress, Trainer, top_errors
from training.run_folder import Run

CPU = torch.device("cpu")


def make_trainer(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))  # no BatchNorm
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return Trainer(model, optimizer, scheduler, Precision(CPU, mixed=False), Ranks(0, 1, CPU), **options)


def make_batches(count, batch_size):
    images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    data = ImageSet(images, torch.arange(count) % 3, ["a", "b", "c"])
    return TrainingBatches(data, batch_size, CPU, (0.5,) * 3, (0.3,) * 3, flip=True, crop_padding=0.1, seed=2)


@pytest.mark.parametrize("parts", [3, 5, 100])
def test_a_step_in_parts_is_the_whole_step(parts):
    whole, divided = make_trainer(), make_trainer(accumulation_steps=parts)
    progress, same = Progress(), Progress()
    whole.train_epoch(make_batches(23, 10), progress)  # batches of 10, 10 and 3 images
    divided.train_epoch(make_batches(23, 10), same)
    assert same.losses == pytest.approx(progress.losses, rel=1e-5) and same.errors == progress.errors
    assert len(same.losses) == 3 and same.images == 23
    for expected, got in zip(whole.model.parameters(), divided.model.parameters(), strict=True):
        assert torch.allclose(expected, got, atol=1e-6)
    assert not torch.allclose(expected, list(make_trainer().model.parameters())[-1], atol=1e-3)


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, [1, 2, 3, 4]), (2, [2, 4]), (5, []), (9, [])])
def test_checkpoints_come_after_every_so_many_steps_but_the_last(every, expected):
    progress, steps = Progress(), []
    trainer = make_trainer(checkpoint=lambda: steps.append(progress.step), checkpoint_every=every)
    trainer.train_epoch(make_batches(25, 5), progress)
    assert steps == expected and progress.step == 5


def test_a_part_of_one_image_where_batchnorm_needs_two():
    trainer = make_trainer(accumulation_steps=3)
    trainer.model.insert(3, nn.BatchNorm1d(4 * 36))
    with pytest.raises(InputError, match=r"cannot be trained on a single image at a time .* or --accumulate that"):
        trainer.train_epoch(make_batches(23, 10), Progress())  # the last batch has 3 images


# -- Logits that are not finite --


def test_logits_that_are_not_finite_are_errors():
    logits = torch.tensor([[3.0, 1, 0, 0, 0, 0], [1, 3, 0, 0, 0, 2], [math.nan] * 6, [math.inf, 0, 0, 0, 0, 0]])
    assert top_errors(logits, torch.tensor([0, 0, 0, 0])) == (3, 2)


def test_a_validation_loss_that_is_not_finite_is_null(tmp_path):
    metrics = {"train_loss": 1.0, "train_error": 50.0, "images_per_second": 9.0}
    progress = Progress(lr=0.1, images=5, seconds=1.0)
    for loss in (math.nan, math.inf):
        progress.finish_epoch(metrics, {"val_loss": loss, "val_error": 100.0, "val_top5_error": 100.0}, 1.0)
    config = {"model": "s3net_cifar", "model_options": {}, "num_classes": 2, "classes": ["a", "b"], "mean": [0.0] * 3}
    config |= {"std": [1.0] * 3, "image_size": 8, "dataset": "folder"}
    Run(tmp_path).save({"config": config, "progress": vars(progress), "model": {"weight": torch.zeros(1)}})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["val_loss"] for row in rows] == [None, None] and rows[1]["train_loss"] == 1.0
    assert (tmp_path / "curves.png").stat().st_size > 0


# -- Memory --


class SmallMemory(nn.Module):
    """A network whose device has room for some images."""

    def __init__(self, network, room):
        super().__init__()
        self.network, self.room = network, room

    def forward(self, images):
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total ...")
        return self.network(images)


@pytest.mark.parametrize(
    ("room", "parts", "message"),
    [
        (3, 1, "10 images at a time are too many for this device, and 2 fit; start a new run with --accumulate 5, or "),
        (4, 2, "5 images at a time are too many for this device, and 2 fit; .* or with --batch-size 2$"),
        (0, 1, "10 images at a time are too many for this device, and so is one; use a smaller --image-size"),
    ],
)
def test_a_step_that_does_not_fit_names_the_batch_that_does(room, parts, message):
    trainer = make_trainer(accumulation_steps=parts)
    trainer.model = SmallMemory(trainer.model, room)
    progress = Progress()
    with pytest.raises(LocalError, match=message) as error:
        trainer.train_epoch(make_batches(23, 10), progress)
    assert "\n" not in str(error.value) and progress.step == 0


def test_other_errors_of_a_step_stay_what_they_are():
    trainer = make_trainer()
    trainer.model.forward = lambda images: torch.zeros(3) @ torch.zeros(4)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        trainer.train_epoch(make_batches(23, 10), Progress())


# -- What the last update made of the weights --


def test_weights_that_are_not_finite_are_not_saved():
    trainer = make_trainer()
    trainer.check_weights(7)
    with torch.no_grad():
        trainer.model[0].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="a weight after step 7 is not finite"):
        trainer.check_weights(7)


def test_float16_continues_a_run_of_bfloat16_and_the_other_way_round():
    trainers = [make_trainer(), make_trainer()]
    trainers[0].precision.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, enabled=True)
    scaled, unscaled = (trainer.state() for trainer in trainers)
    assert scaled["scaler"]["scale"] == 512.0 and unscaled["scaler"] == {}
    trainers[0].load_state(unscaled)
    assert trainers[0].precision.scaler.get_scale() == 512.0
    trainers[1].load_state(scaled)
    assert trainers[1].state()["scaler"] == {}


# -- Choices that --help names --


def test_the_choices_of_flags_are_those_that_the_code_has():
    assert tuple(optimization.SCHEDULES) == recipes.SCHEDULES
    assert tuple(connections.CONNECTIONS) == recipes.CONNECTIONS
    assert set(recipes.RECIPES) == set(datasets.DATASETS)
    assert recipes.DEFAULT_DATASET in recipes.RECIPES
