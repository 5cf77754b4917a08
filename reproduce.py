"""Run all three experiments and write one HTML page with their results.

    python reproduce.py                                       # quick: minutes, no download
    python reproduce.py --budget cpu                          # the full experiments on a few CPU cores: days
    python reproduce.py --budget gpu                          # the paper's recipes, a network on each GPU: days
    python reproduce.py --budget cpu --only expressibility    # one experiment

Writes to --out: a folder for each step, logs/, and index.html, a page that needs no other file and no network. The page
is written again after every step. After Ctrl-C, a kill or a failure, the same command runs only the steps that are not
finished. A failed step is reported, and the other steps still run.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal

from reproduction.job_queue import RunningSteps, groups_of, run_side_by_side, send_sigterm, visible_gpus
from reproduction.record import FAILED, FINISHED, LEFT_OUT, Record, logs_folder, read_record, write_record
from reproduction.steps import EXPERIMENTS, Step, steps_of
from s3net_common.command_line import THREADS, answer_flags, flag, run_script, sigterm_as_exit
from s3net_common.errors import InputError, printable
from s3net_common.output_files import ROOT, default_out, lock_exclusively, machine, versions

SAVE_SECONDS = 10.0  # interval at which a running step's time is saved, in case this program is killed


@dataclass
class Args:
    """Run all three experiments and write one HTML page with their results."""

    budget: Literal["quick", "cpu", "gpu"] = "quick"
    """How much to run: quick (minutes, without downloads), or the full experiments on CPUs or GPUs (days)."""
    only: tuple[Literal["expressibility", "generalizability", "interpretability"], ...] = EXPERIMENTS
    """Experiments to run. The page shows the results of all experiments in --out."""
    out: flag(Path, "DIR", "runs/reproduce-<budget>") = None
    """Folder for all results."""
    overwrite: bool = False
    """Replace the page and the logs in --out although they are not of an earlier run."""
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import torch

from reproduction.page import duration, write_page
from s3net_common import progress
from s3net_common.progress import ProgressBar


def main(args: Args, steps: Sequence[Step] | None = None) -> int:
    """Run the steps that are not finished, write the page, and return 1 if a step failed, else 0.

    Args:
        args: the command line.
        steps: steps to run instead of the budget's.

    Raises:
        InputError: no experiment is selected, the GPU is missing, or --out cannot be written or is in use.
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM, after the active step has ended and the page is written.
    """
    gpus = visible_gpus(torch.cuda.device_count())
    check_flags(args, gpus)
    out = (args.out or default_out(f"reproduce-{args.budget}")).resolve()
    if not args.overwrite:
        check_replaceable(out)
    steps = steps_of(args.budget) if steps is None else steps
    selected = [step for step in steps if step.experiment in args.only]
    failed = 0
    bar = ProgressBar(total=len(selected), unit="step")
    with sigterm_as_exit(), write_errors(out), locked(out) as lock, bar:
        running = RunningSteps(lock)
        for group in groups_of(selected):
            bar.set_description(", ".join(step.name for step in group))
            try:
                for step in [step for step in group if is_finished(step, out)]:
                    bar.write(f"{step.name}: already finished")
                    bar.update()
                missing = [step for step in group if not is_finished(step, out)]
                run = partial(run_step, out=out, running=running, bar=bar)
                with closing(run_side_by_side(missing, gpus or [""], run, running)) as ended:
                    for step, record in ended:
                        failed += record.status == FAILED
                        bar.write(f"{step.name}: {record.status}, {record.reason or duration(record.seconds)}")
                        bar.update()
                        write_page(out / "index.html", args.budget, steps, out)
            except (KeyboardInterrupt, SystemExit):  # Ctrl-C or SIGTERM
                names = ", ".join(step.name for step in group if not is_finished(step, out))
                bar.write(f"{bar.n} of {len(selected)} steps are done; stopped before its end: {names}")
                raise
            finally:
                write_page(out / "index.html", args.budget, steps, out)
    print(
        f"written to {from_root(out / 'index.html')}"
        + (f"; {failed} of {len(selected)} steps failed" if failed else "")
    )
    return 1 if failed else 0


def check_flags(args: Args, gpus: Sequence[str]) -> None:
    """Raise an InputError if no experiment is selected, or if the GPU is missing that the budget needs."""
    if args.budget == "gpu" and not gpus:
        raise InputError("--budget gpu needs a GPU, and PyTorch finds none: pass --budget cpu, or quick")
    if not args.only:
        raise InputError(f"--only needs one or more of {', '.join(EXPERIMENTS)}")


def check_replaceable(out: Path) -> None:
    """Check that the page, the lock and the logs in `out` are those of an earlier run, of which a record is left.

    Raises:
        InputError: they are not.
    """
    files = [path for path in (out / "index.html", out / "lock") if path.is_file() and path.stat().st_size]
    files += logs_folder(out).glob("*.log")
    records = logs_folder(out).glob("*.json")
    if files and not any(read_record(out, path.stem) for path in records):
        names = ", ".join(str(path.relative_to(out)) for path in files)
        raise InputError(
            f"{from_root(out)} already holds {names}, not written by this script: pass another --out, or --overwrite "
            "to replace files"
        )


@contextlib.contextmanager
def write_errors(out: Path) -> Iterator[None]:
    """Turn an OSError that concerns the output folder into an InputError.

    Raises:
        InputError: the folder, or a file in it, cannot be written.
    """
    try:
        yield
    except OSError as error:
        path = Path(error.filename or out)
        if not (path.is_relative_to(out) or out.is_relative_to(path)):  # a missing file of the repository
            raise
        raise InputError(f"{from_root(out)} cannot be written ({error.strerror}): pass another --out") from error


@contextlib.contextmanager
def locked(out: Path) -> Iterator[IO]:
    """Create the folder and lock it. Steps inherit the lock, so a step that outlives this program keeps it.

    While a step runs, the file contains the command that ends the step, for the error message (see `run_command`).

    Raises:
        InputError: another process holds the lock.
    """
    logs_folder(out).mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a+") as lock:
        if not lock_exclusively(lock.fileno()):
            lock.seek(0)
            raise InputError(
                f"{from_root(out)} is in use by another reproduce.py, or by a step that still runs after a kill: "
                f"wait for it, end it ({lock.read() or 'no step has started yet'}), or pass another --out"
            )
        lock.truncate(0)
        yield lock


# ---- One step -----------------------------------------------------------------------------------------------------


def command_of(step: Step, out: Path) -> list[str]:
    """Return the step's command as typed in the repository's root: `python`, script and arguments."""
    program = ["python"]
    for word in step.words(from_root(out)):
        program += matching(word, out) if "*" in word else [word]
    return program


def matching(pattern: str, out: Path) -> list[str]:
    """Return the paths in `out` that match a pattern of a command, relative to the repository's root."""
    inside = Path(pattern).relative_to(from_root(out))
    return [str(from_root(path)) for path in sorted(out.glob(str(inside)))]


