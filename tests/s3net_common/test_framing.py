"""One preparation of images for evaluation, prediction and saliency maps."""

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image

from recipes import RECIPES
from s3net_common.framing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    dataset_preparation,
    stored_preparation,
    timm_preparation,
    usual_preparation,
)

CPU = torch.device("cpu")


def random_image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_imagenets_preparation_is_torchvisions():
    image = random_image(90, 70)
    expected = T.Compose([T.Resize(64), T.CenterCrop(56), T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    preparation = usual_preparation("s3net_imagenet_large").with_image_size(56)
    seen = preparation.normalization(CPU)(preparation.pixels(image)[None])[0]
    assert (preparation.resize, preparation.crop) == (64, 56)
    assert torch.allclose(seen, expected(image), atol=1e-5)


def test_a_squashed_image_keeps_its_edges():
    image = random_image(90, 40)
    preparation = usual_preparation("s3net_imagenet_large").with_image_size(20).squashed()
    expected = np.asarray(image.resize((20, 20), Image.Resampling.BILINEAR))
    assert np.array_equal(preparation.pixels(image).permute(1, 2, 0).numpy(), expected)
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, 9, 40))  # the left tenth
    assert np.asarray(preparation.frame_mask(mask)).nonzero()[1].tolist() == [0, 1] * 20
    cropped = usual_preparation("s3net_imagenet_large").with_image_size(20)
    assert not np.asarray(cropped.frame_mask(mask)).any()


@pytest.mark.parametrize("dataset", ["digits", "cifar100", "tinyimagenet", "imagenet", "folder"])
def test_the_metadata_of_a_file_give_the_trainers_preparation(dataset):
    recipe = RECIPES[dataset]
    metadata = {"dataset": dataset, "image_size": recipe.image_size, "mean": [*recipe.mean], "std": [*recipe.std]}
    preparation = stored_preparation(metadata)
    assert preparation == dataset_preparation(dataset, recipe.image_size, recipe.mean, recipe.std)
    sizes = {"imagenet": (256, 224, 224), "tinyimagenet": (64, 64, 224), "folder": (32, 32, 32)}
    expected = sizes.get(dataset, (32, 32, 32))
    assert (preparation.resize, preparation.crop, preparation.image_size) == expected
    assert stored_preparation({"image_size": 32}) is None


def test_timms_ways_of_cropping():
    config = {"input_size": (3, 160, 160), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.95}
    preparation = timm_preparation(config | {"interpolation": "random"})
    assert (preparation.resize, preparation.crop) == (168, 160)
    assert (preparation.method, preparation.interpolation) == ("crop", "bilinear")
    assert timm_preparation(config | {"crop_mode": "squash"}).method == "squash"
