"""Finished runs that were trained elsewhere, taken into the folder of a comparison."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from comparison.jobs import Job
from comparison.runs import Run, read_run
from s3net_common.errors import InputError
from s3net_common.output_files import relative

COPIED = ("config.json", "metrics.jsonl", "summary.json", "last.pt", "best.safetensors", "curves.png")


def runs_below(paths: Iterable[Path]) -> tuple[list[Run], list[Run]]:
    """Return the runs whose folders are given, and the runs one level below the other folders.

    Raises:
        InputError: a path holds no run.
    """
    named, contained = [], []
    for path in paths:
        if (path / "config.json").is_file():
            named.append(read_run(path))
            continue
        folders = sorted(file.parent for file in path.glob("*/config.json"))
        if not folders:
            raise InputError(
                f"{path} holds no run of train_s3net.py: give the folder of a run, or one with such folders"
            )
        contained += map(read_run, folders)
    return named, contained


def adopt_runs(runs: list[Run], jobs: list[Job]) -> list[Run]:
    """Copy the finished runs whose flags are those of a job into the job's folder. Return the other runs.

    A job that has finished keeps its own run.

    Raises:
        InputError: two runs have the flags of one job, the runs have different minor versions of PyTorch or number
            formats, or a run cannot be copied.
    """
    chosen: dict[Path, Run] = {}
    rest = []
    for run in runs:
        job = next((job for job in jobs if not job.differences(all_settings(run))), None)
        if job is None or not (run.finished and run.summary):
            rest.append(run)
        elif job.folder in chosen:
            raise InputError(f"{chosen[job.folder].path} and {run.path} have the same flags: leave one of them out")
        else:
            chosen[job.folder] = run
    known = {job.folder: read_run(job.folder) for job in jobs if job.finished()}
    check_alike([*known.values(), *chosen.values()])
    for folder, run in chosen.items():
        if folder not in known:
            copy_run(run.path, folder)
    return rest


def report_rest(rest: list[Run], named: list[Run], jobs: list[Job]) -> None:
    """Print why the runs in `rest` were not adopted.

    Raises:
        InputError: one of them is in `named`; the message says which flags differ, or that it has not finished.
    """
    for run in rest:
        different = min((job.differences(all_settings(run)) for job in jobs), key=len)
        reason = ", ".join(different) or f"it has reached epoch {len(run.history)} of {run.config['epochs']}"
        if run in named:
            raise InputError(f"{relative(run.path)} cannot be adopted: {reason}")
        print(f"not adopted: {run.path.name}: {reason}")


def all_settings(run: Run) -> dict:
    """Return a run's configuration with the network's options at the top."""
    return run.config | run.config["model_options"]


def check_alike(runs: list[Run]) -> None:
    """Raise an InputError if minor versions of PyTorch or number formats, which round differently, are mixed."""
    for kind, value in (
        ("versions of PyTorch", lambda run: torch_version(run.summary)),
        ("number formats", lambda run: "mixed precision" if run.config.get("amp") else "float32"),
    ):
        by_value = {value(run): run for run in runs}
        if len(by_value) > 1:
            places = ", ".join(f"{name} in {relative(run.path)}" for name, run in sorted(by_value.items()))
            raise InputError(f"the runs have different {kind} ({places}): compare runs that have the same")


def torch_version(summary: dict) -> str:
    """Return the minor version of PyTorch in a run's summary, "2.14", or "unknown"."""
    versions = summary.get("versions")
    version = versions.get("torch") if isinstance(versions, dict) else None
    return ".".join(version.split(".")[:2]) if isinstance(version, str) else "unknown"


def copy_run(source: Path, target: Path) -> None:
    """Copy the files of a run; the folder appears when they are complete.

    Raises:
        InputError: the target exists, with an unfinished run, or cannot be written.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{source} cannot be copied to {target} ({error.strerror}): remove what is there") from error
