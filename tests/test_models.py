"""The topology, the named networks and the loading of weights."""

import argparse
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from models import Block, S3Net, create_model, list_models
from s3net_common.checkpoints import load_weights
from s3net_common.errors import InputError

DATA = Path(__file__).parent / "data"


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def tiny(**options):
    return create_model("s3net_cifar", **{"growth_rate": 4, "depth": 13, "num_classes": 10} | options)


@pytest.mark.parametrize(
    ("growth_rate", "depth", "expected"),
    [(12, 40, 272_836), (24, 40, 927_244), (40, 40, 2_400_556), (64, 40, 5_897_884), (64, 70, 15_372_444)],
)
def test_cifar_parameter_counts(growth_rate, depth, expected):
    assert parameters(create_model("s3net_cifar", growth_rate=growth_rate, depth=depth)) == expected


@pytest.mark.parametrize(
    ("name", "with_1000", "with_200"),
    [
        ("s3net_tiny_k96", 5_021_608, 4_208_008),
        ("s3net_tiny_k108", 10_600_800, 9_680_000),
        ("s3net_imagenet_small", 9_405_560, 8_678_360),
        ("s3net_imagenet_k110", 8_962_182, 8_185_382),
        ("s3net_imagenet_k48", 7_051_080, 5_962_280),
        ("s3net_imagenet_large", 22_213_032, 20_861_832),
        ("s3net_imagenet_k180", 27_855_232, 26_336_032),
    ],
)
def test_imagenet_parameter_counts(name, with_1000, with_200):
    assert parameters(create_model(name)) == with_1000
    assert parameters(create_model(name, num_classes=200)) == with_200


def test_every_listed_name_builds():
    assert len(list_models()) == 8
    for name in list_models():
        assert isinstance(create_model(name), S3Net)


def test_layers_read_only_the_layer_before():
    block = Block(num_layers=4, in_channels=24, growth_rate=5)
    assert [layer[0].conv.in_channels for layer in block.layers] == [24, 5, 5, 5]
    x = torch.randn(2, 24, 8, 8)
    with torch.no_grad():
        out = block.eval()(x)
        chain = [x]
        for layer in block.layers:
            chain.append(layer(chain[-1]))
    assert out.shape == (2, 24 + 4 * 5, 8, 8)
    torch.testing.assert_close(out, torch.cat(chain, dim=1))


class CountConcatenations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.aten.cat
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_each_block_concatenates_once(training):
    model = tiny().train(training)
    with CountConcatenations() as mode:
        model(torch.randn(2, 3, 32, 32))
    assert mode.count == 3


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"block_config": (2, 2, 2), "growth_rate": 4, "num_init_features": 8}, [(4, 4), (32, 32), (33, 47), (64, 20)]),
        (
            {"block_config": (2, 2, 2), "growth_rate": 4, "num_init_features": 8, "stem": "imagenet", "bn_size": 2},
            [(16, 16), (64, 64), (75, 101)],
        ),
    ],
)
def test_any_input_size_and_a_batch_of_one(options, sizes):
    model = S3Net(**options, num_classes=7).eval()
    for size in sizes:
        images = torch.randn(2, 3, *size)
        logits = model(images)
        assert logits.shape == (2, 7)
        torch.testing.assert_close(model(images[:1]), logits[:1], atol=1e-5, rtol=1e-5)


def test_evaluation_is_deterministic_with_dropout_and_training_is_not():
    model, images = tiny(drop_rate=0.3), torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_calls_from_two_threads_do_not_mix():
    model = tiny().eval()
    batches = [torch.randn(3, 3, 32, 32) for _ in range(8)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    results = [None] * len(batches)

    def call(index):
        with torch.no_grad():
            results[index] = model(batches[index])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_an_exception_leaves_nothing_behind():
    model, images = tiny().eval(), torch.randn(2, 3, 32, 32)
    expected = model(images)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 32, 32))
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(training):
    model, images = tiny().train(training), torch.randn(2, 3, 32, 32)
    twin = tiny().train(training)
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), atol=1e-4, rtol=1e-4)


def test_channels_last_and_autocast_give_the_same_answer():
    model, images = tiny().eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images)
    assert mixed.dtype == torch.bfloat16
    assert (mixed.float() - expected).norm() < 0.05 * expected.norm()


def test_distributed_data_parallel_gives_the_same_gradients(tmp_path):
    model, images = tiny(), torch.randn(4, 3, 32, 32)
    twin = tiny()
    twin.load_state_dict(model.state_dict())
    model(images).square().sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        DistributedDataParallel(twin)(images).square().sum().backward()
    finally:
        dist.destroy_process_group()
    for parameter, copy in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(copy.grad, parameter.grad)


def test_initial_weights():
    model = S3Net(8, (2, 2), 64, bn_size=4, stem="imagenet", num_classes=10)
    conv = model.blocks[0].layers[1][1].conv.weight
    assert conv.std().item() == pytest.approx((2 / (conv.shape[1] * 9)) ** 0.5, rel=0.1)
    assert not model.classifier.bias.any()


# -- Names and options --


def test_unknown_network_names_the_nearest():
    with pytest.raises(InputError, match="did you mean s3net_cifar"):
        create_model("s3net_cifarr")


