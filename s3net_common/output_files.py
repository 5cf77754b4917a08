"""Output files: whole or absent, locked, and recorded with the command, versions and machine. Imports no torch."""

import errno
import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from s3net_common.errors import TOO_MANY_FILES, InputError, first_line, printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parents[1]  # the repository
PACKAGES = ("torch", "torchvision", "timm", "captum", "jax", "neural-tangents", "numpy", "scipy", "scikit-learn")


def default_out(name: str) -> Path:
    """Return the default output folder: runs/`name` in the repository, ignored by git."""
    return ROOT / "runs" / name


def relative(path: Path) -> Path:
    """Return the path relative to the working directory if it lies below it, else absolute."""
    path = Path(path).resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# ---- Writing ------------------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents, check that files can be written there, and return it.

    Raises:
        InputError: the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): pass another --out") from error
    return folder


def claim_folder(folder: Path, record: str, *others: str, overwrite: bool = False) -> Path:
    """Create the output folder, check that no file of something else would be replaced in it, and return it.

    A script's files of an earlier run may be replaced: their record names the script in `command` (see `run_record`).

    Args:
        folder: created if missing.
        record: name of the script's JSON file, which is written before its other files.
        others: names of the script's other files and folders, or patterns with `*`.
        overwrite: whether any file may be replaced.

    Raises:
        InputError: the folder cannot be written, or holds such files without a record of this script.
    """
    make_folder(folder)
    names = [path.name for pattern in (record, *others) for path in sorted(folder.glob(pattern))]
    if names and not overwrite and not _recorded_by_this_script(folder / record):
        raise InputError(
            f"{relative(folder)} already holds {', '.join(names)}, not written by this script: pass another --out, or "
            "--overwrite to replace files"
        )
    return folder


def _recorded_by_this_script(record: Path) -> bool:
    try:
        recorded = shlex.split(str(json.loads(record.read_text())["command"]))
    except (OSError, ValueError, KeyError, TypeError):  # missing, or no record
        return False
    return recorded[:2] == shlex.split(shell_command())[:2]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, then rename the file to `path`, all flushed to the disk.

    Raises:
        InputError: the file cannot be written (permissions, a full disk). An earlier file at `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        rename_durably(temporary, path)
    except (OSError, RuntimeError) as error:
        refusal = _system_error(error)
        if getattr(refusal, "errno", None) == errno.EMFILE:
            raise InputError(f"{path} cannot be written: {TOO_MANY_FILES}") from error
        reason = getattr(refusal, "strerror", None) or first_line(refusal)
        advice = _WRITE_ADVICE.get(getattr(refusal, "errno", None), "make room, or pass another --out")
        raise InputError(f"{path} cannot be written ({reason}): {advice}") from error
    finally:
        temporary.unlink(missing_ok=True)


_WRITE_ADVICE = {
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG), "pass another --out"),
    errno.EFBIG: "raise the limit of a file's size (ulimit -f unlimited)",
}


def _system_error(error: BaseException) -> BaseException:
    """Return the system's error behind an error, or the error itself.

    torch.save ends with a RuntimeError about its own state after the file that it writes to was refused.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def rename_durably(temporary: Path, path: Path) -> None:
    """Rename a file after its content has reached the disk, and flush the folder's entry, too."""
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    if os.name == "posix":  # Windows cannot open a folder
        folder = os.open(path.absolute().parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON.

    Raises:
        InputError: as `write_atomically`.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def json_line(metrics: dict[str, Any]) -> str:
    """Return metrics as one line of JSON. NaN and infinity, which JSON lacks, become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return json.dumps(finite, allow_nan=False)


def csv_cell(text: str) -> str:
    """Return a text for a cell of a CSV file.

    Control characters are escaped. An apostrophe goes before a text that a spreadsheet would compute as a formula.
    """
    text = printable(text)
    return f"'{text}" if text.startswith(tuple("=+-@＝＋－＠")) else text


def figure_text(name: str) -> str:
    r"""Return a name for a text in a matplotlib figure.

    Control characters are escaped, and so is `$`, which would begin a formula. Within no formula, `_`, `^` and `\` are
    plain.
    """
    return printable(name).replace("$", r"\$")


def save_figure(path: Path, figure: Any, dpi: int = 130) -> None:
    """Write a matplotlib figure as PNG, `dpi` pixels an inch.

    Raises:
        InputError: as `write_atomically`.
    """
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))


def lock_exclusively(descriptor: int, wait_seconds: float = 0.0) -> bool:
    """Lock an open file or folder against other processes. Returns False if another process holds the lock.

    The operating system releases the lock when the descriptor is closed in this process and in every child process
    that inherited it. On file systems without locks nothing is locked and True is returned.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            _lock(descriptor)
            return True
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return True


def supports_locks(descriptor: int) -> bool:
    """Whether the file system can lock this open file or folder. NFS locks only what is open for writing.

    If no other process holds the lock, this process holds it afterwards.
    """
    try:
        _lock(descriptor)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return False
    return True


def _lock(descriptor: int) -> None:
    """Lock an open file or folder, on Windows a file, without waiting.

    Raises:
        BlockingIOError, on Windows PermissionError: another process, on Windows any other descriptor, holds the lock.
        OSError: the file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import ctypes  # Windows
    import msvcrt

    # Locked bytes cannot be read or written through other descriptors: lock one byte at 2^62, far behind the end.
    handle = ctypes.c_void_p(msvcrt.get_osfhandle(descriptor))
    if not ctypes.WinDLL("kernel32", use_last_error=True).LockFile(handle, 0, 2**30, 1, 0):
        raise ctypes.WinError(ctypes.get_last_error())


# ---- Where results come from --------------------------------------------------------------------------------------


def run_record() -> dict[str, Any]:
    """Return what is recorded with every result: `command`, `versions`, `machine` and `cpu_seconds` until now."""
    return {
        "command": shell_command(),
        "versions": versions(),
        "machine": machine(),
        "cpu_seconds": round(sum(os.times()[:4]), 1),  # of this process and of its children that have ended
    }


def shell_command() -> str:
    """Return the command line of this process as typed in the repository's root."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", shown, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def machine() -> str:
    """Return the processor's name and number of cores, and the GPUs if torch is loaded, in one line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = next((name for name in names if name and name != "unknown"), processor)
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return ", ".join([processor, f"{os.cpu_count()} cores", *gpus])
