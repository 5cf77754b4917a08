"""Regression data sets from tables of numbers: Boston housing, diabetes, or a CSV file."""

import csv
import io
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split

from s3net_common.errors import InputError
from s3net_common.text_files import read_text

BOSTON_CSV = Path(__file__).parent / "data" / "boston_housing.csv"
BOSTON_TARGET = "MEDV"  # median value of the owner-occupied homes of a tract, in 1000 US dollars
TEST_SHARE = 0.1
PAPER_SEED = 13
MIN_ROWS = 20  # so that a tenth of the rows is at least two test rows
SEPARATORS = ",;\t"
NUMBER = re.compile(r"[+-]?([0-9]+[.,]?[0-9]*|[.,][0-9]+)([eE][+-]?[0-9]+)?")
NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
LARGEST = 1e30  # the variance of squared errors must be finite


class Table(NamedTuple):
    """A regression data set of n rows and d features."""

    name: str
    features: np.ndarray
    """(n, d) float64, not scaled."""
    target: np.ndarray
    """(n,) float64."""


class Split(NamedTuple):
    """The training and test rows of a table."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def standardised(self) -> "Split":
        """Return the split with each feature shifted and scaled to mean 0 and standard deviation 1.

        Mean and standard deviation are those of the training rows, for the test rows, too. A feature that is constant
        in the training rows becomes 0.
        """
        mean, std = self.x_train.mean(axis=0), self.x_train.std(axis=0)
        varies = std > 1e-12 * np.abs(self.x_train).max(axis=0)
        scale = np.where(varies, std, 1.0)
        return self._replace(
            x_train=(self.x_train - mean) * varies / scale, x_test=(self.x_test - mean) * varies / scale
        )


def split(table: Table, seed: int) -> Split:
    """Split off a random tenth for testing: `train_test_split(test_size=0.1, random_state=seed)` of scikit-learn."""
    x_train, x_test, y_train, y_test = train_test_split(
        table.features, table.target, test_size=TEST_SHARE, random_state=seed
    )
    return Split(x_train, y_train, x_test, y_test)


def boston() -> Table:
    """Load Boston housing, the data of Figure 3: 506 census tracts with 13 features."""
    return load_csv(BOSTON_CSV, BOSTON_TARGET)._replace(name="boston")


def diabetes() -> Table:
    """Load scikit-learn's diabetes data: 442 patients with 10 features in their original units."""
    data = load_diabetes(scaled=False)
    return Table("diabetes", data.data.astype(np.float64), data.target.astype(np.float64))


