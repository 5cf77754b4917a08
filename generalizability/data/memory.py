"""How much memory this process can still use: the machine's free memory, within the limits of its control groups."""

from collections.abc import Iterator
from pathlib import Path

from s3net_common.errors import InputError

GIB = 2**30


def check_memory(needed: int, description: str) -> None:
    """Check that images fit into memory, if the system says how much there is (Linux does).

    Args:
        needed: bytes.
        description: of the images, the subject of the message.

    Raises:
        InputError: they do not.
    """
    available = available_memory()
    if available is not None and needed > 0.9 * available:
        raise InputError(
            f"{description} need {needed / GIB:.1f} GiB of memory and {available / GIB:.1f} GiB are available: pass a "
            "smaller --image-size, use fewer images, or keep the images on disk: make train.lmdb and val.lmdb with "
            "folder2lmdb.py and pass --dataset imagenet with their --data-dir"
        )


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that new data can use without swapping, or None if unknown.

    This is MemAvailable, which counts the page cache as free, or less if a control group (of a container or a batch
    system) has a limit.

    Args:
        root: of the file system that contains proc/ and sys/.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":") for line in lines)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None
    return max(0, min([available, *_room_in_groups(root)]))


def _room_in_groups(root: Path) -> Iterator[int]:
    """Yield for each memory limit of this process's control groups the bytes that are left of it."""
    for folder, version in _control_groups(root):
        limit_name, usage_name, prefix = {
            1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
            2: ("memory.max", "memory.current", ""),
        }[version]
        try:
            limit = int((folder / limit_name).read_text())  # "max" without a limit
            usage = int((folder / usage_name).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        # The usage contains the page cache, which is dropped when the memory is needed.
        cache = sum(int(statistics.get(f"{prefix}{part}_file", 0)) for part in ("active", "inactive"))
        yield limit - max(0, usage - cache)


def _control_groups(root: Path) -> Iterator[tuple[Path, int]]:
    """Yield the folders of this process's memory control groups up to the topmost one, and their version (1 or 2)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, name = line.split(":", 2)
        if number == "0":
            mount, version = root / "sys/fs/cgroup", 2
        elif "memory" in controllers.split(","):
            mount, version = root / "sys/fs/cgroup/memory", 1
        else:
            continue
        # In a container the name may be that of the host, and only the mounted folder itself exists.
        folder = mount / name.lstrip("/")
        for parent in (folder, *folder.parents):
            if parent.is_relative_to(mount):
                yield parent, version
