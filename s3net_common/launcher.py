"""Environment variables of torchrun, Slurm and MPI: which process this is. Imports the standard library only."""

import os

from s3net_common.errors import InputError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# The number of tasks of a Slurm step, of a Slurm job, and of Open MPI's and MPICH's process managers.
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
ADVICE = "start several processes with torchrun (torchrun --nproc_per_node=4 SCRIPT ...)"


def is_distributed() -> bool:
    """Whether all variables that torchrun gives its processes are set."""
    return all(name in os.environ for name in RANK_VARIABLES)


def is_first_rank() -> bool:
    """Whether this process prints what concerns all distributed ranks: the first of them, or a single process."""
    return not is_distributed() or os.environ["RANK"] == "0"


def check_launcher() -> None:
    """Check that this process is alone, or one that torchrun started.

    Raises:
        InputError: some of torchrun's variables are missing or are no numbers; or this is one of several tasks of Slurm
            or MPI, which know nothing of each other.
    """
    if "RANK" in os.environ or is_distributed():
        missing = [name for name in RANK_VARIABLES if name not in os.environ]
        if missing:
            raise InputError(
                f"RANK is set without {' and '.join(missing)}: {ADVICE}, or remove RANK for one process (unset RANK)"
            )
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            if not os.environ.get(name, "0").isdecimal():
                raise InputError(f"{name} is {os.environ[name]!r} instead of a number: {ADVICE}")
        return
    name = next((name for name in TASK_COUNTS if name in os.environ), None)
    if name and os.environ[name].isdecimal() and int(os.environ[name]) > 1:
        raise InputError(
            f"this is one of {os.environ[name]} tasks ({name}) that would compute the same side by side: start one "
            f"task a node, which runs torchrun (srun --ntasks-per-node=1 torchrun ...), or unset {name} for one process"
        )
