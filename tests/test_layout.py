"""Imports run downwards only, what must work without torch imports no torch, and names are words that say something."""

import ast
import subprocess
from pathlib import Path

import pytest
from processes import run_python

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ("expressibility", "generalizability", "interpretability")
FOLDERS = (*EXPERIMENTS, "s3net_common", "s3net_networks", "reproduction", "tests")
# A module may import modules of its own layer and of those below it (further left), never of those above.
LAYERS = ("s3net_common", "models", "s3net_networks", "experiments")


def source_files() -> dict[str, Path]:
    """Return the repository's modules by the name that they are imported by."""
    files = {"models": ROOT / "models.py"}
    for folder in ("s3net_common", "s3net_networks"):
        files |= {module_name(path, ROOT): path for path in (ROOT / folder).rglob("*.py")}
    for experiment in EXPERIMENTS:
        paths = (ROOT / experiment).rglob("*.py")
        files |= {f"{experiment}:{module_name(path, ROOT / experiment)}": path for path in paths}
    return files


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def layer(module: str) -> int:
    return LAYERS.index("experiments" if ":" in module else module.split(".")[0])


def imports_of(module: str, files: dict[str, Path]) -> set[str]:
    """Return the repository's modules that a module imports, also inside functions."""
    experiment = module.split(":")[0]
    names = set()
    for node in ast.walk(ast.parse(files[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {name for name in names if name in files}
    return modules | {f"{experiment}:{name}" for name in names if f"{experiment}:{name}" in files}


def test_imports_run_downwards():
    files = source_files()
    assert len(files) > 60
    upwards = [(module, name) for module in files for name in imports_of(module, files) if layer(name) > layer(module)]
    assert upwards == []


def test_modules_that_windows_lacks_are_imported_where_they_may_be_missing():
    posix, imported = {"fcntl", "grp", "pwd", "resource", "termios"}, []
    patterns = ("*.py", "reproduction/*.py", "tests/**/*.py")
    for path in [*source_files().values(), *(path for pattern in patterns for path in ROOT.glob(pattern))]:
        for node in ast.parse(path.read_text()).body:  # not within functions and try
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module}
                imported += [f"{path.relative_to(ROOT)}: {name}" for name in names & posix]
    assert imported == []


def test_requirements_of_the_experiments_name_no_folder():
    """pip reads `-e .` in them as the working directory, wherever they lie: the commands in the READMEs say it."""
    files = [*ROOT.glob("*/requirements.txt")]
    assert len(files) == 3
    assert "-e ." in (ROOT / "requirements.txt").read_text().splitlines()  # which is in the root itself
    assert [line for file in files for line in file.read_text().splitlines() if line.startswith("-e")] == []


def test_no_experiment_imports_from_another():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for module, path in source_files().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in folders:
                assert node.module.split(".")[0] not in EXPERIMENTS, (module, node.module)


def test_no_modules_import_each_other_in_a_circle():
    files = source_files()
    graph = {module: imports_of(module, files) - {module} for module in files}
    # The registry loads baselines by name when they are built, and a package's __init__ imports its modules.
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in finished:
            for name in graph[module]:
                visit(name, (*path, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", ["errors", "command_line", "output_files"])
def test_shared_modules_import_no_torch(module):
    program = f"import sys, s3net_common.{module}; print('torch' in sys.modules)"
    assert run_python("-c", program, env={"PYTHONPATH": str(ROOT)}, check=True).stdout == "False\n"


NO_NAMES = {"ahead", "alone", "found", "it", "its", "mine", "mix", "of", "one", "ours", "own", "said", "theirs"}
NO_NAMES |= {"there", "they", "thing", "to", "what", "which", "who"}


def test_names_are_no_pronouns_or_particles():
    paths = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]
    assert len(paths) > 120
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add((node.id, path.name))
            elif isinstance(node, ast.arg):
                names.add((node.arg, path.name))
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add((node.name, path.name))
    assert sorted(name for name in names if name[0].strip("_").lower() in NO_NAMES) == []


def test_models_is_short_and_begins_with_the_topology():
    lines = (ROOT / "models.py").read_text().splitlines()
    assert len(lines) <= 330
    begin = next(i for i, line in enumerate(lines) if line.startswith("# ---- The topology"))
    end = next(i for i, line in enumerate(lines) if line.startswith("# ---- The paper's networks"))
    assert end - begin <= 170 and begin < 50


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository, not only its files")
def test_data_and_runs_are_not_in_the_repository():
    """Not even as links: a checkout would replace a folder of that name, with everything in it."""
    done = subprocess.run(["git", "ls-files", "data", "runs"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ""
