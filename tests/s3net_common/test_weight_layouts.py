"""Weights as other people's programs write them: prefixes, containers, older names, and files of other kinds."""

import io
import re
import tarfile
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import DenseNet

from models import create_model
from s3net_common.checkpoints import head_names, load_weights
from s3net_common.errors import InputError
from s3net_networks import create_network, list_networks


def network(num_classes=10):
    return create_model("s3net_cifar", num_classes, growth_rate=4, depth=7, num_init_features=8)


def prefixed(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def without(state, word):
    return {name: tensor for name, tensor in state.items() if word not in name}


def other(state):
    """Other weights of the same network."""
    return {name: tensor + 1 for name, tensor in state.items()}


def averaged(state):
    model = network()
    model.load_state_dict(state)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)).state_dict()


def with_parts(state, part):
    """Put a part into the names below the blocks, as a wrapper around each block does."""
    return {re.sub(r"^(blocks\.\d+\.)", rf"\g<1>{part}.", name): tensor for name, tensor in state.items()}


LAYOUTS = {
    "plain": lambda s: s,
    "ordered": OrderedDict,
    "module": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled, parallel": prefixed("module._orig_mod."),
    "parallel, compiled": prefixed("_orig_mod.module."),
    "model": prefixed("model."),
    "backbone": prefixed("backbone."),
    "net": prefixed("net."),
    "encoder": prefixed("encoder."),
    "network, twice": prefixed("network.network."),
    "many prefixes": prefixed("model.module._orig_mod.net.backbone."),
    "backbone beside the classifier": lambda s: (
        prefixed("backbone.")(without(s, "classifier")) | {n: t for n, t in s.items() if "classifier" in n}
    ),
    "backbone beside another head": lambda s: prefixed("model.")(s) | {"criterion.weight": torch.ones(3)},
    "parallel blocks": lambda s: with_parts(s, "module"),
    "fully sharded": lambda s: prefixed("_fsdp_wrapped_module.")(with_parts(s, "_fsdp_wrapped_module")),
    "checkpointed and compiled": lambda s: with_parts(s, "_checkpoint_wrapped_module._orig_mod"),
    "without counters": lambda s: without(s, "num_batches_tracked"),
    "parallel without counters": lambda s: prefixed("module.")(without(s, "num_batches_tracked")),
    "half precision": lambda s: {n: t.half() if t.is_floating_point() else t for n, t in s.items()},
    "bfloat16": lambda s: {n: t.bfloat16() if t.is_floating_point() else t for n, t in s.items()},
    "double precision": lambda s: {n: t.double() for n, t in s.items()},
    "parameters": lambda s: {n: nn.Parameter(t, requires_grad=t.is_floating_point()) for n, t in s.items()},
    "averaged": averaged,
    "averaged, parallel": lambda s: prefixed("module.")(averaged(s)),
    "averaged without prefix": lambda s: s | {"n_averaged": torch.tensor(3)},
    "counted by thop": lambda s: (
        s | {f"{m}{n}": torch.zeros(1) for m in ("", "stem.", "stem.conv.") for n in ("total_ops", "total_params")}
    ),
    "counted by thop, parallel": lambda s: prefixed("module.")(s | {"stem.total_ops": torch.zeros(1).double()}),
    "avg_model beside the trained": lambda s: prefixed("model.")(other(s)) | prefixed("avg_model.")(s),
    "averaged beside the trained": lambda s: prefixed("online_model.")(other(s)) | prefixed("ema_model.")(s),
    "Lightning": lambda s: {
        "epoch": 3,
        "pytorch-lightning_version": "2.1",
        "state_dict": prefixed("model.")(s),
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(2)}}}],
    },
    "with an accuracy": lambda s: {"model": s, "best_acc1": torch.tensor(71.5), "epoch": 9, "arch": "resnet"},
    "with a name-keyed optimizer": lambda s: {"momentum": other(s), "model_state_dict": s},
    "two levels": lambda s: {"checkpoint": {"state_dict": prefixed("module.")(s)}},
    "averaged, two levels": lambda s: {"model": other(s), "ema": {"decay": 0.9, "module": s}},
}
CONTAINERS = ["state_dict", "model", "model_state_dict", "net", "network", "weights", "params", "state_dict_ema"]
CONTAINERS += ["model_ema", "ema", "ema_state_dict", "my_own_name"]
LAYOUTS |= {f"container {name}": (lambda s, name=name: {name: s, "epoch": 3}) for name in CONTAINERS}
LAYOUTS |= {
    f"{name} beside the trained": (lambda s, name=name: {"state_dict": other(s), "model": other(s), name: s})
    for name in ("state_dict_ema", "model_ema", "ema", "model_avg")
}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    state = network().state_dict()
    state = {
        name: torch.randn_like(t).half().bfloat16().float() if t.is_floating_point() else t + 7
        for name, t in state.items()
    }
    return {name: t.abs() if name.endswith("running_var") else t for name, t in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_load(tmp_path, state, layout):
    content = LAYOUTS[layout](state)
    torch.save(content, tmp_path / "w.pt")
    files = ["w.pt"]
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        save_file({name: tensor.detach().contiguous() for name, tensor in content.items()}, tmp_path / "w.safetensors")
        torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        files += ["w.safetensors", "old.pth"]
    for file in files:
        loaded = load_weights(network(), tmp_path / file).state_dict()
        for name, tensor in state.items():
            if "num_batches" not in name or "without counters" not in layout:
                assert torch.equal(loaded[name], tensor), (file, name)


def test_more_than_34_layouts():
    assert len(LAYOUTS) >= 34


@pytest.mark.parametrize(
    ("layout", "line"),
    [
        ("plain", None),
        ("module", "weights of w.pt: removed module. from the names"),
        ("parallel blocks", "weights of w.pt: removed module. and similar parts from the names"),
        ("encoder", "weights of w.pt: removed encoder. from the names"),
        ("container net", "weights of w.pt: took net"),
        ("model_ema beside the trained", "weights of w.pt: took model_ema (not model, state_dict)"),
        ("Lightning", "weights of w.pt: took state_dict; removed model. from the names"),
        (
            "backbone beside another head",
            "weights of w.pt: removed model. from the names; left out other tensors: 1 (criterion.weight, ...)",
        ),
    ],
)
def test_the_choice_is_reported_in_one_line(tmp_path, state, layout, line):
    torch.save(LAYOUTS[layout](state), tmp_path / "w.pt")
    lines = []
    load_weights(network(), tmp_path / "w.pt", report=lines.append)
    assert lines == ([line] if line else [])


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (lambda s: s | prefixed("module.")(other(s)), "it also holds module."),
        (lambda s: prefixed("encoder_q.")(s) | prefixed("encoder_k.")(s), "several networks in the file fit"),
        (lambda s: prefixed("module.")(s | {"blocks.0.layers.1.0.conv.weight": torch.ones(1)}), "also holds blocks.0."),
        (lambda s: s | {"stem.norm.running_var": torch.full((8,), -1.0)}, "stem.norm.running_var, a variance, has"),
        (lambda s: prefixed("model.")(without(s, "stem.conv")), "it lacks stem.conv.weight of shape (8, 3, 3, 3)"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, state, layout, message):
    torch.save(layout(state), tmp_path / "w.pt")
    with pytest.raises(InputError, match=re.escape(message)):
        load_weights(network(), tmp_path / "w.pt")


def test_a_head_of_another_class_count_names_both_ways(tmp_path, state):
    torch.save(prefixed("module.")(state), tmp_path / "w.pt")
    with pytest.raises(InputError) as error:
        load_weights(network(7), tmp_path / "w.pt")
    assert str(error.value) == (
        f"{tmp_path}/w.pt does not fit this network: classifier.weight has shape (10, 20) in the file and (7, 20) in "
        "the network; pass 10 as the number of classes (--num-classes 10), or train a new classifier on top of these "
        "weights: train_s3net.py --init FILE"
    )


@pytest.mark.parametrize("name", list_networks())
def test_every_networks_last_linear_layer_is_its_classifier(name):
    with torch.device("meta"):
        model = create_network(name, 7)
    weights = dict(model.named_parameters())
    assert [len(weights[part]) for part in head_names(model)] == [7, 7]


def old_name(name):
    return re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name)


