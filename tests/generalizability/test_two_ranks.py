"""Two ranks that are stopped, killed, or fail at different places: they end soon, and the run can be resumed."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import TORCHRUN, run_forked, run_python, started_python
from safetensors.torch import load_file
from two_ranks import SCRIPT, TwoRanks

import train_s3net
from s3net_common.errors import InputError
from train_s3net import Args

ROOT = Path(__file__).parents[2]
NETWORK = ["--dataset", "digits", "--growth-rate", 4, "--depth", 7, "--device", "cpu", "--drop-rate", 0.1]
TINY = [*NETWORK, "--limit-train", 64, "--limit-val", 40, "--batch-size", 8, "--epochs", 2]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups and no fork")


@pytest.fixture(scope="module", autouse=True)
def module_path():
    """Let the server process of `two_ranks` find the modules."""
    folders = [ROOT, ROOT / "generalizability", ROOT / "tests" / "generalizability"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ":".join(map(str, folders)))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def start(tmp_path):
    """Starts two ranks, and kills those that are left at the end of the test."""
    started = []

    def start_ranks(*args, **options):
        started.append(TwoRanks(tmp_path / f"ranks{len(started)}", *args, **options))
        return started[-1]

    yield start_ranks
    for ranks in started:
        ranks.kill()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The files of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    on_two_ranks(folder / "ranks", *TINY, "--out", folder / "run")
    return folder / "run"


def on_two_ranks(folder, *flags):
    """Run the trainer on two undisturbed ranks. Return what they printed."""
    codes, output = TwoRanks(folder, flags).end()
    assert codes == [0, 0], output
    return output


def torchrun(*flags):
    return [*TORCHRUN, "--nproc_per_node=2", SCRIPT, *flags]


def progress(folder):
    return torch.load(folder / "last.pt", weights_only=True)["progress"]


def assert_same_run(folder, reference):
    states = [torch.load(f / "last.pt", weights_only=True) for f in (folder, reference)]
    first, second = (state["model"] for state in states)
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = ([s["momentum_buffer"] for s in state["optimizer"]["state"].values()] for state in states)
    assert all(map(torch.equal, first, second))
    first, second = (load_file(f / "best.safetensors") for f in (folder, reference))
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (
        [{k: v for k, v in row.items() if "second" not in k} for row in state["progress"]["history"]]
        for state in states
    )
    assert first == second and len(first) == 2


def test_sigterm_in_training_in_evaluation_and_in_writing(tmp_path, start, reference):
    folder = tmp_path / "run"
    flags = [*TINY, "--out", folder, "--resume"]
    steps = []
    for place, disturbed in (("training", (0, 1)), ("evaluation", (0, 1)), ("writing", (0,))):
        ranks = start(flags, place, ranks=disturbed)
        ranks.reach()
        ranks.send(signal.SIGTERM)
        codes, output = ranks.end()
        assert codes == [143, 143], output
        assert output.count("stopped; resume with") == 1 and "error: " not in output
        assert (folder / "stopped").read_text() == output.splitlines()[-1].strip() + "\n"
        steps.append((progress(folder)["epoch"], progress(folder)["step"]))
    assert steps[0][0] == 0 and 2 < steps[0][1] < 8  # in the epoch
    assert steps[1] == (0, 8)  # before the evaluation
    assert steps[2][0] == 1 and steps[2][1] > 0  # what was being written is complete, and the next look stopped
    on_two_ranks(tmp_path / "resumed", *flags)
    assert not (folder / "stopped").exists()
    assert_same_run(folder, reference)


def test_averaged_weights_are_resumed_on_both_ranks(tmp_path, start):
    """Each rank averages its own running statistics; within an epoch they differ."""
    flags = [*TINY, "--average-epochs", 2, "--label-smoothing", 0.1, "--no-norm-decay", "--resume"]
    assert start([*flags, "--out", tmp_path / "undisturbed"]).end()[0] == [0, 0]
    ranks = start([*flags, "--out", tmp_path / "run"], "training")
    ranks.reach()
    ranks.send(signal.SIGTERM)
    codes, output = ranks.end()
    assert codes == [143, 143], output
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    first, second = (process["average_buffers"] for process in state["processes"])
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert any(key.endswith("running_mean") for key in different)
    assert start([*flags, "--out", tmp_path / "run"]).end()[0] == [0, 0]
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    averages = [torch.load(tmp_path / f / "last.pt", weights_only=True)["average"] for f in ("run", "undisturbed")]
    assert averages[0]["n_averaged"] == 16 and all(
        torch.equal(averages[0][key], averages[1][key]) for key in averages[0]
    )


def test_a_rank_that_is_killed(tmp_path, start, reference):
    folder = tmp_path / "run"
    flags = [*TINY, "--out", folder, "--resume", "--checkpoint-every", 1]
    ranks = start(flags, "training", ranks=(1,))
    ranks.reach()
    started = time.monotonic()
    ranks.send(signal.SIGKILL, ranks=(1,))
    codes, output = ranks.end()
    assert codes == [1, -9] and time.monotonic() - started < 60
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"(rank 0 on {socket.gethostname()})" in lines[0]
    assert "the connection to another rank is lost" in lines[0] and "Traceback" not in output
    assert progress(folder)["step"] == 2
    on_two_ranks(tmp_path / "resumed", *flags)
    assert_same_run(folder, reference)


@pytest.mark.parametrize(
    ("place", "event", "rank", "codes", "message"),
    [
        ("data", "fail", 1, [1, 2], "bad image"),
        ("training", "crash", 1, [1, 1], "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("evaluation", "crash", 0, [1, 1], "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("writing", "fail", 0, [2, 2], "last.pt cannot be written (No space left on device): make room, or pass"),
    ],
)
def test_a_rank_that_fails_ends_all_and_says_where(tmp_path, start, place, event, rank, codes, message):
    folder = tmp_path / "run"
    started = time.monotonic()
    ranks = start([*TINY, "--out", folder], place, event, ranks=(rank,), TORCHELASTIC_MAX_RESTARTS=3)
    got, output = ranks.end()
    assert got == codes, output
    assert time.monotonic() - started < 200  # an import and a second, unless the machine is busy
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], output
    assert f"(rank {rank} on {socket.gethostname()})" in lines[0]
    assert (folder / "failed.json").exists() == (event == "fail")
    assert output.count("Traceback") == (event == "crash")


def test_an_error_of_the_program_on_both_ranks_has_one_traceback(tmp_path, start):
    codes, output = start([*TINY, "--out", tmp_path / "run"], "training", "crash").end()
    assert codes == [1, 1] and output.count("Traceback") == 1, output
    lines = [line for line in output.splitlines() if line.startswith("error: RuntimeError: CUDA error")]
    assert 1 <= len(lines) <= 2 and all(f"on {socket.gethostname()})" in line for line in lines)


def test_an_error_of_the_program_before_the_ranks_have_joined(tmp_path):
    program = (
        "import torch, dataclasses\nfrom s3net_common.command_line import run_script\n"
        "@dataclasses.dataclass\nclass Args:\n    n: int = 0\n"
        "run_script(lambda args: [][args.n], Args, '')"
    )
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = run_python("-c", program, env=variables)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    assert done.stderr.endswith(f"error: IndexError: list index out of range (rank 1 on {socket.gethostname()})\n")


def test_a_restart_after_an_error_that_stays_ends_at_once(tmp_path, monkeypatch):
    flags = {"dataset": "digits", "growth_rate": 4, "depth": 7, "device": "cpu", "epochs": 1, "limit_train": 40}
    flags |= {"limit_val": 20, "out": tmp_path / "run"}
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(InputError, match="--num-classes 4 is too small"):
        train_s3net.main(Args(**flags, num_classes=4))
    failed = json.loads((tmp_path / "run" / "failed.json").read_text())
    assert failed["error"].startswith("--num-classes 4 is too small") and socket.gethostname() in failed["from"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(train_s3net, "read_data", None)  # never called
    assert train_s3net.main(Args(**flags, num_classes=4)) == 2
    monkeypatch.undo()
    assert train_s3net.main(Args(**flags)) == 0  # the user has mended the flag
    assert not (tmp_path / "run" / "failed.json").exists()


# -- torchrun itself --


def test_two_processes_count_every_image_once_and_agree_with_one(tmp_path):
    flags = [*NETWORK, "--limit-train", "310", "--limit-val", "101", "--epochs", "2"]
    output = on_two_ranks(tmp_path / "ranks", *flags, "--out", tmp_path / "two")
    assert "2 processes on cpu" in output and output.count("epoch   1/2") == 1
    checkpoint = tmp_path / "two" / "best.safetensors"
    evaluated = run_forked(SCRIPT, "--eval-only", "--checkpoint", checkpoint, "--limit-val", 101, check=True)
    measured = json.loads(evaluated.stdout.splitlines()[-1])
    row = min(progress(tmp_path / "two")["history"], key=lambda row: row["val_error"])
    assert measured["val_error"] == row["val_error"] and measured["images"] == 101
    assert measured["val_loss"] == pytest.approx(row["val_loss"], rel=1e-5)


def test_two_processes_killed_in_mid_epoch_resume_exactly_under_torchrun_and_by_hand(tmp_path):
    flags = [*NETWORK, "--limit-train", "310", "--limit-val", "60", "--epochs", "2", "--batch-size", "8"]
    on_two_ranks(tmp_path / "ranks", *flags, "--out", tmp_path / "whole")
    folder = tmp_path / "parts"
    arguments = torchrun(*flags, "--checkpoint-every", 2, "--out", folder)
    words = [*TORCHRUN, "--max-restarts=1", *arguments[len(TORCHRUN) :]]
    with started_python(*words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        while not (folder / "last.pt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        subprocess.run(["pkill", "-KILL", "--newest", "-f", str(folder)], check=True)  # torchrun restarts both ranks
        assert any("resuming after epoch 0 and" in line for line in process.stdout)
        subprocess.run(["pkill", "-KILL", "-f", str(folder)], check=True)  # torchrun and its two processes
    progress = torch.load(folder / "last.pt", weights_only=True)["progress"]
    assert progress["epoch"] == 0 and progress["step"] % 2 == 0 and 0 < progress["step"] < 39
    on_two_ranks(tmp_path / "ranks", *flags, "--checkpoint-every", 2, "--out", folder, "--resume")
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed by Linux only")
def test_no_thread_of_the_process_group_is_left_when_the_interpreter_shuts_down(tmp_path):
    listing = tmp_path / "listing.py"
    listing.write_text(LISTING)
    flags = [*NETWORK, "--limit-train", "20", "--limit-val", "20", "--epochs", "1", "--out", tmp_path / "run"]
    run_python(*TORCHRUN, "--nproc_per_node=2", listing, *flags, check=True, cwd=tmp_path)
    for rank in "01":
        training, at_the_end = json.loads((tmp_path / f"threads{rank}.json").read_text())
        assert any("gloo" in name for name in training)
        assert not any("gloo" in name for name in at_the_end)


# Runs the trainer and lists the names of the process's threads, in training and at its end. Linux lists a thread for a
# moment after it was joined, and forgets it at any time.
LISTING = f"""
import atexit, contextlib, json, os, runpy, sys, time
from pathlib import Path

def names():
    thread_names = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            thread_names.append((thread / "comm").read_text().strip())
    return thread_names

def save():
    deadline = time.monotonic() + 5
    while any("gloo" in name for name in names()) and time.monotonic() < deadline:
        time.sleep(0.05)
    Path(f"threads{{os.environ['RANK']}}.json").write_text(json.dumps([training, names()]))

sys.argv[0] = {str(SCRIPT)!r}
sys.path.insert(0, {str(SCRIPT.parent)!r})
from training import engine

def evaluate(*arguments, evaluate=engine.evaluate):
    training.extend(names())
    return evaluate(*arguments)

training = []
engine.evaluate = evaluate
atexit.register(save)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_say_an_error_once_and_none_waits_forever(tmp_path):
    done = run_python(*torchrun("--dataset", "folder", "--data-dir", tmp_path / "absent", "--out", tmp_path / "run"))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and f"error: {tmp_path}/absent has no images: it needs" in done.stderr
    assert not (tmp_path / "run").exists()
