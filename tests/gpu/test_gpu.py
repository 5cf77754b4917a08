"""Training, resuming, evaluation and saliency on a GPU: python -m pytest tests/gpu

Without a CUDA GPU they are skipped, except for a few that run on the CPU, so that a change that breaks them is seen.
With the environment variable S3NET_GPU_TESTS=cpu all that need no GPU run on the CPU.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_s3net
from data.batches import EvaluationBatches, TrainingBatches
from data.datasets import load_dataset
from data.image_sets import ImageSet
from distributed import Ranks, device_name
from full_grad import FullGrad
from models import create_model
from recipes import RunConfig, recipe_for
from s3net_networks import create_network, list_networks
from training import training_loop
from training.engine import Precision, Progress, Trainer, evaluate
from training.optimization import make_trainer

CHOSEN = os.environ.get("S3NET_GPU_TESTS")
DEVICE = torch.device(CHOSEN or ("cuda" if torch.cuda.is_available() else "cpu"))
ON_GPU = DEVICE.type == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")
for_gpu = pytest.mark.skipif(not ON_GPU and not CHOSEN, reason="needs a CUDA GPU, or S3NET_GPU_TESTS=cpu")


@pytest.fixture(autouse=True)
def precision_of_products():
    """Restore the settings that the scripts change."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


def random_images(count: int, size: int, classes: int) -> ImageSet:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(classes, (count,), generator=generator), [str(i) for i in range(classes)])


def trainer_and_batches(name: str, count: int, size: int, batch_size: int, classes: int, amp: bool, **options):
    """Return a trainer and its batches, from the same random state each time."""
    recipe = vars(recipe_for("cifar100", name)) | {"batch_size": batch_size, "lr": 0.05}
    config = {key: recipe[key] for key in RunConfig.__dataclass_fields__ if key in recipe}
    config |= {"dataset": "cifar100", "model_options": {}, "num_classes": classes, "seed": 0, "amp": amp}
    config |= {"limit_train": None, "limit_val": None, "train_images": count, "val_images": count, "classes": []}
    config = RunConfig(**config)
    torch.manual_seed(0)
    model = create_network(name, classes).to(DEVICE, memory_format=torch.channels_last)
    data = random_images(count, size, classes)
    augmentation = {"flip": True, "crop_padding": 0.125, "seed": 0}
    batches = TrainingBatches(data, batch_size, DEVICE, config.mean, config.std, **augmentation)
    options = {"compiled": False, "ranks": Ranks(0, 1, DEVICE)} | options
    return make_trainer(model, config, len(batches), **options), batches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=for_gpu) for name in list_networks()])
def test_a_training_step_of_every_network(name, dtype, monkeypatch):
    size, classes = (32, 100) if name.endswith("_cifar") else (64, 200)
    if ON_GPU:  # float16 is what GPUs without bfloat16 get
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: dtype == torch.bfloat16)
    trainer, batches = trainer_and_batches(name, 24, size, 8, classes, amp=True)
    assert trainer.precision.dtype == dtype or not ON_GPU
    trainer.precision.dtype = dtype
    if trainer.precision.scaler.is_enabled():  # the usual first scale may skip all three steps
        trainer.precision.scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    progress = Progress()
    trainer.train_epoch(batches, progress)
    assert len(progress.losses) == 3 and all(0 < loss < 8 * 50 for loss in progress.losses)
    changed = [not torch.equal(before[key], p) for key, p in trainer.model.named_parameters()]
    assert sum(changed) > 0.8 * len(changed)
    parameters = list(trainer.model.parameters())
    assert all(p.isfinite().all() and p.device == torch.empty(0, device=DEVICE).device for p in parameters)


def losses_of(epochs: int, **options) -> tuple[list[float], Trainer]:
    trainer, batches = trainer_and_batches("s3net_cifar", 8 * 32 + 5, 32, 32, 100, **options)
    losses, progress = [], Progress()
    for _ in range(epochs):
        trainer.train_epoch(batches, progress)
        losses += progress.losses
        metrics = trainer.training_metrics(progress)
        progress.finish_epoch(metrics, {"val_loss": 0.0, "val_error": 0.0, "val_top5_error": 0.0}, 0.0)
    return losses, trainer


@needs_gpu
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("kind", ["graphs", "compiled", "both"])
def test_graphs_and_compiled_networks_train_like_plain_ones(kind, amp):
    torch.backends.cudnn.benchmark = True
    plain, _ = losses_of(2, amp=amp)
    other, trainer = losses_of(2, amp=amp, compiled=kind != "graphs", graphs=kind != "compiled")
    assert (trainer.graphed is not None and trainer.graphed.graph is not None) == (kind != "compiled")
    assert len(other) == 18
    assert other == pytest.approx(plain, rel=0.02 if amp else 0.005)  # the rounding errors grow from step to step


