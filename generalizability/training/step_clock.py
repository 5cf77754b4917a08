"""Which side of training waits for which: the data, the host that launches the kernels, or the device."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

Batch = TypeVar("Batch")

LAST_STEP = 50  # the report comes after this step
MEASURED_STEPS = 10  # of these, the last ones are measured


class StepClock:
    """Measures some training steps, and reports once which side limits the speed.

    The data's time of a step is how long the host waits for the next batch. The host's time is how long it takes to
    launch the step's kernels while the device is idle before it, and the device's time ends with the last kernel. To
    measure them, the host waits for the device before and after each of `MEASURED_STEPS` steps, which costs little.
    On a CPU, host and device are one.

    Args:
        device: of the training.
        report: called with the line of the report.
    """

    def __init__(self, device: torch.device, report: Callable[[str], object]) -> None:
        self.device, self.report = device, report
        self.steps = 0
        self.times: list[tuple[float, float, float]] = []  # seconds of data, host, and host and device together

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches. What the caller does between two of them is the step."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            data = time.perf_counter() - started
            self.steps += 1
            if not LAST_STEP - MEASURED_STEPS < self.steps <= LAST_STEP:
                yield batch
                continue
            self._wait_for_device()
            started = time.perf_counter()
            yield batch
            host = time.perf_counter() - started
            self._wait_for_device()
            self.times.append((data, host, time.perf_counter() - started))
            if self.steps == LAST_STEP:
                self.report(describe(self.times, self.device.type == "cpu"))

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def describe(times: list[tuple[float, float, float]], on_cpu: bool) -> str:
    """Return a line that says which side limits the speed, and how long the others wait for it in each step.

    Args:
        times: for each step the seconds of the data, of the host, and of host and device together.
        on_cpu: whether host and device are one.
    """
    data, host, device = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    before = f"after {LAST_STEP} steps: a step takes "
    if on_cpu:
        line = f"{before}{data:.1f} ms for its data and {device:.1f} ms to compute"
        return line + ("; the data limit the speed (--workers, --decode)" if data > device else "")
    line = f"{before}{data:.1f} ms for its data, {host:.1f} ms of the host and {device:.1f} ms to its end on the device"
    # The host fetches the data and launches the kernels. The device runs beside it.
    if device > data + host:
        return f"{line}: the host waits {device - data - host:.1f} ms for the device, which limits the speed"
    if data > host:
        return f"{line}: the device waits {data:.1f} ms for the data, which limit the speed (--workers, --decode)"
    return f"{line}: the device waits for the host, which limits the speed (--compile, --graphs, a larger --batch-size)"
