"""The line that says which side of training waits."""

import re
import time

import pytest
import torch

from training.step_clock import LAST_STEP, MEASURED_STEPS, StepClock, describe

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ((0.020, 0.004, 0.005), "the device waits 20.0 ms for the data, which limit the speed (--workers, --decode)"),
        ((0.001, 0.012, 0.0125), "the device waits for the host, which limits the speed (--compile, --graphs, "),
        ((0.001, 0.012, 0.100), "the host waits 87.0 ms for the device, which limits the speed"),
    ],
)
def test_the_side_that_limits_the_speed(times, words):
    others = [(1.0, 0.0, 0.0), (0.0, 1.0, 1.0)]  # single slow steps count little
    line = describe([times] * 3 + others, on_cpu=False)
    data, host, device = (f"{1000 * value:.1f} ms" for value in times)
    assert line.startswith(f"after 50 steps: a step takes {data} for its data, {host} of the host and {device} to its")
    assert words in line


def test_a_cpu_computes_what_it_launches():
    line = "after 50 steps: a step takes 3.0 ms for its data and 20.0 ms to compute"
    assert describe([(0.003, 0.02, 0.02)], on_cpu=True) == line
    slow = describe([(0.03, 0.02, 0.02)], on_cpu=True)
    assert slow.endswith("30.0 ms for its data and 20.0 ms to compute; the data limit the speed (--workers, --decode)")


def test_the_clock_measures_waiting_and_computing():
    """One report, over two epochs, after the 50th step."""
    lines = []
    clock = StepClock(CPU, lines.append)

    def batches(count):
        for i in range(count):
            if clock.steps >= LAST_STEP - MEASURED_STEPS:
                time.sleep(0.02)
            yield i

    for epoch, count in enumerate((30, 40)):
        for step, batch in enumerate(clock.watch(batches(count))):
            assert batch == step
            if clock.steps > LAST_STEP - MEASURED_STEPS:
                time.sleep(0.005)
            assert len(lines) == (epoch == 1 and step >= 20)
    data, computing = map(float, re.findall(r"([\d.]+) ms", lines[0]))
    assert data >= 20 and 5 <= computing < data
    assert len(clock.times) == MEASURED_STEPS
