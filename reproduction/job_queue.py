"""Steps that run side by side, one on each GPU, and the processes of the steps that run."""

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import IO

from reproduction.record import Record
from reproduction.steps import Step


@dataclass
class RunningSteps:
    """The processes of the steps that run.

    Attributes:
        lock: the locked file; it contains the command that ends the processes, for an error message.
        ended: whether `end` was called.
    """

    lock: IO
    ended: bool = False
    _processes: list[subprocess.Popen] = field(default_factory=list)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def add(self, process: subprocess.Popen) -> None:
        """Note that a process has started."""
        with self._mutex:
            self._processes.append(process)
            self._write()

    def remove(self, process: subprocess.Popen) -> None:
        """Note that a process has ended."""
        with self._mutex:
            self._processes.remove(process)
            self._write()

    def end(self) -> None:
        """End all processes with their children. A training run saves itself first."""
        self.ended = True
        with self._mutex:
            processes = [process for process in self._processes if process.poll() is None]
        for process in processes:
            send_sigterm(process)
        for process in processes:
            process.wait()

    def _write(self) -> None:
        self.lock.truncate(0)
        if self._processes:
            self.lock.write("kill -TERM -- " + " ".join(f"-{process.pid}" for process in self._processes))
        self.lock.flush()


def send_sigterm(process: subprocess.Popen) -> None:
    """Send SIGTERM to a process and its children."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()


def visible_gpus(count: int) -> list[str]:
    """Return the names of the GPUs that this process may use, for CUDA_VISIBLE_DEVICES. `count`: how many they are."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


def groups_of(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps in groups: neighbours that each run on one GPU together, every other step alone."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and step.on_gpu and groups[-1][-1].on_gpu:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def run_side_by_side(
    steps: Sequence[Step], gpus: Sequence[str], run: Callable[[Step, str | None], Record], running: RunningSteps
) -> Iterator[tuple[Step, Record]]:
    """Run steps, one at a time on each GPU, and yield each with its record when it has ended. Close the iterator.

    Args:
        steps: a group of `groups_of`.
        gpus: names of the GPUs.
        run: runs a step on a GPU (None: on any).
        running: ends the processes of the steps if the iterator is closed before its end.
    """
    if len(steps) == 1:
        yield steps[0], run(steps[0], None)
        return
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for gpu in gpus:
        free.put(gpu)

    def run_on_free_gpu(step: Step) -> Record:
        gpu = free.get()
        try:
            return run(step, gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(gpus)) as pool:
        futures = {pool.submit(run_on_free_gpu, step): step for step in steps}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:  # Ctrl-C, SIGTERM, or the iterator is closed
            pool.shutdown(wait=False, cancel_futures=True)
            running.end()
            raise
