"""Regression data sets of numbers in a table: Boston housing, diabetes, or a CSV file."""

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split

from s3net_common.errors import InputError

BOSTON_CSV = Path(__file__).parent / "data" / "boston_housing.csv"
BOSTON_TARGET = "MEDV"  # median value of the owner-occupied homes of a tract, in 1000 US dollars
TEST_SHARE = 0.1
PAPER_SEED = 13
MIN_ROWS = 20  # below this a tenth of the rows is a single test point


class Table(NamedTuple):
    """A regression data set."""

    name: str
    features: np.ndarray
    """(n, d) float64, as in the file."""
    target: np.ndarray
    """(n,) float64."""


class Split(NamedTuple):
    """A table cut in two."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def standardised(self) -> "Split":
        """The same with every feature at mean 0 and standard deviation 1 over the training rows.

        Test rows are shifted and scaled by the training rows' figures; a feature that is constant there
        becomes 0.
        """
        mean, std = self.x_train.mean(axis=0), self.x_train.std(axis=0)
        varies = std > 1e-12 * np.maximum(1.0, np.abs(mean))
        scale = np.where(varies, std, 1.0)
        return self._replace(
            x_train=(self.x_train - mean) * varies / scale, x_test=(self.x_test - mean) * varies / scale
        )


def split(table: Table, seed: int) -> Split:
    """A random tenth for testing: scikit-learn's `train_test_split(test_size=0.1, random_state=seed)`."""
    x_train, x_test, y_train, y_test = train_test_split(
        table.features, table.target, test_size=TEST_SHARE, random_state=seed
    )
    return Split(x_train, y_train, x_test, y_test)


def boston() -> Table:
    """Boston housing: 506 census tracts, 13 features, the data of Figure 3."""
    return load_csv(BOSTON_CSV, BOSTON_TARGET)._replace(name="boston")


def diabetes() -> Table:
    """scikit-learn's diabetes data: 442 patients, 10 features in their original units."""
    data = load_diabetes(scaled=False)
    return Table("diabetes", data.data.astype(np.float64), data.target.astype(np.float64))


def load_csv(path: Path, target: str) -> Table:
    """Reads a comma-separated file: a line of column names, then numbers; all but `target` are features.

    Raises:
        InputError: the file can't be read, lacks the target or any other column, has fewer than 20 rows, a
            line of another length, a value that is missing, not a number or not finite (the column is named),
            or a target that is the same in every row.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "it is not a CSV file in UTF-8"
        raise InputError(f"cannot read {path}: {reason}") from None
    if not lines:
        raise InputError(f"{path} is empty: it needs a line of column names and at least {MIN_ROWS} rows")
    names, rows = [name.strip() for name in lines[0]], lines[1:]
    if target not in names:
        raise InputError(f"{path} has no column {target!r}: choose --target from {', '.join(names)}")
    if len(names) < 2:
        raise InputError(f"{path} has no column beside {target!r}: at least one feature is needed")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path} has two columns {twice!r}: give each its own name")
    if len(rows) < MIN_ROWS:
        raise InputError(f"{path} has {len(rows)} rows: at least {MIN_ROWS} are needed")
    values = np.array([_numbers(path, names, number, row) for number, row in enumerate(rows, start=2)])
    at = names.index(target)
    if np.ptp(values[:, at]) == 0:
        raise InputError(f"{path}: column {target!r} is the same in every row, so there is nothing to predict")
    return Table(Path(path).stem, np.delete(values, at, axis=1), values[:, at])


def _numbers(path: Path, names: list[str], line: int, row: list[str]) -> list[float]:
    if len(row) != len(names):
        raise InputError(f"{path}, line {line} has {len(row)} values and the header {len(names)}: make them agree")
    numbers = []
    for name, text in zip(names, row, strict=True):
        try:
            number = float(text)
        except ValueError:
            what = f"{text.strip()!r} is not a number" if text.strip() else "a value is missing"
            raise InputError(
                f"{path}, line {line}, column {name!r}: {what}; fill it in, or remove the row or column"
            ) from None
        if not math.isfinite(number):
            raise InputError(
                f"{path}, line {line}, column {name!r}: {text.strip()} is not a finite number; remove the row"
            )
        numbers.append(number)
    return numbers
