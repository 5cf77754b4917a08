"""The order of words on a command line, and errors of the system."""

import ast
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro
from processes import run_python

from s3net_common.command_line import flag, parse_flags, run_script

ROOT = Path(__file__).parents[2]


@dataclass
class Args:
    """Flags of every kind."""

    images: tyro.conf.Positional[flag(tuple[Path, ...], "IMAGE ...", "none")] = ()
    """Images."""
    networks: flag(tuple[str, ...], "NAME ...", "none") = ()
    """Names."""
    target: flag(int, "INT", "none") = None
    """Number."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Two numbers."""
    fast: bool = False
    """Switch."""


@pytest.mark.parametrize(
    ("words", "images", "networks", "target"),
    [
        ("a.jpg b.jpg --networks x y", ["a.jpg", "b.jpg"], ("x", "y"), None),
        ("--networks x y a.jpg b.jpg", ["a.jpg", "b.jpg"], ("x", "y"), None),
        ("a.jpg --networks x b.jpg --target 3 c.jpg", ["a.jpg", "b.jpg", "c.jpg"], ("x",), 3),
        ("--fast a.jpg --target=3 b.jpg", ["a.jpg", "b.jpg"], (), 3),
        ("--no-fast a.jpg --interval 0 2 b.jpg", ["a.jpg", "b.jpg"], (), None),
        ("--networks x -- y", ["y"], ("x",), None),
        ("--networks a.jpg", [], ("a.jpg",), None),
    ],
)
def test_images_stand_before_between_or_after_flags(monkeypatch, words, images, networks, target):
    monkeypatch.setattr("sys.argv", ["script.py", *words.split()])
    args = parse_flags(Args, "", lambda word: word.endswith(".jpg"))
    assert ([str(path) for path in args.images], args.networks, args.target) == (images, networks, target)


def test_a_path_that_the_system_refuses_is_an_error_of_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script.py", "x" * 300 + "\x1b"])
    with pytest.raises(SystemExit) as ended:
        run_script(lambda args: args.images[0].is_file() and 0, Args, "")
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err == f"error: {'x' * 300}\\x1b cannot be used (File name too long): give another path\n"
    )


FOLDERS = ("expressibility", "generalizability", "interpretability", "reproduction", "s3net_common", "s3net_networks")
SCRIPTS = sorted(  # in the project's folders only: the others may hold an environment, and results hold records
    path
    for path in [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    if "results" not in path.relative_to(ROOT).parts
    and re.search(r"^if __name__ == .__main__.:", path.read_text(encoding="utf-8"), re.MULTILINE)
)
HELP_OF_ALL = """
import contextlib, io, runpy, sys
for script in sys.argv[1:]:
    sys.argv, sys.path[0] = [script, "--help"], script.rpartition("/")[0]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    print(script, "--" in text.getvalue(), sorted({"torch", "jax", "matplotlib", "sklearn"} & sys.modules.keys()))
"""


def test_help_imports_no_slow_package():
    assert len(SCRIPTS) >= 19
    done = run_python("-c", HELP_OF_ALL, *SCRIPTS, env={"PYTHONPATH": str(ROOT)}, check=True)
    assert done.stdout.splitlines() == [f"{script} True []" for script in SCRIPTS]


def test_every_script_answers_flags_before_its_imports_and_is_run_by_run_script():
    """So that --help takes no time, and every error is one line. Without slow imports, `run_script` does both."""
    for script in SCRIPTS:
        blocks = [node for node in ast.parse(script.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
        blocks = [block for block in blocks if "__name__" in ast.unparse(block.test)]
        calls = [ast.unparse(block.body[0]).partition("(")[0] for block in blocks]
        assert calls in (["answer_flags", "run_script"], ["run_script"]), script
        assert all(len(block.body) == 1 for block in blocks), script


def test_help_fits_any_terminal():
    script = next(path for path in SCRIPTS if path.name == "ntk_comparison.py")
    for columns in ("1", "0", "many"):
        done = run_python(script, "--help", env={"PYTHONPATH": str(ROOT), "COLUMNS": columns}, check=True)
        assert "--finite-width" in done.stdout


@pytest.mark.parametrize("name", ["generalizability/compare_results.py", "expressibility/one_neuron_approximation.py"])
def test_a_script_does_not_use_the_modules_of_another_copy_of_the_repository(tmp_path, name):
    """As in a second clone or worktree, with the environment that the first clone is installed in."""
    copy = tmp_path / "second clone"
    script = copy / name
    script.parent.mkdir(parents=True)
    shutil.copytree(ROOT / "s3net_common", copy / "s3net_common")
    shutil.copyfile(ROOT / name, script)
    done = run_python(script, "--help", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stdout == ""
    assert f"{script} would use the modules of another copy of this repository, {ROOT}: " in done.stderr
    assert f"set PYTHONPATH='{copy}'" in done.stderr and done.stderr.count("\n") == 1
    done = run_python(script, "--help", env={"PYTHONPATH": str(copy)}, check=True)
    assert "--out" in done.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no safe path")
def test_a_safe_path_is_named():
    script = next(path for path in SCRIPTS if path.name == "one_neuron_approximation.py")
    done = run_python(script, env={"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"})
    assert done.returncode == 2 and done.stderr.startswith("error: No module named ")
    assert "unset PYTHONSAFEPATH and leave out -P" in done.stderr and done.stderr.count("\n") == 1
