"""Runs of train_s3net.py as subprocesses: started some at a time, resumed where they stand, skipped if finished."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from s3net_common.command_line import sigterm_as_exit
from s3net_common.errors import InputError

TRAINER = Path(__file__).resolve().parents[1] / "train_s3net.py"
ELSEWHERE = {"out", "data_dir", "device"}  # flags that decide where a run is, not what it computes


@dataclass(frozen=True)
class Job:
    """One run of train_s3net.py."""

    folder: Path
    flags: tuple[str, ...]

    def finished(self) -> bool:
        """Whether it has been run to its end.

        Raises:
            InputError: what has been run there had other flags.
        """
        if not (self.folder / "summary.json").is_file():
            return False
        config = json.loads((self.folder / "config.json").read_text())
        config |= config.pop("model_options")
        whole = {"--limit-train": "None"}  # where the flag is not given
        for flag, asked in (whole | dict(zip(self.flags[::2], self.flags[1::2], strict=True))).items():
            name = flag.removeprefix("--").replace("-", "_")
            if name not in ELSEWHERE and not same(config.get(name), asked):
                raise InputError(
                    f"{self.folder} holds a finished run with {flag} {config.get(name)} instead of {asked}: "
                    "pass another --out"
                )
        return True


def same(saved: object, flag: str) -> bool:
    """Whether a run's saved setting is what a flag asks for."""
    return float(flag) == saved if isinstance(saved, float) else flag == str(saved)


def run_jobs(jobs: Iterable[Job], at_once: int, what: str) -> None:
    """Run the jobs that aren't finished, some at a time.

    Raises:
        InputError: one of them failed; the others that had begun are finished first.
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM, when the runs under way have saved themselves and ended.
    """
    missing = [job for job in jobs if not job.finished()]
    under_way: set[subprocess.Popen] = set()
    with (
        sigterm_as_exit(),
        tqdm(total=len(missing), desc=what, unit="run", disable=None) as bar,
        ThreadPoolExecutor(at_once) as pool,
    ):

        def one(job: Job) -> None:
            run_training(job, at_once > 1, under_way)
            bar.update()

        try:
            for future in [pool.submit(one, job) for job in missing]:
                future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, Exception):  # Ctrl-C or SIGTERM, which may have reached only this process
                for process in under_way.copy():
                    process.terminate()
            raise


def run_training(job: Job, one_thread: bool, under_way: set[subprocess.Popen]) -> None:
    """Train to the end, from where it stands; the output goes to log.txt in the run's folder.

    Args:
        job: the run.
        one_thread: whether it computes in one thread.
        under_way: holds the process as long as it runs.

    Raises:
        InputError: the run failed; the message ends with its last line.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1"} if one_thread else {}
    command = [sys.executable, str(TRAINER), *job.flags, "--resume"]
    log = job.folder / "log.txt"
    with log.open("a") as file:
        # Inherited files stay open: reproduce.py's lock among them, which so notices a run that outlives a kill.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads, close_fds=False
        )
    under_way.add(process)
    code = process.wait()
    under_way.remove(process)
    if code:
        lines = log.read_text().strip().splitlines() or ["it said nothing"]
        raise InputError(f"the run in {job.folder} ended with exit code {code}: {lines[-1]}")


def read_summary(folder: Path) -> dict:
    """A finished run's summary.json."""
    return json.loads((folder / "summary.json").read_text())
