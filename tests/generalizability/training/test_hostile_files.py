"""Damaged and hostile checkpoints and run folders end in one InputError, and ask for no huge memory."""

import json
import pickle
import struct
import sys
from dataclasses import MISSING, fields
from functools import cache, partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import train_s3net
from explained_networks import load_network
from recipes import RunConfig
from s3net_common.checkpoints import create_with_weights, read_metadata
from s3net_common.errors import InputError
from s3net_networks import create_network
from train_s3net import Args

OPTIONS = {"growth_rate": 4, "depth": 7}
CLASSES = [str(digit) for digit in range(10)]
METADATA = {
    "model": "s3net_cifar",
    "model_options": OPTIONS,
    "num_classes": 10,
    "classes": CLASSES,
    "mean": [0.3, 0.3, 0.3],
    "std": [0.3, 0.3, 0.3],
    "image_size": 32,
    "dataset": "digits",
}
HUGE = 10**9
KEY = "stem.conv.weight"


def nested(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


@cache
def weights():
    torch.manual_seed(0)
    return create_network("s3net_cifar", 10, **OPTIONS).state_dict()


def refused(action):
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and len(message) < 500 and "alloc" not in message
    return message


def evaluate(path):
    """Build and load the network of a file as the scripts do."""
    metadata = read_metadata(path)
    build = partial(
        create_network,
        metadata.get("model", "s3net_cifar"),
        metadata.get("num_classes", 10),
        **metadata["model_options"],
    )
    return create_with_weights(build, path)


# ---- Metadata: the same edits in both formats ---------------------------------------------------------------------

METADATA_EDITS = {
    "huge growth rate": {"model_options": {"growth_rate": HUGE, "depth": 7}},
    "wide": {"model_options": {"growth_rate": 90_000, "depth": 7}},
    "huge depth": {"model_options": {"growth_rate": 4, "depth": 3 * HUGE + 4}},
    "deep": {"model_options": {"growth_rate": 4, "depth": 3004}},
    "depth x": {"model_options": {"depth": "x"}},
    "negative": {"model_options": {"growth_rate": -4}},
    "growth rate None": {"model_options": {"growth_rate": None}},
    "growth rate NaN": {"model_options": {"growth_rate": float("nan")}},
    "growth rate list": {"model_options": {"growth_rate": [4]}},
    "drop rate": {"model_options": OPTIONS | {"drop_rate": "much"}},
    "huge stem": {"model_options": OPTIONS | {"num_init_features": HUGE}},
    "blocks": {"model_options": {"block_config": [HUGE] * 3}},
    "block text": {"model_options": {"block_config": "666"}},
    "block class": {"model_options": OPTIONS | {"block": "os.system"}},
    "connections": {"model_options": OPTIONS | {"connections": ["chain"]}},
    "options list": {"model_options": [1, 2]},
    "options text": {"model_options": "growth_rate=4"},
    "option name": {"model_options": {"name": "s3net_cifar"}},
    "option pretrained": {"model_options": {"pretrained": True}},
    "unknown option": {"model_options": {"os": 1}},
    "unknown network": {"model": "s3net_cifra"},
    "other network": {"model": "resnet20_cifar", "model_options": {}},
    "graphs": {"model": "randwire_ws", "model_options": {"graphs": [{"nodes": HUGE, "edges": []}] * 4}},
    "huge classes": {"num_classes": 10**12},
    "many classes": {"num_classes": 99_999},
    "no class": {"num_classes": 0},
    "class count text": {"num_classes": "10"},
    "class count true": {"num_classes": True},
    "classes text": {"classes": "0123456789"},
    "classes numbers": {"classes": list(range(10))},
    "classes dict": {"classes": {"0": 1}},
    "too many classes": {"classes": [str(i) for i in range(11)]},
    "mean text": {"mean": "0.3"},
    "mean short": {"mean": [0.3]},
    "mean NaN": {"mean": [0.3, 0.3, float("nan")]},
    "std zero": {"std": [0.3, 0, 0.3]},
    "std dict": {"std": {"r": 1}},
    "huge image": {"image_size": HUGE},
    "image size list": {"image_size": [32, 32]},
    "image size negative": {"image_size": -1},
}


def save_pt(path, metadata, state=None):
    torch.save({"config": metadata, "model": weights() if state is None else state}, path)


def save_safetensors(path, metadata, state=None):
    stored = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    stored["options"] = stored.pop("model_options")
    save_file(weights() if state is None else state, path, stored)


@pytest.mark.parametrize("edit", METADATA_EDITS)
def test_altered_metadata(tmp_path, edit):
    metadata = METADATA | METADATA_EDITS[edit]
    save_pt(tmp_path / "w.pt", metadata)
    refused(lambda: evaluate(tmp_path / "w.pt"))
    save_safetensors(tmp_path / "w.safetensors", metadata)
    if edit != "class count text":  # "10" is the JSON number 10
        refused(lambda: evaluate(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("text", ["", "{", "growth", "NaN", "null", "[" * 100_000, '{"a": 1e999}', "\x00"])
def test_metadata_that_is_no_json(tmp_path, text):
    for name in ("options", "num_classes", "classes"):
        stored = {"options": "{}", "num_classes": "10", "classes": "[]", "mean": "[1, 1, 1]", "std": "[1, 1, 1]"}
        save_file(weights(), tmp_path / "w.safetensors", stored | {"image_size": "32", name: text})
        refused(lambda: evaluate(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("edit", ["huge growth rate", "huge classes", "mean text", "unknown network", "huge image"])
def test_altered_metadata_in_the_scripts(tmp_path, edit, monkeypatch):
    save_safetensors(tmp_path / "w.safetensors", METADATA | METADATA_EDITS[edit])
    refused(lambda: train_s3net.main(Args(eval_only=True, checkpoint=tmp_path / "w.safetensors", device="cpu")))
    refused(lambda: train_s3net.main(Args(init=str(tmp_path / "w.safetensors"), dataset="digits", out=tmp_path / "r")))
    if edit not in ("unknown network",):
        refused(lambda: load_network("s3net_cifar", tmp_path / "w.safetensors"))
    assert not (tmp_path / "r").exists()


def test_an_unknown_data_set_in_the_scripts(tmp_path):
    save_safetensors(tmp_path / "w.safetensors", METADATA | {"dataset": "digts"})
    message = refused(lambda: train_s3net.main(Args(eval_only=True, checkpoint=tmp_path / "w.safetensors")))
    assert "there is no data set 'digts'" in message


# ---- Tensors ------------------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def aliased(state):
    state["module." + KEY] = state[KEY]
    return state


def recursive(state):
    state = {"model": {**state, KEY: 1}}
    state["model"]["model"] = state
    return state


TENSOR_EDITS = {
    "huge expanded": lambda s: s | {KEY: torch.zeros(1).expand(10**6, 10**6)},
    "meta": lambda s: s | {KEY: torch.empty(24, 3, 3, 3, device="meta")},
    "huge meta": lambda s: s | {KEY: torch.empty(10**6, 10**6, device="meta")},
    "sparse": lambda s: s | {KEY: s[KEY].to_sparse()},
    "huge sparse": lambda s: s | {KEY: torch.sparse_coo_tensor([[0], [0]], [1.0], (HUGE, HUGE))},
    "CSR": lambda s: s | {"classifier.weight": s["classifier.weight"].to_sparse_csr()},
    "quantized": lambda s: s | {KEY: torch.quantize_per_tensor(s[KEY], 0.1, 0, torch.qint8)},
    "nested": lambda s: s | {KEY: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
    "complex": lambda s: s | {KEY: s[KEY].to(torch.complex64)},
    "integers": lambda s: s | {KEY: s[KEY].to(torch.int8)},
    "booleans": lambda s: s | {KEY: s[KEY] > 0},
    "NaN": lambda s: s | {KEY: s[KEY] * float("nan")},
    "infinite": lambda s: s | {"norm.running_var": s["norm.running_var"] / 0},
    "empty": lambda s: s | {KEY: torch.zeros(0)},
    "scalar": lambda s: s | {KEY: torch.tensor(1.0)},
    "transposed": lambda s: s | {KEY: s[KEY].transpose(0, 1)},
    "number": lambda s: s | {KEY: 1.0},
    "None": lambda s: s | {KEY: None},
    "text": lambda s: s | {KEY: "weights"},
    "nested lists": lambda s: s | {KEY: nested(500)},
    "number as a key": lambda s: {k: v for k, v in s.items() if k != KEY} | {5: s[KEY]},
    "no weights": lambda s: {},
    "list": lambda s: list(s.values()),
    "alias": aliased,
    "recursive": recursive,
    "only numbers": lambda s: {"epoch": 3},
    "subclass": lambda s: s | {KEY: s[KEY].as_subclass(Subclass)},
    "bytes": lambda s: s | {KEY: bytearray(5)},
    "long names": lambda s: {"a." * 5000 + k: v for k, v in s.items() if k != KEY},
}


@pytest.mark.parametrize("edit", TENSOR_EDITS)
@pytest.mark.filterwarnings("ignore")  # prototypes of PyTorch
@pytest.mark.parametrize("old_format", [False, True])
def test_altered_tensors_in_a_pt_file(tmp_path, edit, old_format):
    state = TENSOR_EDITS[edit](dict(weights()))
    try:
        torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=not old_format)
    except (RuntimeError, NotImplementedError):
        pytest.skip("the format has no such tensors")
    refused(lambda: create_with_weights(partial(create_network, "s3net_cifar", 10, **OPTIONS), tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [("NaN", f"{KEY} holds NaN or infinite"), ("complex", f"{KEY} is of type torch.complex64"), ("sparse", "sparse")],
)
def test_the_message_names_the_tensor(tmp_path, edit, message):
    torch.save(TENSOR_EDITS[edit](dict(weights())), tmp_path / "w.pt")
    build = partial(create_network, "s3net_cifar", 10, **OPTIONS)
    assert message in refused(lambda: create_with_weights(build, tmp_path / "w.pt"))


HEADERS = {
    "no shape": {KEY: {"dtype": "F32"}},
    "negative": {KEY: {"dtype": "F32", "shape": [-1, 3], "data_offsets": [0, 12]}},
    "huge": {KEY: {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}},
    "overflow": {KEY: {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}},
    "no elements": {KEY: {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}},
    "unknown type": {KEY: {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}},
    "offsets": {KEY: {"dtype": "F32", "shape": [1], "data_offsets": [2**63, 2**63 + 4]}},
    "list": [1, 2],
    "deep": {KEY: nested(300)},
    "numbers as metadata": {"__metadata__": {"options": 5}},
    "nothing": {},
}


@pytest.mark.parametrize("header", HEADERS)
def test_altered_safetensors_headers(tmp_path, header):
    text = json.dumps(HEADERS[header]).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    build = partial(create_network, "s3net_cifar", 10, **OPTIONS)
    refused(lambda: create_with_weights(build, tmp_path / "w.safetensors"))


class HugeStorage:
    """Pickles as a storage of more bytes than the file has."""

    def __init__(self, count):
        self.count = count


class OldPickler(pickle.Pickler):
    def persistent_id(self, value):
        return (
            ("storage", torch.FloatStorage, "0", "cpu", value.count, None) if isinstance(value, HugeStorage) else None
        )


@pytest.mark.parametrize("count", [10**12, -1, 2**63])
def test_a_storage_larger_than_an_old_file(tmp_path, count):
    with (tmp_path / "w.pt").open("wb") as file:
        for value in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        OldPickler(file, protocol=2).dump({KEY: HugeStorage(count)})
        pickle.dump(["0"], file, protocol=2)
    build = partial(create_network, "s3net_cifar", 10, **OPTIONS)
    assert "larger than the file" in refused(lambda: create_with_weights(build, tmp_path / "w.pt"))


@pytest.mark.parametrize("old_format", [False, True])
def test_flipped_bytes(tmp_path, old_format):
    path = tmp_path / "w.pt"
    torch.save({"model": nn.Linear(2, 2).state_dict()}, path, _use_new_zipfile_serialization=not old_format)
    content = path.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 300)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x5A]) + content[position + 1 :])
        try:
            create_with_weights(partial(nn.Linear, 2, 2), path)
        except InputError as error:
            assert "alloc" not in str(error)


def test_the_number_of_altered_checkpoints():
    assert 2 * len(METADATA_EDITS) + len(TENSOR_EDITS) + len(HEADERS) >= 57


# ---- The run folder -----------------------------------------------------------------------------------------------

CONFIG_EDITS = {
    **{
        f"{name} x": {name: "x"}
        for name in ("epochs", "lr", "batch_size", "milestones", "amp", "flip", "model_options")
    },
    **{f"{name} list": {name: [1]} for name in ("dataset", "model", "num_classes", "seed", "lr", "val_images")},
    **{f"{name} huge": {name: 10**30} for name in ("epochs", "num_classes", "image_size", "train_images", "seed")},
    **{
        f"{name} negative": {name: -1}
        for name in ("epochs", "batch_size", "lr", "momentum", "image_size", "crop_padding")
    },
    **{f"{name} None": {name: None} for name in ("epochs", "classes", "mean", "model", "schedule", "accumulate")},
    **{f"{name} NaN": {name: float("nan")} for name in ("lr", "weight_decay", "crop_padding")},
    "classes numbers": {"classes": list(range(10))},
    "fewer classes": {"classes": CLASSES[:9]},
    "more classes": {"classes": [*CLASSES, "10"]},
    "std zero": {"std": [0, 1, 1]},
    "milestones": {"milestones": [10**9]},
    "huge growth": {"model_options": {"growth_rate": HUGE, "depth": 7}},
    "wide": {"model_options": {"growth_rate": 90_000, "depth": 7}},
    "deep": {"model_options": {"growth_rate": 4, "depth": 3004}},
    "unknown option": {"model_options": {"width": 3}},
    "unknown schedule": {"schedule": "linear"},
    "unknown data set": {"dataset": "digts"},
    "accumulate": {"accumulate": 65},
    "another rate": {"lr": 0.05},
    "init": {"init": 5},
}
TEXTS = ["", "{", "[]", "null", "5", '"x"', "[" * 100_000, "\x00", "{}", '{"dataset": "digits"}']
PROGRESS = "progress"
STATE_EDITS = {
    **{f"without {name}": lambda s, name=name: s.pop(name) for name in ("config", "model", "optimizer", "processes")},
    **{
        f"{name} list": lambda s, name=name: s.update({name: [1]})
        for name in (PROGRESS, "model", "scheduler", "scaler")
    },
    **{f"{name} None": lambda s, name=name: s.update({name: None}) for name in ("config", "optimizer", "processes")},
    "another format": lambda s: s.update(format=2),
    "epoch text": lambda s: s[PROGRESS].update(epoch="1"),
    "epoch beyond the end": lambda s: s[PROGRESS].update(epoch=10**9),
    "negative step": lambda s: s[PROGRESS].update(step=-1),
    "huge step": lambda s: s[PROGRESS].update(step=10**9),
    "history dict": lambda s: s[PROGRESS].update(history={"epoch": 1}),
    "history of numbers": lambda s: s[PROGRESS].update(history=[1]),
    "row without error": lambda s: s[PROGRESS]["history"][0].pop("val_error"),
    "row of text": lambda s: s[PROGRESS]["history"][0].update(val_error="low"),
    "unknown progress": lambda s: s[PROGRESS].update(color=1),
    "weight missing": lambda s: s["model"].pop(KEY),
    "weight shape": lambda s: s["model"].update({KEY: torch.zeros(1).expand(10**6, 10**6)}),
    "weight complex": lambda s: s["model"].update({KEY: s["model"][KEY].to(torch.complex64)}),
    "weight text": lambda s: s["model"].update({KEY: "x"}),
    "momentum shape": lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(5)),
    "momentum text": lambda s: s["optimizer"]["state"][0].update(momentum_buffer="x"),
    "rate text": lambda s: s["optimizer"]["param_groups"][0].update(lr="x"),
    "no groups": lambda s: s["optimizer"].update(param_groups=[]),
    "parameters": lambda s: s["optimizer"]["param_groups"][0].update(params=[10**9]),
    "schedule step": lambda s: s["scheduler"].update(last_epoch=10**9),
    "schedule rates": lambda s: s["scheduler"].update(base_lrs="x"),
    "no process": lambda s: s.update(processes=[]),
    "process list": lambda s: s.update(processes=[[1]]),
    "random state": lambda s: s["processes"][0].update(random={"cpu": torch.zeros(3)}),
    "random text": lambda s: s["processes"][0]["random"].update(cpu="x"),
    "buffers": lambda s: s["processes"][0].update(buffers={"norm.running_mean": torch.zeros(10**6)}),
    "losses": lambda s: s["processes"][0].update(losses="x"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was stopped after the first of two epochs."""
    folder, settings = tmp_path_factory.mktemp("run"), {"epochs": 2, "limit_train": 64, "limit_val": 20}
    publish = train_s3net.Run.publish

    def publish_and_stop(self, state):
        publish(self, state)
        if state["progress"]["history"]:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_s3net.Run, "publish", publish_and_stop)
        patch.setattr(sys, "argv", ["train_s3net.py"])
        args = Args(dataset="digits", device="cpu", out=folder / "run", **OPTIONS, **settings)
        with pytest.raises(KeyboardInterrupt):
            train_s3net.main(args)
    return folder / "run"


@pytest.fixture
def damaged(run, tmp_path, monkeypatch):
    """A copy of the run, and a function that demands that resuming is refused and changes nothing."""
    for path in run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    loaded = cache(train_s3net.load_dataset)
    monkeypatch.setattr(train_s3net, "load_dataset", loaded)

    def check():
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        message = refused(lambda: train_s3net.main(Args(out=tmp_path, resume=True, device="cpu")))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        return message

    return tmp_path, check


@pytest.mark.parametrize("edit", CONFIG_EDITS)
@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_altered_configurations(damaged, edit, with_checkpoint):
    if not with_checkpoint and edit == "another rate":
        pytest.skip("another run, and a valid one")
    folder, check = damaged
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | CONFIG_EDITS[edit]))
    if not with_checkpoint:
        for name in ("last.pt", "metrics.jsonl", "best.safetensors", "curves.png"):
            (folder / name).unlink()
    check()


@pytest.mark.parametrize("text", TEXTS)
def test_configurations_that_are_none(damaged, text):
    folder, check = damaged
    (folder / "config.json").write_text(text)
    assert "config.json is missing or damaged" in check()


def test_each_missing_setting_is_named(damaged):
    folder, check = damaged
    config = json.loads((folder / "config.json").read_text())
    for name in [field.name for field in fields(RunConfig) if field.default is MISSING]:
        (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != name}))
        assert f"it lacks {name}; restore it, or start a new run" in check()


@pytest.mark.parametrize("edit", STATE_EDITS)
def test_altered_states(damaged, edit):
    folder, check = damaged
    state = torch.load(folder / "last.pt", weights_only=True)
    STATE_EDITS[edit](state)
    torch.save(state, folder / "last.pt")
    assert str(folder / "last.pt") in check()


def test_harmless_edits_are_accepted(damaged, monkeypatch):
    folder, _ = damaged
    config = json.loads((folder / "config.json").read_text())
    edited = dict(reversed(config.items())) | {"comment": "mine"}
    (folder / "config.json").write_text(json.dumps(edited, indent=7))
    assert train_s3net.main(Args(out=folder, resume=True, device="cpu")) == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_number_of_altered_configurations():
    assert len(CONFIG_EDITS) >= 31
