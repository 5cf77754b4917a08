"""Pages of figures, and names of files in them."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import saliency_figures
from explain_images import PictureExplanation
from explained_networks import Network
from network_flags import is_image
from pictures import Picture


def explained(names):
    pictures = [Picture(name, np.full((8, 8, 3), 90, np.uint8), mask=np.eye(8) > 0) for name in names]
    explanation = PictureExplanation(np.eye(8, dtype=np.float32), 0, 0.5, 1, 0.0, 0.9, 0.0, [(0, 0.5)])
    return pictures, [explanation] * len(pictures)


@pytest.fixture
def row_labels(monkeypatch):
    """Return the labels of the rows of all figures that are saved."""
    labels = []

    def save(path, figure: Figure, dpi):
        labels.extend(axes.get_ylabel() for axes in figure.axes if axes.get_ylabel())
        figure.savefig(path, dpi=20)

    monkeypatch.setattr(saliency_figures, "save_figure", save)
    return labels


@pytest.mark.parametrize("kind", ["maps", "segmentations"])
def test_every_image_is_on_a_page_with_its_name(tmp_path, row_labels, kind):
    for count, pages in ((13, ["figure.png", "figure-2.png", "figure-3.png"]), (6, ["figure.png"])):
        names = [f"image_{i}" for i in range(count)]
        pictures, explanations = explained(names)
        if kind == "maps":
            saliency_figures.draw_maps(
                tmp_path / "figure.png", pictures, [(Network("net", None), pictures, explanations)]
            )
        else:
            maps = [explanation.saliency for explanation in explanations]
            saliency_figures.draw_segmentations(tmp_path / "figure.png", pictures, [("net", pictures, maps)], 90.0)
        assert row_labels == names
        assert {path.name for path in tmp_path.iterdir()} == set(pages)
        row_labels.clear()


@pytest.mark.parametrize("name", ["$x_1$ and $y^", "a$b", "50%_{off}", "\\frac{", "caf\udce9"])
def test_names_of_files_and_classes_are_not_mathematics(tmp_path, name):
    pictures, explanations = explained([name])
    columns = [(Network("net", None, classes=[name, name]), pictures, explanations)]
    saliency_figures.draw_maps(tmp_path / "figure.png", pictures, columns)
    assert Image.open(tmp_path / "figure.png").size[0] > 100


def test_images_are_told_from_names_of_networks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "resnet50").mkdir()
    assert [is_image(word) for word in ("a.JPG", "photos", "resnet50", "vgg19", "my.pt")] == [True, True] + [False] * 3


def test_a_squashed_photograph_is_drawn_in_its_own_proportions(tmp_path, monkeypatch):
    (picture,), explanations = explained(["a"])
    boxes = []

    def measure(path, figure: Figure, dpi):
        figure.savefig(path, dpi=50)
        boxes.extend(axes.get_window_extent() for axes in figure.axes)

    monkeypatch.setattr(saliency_figures, "save_figure", measure)
    for aspect, size in ((1.5, (12, 8)), (0.5, (8, 16)), (1.0, (8, 8))):
        shown = replace(picture, aspect=aspect)
        saliency_figures.save_overlay(tmp_path / "overlay.png", shown, explanations[0].saliency)
        assert Image.open(tmp_path / "overlay.png").size == size
        saliency_figures.draw_maps(tmp_path / "maps.png", [shown], [(Network("net", None), [shown], explanations)])
        saliency_figures.draw_segmentations(tmp_path / "s.png", [shown], [("net", [shown], [np.eye(8)])], 90.0)
        assert [box.width / box.height for box in boxes] == pytest.approx([aspect] * 5, rel=1e-3)
        boxes.clear()


def test_titles_say_which_share_of_the_terms_is_drawn():
    _, (explanation, *_) = explained(["a"])
    assert saliency_figures.drawn_share([explanation]) == "90% of terms drawn"
    assert saliency_figures.drawn_share([explanation, replace(explanation, drawn=0.384)]) == "38-90% of terms drawn"
