"""The lines that a run prints."""

import json
import math
from pathlib import Path

import pytest

from training.reporting import large_loss_note

DIGITS = Path(__file__).parents[3] / "generalizability" / "results" / "digits" / "metrics.jsonl"


def test_large_validation_losses_of_the_run_on_digits_are_explained():
    rows = [json.loads(line) for line in DIGITS.read_text().splitlines()]
    explained = [row["epoch"] for row in rows if large_loss_note(row, 10)]
    assert explained == [row["epoch"] for row in rows if row["val_loss"] > 23.1] and {2, 3} <= set(explained)
    assert "BatchNorm's running statistics lag behind the weights." in large_loss_note(rows[1], 10)[0]


@pytest.mark.parametrize(
    ("training", "validation"), [(0.5, 22.0), (2.4, 300.0), (0.5, math.nan), (math.nan, math.nan), (9.0, 9.0)]
)
def test_other_losses_are_not(training, validation):
    assert large_loss_note({"train_loss": training, "val_loss": validation}, 10) == []
