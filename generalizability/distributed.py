"""The distributed ranks: the processes that torchrun started, or a single process."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from s3net_common import process_group
from s3net_common.errors import InputError
from s3net_common.launcher import check_launcher, is_distributed

# The first rank may download and decode images while the others wait. NCCL would give up after 10 minutes.
CONTROL_TIMEOUT = timedelta(hours=2)

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks that train together, and this rank's device.

    Python values are exchanged over `control`, a process group on the CPU: a GPU need not finish its work first.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def reduce(self, values: list[float], op: dist.ReduceOp = dist.ReduceOp.SUM) -> list[float]:
        """Reduce numbers over all ranks in float64. Return the result on every rank."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op, group=self.control)
        return tensor.tolist()

    def gather(self, value: object) -> list:
        """Return the values of all ranks, in order of rank, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def on_all_ranks(self, action: Callable[[], T]) -> T:
        """Call `action` on every rank and return its result.

        An InputError on one rank is raised on all of them: otherwise the others would wait for that rank forever.
        """
        result = error = None
        try:
            result = action()
        except InputError as raised:
            error = (raised, process_group.place())
        errors = self.gather(error)
        if failed := [raised for raised in errors if raised is not None]:
            with contextlib.suppress(RuntimeError):  # no rank ends before all of them know the error
                self.gather(None)
            first, place = failed[0]
            text = str(first) if len(failed) == self.world_size else f"{first} ({place})"
            raise InputError(text) from first  # also a LocalError, which every rank would print
        return result

    def on_main_rank(self, action: Callable[[], T]) -> T:
        """Call `action` on the main rank only. Return its result, or raise its InputError, on all ranks."""
        return self.gather(self.on_all_ranks(action if self.is_main else lambda: None))[0]


def join_ranks(device: str | None) -> Ranks:
    """Join the ranks that torchrun started, if it did, and choose this rank's device.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps"; None for a GPU if there is one, else the CPU.

    Raises:
        InputError: this machine lacks the device, or torchrun has not started this process as it should.
    """
    check_launcher()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"there is no device {device!r}: give cpu, cuda, cuda:1 or mps") from error
    if chosen.type == "cuda":
        chosen = _cuda_device(chosen)
        torch.cuda.set_device(chosen)  # else allocations and kernels without a device go to cuda:0
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: this machine has no Apple GPU that PyTorch can use; pass --device cpu")
    elif chosen.type not in ("cpu", "mps"):
        raise InputError(f"--device {device} is not supported: give cpu, cuda, cuda:1 or mps")
    if not is_distributed():
        return Ranks(0, 1, chosen)
    # After a restart by torchrun, its store may still hold the addresses of the previous processes.
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    process_group.share(store)
    return Ranks(rank, world_size, chosen, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cuda_device(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA GPU here; pass --device cpu, or leave it out")
    count, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > count:
        raise InputError(f"{processes} processes on this node and {count} GPUs: give torchrun --nproc_per_node={count}")
    index = device.index
    if index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise InputError(
            f"--device cuda:{index} would put all processes of this node on one GPU: pass --device cuda, which gives "
            "each process one GPU"
        )
    if index is None:
        index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    if index >= count:
        raise InputError(f"--device cuda:{index}: the last GPU here is cuda:{count - 1}")
    return torch.device("cuda", index)