@pytest.mark.parametrize(("depth", "nearest"), [(41, "40 and 43"), (5, "7 and 10"), (-3, "7 and 10")])
def test_impossible_depth_names_the_nearest(depth, nearest):
    with pytest.raises(InputError, match=f"depth {depth} is not possible.*{nearest}"):
        create_model("s3net_cifar", depth=depth)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("growth", 12, "no option 'growth': did you mean growth_rate"),
        ("growth_rate", 0, "growth_rate is 0: give 1 or more"),
        ("drop_rate", 1.0, "drop_rate is 1.0"),
        ("compression", 0, "compression is 0"),
        ("stem", "resnet", "stem is 'resnet'"),
    ],
)
def test_options_out_of_range(option, value, message):
    with pytest.raises(InputError, match=message):
        create_model("s3net_cifar", **{option: value})


VALUES = [None, -1, 0, True, "x", "12", 12.5, float("nan"), float("inf"), 10**9, 10**30, [], {}, (6, "6"), (10**9,) * 3]
VALUES += [(2,) * 5000, object(), torch.zeros(3), np.zeros(2), nn.Linear, b"x", 99_999]
NAMES = ["name", "num_classes", "pretrained", "growth_rate", "depth", "num_init_features", "bn_size", "compression"]
NAMES += ["stem", "drop_rate", "block_config", "block", "width"]


@pytest.mark.parametrize("name", NAMES)
def test_any_argument_gives_a_network_or_one_error_line(name):
    for value in VALUES:
        try:
            model = create_model(**{"name": "s3net_cifar", "num_classes": 3} | {name: value})
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
        else:
            assert parameters(model) < 2e9


# -- Weights --


@pytest.mark.parametrize(
    ("checkpoint", "build"),
    [
        ("authors_cifar_k4_d13.pt", tiny),
        (
            "authors_imagenet_k8_b222_i8_bn2.pth.tar",
            lambda: S3Net(8, (2, 2, 2), 8, bn_size=2, compression=0.5, stem="imagenet", num_classes=10),
        ),
    ],
)
def test_published_checkpoints_give_the_published_logits(checkpoint, build):
    reference = np.load(DATA / (checkpoint.split(".")[0] + "_io.npz"))
    model = load_weights(build(), DATA / checkpoint).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(reference["x"]))
    assert np.abs(logits.numpy() - reference["y"]).max() < 1e-4


def test_published_cifar_checkpoint_loads_with_dropout():
    model = load_weights(tiny(drop_rate=0.1), DATA / "authors_cifar_k4_d13.pt").eval()
    reference = np.load(DATA / "authors_cifar_k4_d13_io.npz")
    with torch.no_grad():
        assert np.abs(model(torch.from_numpy(reference["x"])).numpy() - reference["y"]).max() < 1e-4


@pytest.mark.parametrize("kind", ["safetensors", "state dict", "wrapped", "data parallel"])
def test_own_formats_round_trip(tmp_path, kind):
    model = tiny()
    state = model.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        wrapped = {"state dict": state, "wrapped": {"model": state, "epoch": 3}}
        torch.save(wrapped.get(kind, {"state_dict": {f"module.{k}": v for k, v in state.items()}}), path)
    loaded = load_weights(tiny(), path).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def refused(path, model=None):
    model = model or tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_weights(model, path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_shape_that_does_not_fit_is_named_with_both_shapes(tmp_path):
    torch.save(tiny(num_classes=12).state_dict(), tmp_path / "w.pt")
    message = refused(tmp_path / "w.pt")
    assert "classifier.weight" in message and "(12, 60)" in message and "(10, 60)" in message


def test_a_missing_and_an_extra_key_are_named(tmp_path):
    torch.save(tiny(depth=10).state_dict(), tmp_path / "small.pt")
    torch.save(tiny(depth=16).state_dict(), tmp_path / "large.pt")
    assert "blocks.0.layers.2.0.norm.weight" in refused(tmp_path / "small.pt")
    assert "blocks.0.layers.3.0" in refused(tmp_path / "large.pt") or "has shape" in refused(tmp_path / "large.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_truncated_checkpoint_is_refused(tmp_path, name):
    save = torch.save if name == "w.pt" else save_file
    save(tiny().state_dict(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 3):
        (tmp_path / name).write_bytes(content[:length])
        assert "damaged" in refused(tmp_path / name)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello, this is no checkpoint\n")
    assert "damaged or no PyTorch checkpoint" in refused(tmp_path / "text.pt")
    torch.save({"numbers": [1, 2, 3]}, tmp_path / "numbers.pt")
    assert "holds no weights" in refused(tmp_path / "numbers.pt")
    assert "there is no checkpoint" in refused(tmp_path / "absent.pt")


class Malicious:
    def __reduce__(self):
        return exec, ("open('pwned', 'w').close()",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, tmp_path / "evil.pt")
    assert "would run code" in refused(tmp_path / "evil.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Malicious()))
    refused(tmp_path / "old.pt")
    assert not (tmp_path / "pwned").exists()
    torch.save({"settings": argparse.Namespace(lr=1), "model": tiny().state_dict()}, tmp_path / "fine.pt")
    load_weights(tiny(), tmp_path / "fine.pt")
