"""Errors by class and the confusion matrix of an evaluation: counted batch by batch, as JSON and as a picture."""

import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from distributed import Ranks
from s3net_common.errors import printable
from s3net_common.output_files import figure_text, save_figure
from training.engine import top_errors

LARGEST_MATRIX = 50  # classes; with more of them, the JSON file and the picture hold the most confused pairs instead
NUMBERED_CELLS = 20  # classes up to which each cell of the picture shows its number
LONGEST_NAME = 24  # characters of a name in the picture
BARS = 25  # pairs and classes in the picture of many classes


class ConfusionMatrix:
    """The images of each class by predicted class, and the top-1 and top-5 errors.

    Args:
        names: name of each output of the network.
        present: outputs of the classes that the images have, which may be some of the network's classes.

    Batches are counted on their device. The host waits for it only when it reads the counts. Call `reduce` at the end.

    Attributes:
        counts: int64 `(outputs, outputs + 1)`: images of the class of the row, predicted as the class of the column.
            The last column counts images with an infinite or NaN logit, which have no prediction.
    """

    def __init__(self, names: list[str], present: list[int]) -> None:
        self.names, self.present = names, torch.tensor(sorted(set(present)))
        self.counts = torch.zeros(len(names), len(names) + 1, dtype=torch.int64)
        self._errors = torch.zeros(4, dtype=torch.int64)  # top-1, top-5, restricted top-1, restricted top-5
        self._present = self.present  # on the device of the logits, as are the two before it

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch of logits `(b, outputs)` and labels `(b,)`, which are indices of outputs."""
        if self.counts.device != logits.device:
            self.counts, self._errors, self._present = (
                t.to(logits.device) for t in (self.counts, self._errors, self._present)
            )
        # As in `top_errors`, and on the same device: the order of equal logits may differ otherwise.
        predicted = logits.topk(min(5, logits.shape[1]), dim=1).indices[:, 0]
        predicted = torch.where(logits.isfinite().all(dim=1), predicted, len(self.names))
        cells = labels * self.counts.shape[1] + predicted
        self.counts.view(-1).index_add_(0, cells, torch.ones_like(cells))
        restricted = top_errors(logits[:, self._present], torch.searchsorted(self._present, labels))
        self._errors = self._errors + torch.stack([*top_errors(logits, labels), *restricted])

    def reduce(self, ranks: Ranks) -> None:
        """Add the counts of all ranks on every rank."""
        self.counts, self._errors = self.counts.cpu(), self._errors.cpu()
        if ranks.world_size > 1:
            numbers = map(float, [*self.counts.flatten().tolist(), *self._errors.tolist()])
            sums = torch.tensor(ranks.reduce(list(numbers)), dtype=torch.float64).long()
            self.counts, self._errors = sums[:-4].view_as(self.counts), sums[-4:]

    @property
    def errors(self) -> tuple[int, int]:
        """Number of top-1 and top-5 errors."""
        return tuple(self._errors[:2].tolist())

    @property
    def restricted_errors(self) -> tuple[int, int]:
        """Number of top-1 and top-5 errors with the logits restricted to the classes present."""
        return tuple(self._errors[2:].tolist())

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.counts.sum())

    def confused_pairs(self) -> list[tuple[int, int, int]]:
        """Return (class, predicted class, images) of every confusion, the most frequent first."""
        wrong = self.counts[:, :-1].clone().fill_diagonal_(0)
        rows, columns = wrong.nonzero(as_tuple=True)
        images = wrong[rows, columns]
        order = images.argsort(descending=True, stable=True)
        return list(zip(*(values[order].tolist() for values in (rows, columns, images)), strict=True))

    def errors_by_class(self) -> list[dict]:
        """Return for each class present its `name`, `images`, `errors` and `error` (%; None without images)."""
        images, correct = self.counts.sum(dim=1), self.counts.diagonal()
        return [
            {
                "name": self.names[i],
                "images": int(images[i]),
                "errors": int(images[i] - correct[i]),
                "error": 100 * (1 - int(correct[i]) / int(images[i])) if images[i] else None,
            }
            for i in self.present.tolist()
        ]

    def as_json(self) -> dict:
        """Return the errors by class, the confused pairs and, for up to `LARGEST_MATRIX` classes, the matrix."""
        pairs = self.confused_pairs()
        content = {
            "classes": self.errors_by_class(),
            "without_prediction": int(self.counts[:, -1].sum()),
            "confused_pairs": [
                {"class": self.names[row], "predicted": self.names[column], "images": images}
                for row, column, images in pairs
            ],
        }
        if len(self.names) <= LARGEST_MATRIX:
            matrix = self.counts[self.present, :-1].tolist()
            rows = [self.names[i] for i in self.present.tolist()]
            content["confusion_matrix"] = {"rows": rows, "columns": self.names, "images": matrix}
        return content

    def draw(self, path: Path, title: str) -> None:
        """Draw the matrix or, for more than `LARGEST_MATRIX` classes, the most confused pairs and the worst classes.

        Raises:
            InputError: the file cannot be written.
        """
        figure = self._draw_matrix() if len(self.names) <= LARGEST_MATRIX else self._draw_bars()
        figure.suptitle(label(title, 100), fontsize="medium")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # the font lacks a character of a name
            save_figure(path, figure)

    def _draw_matrix(self) -> Figure:
        counts = self.counts[self.present, :-1]
        shares = 100 * counts / self.counts[self.present].sum(dim=1, keepdim=True).clamp(min=1)
        rows, columns = counts.shape
        figure = Figure(figsize=(4.0 + 0.3 * columns, 3.2 + 0.3 * rows), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
        axes.set_xticks(range(columns), map(label, self.names), rotation=90, fontsize="small")
        axes.set_yticks(range(rows), [label(self.names[i]) for i in self.present.tolist()], fontsize="small")
        axes.set(xlabel="predicted class", ylabel="class")
        if columns <= NUMBERED_CELLS:
            for row, column in counts.nonzero().tolist():
                colour = "white" if shares[row, column] > 50 else "black"
                number = str(int(counts[row, column]))
                axes.text(column, row, number, ha="center", va="center", color=colour, fontsize="x-small")
        figure.colorbar(image, label="images of the class (%)", shrink=min(1.0, 8 / rows))
        return figure

    def _draw_bars(self) -> Figure:
        pairs = self.confused_pairs()[:BARS]
        classes = [row for row in self.errors_by_class() if row["images"]]
        classes = sorted(classes, key=lambda row: -row["error"])[:BARS]
        figure = Figure(figsize=(12, 7), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = [f"{label(self.names[row])} → {label(self.names[column])}" for row, column, _ in pairs]
        for axes, labels, lengths in (
            (left, names, [images for _, _, images in pairs]),
            (right, [label(row["name"]) for row in classes], [row["error"] for row in classes]),
        ):
            axes.barh(range(len(labels)), lengths)
            axes.set_yticks(range(len(labels)), labels, fontsize="small")
            axes.invert_yaxis()
            axes.grid(alpha=0.3, axis="x")
            axes.set_axisbelow(True)
        left.set(xlabel="images", title="most confused pairs (class → prediction)")
        left.xaxis.get_major_locator().set_params(integer=True)
        right.set(xlabel="top-1 error (%)", title="classes with the largest error", xlim=(0, 100))
        return figure


def label(name: str, longest: int = LONGEST_NAME) -> str:
    """Return a name for a picture: escaped, without markup, and shortened."""
    name = printable(name)
    shown = name if len(name) <= longest else name[: longest - 1] + "…"
    return figure_text(shown)
