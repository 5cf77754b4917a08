"""How much a script may use: threads, processors of its container, and sizes that make sense. Imports no torch."""

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from s3net_common.errors import InputError

# Largest values that can be meant; beyond them, arrays do not fit any memory. Other whole numbers: `LARGEST_NUMBER`.
MAXIMUM = {
    **dict.fromkeys(("epochs", "search_epochs", "ablation_epochs"), 100_000),
    **dict.fromkeys(("batch_size", "accumulate", "num_classes", "splits", "points", "batches"), 1_000_000),
    **dict.fromkeys(("growth_rate", "depth", "seeds", "repeats", "rounds", "depths"), 10_000),
    **dict.fromkeys(("workers", "jobs", "threads"), 1_024),
    "image_size": 4_096,
    "seed": 2**62 - 1,
    "max_pixels": 10**12,
}
LARGEST_NUMBER = 10**9


def check_numbers(values: Mapping[str, object]) -> None:
    """Check that flags are numbers of a size that makes sense.

    Args:
        values: values by the flag's name with underscores. Of tuples, every number is checked.

    Raises:
        InputError: a whole number is larger than `MAXIMUM` allows, or a number is infinite or NaN.
    """
    for name, value in values.items():
        for number in value if isinstance(value, tuple | list) else (value,):
            flag = f"--{name.replace('_', '-')} {number}"
            if isinstance(number, int) and number > (maximum := MAXIMUM.get(name, LARGEST_NUMBER)):
                limit = "below 2^62" if name == "seed" else f"of at most {maximum:,}"
                raise InputError(f"{flag} is not possible: give a number {limit}")
            if isinstance(number, float) and not abs(number) < 1e100:
                raise InputError(f"{flag} is not possible: give a finite number below 1e100")


def available_processors() -> int:
    """Return how many processors this process may use: those that Slurm or a container leaves to it."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(count, container_quota())))


def container_quota(groups: Path = Path("/sys/fs/cgroup"), memberships: Path = Path("/proc/self/cgroup")) -> float:
    """Return the processor time per second that the process's control groups allow, or infinity without a limit.

    Args:
        groups: where the control groups (version 2, or 1) are mounted.
        memberships: the file that names this process's groups.
    """
    quotas = [math.inf]
    try:
        names = [line.split(":", 2)[2].strip("/") for line in memberships.read_text().splitlines()]
    except (OSError, IndexError):  # no Linux
        return math.inf
    for name in {*names, ""}:
        for group in (groups / name, *(groups / name).parents):
            if not group.is_relative_to(groups):
                break
            quotas.append(_ratio(group / "cpu.max"))
    for group in {groups / kind / name for kind in ("cpu", "cpu,cpuacct") for name in {*names, ""}}:
        quotas.append(_ratio(group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"))
    return min(quotas)


def _ratio(*files: Path) -> float:
    """Return the first of the two numbers in the files by the second; infinity if it is "max", -1 or unreadable."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def limit_threads(threads: int | None) -> None:
    """Let PyTorch, NumPy and JAX compute with so many threads, also in child processes.

    Args:
        threads: --threads; None for all processors. A container's quota may leave fewer than the libraries see.

    Raises:
        InputError: the number is below 1.
    """
    if threads is None:
        if "OMP_NUM_THREADS" in os.environ or available_processors() >= (os.cpu_count() or 1):
            return
        threads = available_processors()
    if threads < 1:
        raise InputError(f"--threads {threads} is not possible: give a number of 1 or more")
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")  # the last is JAX's
    os.environ.update(dict.fromkeys(names, str(threads)))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
