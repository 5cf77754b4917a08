"""How a distributed rank ends: one rank says why, and none waits for a rank that has ended. Imports torch late."""

import contextlib
import gc
import os
import socket
import sys
import traceback
from typing import Any, NoReturn

from s3net_common.errors import InputError, LocalError, first_line, printable

_store: Any = None  # torch.distributed.Store that all ranks share


def share(store: Any) -> None:
    """Set the store with which the ranks agree on the one that reports an error."""
    global _store
    _store = store


def is_joined() -> bool:
    """Whether this process belongs to a process group."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def place() -> str:
    """Return this process's rank and host, for messages."""
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def end_together() -> None:
    """Destroy the process group. All ranks must call it, at a point where none has failed.

    Its threads must end before the interpreter does: one that frees a tensor during shutdown aborts the process.
    """
    import torch.distributed as dist

    gc.collect()  # a distributed network is part of reference cycles, which keep the threads alive
    dist.destroy_process_group()


def end_alone(code: int) -> NoReturn:
    """End this process at once.

    Destroying the process group, or the interpreter's shutdown, could wait for other ranks, which may stand in a
    collective operation. They notice the closed connections.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def error_line(error: BaseException) -> str | None:
    """Return the line that this rank prints about an error, or None if another rank has reported it.

    An error in the program comes with its traceback, unless another rank has printed one.
    """
    first = _reports_first()
    if is_lost_connection(error):
        text = "the connection to another rank is lost: it was killed, its node failed, or it has stalled; --resume"
        return f"error: {text} continues from the last checkpoint ({place()})" if first else None
    if isinstance(error, LocalError):
        return f"error: {printable(' '.join(str(error).split()))} ({place()})"
    if isinstance(error, InputError | ImportError):
        return f"error: {printable(' '.join(str(error).split()))}" if first else None
    text = "".join(traceback.format_exception(error)) if first else ""
    return f"{text}error: {type(error).__name__}: {first_line(error)} ({place()})"


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective operation failed because another rank has ended or has not answered in time."""
    import torch.distributed as dist

    is_network = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
    return isinstance(error, RuntimeError) and is_network


def _reports_first() -> bool:
    try:
        return _store is None or _store.add("reported errors", 1) == 1
    except Exception:  # the store has ended with the process that hosts it
        return True
