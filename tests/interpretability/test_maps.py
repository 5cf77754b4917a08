import numpy as np
import pytest
import torch
from torch import nn

from digit_scenes import SIZE, make_scenes, scene_pictures
from faithfulness import area, deletion_curve, insertion_curve
from map_scores import (
    autocorrelation,
    bootstrap,
    centred_gaussian,
    dice,
    edge_map,
    gini,
    intersection_over_union,
    interval,
    mask_map,
    score_map,
    segment,
    sharpness,
)
from saliency_figures import brightness, overlay


def test_scores_of_known_sets():
    segmentation, mask = np.zeros((4, 5), bool), np.zeros((4, 5), bool)
    segmentation[0] = True  # 5 pixels
    mask[:2, :3] = True  # 6 pixels, 3 of them shared
    assert dice(segmentation, mask) == pytest.approx(2 * 3 / 11)
    assert intersection_over_union(segmentation, mask) == pytest.approx(3 / 8)
    assert dice(mask, mask) == 1


def test_segmentation_is_the_top_of_the_map():
    saliency = np.arange(100.0).reshape(10, 10)
    assert segment(saliency, 90).sum() == 10
    assert segment(saliency, 90)[9].all()


def test_scores_of_a_perfect_and_an_inverted_map():
    mask = np.zeros((20, 20), bool)
    mask[5:10, 5:13] = True  # 40 of 400 pixels: a tenth
    ordered = np.linspace(0, 0.5, 400).reshape(20, 20)
    perfect = score_map(mask + ordered, mask)
    assert perfect["dice_at"] == perfect["iou_at"] == perfect["average_precision"] == 1
    assert perfect["pointing"] is True
    assert perfect["dice"][99] == pytest.approx(2 * 4 / 44)  # 4 pixels marked
    assert perfect["dice"][80] == pytest.approx(2 * 40 / 120)  # 80 pixels marked
    inverted = score_map(-1.0 * mask + ordered, mask)
    assert inverted["dice_at"] == 0
    assert inverted["pointing"] is False
    assert inverted["average_precision"] < 0.1


def test_sharpness_of_known_maps():
    assert gini(np.full((3, 4), 2.0)) == pytest.approx(0)
    single = np.zeros((5, 8))
    single[2, 3] = 7
    assert gini(single) == pytest.approx(1 - 1 / 40)
    assert gini(np.zeros((2, 2))) == 0
    mask = np.zeros((5, 8), bool)
    mask[2] = True
    assert sharpness(single + 1, mask)["mass"] == pytest.approx((8 + 7) / (40 + 7))


def test_autocorrelation_of_known_gradients():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 200, 200))
    assert autocorrelation(noise) == pytest.approx(0, abs=0.02)
    rows, columns = np.indices((64, 64))
    waves = np.sin(rows / 10) + np.sin(columns / 10)
    assert autocorrelation(np.stack([waves, -waves])) > 0.95
    assert autocorrelation(np.where((rows + columns) % 2, 1.0, -1.0)[None]) == pytest.approx(-1)


def test_the_bootstrap_draws_seeds_and_scenes():
    rng = np.random.default_rng(0)
    scenes, seeds = rng.normal(0, 1, 400), np.array([-1.0, 0.0, 1.0])
    only_scenes = bootstrap(scenes[None])
    assert only_scenes.mean() == pytest.approx(scenes.mean(), abs=0.01)
    assert only_scenes.std() == pytest.approx(scenes.std() / 20, rel=0.1)
    both = bootstrap(scenes[None] + seeds[:, None])
    expected = np.hypot(scenes.std() / 20, seeds.std() / np.sqrt(3))
    assert both.std() == pytest.approx(expected, rel=0.1)
    difference = bootstrap(scenes[None] + 2, 0) - bootstrap(scenes[None], 1)  # paired by scene
    assert interval(difference) == pytest.approx([2, 2])


def test_the_true_mask_is_the_ceiling():
    mask = np.zeros((20, 20), bool)
    mask[4:8, 3:9] = True  # 24 of 400 pixels; the top tenth has 40
    scores = score_map(mask_map(mask, 0), mask)
    assert scores["pointing"] and scores["average_precision"] == pytest.approx(1)
    assert scores["dice_at"] == pytest.approx(2 * 24 / (24 + 40))


def test_baseline_maps():
    gaussian = centred_gaussian(9)
    assert gaussian.argmax() == 40  # the centre
    assert gaussian[4, 4] == 1
    assert gaussian[0, 4] == pytest.approx(np.exp(-((4 / 2.25) ** 2) / 2))
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 200
    edges = edge_map(pixels)
    assert edges[:, 3:5] == pytest.approx(100)
    assert edges[:, [0, 1, 2, 5, 6, 7]].max() == 0


class FirstPixel(nn.Module):
    """Class 1 is the brightness of the top left pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros(len(x)), x[:, 0, 0, 0]], dim=1)


def test_faithfulness_curves_follow_the_order_of_the_map():
    images = torch.zeros(2, 3, 4, 4)
    images[:, :, 0, 0] = 4.0
    first, last = torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    first[0, 0, 0], last[0, 0, 0] = 1, 0  # one map ranks the pixel first, the other last
    maps, target = torch.stack([first, last]), torch.tensor([1, 1])
    high, low = torch.tensor(4.0).sigmoid().item(), 0.5
    deletion = deletion_curve(FirstPixel(), images, maps, target, steps=4)
    assert deletion[0] == pytest.approx([high, low, low, low, low])
    assert deletion[1] == pytest.approx([high, high, high, high, low])
    assert area(deletion) == pytest.approx([(high / 2 + 3.5 * low) / 4, (3.5 * high + low / 2) / 4])
    insertion = insertion_curve(FirstPixel(), images, maps, target, steps=4)
    assert insertion[0, 1:] == pytest.approx([high] * 4)
    assert insertion[1, 1:4] == pytest.approx([insertion[1, 0]] * 3)
    assert insertion[1, 0] < insertion[1, 4] == pytest.approx(high)


def test_the_masks_of_digit_scenes_mark_bright_strokes():
    images, masks, labels = make_scenes(np.arange(50), seed=3)
    assert images.shape == (50, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    assert labels.tolist()[:10] == list(range(10))  # scikit-learn's order
    brightness_inside = np.array([i[m].mean() for i, m in zip(images, masks, strict=True)])
    brightness_outside = np.array([i[~m].mean() for i, m in zip(images, masks, strict=True)])
    assert (brightness_inside > brightness_outside + 20).all()
    assert 0.03 < masks.mean() < 0.2
    repeated, _, _ = make_scenes(np.arange(50), seed=3)
    assert np.array_equal(images, repeated)
    small, small_masks, _ = make_scenes(np.arange(5), seed=3, size=18)
    assert small.shape == (5, 18, 18, 3) and small_masks.any((1, 2)).all()
    names = [picture.name.split("-")[0] for picture in scene_pictures(6)]
    assert names == [f"digit{i}" for i in range(6)]


def test_overlays_are_bright_where_the_map_is_large():
    saliency = np.zeros((10, 10))
    saliency[2:4, 2:4] = 5
    heat = brightness(saliency)
    assert heat[2, 2] == 1
    assert heat[9, 9] == 0
    drawn = overlay(np.full((10, 10, 3), 100, np.uint8), saliency)
    assert drawn.shape == (10, 10, 3)
    assert drawn[3, 3].sum() > 2 * drawn[8, 8].sum()
