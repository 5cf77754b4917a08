"""Renew the copy of the code that topology_ntk_comparison.ipynb carries, so that it runs without the repository.

    python expressibility/build_notebook.py          # after each change of a module that the notebook uses
    python expressibility/build_notebook.py --run    # also run the notebook in an empty folder, and keep its outputs

The copy is the one string in the notebook's cell "files": a JSON object {path in the repository: text}, compressed by
zlib, in base 85. The cell after it unpacks the string.
"""

import ast
import base64
import json
import re
import tempfile
import textwrap
import zlib
from dataclasses import dataclass
from pathlib import Path

from s3net_common.command_line import run_script
from s3net_common.output_files import ROOT, write_atomically

FOLDER = Path(__file__).resolve().parent
NOTEBOOK = FOLDER / "topology_ntk_comparison.ipynb"
DATA_FILES = (FOLDER / "data" / "boston_housing.csv",)
FILES_CELL = "files"
FILES_SOURCE = '# @title The code that the next cell needs, compressed: run this cell, too\nFILES = """\n{}\n"""'
Notebook = dict  # as in the file: nbformat 4


@dataclass
class Args:
    """Flags of the script."""

    run: bool = False
    """Run the notebook and keep its outputs (about a minute). Needs nbclient, of the root's requirements.txt."""


def imported_files(source: str) -> set[Path]:
    """Return the modules of the repository that a Python source imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {folder / f"{module.replace('.', '/')}.py" for module in modules for folder in (FOLDER, ROOT)}
    return {path for path in paths if path.is_file()}


def needed_files(notebook: Notebook) -> dict[str, str]:
    """Return the texts of the modules that the notebook imports, directly and through others, and of its data.

    The keys are paths relative to the repository, with slashes.
    """
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    waiting = {path for source in sources for path in imported_files(source)}
    files = {path: path.read_text(encoding="utf-8") for path in DATA_FILES}
    while waiting:
        path = waiting.pop()
        files[path] = path.read_text(encoding="utf-8")
        waiting |= imported_files(files[path]) - files.keys()
        if (package := path.parent / "__init__.py").is_file():
            files[package] = package.read_text(encoding="utf-8")
    return {path.relative_to(ROOT).as_posix(): files[path] for path in sorted(files)}


def packed(files: dict[str, str]) -> str:
    """Return the source of the notebook's cell "files"."""
    text = base64.b85encode(zlib.compress(json.dumps(files).encode(), 9)).decode()
    return FILES_SOURCE.format("\n".join(textwrap.wrap(text, 119, break_on_hyphens=False)))


def unpacked(notebook: Notebook) -> dict[str, str]:
    """Return the files that the notebook carries. The inverse of `packed`."""
    text = re.search(r'"""(.*)"""', "".join(_files_cell(notebook)["source"]), re.DOTALL)[1]
    return json.loads(zlib.decompress(base64.b85decode("".join(text.split()))))


def _files_cell(notebook: Notebook) -> dict:
    return next(cell for cell in notebook["cells"] if cell["id"] == FILES_CELL)


def run(notebook: Notebook) -> Notebook:
    """Return the notebook with the outputs of a run in an empty folder, where only the carried files are present."""
    import nbformat
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            nbformat.reads(json.dumps(notebook), as_version=4),
            timeout=1200,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
        )
        return json.loads(nbformat.writes(client.execute()))


def main(args: Args) -> None:
    """Renew the notebook's files, and with --run its outputs."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    files = needed_files(notebook)
    _files_cell(notebook)["source"] = packed(files).splitlines(keepends=True)
    if args.run:
        notebook = run(notebook)
        notebook["metadata"]["language_info"] = {"name": "python"}  # not the version that ran it
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    write_atomically(NOTEBOOK, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))
    print(f"{NOTEBOOK.name} carries {len(files)} files: {', '.join(files)}")


if __name__ == "__main__":
    run_script(main, Args, __doc__)
