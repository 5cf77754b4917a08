import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "expressibility" / "topology_ntk_comparison.ipynb"
ADDRESS = 'REPOSITORY = "https://github.com/'


def printed(notebook):
    streams = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    ]
    return "\n".join(stream.text for stream in streams)


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def check_outputs(notebook):
    text = printed(notebook)
    assert float(re.search(r"disagreement of the two ways: (\S+)", text)[1]) < 1e-6
    assert "K = 4, residual: 0.78061 here, 0.78054 there" in text
    assert "K = 5, proposed: 0.74947 here, 0.74940 there" in text
    assert re.search(r"is ahead on \d+ of 30 splits", text)
    assert pictures(notebook) == 5


def test_the_notebook_runs_from_top_to_bottom():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    check_outputs(NotebookClient(notebook, timeout=180, kernel_name="python3", resources=where).execute())


def test_the_committed_notebook_has_its_outputs_and_no_place_of_its_own():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check_outputs(notebook)
    assert printed(notebook).count("Traceback") == 0
    sources = "\n".join(cell.source for cell in notebook.cells)
    assert len(re.findall(r"https://github\.com/(?!google/)", sources)) == 1
    assert not re.search(r"/(home|root|Users|tmp)/", sources + printed(notebook))


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="needs a git checkout to clone from")
def test_the_set_up_cell_clones_the_repository_where_it_is_not_there(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell.source for cell in notebook.cells if ADDRESS in cell.source)
    cell = re.sub(r'REPOSITORY = ".*?"', f"REPOSITORY = {REPOSITORY.as_uri()!r}", cell)
    command = [sys.executable, "-c", f"{cell}\nprint(experiment)\nimport kernels\nprint(kernels.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    clone = f"{REPOSITORY.name}/expressibility"
    assert done.stdout.splitlines() == [clone, str(tmp_path / clone / "kernels.py")]
