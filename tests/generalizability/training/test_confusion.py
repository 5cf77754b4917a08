import numpy as np
import pytest
import torch
from PIL import Image

from training import confusion
from training.confusion import ConfusionMatrix
from training.engine import top_errors


def random_batches(outputs, present):
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        labels = torch.tensor(present)[torch.randint(len(present), (40,), generator=generator)]
        yield torch.randn(40, outputs, generator=generator).round(), labels  # rounded: there are ties


def counted(names, present):
    matrix = ConfusionMatrix(names, present)
    for logits, labels in random_batches(len(names), present):
        matrix.add(logits, labels)
    return matrix


def test_counts_agree_with_the_errors():
    present = [5, 1, 7]
    matrix = counted([f"class {i}" for i in range(9)], present)
    batches = list(random_batches(9, present))
    assert matrix.images == 120
    assert matrix.errors == tuple(map(sum, zip(*(top_errors(*batch) for batch in batches), strict=True)))
    assert int(matrix.counts.diagonal().sum()) == 120 - matrix.errors[0]
    content = matrix.as_json()
    assert [row["name"] for row in content["classes"]] == ["class 1", "class 5", "class 7"]
    assert sum(row["errors"] for row in content["classes"]) == matrix.errors[0]
    assert sum(row["images"] for row in content["confused_pairs"]) == matrix.errors[0]
    assert np.array(content["confusion_matrix"]["images"]).shape == (3, 9)
    restricted = sum(
        int((logits[:, [1, 5, 7]].topk(3).indices[:, 0] != torch.searchsorted(torch.tensor([1, 5, 7]), labels)).sum())
        for logits, labels in batches
    )
    assert matrix.restricted_errors == (restricted, 0) and restricted < matrix.errors[0]


def test_images_without_finite_logits_have_no_prediction():
    matrix = ConfusionMatrix(["a", "b"], [0, 1])
    matrix.add(torch.tensor([[2.0, 1.0], [float("nan"), 0.0], [0.0, float("inf")]]), torch.tensor([0, 1, 1]))
    content = matrix.as_json()
    assert content["without_prediction"] == 2 and content["confused_pairs"] == []
    assert [row["error"] for row in content["classes"]] == [0, 100] and matrix.errors[0] == 2


def test_a_class_without_images_has_no_error():
    matrix = ConfusionMatrix(["a", "b"], [0, 1])
    matrix.add(torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
    assert [row["error"] for row in matrix.as_json()["classes"]] == [0, None]


@pytest.mark.parametrize("outputs", [2, 12, 60])
def test_pictures(outputs, tmp_path):
    names = [f"class {i}" for i in range(outputs)]
    names[0] = "costs $5 or $6 \x1b[31m" + "long " * 20
    matrix = counted(names, list(range(outputs)))
    matrix.draw(tmp_path / "confusion.png", "a network: error 50%")
    with Image.open(tmp_path / "confusion.png") as image:
        assert min(image.size) > 300 and len(image.convert("L").getcolors()) > 10
    assert ("confusion_matrix" in matrix.as_json()) == (outputs <= confusion.LARGEST_MATRIX)


def test_labels_of_pictures():
    assert confusion.label("a$b\x07") == "a\\$b\\x07"
    assert confusion.label("x" * 40) == "x" * 23 + "…"
