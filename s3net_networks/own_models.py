"""The module models.py of this repository, checked not to be another module of that name.

`models` is a common name: a user's own models.py or models/ may come first on sys.path or PYTHONPATH.
"""

import sys
from pathlib import Path

import models
from s3net_common.output_files import ROOT

__all__ = ["models"]


def check_not_shadowed(file: str | None, locations: list[str]) -> None:
    """Check that the imported module `models` is this repository's.

    Args:
        file: `models.__file__`; None for a folder without `__init__.py`.
        locations: `models.__path__`, or an empty list.

    Raises:
        ImportError: it is another module; the message names its file.
        SystemExit: the same in a script, with exit code 2 after the message in one line.
    """
    if file is not None and Path(file).resolve() == ROOT / "models.py":
        return
    message = (
        f"{file or ', '.join(locations)} shadows this repository's {ROOT / 'models.py'}: rename it, or remove its "
        "folder from PYTHONPATH"
    )
    script = Path(getattr(sys.modules["__main__"], "__file__", "") or "-").resolve()
    if ROOT in list(script.parents)[:2]:  # one of this repository's scripts
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(message)


check_not_shadowed(getattr(models, "__file__", None), list(getattr(models, "__path__", [])))