@needs_gpu
def test_dropout_differs_from_replay_to_replay():
    trainer, batches = trainer_and_batches("s3net_cifar", 256, 32, 32, 100, amp=False, graphs=True)
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    trainer.model.classifier.register_forward_pre_hook(lambda module, inputs: (F.dropout(inputs[0], 0.5),))
    trainer.model.train()
    batch = next(batches.epoch(0))
    losses = [float(trainer._step(*batch)[0]) for _ in range(8)]
    assert trainer.graphed.graph is not None and len(set(losses[3:])) == 5


@pytest.fixture
def digits(tmp_path):
    """Return a function that trains on digits in one of the folders of a test, and its summary, metrics and state."""

    def train(folder: str, **flags) -> tuple[dict, list[dict], dict]:
        out = tmp_path / folder
        settings = {"dataset": "digits", "growth_rate": 4, "depth": 10, "epochs": 3, "limit_train": 330}
        settings |= {"limit_val": 200, "device": str(DEVICE), "out": out} | flags
        train_s3net.main(train_s3net.Args(**settings))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        summary = out / "summary.json"
        state = torch.load(out / "last.pt", weights_only=True, map_location="cpu")
        return json.loads(summary.read_text()) if summary.is_file() else {}, rows, state

    return train


def test_a_resumed_run_goes_on_from_the_same_state(digits, monkeypatch):
    """The run ends after its fourth checkpoint, within the second epoch of 6 steps."""
    _, expected, whole = digits("whole", checkpoint_every=4)
    save, checkpoints = training_loop.save_progress, []

    def save_and_end(*args):
        save(*args)
        checkpoints.append(args)
        if len(checkpoints) == 4:  # within and after the first epoch's training, after its evaluation, and one more
            raise InterruptedError

    with monkeypatch.context() as context, pytest.raises(InterruptedError):
        context.setattr(training_loop, "save_progress", save_and_end)
        digits("parts", checkpoint_every=4)
    assert (checkpoints[-1][-1].epoch, checkpoints[-1][-1].step) == (1, 4)
    _, rows, parts = digits("parts", resume=True)
    assert [row["lr"] for row in rows] == [row["lr"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=0.02)
    for kind, value in whole["processes"][0]["random"].items():
        assert torch.equal(value, parts["processes"][0]["random"][kind]), kind
    weights = {name: value.float() for name, value in whole["model"].items()}
    differences = [(parts["model"][name].float() - value).abs().max() for name, value in weights.items()]
    assert max(differences) < (0.05 if ON_GPU else 1e-9)


def test_the_summary_names_device_and_precision(digits):
    flags = {"device": "cuda:0"} if ON_GPU else {}
    summary, rows, _ = digits("numbered", epochs=1, **flags)
    names = ("bfloat16", "float16") if Precision.is_faster(DEVICE) else ("float32",)
    assert summary["device"] == device_name(DEVICE) and summary["precision"] in names
    assert len(rows) == 1
    if ON_GPU:
        assert torch.cuda.current_device() == 0


@for_gpu
def test_fullgrad_is_complete():
    torch.set_float32_matmul_precision("high")
    model = create_model("s3net_cifar", pretrained=True).eval().to(DEVICE)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    explainer = FullGrad(model)
    assert explainer.completeness_error(images).max() < 1e-4
    assert explainer.saliency(images).shape == (4, 1, 32, 32)


@for_gpu
def test_channels_last_gives_the_same_logits():
    torch.set_float32_matmul_precision("highest")
    model = create_model("s3net_cifar", pretrained=True).eval().to(DEVICE)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        expected = model(images)
        got = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@for_gpu
def test_an_evaluation_equals_the_cpus():
    _, val = load_dataset("digits", Path("digits"), image_size=32)
    model = create_model("s3net_cifar", pretrained=True).eval()
    results = []
    for device in (torch.device("cpu"), DEVICE):
        batches = EvaluationBatches(val, 100, device, (0.5,) * 3, (0.25,) * 3)
        trainer = Trainer(model, None, None, Precision(device, mixed=False), Ranks(0, 1, device))
        with torch.backends.cudnn.flags(allow_tf32=False):
            results.append(evaluate(model.to(device, memory_format=torch.channels_last), batches, trainer))
    assert results[1]["val_loss"] == pytest.approx(results[0]["val_loss"], rel=1e-3)
    assert results[1]["val_error"] == pytest.approx(results[0]["val_error"], abs=0.5)


@needs_gpu
def test_tf32_is_named(digits):
    summary, _, _ = digits("float32", epochs=1, amp=False)
    rounds = torch.cuda.get_device_capability() >= (8, 0)
    assert summary["precision"] == ("float32 (products in TF32)" if rounds else "float32")