def load_csv(path: Path, target: str) -> Table:
    """Load a table as spreadsheets and pandas write it: a line of column names, then lines of numbers.

    The columns are separated by commas, semicolons or tabs. If they are not separated by commas, numbers may have
    decimal commas. Empty lines, and empty columns without a name, are ignored. Columns without a name at the left, with
    row numbers or row names, are left out, and a line on stderr says so; R leaves out even their place in the header.

    Args:
        path: the file, in UTF-8, or in UTF-16 with a byte-order mark.
        target: name of the column to predict. All other columns are features.

    Raises:
        InputError: the file cannot be read, lacks the target or has no other column, has fewer than 20 rows, rows of
            different lengths, a column with values but no name, or a value that is not a number of at most 1e30 (the
            message names line and column), or the target is constant.
    """
    try:
        lines, separator = _split_lines(read_text(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is not a CSV file in UTF-8"
        raise InputError(f"cannot read {path}: {reason}") from None
    if not lines:
        raise InputError(f"{path} is empty: it needs a line of column names and at least {MIN_ROWS} rows")
    (_, names), rows = lines[0], lines[1:]
    if all(len(cells) == len(names) + 1 for _, cells in rows) and any(cells[-1] for _, cells in rows):
        names = ["", *names]  # R writes row names without a column name
    _check_target(path, [name for name in names if name], target)
    rows = [(line, _fit(path, line, cells, names)) for line, cells in rows]
    used = _used_columns(path, names, rows, target)
    names, rows = [names[i] for i in used], [(line, [cells[i] for i in used]) for line, cells in rows]
    if len(names) < 2:
        raise InputError(f"{path} has no column except {target!r}: at least one feature is needed")
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path} has two columns named {duplicate!r}: rename one of them")
    if len(rows) < MIN_ROWS:
        raise InputError(f"{path} has {len(rows)} rows: at least {MIN_ROWS} are needed")
    _check_decimal_marks(path, names, rows, separator)
    values = np.array([[_parse(path, line, *cell) for cell in zip(names, cells, strict=True)] for line, cells in rows])
    target_column = names.index(target)
    if np.ptp(values[:, target_column]) == 0:
        raise InputError(f"{path}: column {target!r} has the same value in every row: choose another --target")
    return Table(Path(path).stem, np.delete(values, target_column, axis=1), values[:, target_column])


Line = tuple[int, list[str]]  # number of a line in the file, and its cells


def _split_lines(text: str) -> tuple[list[Line], str]:
    """Return the lines that are not empty, and the separator: the one that gives the first line most cells."""
    separators, tables = SEPARATORS, []
    if match := re.match(r"sep=([,;\t|])(?=\n)", text):  # written for Excel
        separators, text = match[1], text[match.end() :]
    for separator in separators:
        reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
        cells = ([cell.strip() for cell in line] for line in reader)
        tables.append(([(reader.line_num, line) for line in cells if any(line)], separator))
    return max(tables, key=lambda table: len(table[0][0][1]) if table[0] else 0)


def _fit(path: Path, line: int, cells: list[str], names: list[str]) -> list[str]:
    """Return as many cells as there are column names. Empty cells may be missing or surplus at the right.

    Raises:
        InputError: other cells are.
    """
    needed = max(i for i, name in enumerate(names, 1) if name)
    if len(cells) < needed or any(cells[len(names) :]):
        raise InputError(f"{path}, line {line} has {len(cells)} values, but the header has {needed}: correct the line")
    return (cells + [""] * len(names))[: len(names)]


def _used_columns(path: Path, names: list[str], rows: list[Line], target: str) -> list[int]:
    """Return the columns with data: all but empty ones, and row numbers or row names without a column name.

    Raises:
        InputError: another column has values but no name.
    """
    used, at_the_left = [], True
    for i, name in enumerate(names):
        column = [cells[i] for _, cells in rows]
        if name == target or (name and not re.fullmatch(r"Unnamed: \d+(\.\d+)?", name)):  # pandas' names
            used.append(i)
            at_the_left = False
        elif any(column):
            if not (at_the_left and _are_row_labels(column)):
                raise InputError(f"{path}: column {i + 1} has no name: name it in the first line, or remove it")
            print(f"{path}: column {i + 1}, row numbers or row names without a name, is left out", file=sys.stderr)
    return used


def _are_row_labels(column: list[str]) -> bool:
    """Return whether the cells are whole numbers or texts, each of them once."""
    return len(set(column)) == len(column) and not any(NUMBER.fullmatch(c) and not _is_whole(c) for c in column)


def _is_whole(text: str) -> bool:
    return float(text.replace(",", ".")).is_integer()


def _check_target(path: Path, names: list[str], target: str) -> None:
    if target not in names:
        advice = "columns are separated by commas, semicolons or tabs" if len(names) < 2 else "choose another --target"
        if names and all(NUMBER.fullmatch(name) for name in names):
            advice = "the first line must contain the column names"
        raise InputError(f"{path} has no column {target!r}, only {', '.join(names)}: {advice}")


def _check_decimal_marks(path: Path, names: list[str], rows: list[Line], separator: str) -> None:
    """Check that the numbers have one decimal mark: another one could separate thousands.

    Raises:
        InputError: both marks occur, or commas although they separate the columns.
    """
    examples = {}
    for line, cells in rows:
        for name, text in zip(names, cells, strict=True):
            for mark in ",.":
                if mark in text and NUMBER.fullmatch(text.replace(",", "").replace(".", "")):
                    examples.setdefault(mark, f"{text!r} (line {line}, column {name!r})")
    if len(examples) == 2 or ("," in examples and separator == ","):
        raise InputError(
            f"{path} has {' and '.join(examples.values())}, but a decimal mark and a separator of thousands cannot be "
            "told apart: write all numbers with decimal points and without separators of thousands"
        )


def _parse(path: Path, line: int, name: str, text: str) -> float:
    try:
        if not NUMBER.fullmatch(text) and not NOT_FINITE.fullmatch(text):
            raise ValueError
        number = float(text.replace(",", "."))
    except ValueError:
        reason = f"{text!r} is not a number; enter a number" if text else "a value is missing; enter a number"
    else:
        if abs(number) <= LARGEST:
            return number
        reason = f"{text} is too large; use another unit" if math.isfinite(number) else f"{text} is not a finite number"
    raise InputError(f"{path}, line {line}, column {name!r}: {reason}, or remove the row or column")