def is_finished(step: Step, out: Path) -> bool:
    """Return whether the step has finished with the same command, and its results still exist."""
    record = read_record(out, step.name)
    if record is None or record.status != FINISHED or step.repeated or record.command != command_of(step, out):
        return False
    return (out / step.name).is_dir() or "{here}" not in step.command


def missing_input(step: Step, out: Path) -> str:
    """Return a line that says which input of the step is missing, or an empty text if none is."""
    if step.needs and not (ROOT / step.needs).exists():
        return f"{step.needs} is missing: {step.otherwise}"
    patterns = [word for word in step.words(from_root(out)) if "*" in word]
    if patterns and not any(matching(pattern, out) for pattern in patterns):
        return f"no results yet in {' or '.join(patterns)}"
    return ""


def run_step(step: Step, gpu: str | None, out: Path, running: RunningSteps, bar: ProgressBar) -> Record:
    """Run the step's script with its output in the step's log, on a GPU (None: any). Write and return the record."""
    record = Record(command_of(step, out), machine=machine(), versions=versions())
    if reason := missing_input(step, out):
        record.status, record.reason = LEFT_OUT, reason
        write_record(out, step.name, record)
        return record
    before = read_record(out, step.name)
    if before and not step.repeated:
        if before.command == record.command:
            record.seconds = before.seconds
        else:
            move_to_former(out / step.name)
    write_record(out, step.name, record)  # before all other files, to show whose they are
    log = logs_folder(out) / f"{step.name}.log"
    with log.open("w") as file:
        code = run_command(step, record, out, file, running, gpu, bar)
    if code == 0:
        record.status = FINISHED
    else:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        record.status, record.reason = FAILED, f"exit code {code}: {lines[-1]} (log: {from_root(log)})"
    write_record(out, step.name, record)
    return record


def move_to_former(folder: Path) -> None:
    """Move the results of another command to former/, so that results are neither mixed nor lost."""
    if folder.exists():
        former = folder.parent / "former"
        former.mkdir(exist_ok=True)
        number = 1 + len(list(former.glob(f"{folder.name}-*")))
        folder.rename(former / f"{folder.name}-{number}")


def run_command(
    step: Step, record: Record, out: Path, log: IO, running: RunningSteps, gpu: str | None, bar: ProgressBar
) -> int:
    """Run the step in a new process group, which is ended if this program is ended. Return the exit code.

    The bar shows the last line of the step's log, to which the scripts write their progress.

    Raises:
        SystemExit: the step was ended together with others.
    """
    variables = {"PYTHONUNBUFFERED": "1", progress.SECONDS: "60"}
    if gpu is not None:
        variables["CUDA_VISIBLE_DEVICES"] = gpu
    process = subprocess.Popen(
        [sys.executable, *record.command[1:]],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(running.lock.fileno(),) if os.name == "posix" else (),
    )
    running.add(process)
    started, before = time.monotonic(), record.seconds
    try:
        while True:
            try:
                code = process.wait(timeout=SAVE_SECONDS)
                if running.ended:
                    sys.exit(code)
                return code
            except subprocess.TimeoutExpired:
                bar.set_postfix_str(last_line(log))
            finally:
                record.seconds = before + time.monotonic() - started
                write_record(out, step.name, record)
    finally:
        if process.poll() is None:
            send_sigterm(process)
            process.wait()
        running.remove(process)


def last_line(log: IO) -> str:
    """Return the last line of a log in at most 100 characters, or an empty text."""
    with Path(log.name).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
        lines = file.read().decode(errors="replace").split("\n")
    return printable(next((line.strip() for line in reversed(lines) if line.strip()), ""))[:100]


def from_root(path: Path) -> Path:
    """Return the path relative to the repository's root, where the steps run, if it lies inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    run_script(main, Args, __doc__, resume="run the same command again to continue")