@pytest.mark.parametrize("prefix", ["", "module.", "features_net."])
def test_densenet_as_torchvision_published_it_before_2018(tmp_path, prefix):
    model = DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=5)
    state = {prefix + old_name(name): t for name, t in without(model.state_dict(), "num_batches").items()}
    assert prefix + "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "d.pth", _use_new_zipfile_serialization=False)
    other_model = DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=5)
    loaded = load_weights(other_model, tmp_path / "d.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("wrap", ["compiled", "parallel"])
def test_a_wrapped_network_is_loaded_too(tmp_path, state, wrap):
    torch.save(state, tmp_path / "w.pt")
    model = torch.compile(network()) if wrap == "compiled" else nn.DataParallel(network())
    loaded = load_weights(model, tmp_path / "w.pt").state_dict()
    assert all(torch.equal(a, b) for a, b in zip(loaded.values(), state.values(), strict=True))


# ---- Files of other kinds -----------------------------------------------------------------------------------------


def compressed_zip():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"\0" * 1000)
    return content.getvalue()


def other_zip():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return content.getvalue()


def tar():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pt"))
    return content.getvalue()


TEXT = "it is a text file that begins with "
OTHER_FILES = {
    **{f"text {c}": (f"{c}ot a checkpoint\n".encode(), TEXT + repr(f"{c}ot a checkpoint")) for c in "(]}Na0.Xc{<lIFV"},
    "no newline": (b"hello", TEXT + "'hello'"),
    "umlauts": ("Gr\u00fc\u00dfe ".encode() * 100, TEXT + "'Gr\u00fc\u00dfe"),
    "byte-order mark": (b"\xef\xbb\xbfname,value\n", TEXT + "'name,value'"),
    "JSON": (b'{"model": 1}', TEXT + "'{\"model\": 1}'"),
    "HTML": (b"<!DOCTYPE html>\n<html>Sign in</html>", "it is an HTML page): download the file itself"),
    "html": (b"\n <html><body>404</body>", "it is an HTML page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\n", "it is a git-lfs pointer): fetch"),
    "empty": (b"", "it is empty): get it again"),
    "tar": (tar(), "it is a tar archive): unpack it"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "it is a gzip archive): unpack it"),
    "zip": (other_zip(), "it is a zip archive without a PyTorch checkpoint"),
    "compressed": (compressed_zip(), "it is a zip archive that torch.save did not write"),
    "truncated zip": (b"PK\x03\x04" + bytes(99), "it is a truncated or damaged zip archive"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "it is an HDF5 file"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(99), "it is a PNG image"),
    "zeros": (bytes(1000), "its first bytes are those of no known format"),
    "pickle": (b"\x80\x02]q\x00.", "pickle exhausted"),
    "broken pickle": (b"\x80\x02" + b"\xff" * 99, "at position"),
    "huge header": (b"\xff" * 7 + b"\x7f{", "header"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_files_of_other_kinds_are_refused_by_what_they_are(tmp_path, kind, suffix):
    content, message = OTHER_FILES[kind]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_weights(network(), path)
    wanted = "PyTorch checkpoint" if suffix == ".pt" else "safetensors file"
    assert str(error.value).startswith(f"{path} is damaged or no {wanted} (")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_under_the_other_formats_name_loads(tmp_path, state):
    torch.save(state, tmp_path / "w.safetensors")
    save_file(state, tmp_path / "w.bin")
    for name in ("w.safetensors", "w.bin"):
        assert torch.equal(load_weights(network(), tmp_path / name).state_dict()["norm.bias"], state["norm.bias"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "is a folder: give the file of weights in it"),
        ("absent.pt", "there is no checkpoint absent.pt"),
        ("/dev/null", "/dev/null is no regular file"),
        ("x" * 5000, "(File name too long|there is no checkpoint)"),
        ("nul\0.pt", "(there is no checkpoint|is no path of a file)"),
        (None, "None is no path of a file"),
        (7, "7 is no path of a file"),
        ([], r"\[\] is no path of a file"),
        (b"w.pt", "is no path of a file"),
    ],
)
def test_paths_that_are_no_file(path, message):
    with pytest.raises(InputError, match=message):
        load_weights(network(), path)


@pytest.mark.parametrize("model", [None, "s3net_cifar", {}, nn.Module])
def test_models_that_are_no_module(tmp_path, model, state):
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"weights are loaded into a torch\.nn\.Module, and"):
        load_weights(model, tmp_path / "w.pt")
