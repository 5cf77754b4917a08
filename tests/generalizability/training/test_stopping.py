"""When ranks look for a request to stop, and what counts as one."""

import math
import os
import pty
import signal

import pytest
import torch

from distributed import Ranks
from training import stopping
from training.stopping import Agreement, StopSignal

CPU = torch.device("cpu")


class Clock:
    """Two ranks, one of which takes `slower` times as long for a step."""

    def __init__(self, monkeypatch, seconds, slower):
        self.now, self.seconds, self.slower, self.exchanges = 0.0, seconds, slower, []
        monkeypatch.setattr(stopping.time, "perf_counter", lambda: self.now)

    def reduce(self, values, op):
        *values, seconds = values
        self.exchanges.append(self.now)
        return [*values, self.slower * seconds]


@pytest.mark.parametrize(("seconds", "slower"), [(0.001, 1), (0.3, 1), (0.3, 4), (9.0, 1)])
def test_the_looks_follow_the_slowest_rank(monkeypatch, seconds, slower):
    clock = Clock(monkeypatch, seconds, slower)
    agreement = Agreement(clock)
    for _ in range(round(60 / seconds)):
        clock.now += seconds
        if agreement.is_due():
            assert agreement.largest(1.0, -math.inf) == [1.0, -math.inf]
    gaps = [later - earlier for earlier, later in zip(clock.exchanges, clock.exchanges[1:], strict=False)]
    expected = max(1, int(2.0 / (seconds * slower) + 1e-6)) * seconds  # 2 seconds of the slowest, or one step
    assert gaps[-1] == pytest.approx(expected) and max(gaps) <= expected + 1e-6
    assert clock.exchanges[0] == pytest.approx(seconds)  # after the first step


def test_one_process_on_a_cpu_looks_at_every_step():
    agreement = Agreement(Ranks(0, 1, CPU), every_step=True)
    for _ in range(5):
        assert agreement.is_due() and agreement.largest(0.0) == [0.0]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_that_stop(name):
    stop, number = StopSignal(), getattr(signal, name)
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop() and stop.number == number
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == number


def test_a_second_ctrl_c_interrupts_unless_torchrun_repeats_the_first(monkeypatch):
    stop, now = StopSignal(), [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop()
    now[0] += 3
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_nohup_keeps_ignoring_sighup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_closed_terminal_is_no_error(tmp_path):
    process, terminal = pty.fork()
    if not process:  # the terminal is its standard output; closing it sends SIGHUP
        stop = StopSignal()
        (tmp_path / "ready").touch()
        while not stop():
            signal.pause()
        os.write(1, b"stopped")
        os._exit(128 + stop.number)
    while not (tmp_path / "ready").exists():
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP


def test_an_orphan_stops(monkeypatch):
    stop = StopSignal()
    assert not stop()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop() and stop.number == signal.SIGTERM
