"""The whole story with one command: runs the experiments' scripts and writes one HTML page on what they found.

    python reproduce.py                                       # quick: all three experiments, minutes, no download
    python reproduce.py --budget cpu                          # the real thing on a few CPU cores: days
    python reproduce.py --budget gpu                          # the paper's recipes: days on a GPU; uses all there are
    python reproduce.py --budget cpu --only expressibility    # one experiment

Everything goes into --out: a folder for each step, logs/, and index.html, a page that needs no other file and no
network. It is written anew after every step. Finished steps are not repeated: after Ctrl-C, a kill or a failure the
same command goes on where it was. A step that fails is reported, and the others go on.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from reproduction.page import duration, write_page
from reproduction.record import (
    FAILED,
    FINISHED,
    LEFT_OUT,
    Record,
    logs_folder,
    machine,
    read_record,
    versions,
    write_record,
)
from reproduction.steps import EXPERIMENTS, Step, steps_of
from s3net_common.command_line import run_script, sigterm_as_exit
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT, lock_exclusively

SAVE_EVERY = 10.0  # seconds between notes of how long a step has been running, for the case of a kill


@dataclass
class Args:
    """Run all three experiments and write one page."""

    budget: Literal["quick", "cpu", "gpu"] = "quick"
    """How much to run: minutes on embedded data, or the real thing on CPUs or GPUs."""
    only: tuple[Literal["expressibility", "generalizability", "interpretability"], ...] = EXPERIMENTS
    """The experiments to run; the page shows what there is of all of them."""
    out: Annotated[
        Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/reproduce-<budget>)")
    ] = None
    """Folder for everything that is written."""


def main(args: Args, steps: Sequence[Step] | None = None) -> int:
    """Run what is not finished, write the page, and return 1 where a step failed.

    Args:
        args: the command line.
        steps: instead of the budget's own.

    Raises:
        InputError: there is nothing to run or no GPU to run it on, or the folder cannot be written or is in use.
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM, when the step under way has ended and the page is written.
    """
    gpus = torch.cuda.device_count()
    if args.budget == "gpu" and gpus == 0:
        raise InputError("--budget gpu needs a GPU, and PyTorch finds none: pass --budget cpu, or quick")
    if not args.only:
        raise InputError(f"--only needs one or more of {', '.join(EXPERIMENTS)}")
    out = (args.out or ROOT / "runs" / f"reproduce-{args.budget}").resolve()
    steps = steps_of(args.budget, gpus) if steps is None else steps
    wanted = [step for step in steps if step.experiment in args.only]
    failed = 0
    with sigterm_as_exit(), writable(out), locked(out) as lock, tqdm(wanted, unit="step", disable=None) as bar:
        for step in bar:
            bar.set_description(step.name)
            try:
                if is_finished(step, out):
                    bar.write(f"{step.name}: finished before")
                    continue
                record = run_step(step, out, lock)
                failed += record.status == FAILED
                bar.write(f"{step.name}: {record.status}, {record.reason or duration(record.seconds)}")
            finally:
                write_page(out / "index.html", args.budget, steps, out)
    print(f"written to {shorter(out / 'index.html')}" + (f"; {failed} of {len(wanted)} steps failed" if failed else ""))
    return 1 if failed else 0


@contextlib.contextmanager
def writable(out: Path) -> Iterator[None]:
    """Turn what goes wrong in writing there, at the start or later, into one line.

    Raises:
        InputError: the folder, or a file in it, cannot be written.
    """
    try:
        yield
    except OSError as error:
        where = Path(error.filename or out)
        if not (where.is_relative_to(out) or out.is_relative_to(where)):  # a part of the repository that is missing
            raise
        raise InputError(f"{shorter(out)} cannot be written ({error.strerror}): pass another --out") from error


@contextlib.contextmanager
def locked(out: Path) -> Iterator[IO]:
    """Make the folder and hold its lock; the steps hold it, too, so that one that outlives a kill is noticed.

    Meanwhile the file says how to end the step under way (see `run_command`), for the error.

    Raises:
        InputError: another process holds the lock.
    """
    logs_folder(out).mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a+") as lock:
        if not lock_exclusively(lock.fileno()):
            lock.seek(0)
            raise InputError(
                f"{shorter(out)} is in use by another reproduce.py, or by a step that a killed one has left running: "
                f"wait for it, end it ({lock.read() or 'it is just beginning'}), or pass another --out"
            )
        lock.truncate(0)
        yield lock


# ---- One step -----------------------------------------------------------------------------------------------------


def command_of(step: Step, out: Path) -> list[str]:
    """The command line for people: `python` or `torchrun`, the script and its arguments, seen from the root."""
    program = ["python"] if step.processes == 1 else ["torchrun", "--standalone", f"--nproc_per_node={step.processes}"]
    for word in step.words(shorter(out)):
        program += matching(word, out) if "*" in word else [word]
    return program


def matching(pattern: str, out: Path) -> list[str]:
    """The paths in `out` that a pattern of a command matches, seen from the root."""
    inside = Path(pattern).relative_to(shorter(out))
    return [str(shorter(path)) for path in sorted(out.glob(str(inside)))]


def is_finished(step: Step, out: Path) -> bool:
    """Whether this very command has been run to its end, and its results are still there."""
    record = read_record(out, step.name)
    if record is None or record.status != FINISHED or step.repeated or record.command != command_of(step, out):
        return False
    return (out / step.name).is_dir() or "{here}" not in step.command


def why_left_out(step: Step, out: Path) -> str:
    """What is missing that the step needs; empty where nothing is."""
    if step.needs and not (ROOT / step.needs).exists():
        return f"{step.needs} is not there: {step.otherwise}"
    patterns = [word for word in step.words(shorter(out)) if "*" in word]
    if patterns and not any(matching(pattern, out) for pattern in patterns):
        return f"there is nothing yet in {' or '.join(patterns)}"
    return ""


def run_step(step: Step, out: Path, lock: IO) -> Record:
    """Run the step's script to its end, its output going to its log; returns what happened, which is also on disk."""
    record = Record(command_of(step, out), machine=machine(), versions=versions())
    if reason := why_left_out(step, out):
        record.status, record.reason = LEFT_OUT, reason
        write_record(out, step.name, record)
        return record
    before = read_record(out, step.name)
    if before and not step.repeated:
        if before.command == record.command:
            record.seconds = before.seconds
        else:
            set_aside(out / step.name)
    log = logs_folder(out) / f"{step.name}.log"
    with log.open("w") as file:
        code = run_command(step, record, out, file, lock)
    if code == 0:
        record.status = FINISHED
    else:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        record.status, record.reason = FAILED, f"exit code {code}: {lines[-1]} (log: {shorter(log)})"
    write_record(out, step.name, record)
    return record


