"""Run scripts in forks of a process that has imported the slow packages: these imports take longer than most tests.

The fork ends as a new process would: the script is its __main__, with its own arguments, variables, folder and output.
Reads a JSON object from each line of stdin; prints the fork's process id, then its exit code. `processes.ForkedScript`
is the client.
"""

import gc
import importlib
import json
import os
import runpy
import sys

SLOW_PACKAGES = (
    *("matplotlib.pyplot", "networkx", "scipy.stats", "sklearn.datasets", "sklearn.model_selection"),
    *("torch.utils.data", "torchvision.transforms.v2", "tyro"),
)


def become(arguments: list[str], cwd: str, environment: dict[str, str], stdout: str, stderr: str) -> None:
    """Make this process look like a new one that runs a script: see subprocess.run for the arguments."""
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, stdout, os.O_WRONLY | os.O_CREAT),
        (2, stderr, os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(path, flags), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    folders = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:1] = [os.path.dirname(os.path.abspath(arguments[0])), *folders]  # noqa: PTH100, PTH120


for package in SLOW_PACKAGES:
    importlib.import_module(package)
gc.freeze()  # the collector need not copy these pages in the forks
for line in sys.stdin:
    child = os.fork()
    if not child:
        become(**json.loads(line))
        runpy.run_path(sys.argv[0], run_name="__main__")
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
