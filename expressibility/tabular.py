"""Regression data sets from tables of numbers: Boston housing, diabetes, or a CSV file."""

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
MIN_ROWS = 20  # so that a tenth of the rows is at least two test rows


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
        varies = std > 1e-12 * np.maximum(1.0, np.abs(mean))
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
    """Load a comma-separated file: a line of column names, then lines of numbers.

    Args:
        path: the file, in UTF-8.
        target: name of the column to predict. All other columns are features.

    Raises:
        InputError: the file cannot be read, lacks the target or has no other column, has fewer than 20 rows, rows of
            different lengths, or a value that is not a finite number (the message names line and column), or the
            target is constant.
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
        raise InputError(f"{path} has no column except {target!r}: at least one feature is needed")
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path} has two columns named {duplicate!r}: rename one of them")
    if len(rows) < MIN_ROWS:
        raise InputError(f"{path} has {len(rows)} rows: at least {MIN_ROWS} are needed")
    values = np.array([_parse_row(path, names, line, row) for line, row in enumerate(rows, start=2)])
    target_column = names.index(target)
    if np.ptp(values[:, target_column]) == 0:
        raise InputError(f"{path}: column {target!r} has the same value in every row: choose another --target")
    return Table(Path(path).stem, np.delete(values, target_column, axis=1), values[:, target_column])


def _parse_row(path: Path, names: list[str], line: int, row: list[str]) -> list[float]:
    if len(row) != len(names):
        raise InputError(
            f"{path}, line {line} has {len(row)} values, but the header has {len(names)}: correct the line"
        )
    numbers = []
    for name, text in zip(names, row, strict=True):
        try:
            number = float(text)
        except ValueError:
            reason = f"{text.strip()!r} is not a number" if text.strip() else "a value is missing"
            raise InputError(
                f"{path}, line {line}, column {name!r}: {reason}; enter a number, or remove the row or column"
            ) from None
        if not math.isfinite(number):
            raise InputError(
                f"{path}, line {line}, column {name!r}: {text.strip()} is not a finite number; remove the row"
            )
        numbers.append(number)
    return numbers
