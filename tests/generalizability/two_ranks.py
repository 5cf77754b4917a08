"""Two distributed ranks of the trainer, started as torchrun starts them, and disturbed at a known place.

A server process imports the trainer once and is forked for every rank: importing takes longer than a tiny run.
"""

import errno
import multiprocessing
import os
import sys
import time
from pathlib import Path

import sklearn.datasets
import sklearn.model_selection  # noqa: F401
import torch.distributed as dist

import train_s3net
from data.batches import EvaluationBatches, TrainingBatches
from s3net_common.command_line import run_script
from s3net_common.errors import LocalError
from training import run_folder
from training.engine import Trainer

SCRIPT = Path(train_s3net.__file__)
PLACES = ("data", "training", "evaluation", "writing")
MARKER = "reached-{rank}"


class TwoRanks:
    """Both processes of a run.

    Args:
        folder: for their output, and the markers of the places that they have reached.
        flags: of the trainer.
        place: one of `PLACES`, where something happens; None for an undisturbed run.
        event: "wait" until the marker is removed, "fail" with an error that users can correct, or "crash".
        ranks: to which it happens.
        environment: more variables.
    """

    def __init__(self, folder, flags, place=None, event="wait", ranks=(0, 1), **environment):
        self.folder, self.disturbed = folder, ranks
        folder.mkdir(exist_ok=True)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        common |= {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "test"}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["two_ranks"])
        self.processes = []
        for rank in (0, 1):
            variables = common | {"RANK": rank, "LOCAL_RANK": rank} | environment
            arguments = (rank, folder, [*map(str, flags)], {name: str(value) for name, value in variables.items()})
            disturbance = (place, event) if rank in ranks else (None, None)
            self.processes.append(context.Process(target=run_rank, args=(*arguments, *disturbance)))
            self.processes[-1].start()

    def reach(self, ranks=None):
        """Wait until ranks have reached the place."""
        for rank in self.disturbed if ranks is None else ranks:
            while not (self.folder / MARKER.format(rank=rank)).exists():
                assert self.processes[rank].is_alive(), self.output()
                time.sleep(0.01)

    def send(self, number, ranks=(0, 1)):
        """Send a signal to the process groups of ranks, as torchrun does, and let the ranks continue."""
        for rank in ranks:
            os.killpg(self.processes[rank].pid, number)
        for rank in (0, 1):
            (self.folder / MARKER.format(rank=rank)).unlink(missing_ok=True)

    def end(self, seconds=300):
        """Return the exit codes and the output of both ranks together."""
        for process in self.processes:
            process.join(seconds)
        assert not any(process.is_alive() for process in self.processes), self.output()
        return [process.exitcode for process in self.processes], self.output()

    def output(self):
        return "".join((self.folder / f"output-{rank}").read_text() for rank in (0, 1))

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()


def run_rank(rank, folder, flags, variables, place, event):
    os.setsid()
    os.environ.update(variables)
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [str(SCRIPT), *flags]
    smaller_evaluation_batches()
    run_folder.draw_curves = lambda history, path, title: path.touch()  # drawing takes longer than training here
    if place:
        disturb(place, event, folder / MARKER.format(rank=rank))
    run_script(train_s3net.main, train_s3net.Args, "")


def smaller_evaluation_batches():
    initialize = EvaluationBatches.__init__
    EvaluationBatches.__init__ = lambda self, data, batch_size, *args, **options: initialize(
        self, data, 8, *args, **options
    )


def disturb(place, event, marker):
    """Let something happen at a place, once, in this process."""
    calls = []

    def happen(when):
        calls.append(None)
        if len(calls) != when:
            return
        if event == "wait":
            marker.touch()
            while marker.exists():
                time.sleep(0.01)
        elif event == "fail":
            raise OSError(errno.ENOSPC, "No space left on device") if place == "writing" else LocalError("bad image")
        else:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def before(function, when):
        def disturbed(*args, **options):
            happen(when)
            return function(*args, **options)

        return disturbed

    def before_items(function, when):
        def disturbed(*args, **options):
            for item in function(*args, **options):
                happen(when)
                yield item

        return disturbed

    if place == "data":
        TrainingBatches.epoch = before_items(TrainingBatches.epoch, 3)
    elif place == "training":
        Trainer._step = before(Trainer._step, 3)
    elif place == "evaluation":
        EvaluationBatches.part = before_items(EvaluationBatches.part, 1)
    else:
        write_file = run_folder.Run._write

        def write_checkpoint(self, name, write):
            write_file(self, name, before(write, 1) if name == "last.pt" else write)

        run_folder.Run._write = write_checkpoint
