import base64
import json
import re
import subprocess
import zlib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import build_notebook

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "expressibility" / "topology_ntk_comparison.ipynb"
RENEW = "the notebook carries an old copy of the code: run python expressibility/build_notebook.py"


def read_notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def printed_text(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.text for output in outputs if output.output_type == "stream")


def number_of_pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def check_outputs(notebook, splits):
    text = printed_text(notebook)
    assert float(re.search(r"disagreement of the two ways: (\S+)", text)[1]) < 1e-6
    assert "K = 4, residual: 0.78061 here, 0.78054 there" in text
    assert "K = 5, proposed: 0.74947 here, 0.74940 there" in text
    assert "The chain's error is smaller than both by" in text
    assert re.search(rf"is ahead on \d+ of {splits} splits", text)
    assert number_of_pictures(notebook) == 5


def test_the_notebook_alone_runs_from_top_to_bottom_in_an_empty_folder(tmp_path):
    notebook = read_notebook()
    fewer = {"seeds=30": "seeds=2", "range(100, 130)": "range(100, 102)"}  # repetitions, in less time
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
            for text in [text for text in fewer if text in cell.source]:
                cell.source = cell.source.replace(text, fewer.pop(text))
    assert not fewer
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources)
    check_outputs(client.execute(), splits=2)
    assert not list(tmp_path.iterdir())


def test_the_committed_notebook_is_valid_and_contains_its_outputs():
    notebook = read_notebook()
    nbformat.validate(notebook)
    check_outputs(notebook, splits=30)
    assert "Traceback" not in printed_text(notebook)


def test_the_committed_notebook_contains_no_local_path_and_no_address_of_a_clone():
    notebook = read_notebook()
    text = "\n".join(cell.source for cell in notebook.cells if cell.id != "files") + printed_text(notebook)
    assert not re.search(r"https://github\.com/(?!google/)", text)
    assert not re.search(r"/(home|root|Users|tmp)/", text)


def carried_files():
    source = next(cell.source for cell in read_notebook().cells if cell.id == "files")
    text = re.search(r'FILES = """(.*)"""', source, re.DOTALL)[1]
    return json.loads(zlib.decompress(base64.b85decode("".join(text.split()))))


def test_the_notebook_carries_the_modules_and_the_data_as_they_are_in_the_repository():
    files = carried_files()
    assert {"expressibility/kernels.py", "expressibility/data/boston_housing.csv", "s3net_common/errors.py"} <= set(
        files
    )
    for name, text in files.items():
        assert text == (REPOSITORY / name).read_text(encoding="utf-8"), f"{name}: {RENEW}"
    assert files.keys() == build_notebook.needed_files(json.loads(NOTEBOOK.read_text(encoding="utf-8"))).keys(), RENEW


def test_the_cell_with_the_files_is_folded_in_jupyter_and_in_colab():
    cell = next(cell for cell in read_notebook().cells if cell.id == "files")
    assert cell.metadata["jupyter"]["source_hidden"] and cell.metadata["cellView"] == "form"
    assert cell.source.startswith("# @title ")


def test_a_changed_module_is_carried_after_the_script_has_run(tmp_path, monkeypatch):
    copy = tmp_path / NOTEBOOK.name
    copy.write_bytes(NOTEBOOK.read_bytes())
    monkeypatch.setattr(build_notebook, "NOTEBOOK", copy)
    monkeypatch.setattr(build_notebook, "needed_files", lambda notebook: {"expressibility/kernels.py": "é = 1\n"})
    build_notebook.main(build_notebook.Args())
    changed, before = (json.loads(path.read_text(encoding="utf-8")) for path in (copy, NOTEBOOK))
    assert build_notebook.unpacked(changed) == {"expressibility/kernels.py": "é = 1\n"}
    for cell, cell_before in zip(changed["cells"], before["cells"], strict=True):
        assert cell["id"] == "files" or cell == cell_before


def test_imports_inside_functions_are_found():
    source = "def f():\n    from s3net_common import errors\n    import numpy, tabular\n"
    assert {path.name for path in build_notebook.imported_files(source)} == {"errors.py", "tabular.py"}


@pytest.fixture
def set_up(monkeypatch):
    """Run the notebook's set-up cell in this process, from a working directory. Returns its variables."""

    def run(folder):
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))  # restores sys.path at the end
        cells = {cell.id: cell.source for cell in read_notebook().cells}
        variables = {}
        exec(cells["files"], variables)
        exec(cells["cell-02"], variables)
        return variables

    return run


def test_the_set_up_cell_uses_the_code_beside_the_notebook(set_up):
    for folder in (NOTEBOOK.parent, REPOSITORY):
        assert set_up(folder)["root"] == REPOSITORY


def test_the_set_up_cell_unpacks_the_code_elsewhere(set_up, tmp_path):
    (tmp_path / "kernels.py").write_text("")  # of somebody else
    root = set_up(tmp_path)["root"]
    assert root != tmp_path and not root.is_relative_to(REPOSITORY)
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert names == set(carried_files())


def test_without_network_the_set_up_cell_says_what_is_missing_in_one_line(set_up, tmp_path, monkeypatch):
    commands = []

    def fail(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "Retrying\nERROR: No matching distribution found for tyro\n")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None if module == "tyro" else object())
    with pytest.raises(Exception, match="cannot install tyro") as caught:
        set_up(tmp_path)
    (line,) = caught.value._render_traceback_()  # all that Jupyter shows
    assert line == (
        "error: cannot install tyro (ERROR: No matching distribution found for tyro): connect to the internet, and run "
        "this cell again"
    )
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "install"] and command[-1] == "tyro"
    assert "--no-color" in command  # else the last line is the code that resets the colour


def test_neural_tangents_is_installed_without_its_dependencies(set_up, tmp_path, monkeypatch):
    commands = []

    def succeed(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", succeed)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None if module == "neural_tangents" else object())
    set_up(tmp_path)
    (command,) = commands
    assert command[-2:] == ["--no-deps", "neural-tangents"]
