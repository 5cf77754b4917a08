"""What scripts print and how they end: names, encodings, a stdout that cannot be written, errors of the system."""

import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import run_python, started_python

from distributed import join_ranks
from s3net_common.command_line import run_script
from s3net_common.errors import InputError
from s3net_common.terminal import BAR_CONTROLS, SafeStream

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, dataclasses
from s3net_common.command_line import run_script
@dataclasses.dataclass
class Args:
    pass
def main(args):
    {}
run_script(main, Args, "")
"""


def run_main(body: str, **options):
    return run_python("-c", PROGRAM.format(body), env={"PYTHONPATH": str(ROOT)} | options.pop("env", {}), **options)


@dataclass
class NoFlags:
    """No flags."""


def exit_code(monkeypatch, main) -> int:
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as end:
        run_script(main, NoFlags, "")
    return end.value.code


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_name_can_be_printed_in_any_encoding(encoding):
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, encoding=encoding))
    print("grün Ω \udcff \x1b[31mred\x07\r", file=stream)
    stream.flush()
    shown = {"ascii": r"gr\xfcn \u03a9", "cp1252": r"grün \u03a9", "utf-8": "grün Ω"}[encoding]
    assert raw.getvalue().decode(encoding) == shown + " \\xff \\x1b[31mred\\x07\\r\n"


def test_a_progress_bar_keeps_the_controls_that_it_needs():
    raw = io.StringIO()
    SafeStream(raw, BAR_CONTROLS).write("\r 50%\x1b[A\n\x1b[2J")
    assert raw.getvalue() == "\r 50%\x1b[A\n\\x1b[2J"


def test_a_name_beyond_the_encoding_of_the_terminal():
    done = run_main("print('Ω\\x1b[2J')", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u03a9\\x1b[2J\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_stdout_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = run_main_to(full)
    assert done.returncode == 2
    line = "error: the output cannot be written (No space left on device): give it a reader or room\n"
    assert done.stderr == line


def run_main_to(stream):
    with started_python(
        "-c", PROGRAM.format("print('x' * 9999)"), stdout=stream, stderr=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)}
    ) as process:
        errors = process.communicate()[1]
    return subprocess.CompletedProcess([], process.returncode, "", errors)


@pytest.mark.parametrize("path", ["/dev/full", None])
def test_output_that_cannot_be_written(monkeypatch, capsys, path):
    def main(args):
        print("a line")
        return 0

    monkeypatch.setattr(sys, "argv", ["script"])
    output = Path(path).open("w") if path else None  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit) as ended:
        run_script(main, NoFlags, "")
    errors = capsys.readouterr().err
    if path:
        assert ended.value.code == 2
        assert errors == "error: the output cannot be written (No space left on device): give it a reader or room\n"
        output.close()  # what is left in it has somewhere to go
    else:
        assert ended.value.code == 0 and errors == ""


def test_a_closed_stdout_and_stderr_do_not_matter():
    done = run_main("print(1); print(2, file=sys.stderr); sys.stdout.flush()", preexec_fn=close_output)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def close_output():
    os.close(1)
    os.close(2)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(28, "No space left on device"),
            "refused an operation (No space left on device): make room",
        ),
        (OSError(5, "Input/output error", "a.bin"), "a.bin cannot be used (Input/output error): give another path"),
        (
            OSError(24, "Too many open files"),
            "(Too many open files): raise their limit (ulimit -n 65536)",
        ),
        (
            MemoryError("Unable to allocate 8 TiB"),
            "memory ran out (Unable to allocate 8 TiB): use a smaller",
        ),
        (
            RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you"),
            "memory ran out ([enforce]",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
            "a process that decodes images has ended (DataLoader worker (pid(s) 7) exited unexpectedly); often memory",
        ),
    ],
)
def test_an_error_of_the_system_is_one_line_and_not_blamed_on_the_output(monkeypatch, capsys, error, line):
    def main(args):
        raise error

    assert exit_code(monkeypatch, main) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and line in printed and printed.count("\n") == 1


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(RuntimeError, match="a bug"):
        run_script(lambda args: (_ for _ in ()).throw(RuntimeError("a bug")), NoFlags, "")


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def main(args):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "argv", ["script.py"])
    for resume, line in (("", "stopped\n"), ("run the same command again", "stopped; run the same command again\n")):
        with pytest.raises(SystemExit) as end:
            run_script(main, NoFlags, "", resume=resume)
        assert (end.value.code, capsys.readouterr().err) == (130, line)


IMPORTING = """
import dataclasses, time
from s3net_common.command_line import answer_flags
@dataclasses.dataclass
class Args:
    pass
answer_flags(Args, '')
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "import absent.part",
            "error: No module named 'absent': install the packages with pip install -r requirements.txt\n",
        ),
        ("from os import absent", "error: cannot import name 'absent' from 'os'"),
        ("raise ValueError('a bug')", "Traceback"),
    ],
)
def test_a_package_that_cannot_be_imported_is_one_line_and_a_bug_keeps_its_traceback(line, message):
    done = run_python("-c", IMPORTING + line, env={"PYTHONPATH": str(ROOT)})
    assert done.stderr.startswith(message)
    assert (done.returncode, done.stderr.count("\n") == 1) == ((1, False) if message == "Traceback" else (2, True))


def test_ctrl_c_while_packages_are_imported(tmp_path):
    program = IMPORTING + "print('importing', flush=True)\ntime.sleep(60)"
    with started_python(
        "-c", program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)}
    ) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == "stopped\n"
    assert process.returncode == 130


# ---- torchrun, Slurm and MPI --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_a_rank_without_torchrun_prints_its_errors(monkeypatch, capsys, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def main(args):
        raise InputError("no images")

    assert exit_code(monkeypatch, main) == 2
    assert capsys.readouterr().err == "error: no images\n"


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"RANK": "1"},
            "RANK is set without WORLD_SIZE and MASTER_ADDR and MASTER_PORT: .* torchrun",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "RANK is set without MASTER_ADDR: .* torchrun"),
        (
            {"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK is 'one' instead of a number: .* torchrun",
        ),
        ({"SLURM_NTASKS": "2"}, r"this is one of 2 tasks \(SLURM_NTASKS\) .* torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"this is one of 4 tasks \(OMPI_COMM_WORLD_SIZE\) .* torchrun"),
    ],
)
def test_ranks_that_torchrun_has_not_started(monkeypatch, variables, line):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=line):
        join_ranks("cpu")


def test_one_task_of_a_slurm_step_is_a_single_process(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert join_ranks("cpu").world_size == 1


@pytest.mark.parametrize("flag", ["--local-rank=0", "--local_rank=0"])
def test_the_former_launcher_is_named(monkeypatch, capsys, flag):
    monkeypatch.setattr(sys, "argv", ["script.py", flag])
    with pytest.raises(SystemExit) as end:
        run_script(lambda args: 0, NoFlags, "")
    assert end.value.code == 2
    assert "torch.distributed.launch passes --local-rank: start the script with torchrun" in capsys.readouterr().err


def test_a_backend_of_matplotlib_that_is_missing_does_not_matter():
    body = "import matplotlib.pyplot as plt; print(plt.get_backend())"
    for backend in ("module://matplotlib_inline_that_is_absent", "no-backend"):
        done = run_main(body, env={"MPLBACKEND": backend})
        assert (done.stdout.lower(), done.stderr) == ("agg\n", "")
