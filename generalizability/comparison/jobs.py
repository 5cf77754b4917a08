"""Runs of train_s3net.py as subprocesses: several at a time, resumed if interrupted, skipped if finished."""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from comparison.runs import DEFAULTS
from recipes import NETWORK_FLAGS, recipe_for
from s3net_common.command_line import sigterm_as_exit
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT
from s3net_common.progress import ProgressBar
from s3net_networks import complete_options

TRAINER = ROOT / "generalizability" / "train_s3net.py"
ENVIRONMENT_SETTINGS = {"data_dir", "device"}  # they do not change what a run computes
UNCOMPARED = ENVIRONMENT_SETTINGS | {"mean", "std", "milestones"}  # the latter have no flags


@dataclass(frozen=True)
class Job:
    """One run of train_s3net.py.

    Attributes:
        folder: the run's folder, passed as --out.
        settings: the trainer's other flags by field name, with their values; None leaves the flag out.
    """

    folder: Path
    settings: dict[str, str | int | float | bool | Path | None]

    def flags(self, excluded: Collection[str] = ()) -> list[str]:
        """Return the flags for these settings, without the excluded ones."""
        given = {name: value for name, value in self.settings.items() if value is not None and name not in excluded}
        words = []
        for name, value in given.items():
            if isinstance(value, bool):
                words.append(flag_name(name) if value else flag_name(f"no_{name}"))
            else:
                words += [flag_name(name), str(value)]
        return words

    def finished(self) -> bool:
        """Return whether the run has reached its last epoch.

        Raises:
            InputError: the folder holds a finished run with other settings.
        """
        if not (self.folder / "summary.json").is_file():
            return False
        try:
            config = json.loads((self.folder / "config.json").read_text())
            config |= config.pop("model_options")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.folder} holds a summary.json but no config.json of the trainer: pass another --out"
            ) from error
        if different := self.differences(config):
            raise InputError(f"{self.folder} holds a finished run with {', '.join(different)}: pass another --out")
        return True

    def differences(self, config: dict) -> list[str]:
        """Return in which flags a run differs from this one, as "--lr 0.1 instead of 0.4".

        `config`: content of its `config.json` with the network's options at the top. Settings of this job that are not
        given have the values of the data set's recipe, and the defaults of the network's options. Settings that
        `config` lacks have their defaults.
        """
        expected = dict(DEFAULTS)
        if "dataset" in self.settings:
            expected |= asdict(recipe_for(self.settings["dataset"], self.settings.get("model")))
        expected |= dict.fromkeys(("limit_train", "limit_val"))
        model = self.settings.get("model", expected.get("model"))
        blocks = {name: config[name] for name in ["block_config"] if name in config}  # they take the place of a depth
        config = DEFAULTS | complete_options(model, blocks) | config
        options = complete_options(model, {})
        expected |= {name: options.get(name) for name in NETWORK_FLAGS}
        expected |= {name: value for name, value in self.settings.items() if value is not None or name not in options}
        compared = {name: value for name, value in expected.items() if name not in UNCOMPARED}
        actual = {name: config.get(name, None if name in self.settings else compared[name]) for name in compared}
        return [
            f"{flag_name(name)} {actual[name]} instead of {value}"
            for name, value in compared.items()
            if actual[name] != value
        ]

    def finished_epochs(self) -> int:
        """Return the number of epochs that the run has finished."""
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def summary(self) -> dict:
        """Return the summary.json of the finished run."""
        return json.loads((self.folder / "summary.json").read_text())


def wait_a_while(process: subprocess.Popen) -> int | None:
    """Return the process's exit code, or None if it has not ended after some seconds."""
    try:
        return process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return None


def flag_name(setting: str) -> str:
    """Return the flag of the trainer that sets a field of its arguments."""
    return f"--{setting.replace('_', '-')}"


def run_jobs(jobs: Iterable[Job], parallel_runs: int, description: str) -> None:
    """Run the jobs that are not finished, `parallel_runs` at a time, with a progress bar.

    Raises:
        InputError: a run failed. The other runs that had started are finished first.
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM, after the active runs have saved themselves and ended.
    """
    missing = [job for job in jobs if not job.finished()]
    epochs = sum(job.settings.get("epochs", 0) for job in missing)
    active: set[subprocess.Popen] = set()
    with (
        sigterm_as_exit(),
        ProgressBar(total=epochs, desc=f"{description}, {len(missing)} runs", unit="epoch") as bar,
        ThreadPoolExecutor(parallel_runs) as pool,
    ):

        def run(job: Job) -> None:
            run_training(job, parallel_runs > 1, active, bar)

        try:
            for future in [pool.submit(run, job) for job in missing]:
                future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, Exception):  # Ctrl-C or SIGTERM, which may have reached only this process
                for process in active.copy():
                    process.terminate()
            raise


def run_training(job: Job, single_thread: bool, active: set[subprocess.Popen], bar: ProgressBar) -> None:
    """Train to the last epoch, or resume an interrupted run. The output goes to log.txt in the run's folder.

    Args:
        job: the run.
        single_thread: whether the run computes with one thread on a CPU.
        active: contains the process while it runs.
        bar: advances with the run's epochs.

    Raises:
        InputError: the run failed; the message ends with the last line of its output.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1"} if single_thread else {}
    command = [sys.executable, str(TRAINER), *job.flags(), "--out", str(job.folder), "--resume"]
    log = job.folder / "log.txt"
    with log.open("a") as file:
        # The run inherits open files, such as the lock of reproduce.py, which thus notices a run that outlives it.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads, close_fds=False
        )
    active.add(process)
    counted = 0
    while (code := wait_a_while(process)) is None or counted < job.finished_epochs():
        bar.update(job.finished_epochs() - counted)
        counted = job.finished_epochs()
    active.remove(process)
    if code:
        lines = log.read_text().strip().splitlines() or ["no output"]
        raise InputError(f"the run in {job.folder} ended with exit code {code}: {lines[-1]}")
