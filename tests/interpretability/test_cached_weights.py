"""Weights of timm that an earlier run has left in the Hugging Face cache, without a network connection."""

import json
import os
import socket
import threading
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from processes import run_forked
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
NETWORK = "test_resnet"  # timm's smallest
REVISION = "0" * 40


@pytest.fixture
def silent_server():
    """A server that takes connections and never answers, as behind a firewall. Yields its address and its visitors."""
    visitors = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            while True:
                try:
                    visitors.append(server.accept()[0])
                except OSError:  # closed
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", visitors
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def run(tmp_path, silent_server):
    """Explain a photograph by timm's network. Returns the process and the number of connections that it has tried."""

    def run_script(**variables):
        address, visitors = silent_server
        Image.effect_noise((170, 170), 50).convert("RGB").save(tmp_path / "photo.png")
        flags = ("--networks", f"timm/{NETWORK}", "--device", "cpu", "--out", tmp_path / "out")
        proxies = {name: "" for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")}
        environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": address}
        script = ROOT / "interpretability" / "interpret_fullgrad.py"
        done = run_forked(script, tmp_path / "photo.png", *flags, cwd=tmp_path, env=environment | proxies | variables)
        return done, len(visitors)

    return run_script


def test_cached_weights_are_used_without_a_connection(tmp_path, run):
    torch.manual_seed(0)
    model = timm.create_model(NETWORK)
    repository = tmp_path / "hf" / "hub" / f"models--timm--{model.pretrained_cfg['hf_hub_id'].partition('/')[2]}"
    for folder in ("refs", f"snapshots/{REVISION}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    save_file(model.state_dict(), repository / "snapshots" / REVISION / "model.safetensors")
    done, connections = run()
    assert (done.returncode, connections) == (0, 0), done.stderr
    (row,) = json.loads((tmp_path / "out" / "saliency.json").read_text())["maps"]
    assert row["network"] == f"timm-{NETWORK}" and row["completeness_error"] < 1e-4


@pytest.mark.parametrize(
    ("variables", "connections", "reason"),
    [
        ({}, 1, "timed out"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, 0, "Connection refused"),
        ({"HF_HUB_OFFLINE": "1"}, 0, "HF_HUB_OFFLINE is set: "),
    ],
)
def test_without_a_cache_it_is_one_line(run, variables, connections, reason):
    done, visitors = run(**variables)
    assert (done.returncode, visitors, done.stdout) == (2, connections, "")
    start = f"error: the weights of timm/{NETWORK} cannot be downloaded ("
    assert done.stderr.startswith(start) and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr
