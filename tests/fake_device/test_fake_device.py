"""Training steps on a fake CUDA device: which operations the host launches, and how often it waits for the device.

All networks, about two minutes: python tests/fake_device/fake_cuda.py
"""

import ctypes
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from processes import run_python

SCRIPT = Path(__file__).with_name("fake_cuda.py")


def reason_to_skip() -> str:
    """Return what the fake device lacks here; an empty text if nothing."""
    if sys.platform != "linux":
        return "needs LD_PRELOAD, which Linux has"
    if not shutil.which(os.environ.get("CC", "cc")):
        return "needs a C compiler"
    if not torch.backends.cuda.is_built():
        return "needs a CUDA build of PyTorch"
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    symbols = re.findall(r"_ZN\w+", SCRIPT.read_text().split("LIBRARY")[0])
    missing = [symbol for symbol in symbols if not hasattr(library, symbol)]
    return f"this PyTorch has no {', '.join(missing)}" if missing else ""


pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=f"the fake device {reason_to_skip()}")


def run_on_fake_device(*words: str) -> list[dict]:
    done = run_python(SCRIPT, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)["networks"]


def test_operations_and_waits_of_a_training_step():
    """The counts are those of PyTorch 2.14. Other versions may split or fuse some operations."""
    s3net, resnet = run_on_fake_device("s3net_cifar", "resnet20_cifar")
    assert [result["network"] for result in (s3net, resnet)] == ["s3net_cifar", "resnet20_cifar"]
    for result, operations in ((s3net, 469), (resnet, 249)):
        assert result["precision"] == "bfloat16"
        assert 0.9 * operations <= result["step"]["operations"] <= operations + 10
        assert result["batch"]["operations"] <= 14
        # Nothing is copied between host and device. Losses are read every 2 seconds or so, and at an end.
        assert (result["batch"]["copies"], result["step"]["copies"], result["step"]["reads"]) == (0, 0, 0)
        assert (result["epoch"]["reads"], result["evaluation"]["reads"]) == (1, 1)
        assert result["saliency"]["reads"] == 5  # of a map and a decomposition


def test_a_step_in_parts_with_graphs_in_float16():
    """Within a graph nothing may be read, or copied from the host: `without_reads` of the fake device checks it."""
    (result,) = run_on_fake_device("resnet20_cifar", "--graphs", "--accumulate", "2", "--dtype", "float16")
    assert result["precision"] == "float16"
    # 5 steps: 3 before the capture, 2 replays, each with the learning rate, 3 inputs and 2 results to copy.
    assert result["replays"] == 2
    assert (result["step"]["operations"], result["step"]["copies"]) == (6, 0)
    assert result["reads_of_steps"] == {}
