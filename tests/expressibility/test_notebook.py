import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from processes import run_python

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "expressibility" / "topology_ntk_comparison.ipynb"


def printed_text(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.text for output in outputs if output.output_type == "stream")


def number_of_pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def check_outputs(notebook):
    text = printed_text(notebook)
    assert float(re.search(r"disagreement of the two ways: (\S+)", text)[1]) < 1e-6
    assert "K = 4, residual: 0.78061 here, 0.78054 there" in text
    assert "K = 5, proposed: 0.74947 here, 0.74940 there" in text
    assert re.search(r"is ahead on \d+ of 30 splits", text)
    assert number_of_pictures(notebook) == 5


def test_the_notebook_runs_from_top_to_bottom():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    check_outputs(NotebookClient(notebook, timeout=180, kernel_name="python3", resources=resources).execute())


def test_the_committed_notebook_is_valid_and_contains_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    assert "Traceback" not in printed_text(notebook)


def test_the_committed_notebook_contains_no_local_path_and_no_address_of_a_clone():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells) + printed_text(notebook)
    assert not re.search(r"https://github\.com/(?!google/)", text)
    assert not re.search(r"/(home|root|Users|tmp)/", text)


def run_set_up_cell(folder):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell.source for cell in notebook.cells if "sys.path" in cell.source)
    # -I: only the cell puts the repository on sys.path.
    return run_python("-I", "-c", f"{cell}\nimport ntk_comparison\nprint(ntk_comparison.__file__)", cwd=folder)


def test_the_set_up_cell_finds_the_code_from_the_folder_and_from_the_root():
    for folder in (NOTEBOOK.parent, REPOSITORY):
        process = run_set_up_cell(folder)
        assert process.returncode == 0, process.stderr
        assert process.stdout.strip() == str(NOTEBOOK.parent / "ntk_comparison.py")


def test_the_set_up_cell_says_what_to_do_if_the_code_is_missing(tmp_path):
    process = run_set_up_cell(tmp_path)
    assert process.returncode != 0
    assert "upload or clone the repository and start this notebook in its expressibility folder" in process.stderr
