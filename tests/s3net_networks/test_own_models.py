"""A user's own module `models` does not replace this repository's models.py unnoticed."""

import os
import subprocess
from pathlib import Path

import pytest
from processes import run_forked, run_python

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["models.py", "models/__init__.py", "models/thing.txt"])
def users_folder(request, tmp_path) -> Path:
    """A folder with a user's own module, package or namespace package `models`."""
    file = tmp_path / "user" / request.param
    file.parent.mkdir(parents=True)
    file.write_text("NAME = 'the user'\n")
    return tmp_path / "user"


def run(*command, first_on_path: Path) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": os.pathsep.join([str(first_on_path), str(ROOT)])}
    start = run_python if command[0] == "-c" else run_forked
    return start(*command, env=environment, cwd=first_on_path.parent)


@pytest.mark.parametrize(
    "command",
    [
        ["generalizability/train_s3net.py", "--list-models"],
        ["generalizability/compare_results.py", "--help"],
        ["generalizability/compare_results.py", "absent"],
        ["interpretability/benchmark.py", "--networks", "absent"],
    ],
)
def test_a_script_names_the_file_that_shadows_models(users_folder, command):
    done = run(ROOT / command[0], *command[1:], first_on_path=users_folder)
    if "--help" in command:  # answered without models
        assert done.returncode == 0, done.stderr
    elif not (users_folder / "models" / "thing.txt").exists():  # a folder without __init__.py comes after any module
        assert done.returncode == 2
        assert (
            done.stderr.startswith(f"error: {users_folder / 'models'}") and "shadows this repository's" in done.stderr
        )
        assert done.stderr.count("\n") == 1
    else:
        assert "shadows" not in done.stderr and done.returncode == (2 if "absent" in command else 0), done.stderr


def test_an_import_names_the_file_that_shadows_models(users_folder):
    done = run("-c", "import s3net_networks", first_on_path=users_folder)
    shadowed = not (users_folder / "models" / "thing.txt").exists()
    assert ("ImportError" in done.stderr and "shadows this repository's" in done.stderr) == shadowed


def test_torch_hub_works_beside_a_users_models(users_folder):
    program = (
        "import sys, torch, models\n"
        f"network = torch.hub.load({str(ROOT)!r}, 's3net_cifar', source='local', pretrained=True)\n"
        "assert network.classifier.out_features == 100\n"
        "print(sys.modules['models'] is models, getattr(models, 'NAME', 'none'))\n"
    )
    done = run("-c", program, first_on_path=users_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(" ", 1)[0] == "True"