def set_aside(folder: Path) -> None:
    """Move what another command has left in a step's folder to former/, so that no results are mixed and none lost."""
    if folder.exists():
        former = folder.parent / "former"
        former.mkdir(exist_ok=True)
        number = 1 + len(list(former.glob(f"{folder.name}-*")))
        folder.rename(former / f"{folder.name}-{number}")


def run_command(step: Step, record: Record, out: Path, log: IO, lock: IO) -> int:
    """Run it in a process group of its own, which ends when this program is ended; returns the exit code."""
    program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    process = subprocess.Popen(
        program[record.command[0]] + record.command[1:],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(lock.fileno(),) if os.name == "posix" else (),
    )
    lock.write(f"kill -TERM -- -{process.pid}")
    lock.flush()
    started, before = time.monotonic(), record.seconds
    try:
        while True:
            try:
                return process.wait(timeout=SAVE_EVERY)
            except subprocess.TimeoutExpired:
                pass
            finally:
                record.seconds = before + time.monotonic() - started
                write_record(out, step.name, record)
    finally:
        if process.poll() is None:
            end(process)
        lock.truncate(0)


def end(process: subprocess.Popen) -> None:
    """Ask the process and its children to end (a training run then saves itself), and wait until it has."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()
    process.wait()


def shorter(path: Path) -> Path:
    """The path as seen from the root, if it is inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    run_script(main, Args, __doc__)
