"""The processes that decode images: how many the system's limits allow, and which signals they get."""

import atexit
import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from weakref import WeakSet

from data.memory import available_memory
from s3net_common.limits import available_processors

try:
    import resource
except ImportError:  # Windows
    resource = None

MOST_WORKERS = 16  # of a rank, by default
WORKER_MEMORY = 256 * 2**20  # bytes that a worker needs for itself
WORKER_FILES = 16  # open files in the main process for a worker: its pipes, and the tensors of the batches on their way
OTHER_FILES = 128
BATCHES_AHEAD = 2  # of a worker; PyTorch's default
LOADERS = 2  # of a rank: training and validation
SHARED_MEMORY = "/dev/shm"
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def default_workers() -> int:
    """Return a rank's number of DataLoader workers: its share of the available processors, within the limits."""
    ranks = ranks_of_node()
    memory = available_memory()
    limits = [MOST_WORKERS, available_processors() // ranks, _file_limit()]
    if memory is not None:
        limits.append(memory // (2 * ranks * LOADERS * WORKER_MEMORY))
    return max(1, min(limits))


def fitting_workers(workers: int, batch_bytes: int) -> int:
    """Return how many of a DataLoader's workers the limits of open files and shared memory allow, 0 to `workers`.

    A worker that finds the shared memory full kills its run or hangs. A line says if there are fewer workers.

    Args:
        workers: processes.
        batch_bytes: the size of a rank's batch of images, which a worker puts into the shared memory.
    """
    limits = {"open files (ulimit -n)": _file_limit()}
    with contextlib.suppress(OSError):  # Linux only
        free = shutil.disk_usage(SHARED_MEMORY).free
        room = f"{free / 2**20:.0f} MiB in {SHARED_MEMORY} (docker run --shm-size)"
        limits[room] = free // (ranks_of_node() * LOADERS * BATCHES_AHEAD * max(1, batch_bytes))
    reason = min(limits, key=limits.get)
    if limits[reason] >= workers:
        return workers
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{limits[reason]} instead of {workers} DataLoader workers, because of the limit of {reason}", flush=True)
    return limits[reason]


def ranks_of_node() -> int:
    """Return the number of distributed ranks on this node."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _file_limit() -> int:
    """Raise this process's limit of open files as far as it may, and return how many workers a loader may have."""
    if resource is None:
        return MOST_WORKERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OTHER_FILES + LOADERS * WORKER_FILES * 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has another, lower limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return 2**20
    return max(0, (soft - OTHER_FILES) // (LOADERS * WORKER_FILES))


def is_file_limit(error: Exception) -> bool:
    """Whether an error of a DataLoader means that there are too many open files."""
    # PyTorch receives a batch's memory as an open file; without room for it, the message lacks it.
    texts = ("Too many open files", "received 0 items of ancdata")
    return getattr(error, "errno", None) == errno.EMFILE or any(text in str(error) for text in texts)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Block the signals that stop a run, for good in the worker processes that are started inside the context.

    The signals are sent to every process of a terminal or batch job. The main process ends its workers; a worker that
    ended before would be an error. Workers that are left when the interpreter ends are killed.
    """
    earlier = {*multiprocessing.active_children()}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        _workers.update({*multiprocessing.active_children()} - earlier)
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """Ignore the signals that stop a run, in a worker. PyTorch has set a handler for SIGTERM when it starts."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


_workers: WeakSet[multiprocessing.Process] = WeakSet()


@atexit.register  # before the handler of multiprocessing, which would send SIGTERM and wait
def _kill_workers() -> None:
    left = [worker for worker in _workers if worker.is_alive()]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report a crash
    for worker in left:
        worker.kill()
