"""The batch scripts, with stand-ins for Slurm's commands."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[2] / "cluster"

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "flock", "sha256sum", "df"))), reason="bash, flock or coreutils are missing"
)

SRUN = """
echo "$@" >>"$LOG"
case "$*" in
*copy_to_node.sh*) while [ "$1" != bash ]; do shift; done; "$@" ;;
*) [ -z "$STOPS" ] || { mkdir -p "$RUN"; echo resume >"$RUN/stopped"; }; exit "$CODE" ;;
esac
"""
SCONTROL = """
case $1 in
show) printf 'node7\\nnode8\\n' ;;
*) echo "scontrol $*" >>"$LOG" ;;
esac
"""


@pytest.fixture
def job(tmp_path):
    """Runs the batch script; returns its exit code and the lines of the commands that it started."""
    commands, log, run = tmp_path / "commands", tmp_path / "log", tmp_path / "run"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text("#!/bin/bash" + text)
        (commands / name).chmod(0o755)

    def start(*flags, **variables):
        log.write_text("")
        environment = {"PATH": f"{commands}:{os.environ['PATH']}", "LOG": log, "RUN": run, "STOPS": "", "CODE": "0"}
        environment |= {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
        environment |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"} | variables
        done = subprocess.run(
            ["bash", CLUSTER / "train.sbatch", *flags],
            env={name: str(value) for name, value in environment.items()},
            cwd=CLUSTER.parent,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, log.read_text().splitlines(), done.stderr

    return start, run


def test_the_command_on_two_nodes(job):
    start, run = job
    code, lines, _ = start(run, "--dataset", "imagenet", "--lr", "0.1")
    assert code == 0 and lines == [
        "--ntasks-per-node=1 --cpus-per-task=32 --kill-on-bad-exit=1 torchrun --nnodes=2 --nproc_per_node=4 "
        "--max-restarts=3 --rdzv_backend=c10d --rdzv_id=20007-0 --rdzv_endpoint=node7:20007 "
        f"generalizability/train_s3net.py --dataset imagenet --lr 0.1 --out {run} --resume"
    ]
    _, lines, _ = start(run, CONTAINER="s3net.sif", PROCESSES_PER_NODE=2, SLURM_GPUS_ON_NODE="", SLURM_RESTART_COUNT=3)
    assert "apptainer exec --nv s3net.sif torchrun --nnodes=2 --nproc_per_node=2" in lines[0]
    assert "--rdzv_id=20007-3 " in lines[0]
    code, lines, error = start()
    assert code != 0 and lines == [] and "usage: sbatch cluster/train.sbatch RUN_FOLDER" in error


def test_a_stopped_run_is_queued_again_and_a_failed_one_is_not(job):
    start, run = job
    code, lines, _ = start(run, STOPS="1", CODE=1)
    assert code == 1 and lines[1:] == ["scontrol requeue 20007"]
    assert (run / "stopped").exists()
    code, lines, _ = start(run, CODE=1)  # `stopped` of the job before does not count
    assert code == 1 and len(lines) == 1 and not (run / "stopped").exists()


@pytest.fixture
def shared(tmp_path):
    """A shared folder with two LMDB files."""
    folder = tmp_path / "shared"
    folder.mkdir()
    for name in ("train.lmdb", "val.lmdb"):
        (folder / name).write_bytes(os.urandom(100_000))
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".copy.lock"}


def copy(shared, node, **variables):
    arguments = ["bash", CLUSTER / "copy_to_node.sh", shared, node]
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)


def test_the_images_are_copied_to_the_node_once(job, shared, tmp_path):
    start, run = job
    node = tmp_path / "node"
    code, lines, _ = start(run, SHARED_DATA=shared, NODE_DATA=node)
    assert code == 0 and contents(node) == contents(shared)
    assert lines[1].endswith(f"train_s3net.py --data-dir {node} --out {run} --resume")
    assert copy(shared, node).stdout == ""
    (shared / "val.lmdb").write_bytes(b"another file")
    (node / "train.lmdb").write_bytes(b"half")
    assert len(copy(shared, node).stdout.splitlines()) == 2
    assert contents(node) == contents(shared)


def test_a_copy_that_fails(job, shared, tmp_path):
    start, run = job
    node = tmp_path / "node"
    tee = tmp_path / "commands" / "tee"  # a disk that keeps other bytes than it is given
    tee.write_text('#!/bin/bash\ncat >"$1"; echo x >>"$1"\n')
    tee.chmod(0o755)
    failed = copy(shared, node, PATH=f"{tee.parent}:{os.environ['PATH']}")
    assert failed.returncode == 1 and failed.stderr.startswith(f"error: {node} on ")
    assert failed.stderr.endswith("keeps wrong data\n") and contents(node) == {}
    tee.unlink()
    (shared / "val.lmdb").unlink()
    code, lines, error = start(run, SHARED_DATA=shared, NODE_DATA=node)
    assert code == 1 and len(lines) == 1  # no training
    assert f"error: {shared}/val.lmdb cannot be read on " in error
    (tee.parent / "df").write_text("#!/bin/bash\necho 'Avail\n10'\n")
    (tee.parent / "df").chmod(0o755)
    (shared / "val.lmdb").write_bytes(b"0" * 100)
    full = copy(shared, node, PATH=f"{tee.parent}:{os.environ['PATH']}")
    assert full.returncode == 1 and "has 10 of 100 bytes for val.lmdb" in full.stderr


def test_the_container_file_copies_what_it_installs():
    text = (CLUSTER / "Dockerfile").read_text()
    assert "COPY . ." in text and "-r generalizability/requirements.txt" in text
    ignored = (CLUSTER.parent / ".dockerignore").read_text().split()
    assert ignored == [".git", ".venv", "data", "runs"]
    assert all(stat.S_ISREG(path.stat().st_mode) for path in CLUSTER.iterdir())
