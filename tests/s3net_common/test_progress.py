"""Progress of long work on a terminal and elsewhere."""

import io
import sys
import time

import pytest

from s3net_common.progress import SECONDS, ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_a_line_is_printed_at_each_interval(monkeypatch, capsys):
    monkeypatch.setenv(SECONDS, "0")
    with ProgressBar(total=40, initial=10, desc="epoch 3", unit="batch") as bar:
        bar.set_postfix_str("loss 2.5, 210 images/s", refresh=False)
        monkeypatch.setattr(bar, "_time", lambda: bar.start_t + 5)
        bar.update(10)
        line = bar.line()
    lines = capsys.readouterr().err.splitlines()
    assert line == "epoch 3: 20 of 40 batches, 2 a second, 00:10 left, loss 2.5, 210 images/s"
    assert f"... {line}" in lines and all(text.startswith("... epoch 3: ") for text in lines)


def test_before_the_first_interval_nothing_is_printed(monkeypatch, capsys):
    monkeypatch.setenv(SECONDS, "1000")
    for _ in ProgressBar(range(3), desc="images"):
        ProgressBar.write("a line", file=sys.stdout)
    assert (capsys.readouterr().err, time.monotonic() > 0) == ("", True)


def test_a_total_that_is_not_known(monkeypatch, capsys):
    monkeypatch.setenv(SECONDS, "0")
    with ProgressBar(desc="listing", unit="file") as bar:
        bar.update(3)
        bar.refresh()
    assert capsys.readouterr().err.splitlines()[-1].startswith("... listing: 3 files, ")


@pytest.mark.parametrize("disable", [False, True])
def test_on_a_terminal_there_is_a_bar(monkeypatch, disable):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar(total=4, desc="a\x1b[2Jb", disable=disable) as bar:
        bar.update(4)
        bar.refresh()
    assert ("100%" in terminal.getvalue()) == (not disable)
    assert "\x1b[2J" not in terminal.getvalue()
