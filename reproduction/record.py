"""What happened to a step: kept beside its log, so that finished steps are not repeated and the page can tell."""

import json
import os
import platform
import shlex
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

FINISHED, FAILED, LEFT_OUT, UNFINISHED = "finished", "failed", "left out", "unfinished"
PACKAGES = ("torch", "torchvision", "jax", "neural-tangents", "numpy", "scikit-learn")


@dataclass
class Record:
    """The state of one step.

    Attributes:
        command: the script and its arguments, as they were run.
        status: FINISHED, FAILED, LEFT_OUT or UNFINISHED.
        seconds: spent on this command, over all attempts.
        reason: why it failed or was left out, in a line.
        machine: the processor and the GPUs that it ran on.
        versions: of Python and of the libraries.
    """

    command: list[str]
    status: str = UNFINISHED
    seconds: float = 0.0
    reason: str = ""
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def shown_command(self) -> str:
        """The command line, for people."""
        return shlex.join(self.command)


def logs_folder(out: Path) -> Path:
    """Where the steps' logs and records are."""
    return out / "logs"


def read_record(out: Path, name: str) -> Record | None:
    """The step's record; None where there is none yet or it is damaged."""
    try:
        return Record(**json.loads((logs_folder(out) / f"{name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_record(out: Path, name: str, record: Record) -> None:
    """Write the step's record, whole or not at all."""
    path = logs_folder(out) / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(record), indent=1) + "\n")
    temporary.replace(path)


def machine() -> str:
    """The processor, its cores and the GPUs, in a line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = next((name for name in named if name and name != "unknown"), processor)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([processor, f"{os.cpu_count()} cores", *gpus])


def versions() -> dict[str, str]:
    """Of Python and of the libraries that are installed."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
