"""What depends on the kind of device: copies, the device's number, precision, compiling. None of it needs a GPU."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import distributed
from data.batches import step_part
from data.decoding import Decoder, random_crop
from data.device_input import to_device
from distributed import Ranks
from recipes import RunConfig
from s3net_common.errors import InputError
from s3net_networks import create_network
from training import optimization
from training.config import check_device
from training.engine import Precision, Progress
from training.optimization import make_trainer, share_of_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "source", "pinned", "overlaps"),
    [("cuda", "cpu", True, True), ("cuda", "cpu", False, False), ("mps", "cpu", True, False), ("cpu", "cpu", 1, False)],
)
def test_only_copies_from_pinned_memory_to_cuda_are_not_waited_for(device, source, pinned, overlaps):
    calls = []
    tensor = SimpleNamespace(device=torch.device(source), is_pinned=lambda: pinned)
    tensor.to = lambda target, non_blocking: calls.append((target, non_blocking))
    to_device(tensor, torch.device(device))
    assert calls == [(torch.device(device), overlaps)]


@pytest.mark.parametrize(("count", "world_size"), [(64, 3), (10, 4), (2, 4), (1, 1)])
def test_the_parts_of_a_batch_are_those_of_tensor_split(count, world_size):
    positions = torch.arange(5, 5 + count)
    for rank, expected in enumerate(positions.tensor_split(world_size)):
        part, weight, whole = step_part(1, 5, 5 + count, rank, world_size) if count <= 5 else (None, None, None)
        if part is None:
            part, weight, whole = step_part(0, count, count, rank, world_size)
            expected = expected - 5
        assert whole == count
        assert weight == float(len(expected) > 0)
        if len(expected):
            assert torch.equal(torch.arange(100)[part], expected)
        else:
            assert part.stop - part.start == 1


@pytest.fixture
def four_gpus(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return chosen


@pytest.mark.parametrize(("device", "index"), [("cuda:1", 1), ("cuda", 0), (None, 0)])
def test_the_chosen_gpu_becomes_the_current_one(four_gpus, device, index):
    assert distributed.join_ranks(device).device == torch.device("cuda", index)
    assert four_gpus == [torch.device("cuda", index)]


def test_a_numbered_gpu_for_several_processes_is_refused(four_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"^--device cuda:1 would put all processes of this node on one GPU: pass"):
        distributed.join_ranks("cuda:1")
    assert four_gpus == []


def test_augmentation_does_not_seed_the_generators_of_gpus(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    file = io.BytesIO()
    Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)).save(file, "png")
    source = SimpleNamespace(encoded=lambda index: (file.getvalue(), 7), name=str)
    decoder = Decoder(source, lambda image: random_crop(image, 16, flip=True))
    before = torch.get_rng_state()
    (first, label, problem), (second, _, _), (other, _, _) = decoder[0, 3], decoder[0, 3], decoder[0, 4]
    assert (first.shape, label, problem) == ((3, 16, 16), 7, None)
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert seeded == [] and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("capability", "allowed", "mixed", "name"),
    [
        ((8, 0), True, False, "float32 (products in TF32)"),
        ((7, 5), True, False, "float32"),
        ((8, 0), False, False, "float32"),
        ((8, 0), True, True, "bfloat16"),
    ],
)
def test_the_name_of_a_precision_says_that_products_are_rounded(monkeypatch, capability, allowed, mixed, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: None)
    before, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # a training run in the tests' process may have changed it
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        assert Precision(torch.device("cuda"), mixed).name == name
    finally:
        torch.backends.cudnn.allow_tf32 = before
        torch.set_float32_matmul_precision(products)


def test_the_precision_of_a_cpu_is_its_dtype():
    assert [Precision(CPU, mixed).name for mixed in (False, True)] == ["float32", "bfloat16"]


def config(**changes) -> RunConfig:
    settings = {"dataset": "digits", "model": "s3net_cifar", "model_options": {}, "num_classes": 3, "epochs": 2}
    settings |= {"batch_size": 8, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "schedule": "cosine"}
    settings |= {"milestones": [], "mean": [0.5] * 3, "std": [0.5] * 3, "flip": False, "crop_padding": 0.0}
    settings |= {"image_size": 8, "seed": 0, "amp": False, "limit_train": None, "limit_val": None}
    settings |= {"train_images": 19, "val_images": 3, "classes": ["a", "b", "c"], **changes}
    return RunConfig(**settings)


@pytest.mark.parametrize(("changes", "rank", "size"), [({}, 0, 3), ({}, 2, 2), ({"train_images": 4}, 2, 1)])
def test_the_share_of_a_batch(changes, rank, size):
    assert share_of_batch(config(**changes), Ranks(rank, 3, CPU)) == size


@pytest.mark.parametrize(("changes", "sizes"), [({}, [8]), ({"early_size": 6, "early_epochs": 1}, [6, 8])])
def test_the_network_is_compiled_once_for_each_size_and_the_last_batch_is_not(changes, sizes, monkeypatch):
    graphs = []
    compile_model = torch.compile

    def backend(graph, inputs):
        graphs.append([tuple(t.shape) for t in inputs if len(t) == 8])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compile_model(model, dynamic=dynamic, backend=backend))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model.append(torch.nn.Linear(4, 3))
    trainer = make_trainer(model, config(**changes), 3, compiled=True, ranks=Ranks(0, 1, CPU))
    images, labels = torch.randn(19, 3, 8, 8), torch.arange(19) % 3

    class Batches:
        def __len__(self):
            return 3

        def epoch(self, epoch, first_step):
            for part in (slice(0, 8), slice(8, 16), slice(16, 19)):
                yield images[part], labels[part], torch.ones(len(labels[part])), len(labels[part])

    progress = Progress()
    for _ in range(2):
        trainer.train_epoch(Batches(), progress)
        progress.finish_epoch(
            trainer.training_metrics(progress), {"val_loss": 1.0, "val_error": 1.0, "val_top5_error": 0.0}, 0.0
        )
    assert graphs == [[(8, 3, size, size)] for size in sizes]


# -- CUDA graphs and SyncBatchNorm --


@pytest.mark.parametrize(
    ("settings", "flags", "ranks", "message"),
    [
        ({}, {"graphs": True}, Ranks(0, 1, CPU), "--graphs is for a single process on a CUDA GPU: leave it out"),
        ({}, {"graphs": True}, Ranks(0, 2, torch.device("cuda")), "--graphs is for a single process on a CUDA GPU"),
        ({"sync_bn": True}, {}, Ranks(0, 2, CPU), "--sync-bn is for CUDA GPUs: PyTorch has no BatchNorm over several"),
        ({"sync_bn": True}, {"graphs": True}, Ranks(0, 1, torch.device("cuda")), None),
    ],
)
def test_flags_that_need_a_gpu(settings, flags, ranks, message):
    if message is None:
        return check_device(config(**settings), flags, ranks)
    with pytest.raises(InputError, match=f"^{message}"):
        check_device(config(**settings), flags, ranks)


def test_sync_bn_replaces_every_batchnorm_and_keeps_the_weights(monkeypatch):
    monkeypatch.setattr(optimization, "DistributedDataParallel", lambda model, **options: model)
    model = create_network("s3net_cifar", 3, growth_rate=4, depth=7)
    images, names = torch.randn(2, 3, 8, 8), list(model.state_dict())
    expected = model.eval()(images)
    count = sum(type(module) is torch.nn.BatchNorm2d for module in model.modules())
    make_trainer(model, config(sync_bn=True), 3, compiled=False, ranks=Ranks(0, 2, CPU))
    assert sum(type(module) is torch.nn.SyncBatchNorm for module in model.modules()) == count == 7
    assert list(model.state_dict()) == names and torch.equal(model(images), expected)


class RecordedGraph:
    """Replays, in place of a CUDA graph, the step that was called while it was captured."""

    step = None

    def replay(self):
        for output, value in zip(self.outputs, self.step(), strict=True):
            output.copy_(value)


def test_replayed_steps_train_like_steps_without_a_graph(monkeypatch):
    """The logic around the graph on a CPU: warm-up, fixed inputs, learning rate, smaller batches, smaller images."""
    trainers, settings = [], config(schedule="step", milestones=[0.7], early_size=8, early_epochs=1)
    for graphs in (False, True):
        torch.manual_seed(0)
        pool, classifier = torch.nn.AdaptiveAvgPool2d(6), torch.nn.Linear(4 * 36, 3)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), pool, torch.nn.Flatten(), classifier)
        trainer = make_trainer(model, settings, 6, False, Ranks(0, 1, CPU), graphs)
        trainers.append(trainer)
    plain, graphed = trainers
    captures = []

    def capture(images, labels, weights, whole_batch):
        step = graphed.graphed
        step.inputs, step.graph = tuple(torch.full_like(t, 7) for t in (images, labels, weights)), RecordedGraph()
        step.outputs = step.graph.outputs = (torch.zeros(()), torch.zeros(()))
        step.graph.step = lambda: step.step(*step.inputs, whole_batch)
        captures.append(tuple(images.shape))

    monkeypatch.setattr(graphed.graphed, "_capture", capture)
    monkeypatch.setattr(graphed.graphed, "_beside", graphed._compute)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    generator = torch.Generator().manual_seed(1)
    sums = []
    for step, size in enumerate([8] * 5 + [3] + [8] * 5 + [3]):
        plain.small_images = graphed.small_images = step < 6
        batch = (torch.randn(size, 3, 16, 16, generator=generator), torch.arange(size) % 3, torch.ones(size), size)
        sums.append((plain._step(*batch), graphed._step(*batch)))
    assert captures == [(8, 3, 8, 8), (8, 3, 16, 16)]
    assert all(torch.equal(a, b) for pair in sums for a, b in zip(*pair, strict=True))
    assert len({float(loss) for (loss, _), _ in sums}) == len(sums)
    for a, b in zip(plain.model.parameters(), graphed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert plain.optimizer.param_groups[0]["lr"] == graphed.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_the_optimizer_takes_the_rate_from_the_tensor_and_keeps_the_number():
    model = torch.nn.Linear(192, 3, bias=False)
    network = torch.nn.Sequential(torch.nn.Flatten(), model)
    trainer = make_trainer(network, config(momentum=0.0), 3, False, Ranks(0, 1, CPU))
    trainer.learning_rate, before = torch.zeros(()), model.weight.detach().clone()
    images, labels, weights = torch.randn(8, 3, 8, 8), torch.arange(8) % 3, torch.ones(8)
    trainer._step(images, labels, weights, 8)
    change = (model.weight - before).abs().max()
    assert float(trainer.learning_rate) == pytest.approx(0.1) and change > 1e-4
    rate = trainer.optimizer.param_groups[0]["lr"]
    assert isinstance(rate, float) and rate < 0.1
