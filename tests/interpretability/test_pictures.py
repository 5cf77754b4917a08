import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pictures import make_picture, read_mask, read_pictures
from s3net_common.errors import InputError
from s3net_common.framing import Preparation
from s3net_common.images import find_images

ROTATED = 6  # EXIF orientation: the camera was turned by 90 degrees


def square(size: int, resize: int | None = None, method: str = "squash") -> Preparation:
    return Preparation(resize or size, size, size, (0.0,) * 3, (1.0,) * 3, method)


def save_rotated(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    image.save(path, exif=exif)


def test_a_squashed_image_is_resized_without_cropping(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(pixels).save(tmp_path / name)
        (picture,) = read_pictures([tmp_path / name], square(24))
        with Image.open(tmp_path / name) as image:
            expected = np.asarray(image.convert("RGB").resize((24, 24), Image.Resampling.BILINEAR))
        assert np.array_equal(picture.pixels, expected)
        assert picture.mask is None
        assert picture.aspect == 1.5


def test_an_image_and_its_mask_are_cropped_alike(tmp_path):
    """The short side of 40 becomes 20; of the 30 columns, the centre crop keeps 7 to 22."""
    pixels, mask = np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), np.uint8)
    pixels[:, 30:44], mask[:, 30:44] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "photo.png")
    (picture,) = read_pictures([tmp_path / "photo.png"], square(16, 20, "crop"), tmp_path / "masks")
    assert picture.aspect == 1
    assert picture.mask.any(axis=0).nonzero()[0].tolist() == list(range(8, 15))
    assert np.array_equal(picture.pixels[..., 0] > 127, picture.mask)
    mask[:] = 0
    mask[:, :5] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "photo.png")
    message = r"the mask .*photo\.png marks no pixel of the part of .*photo\.png that the network sees: pass --squash"
    with pytest.raises(InputError, match=message):
        read_pictures([tmp_path / "photo.png"], square(16, 20, "crop"), tmp_path / "masks")


def test_a_small_crop_is_enlarged_to_the_networks_input():
    """As the trainer enlarges the images of Tiny ImageNet, up to the rounding to whole values."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    preparation = Preparation(64, 64, 224, (0.0,) * 3, (1.0,) * 3, "fit")
    picture = make_picture("a", image, preparation)
    assert picture.pixels.shape == (224, 224, 3)
    seen = preparation.normalization(torch.device("cpu"))(preparation.pixels(image)[None])[0]
    assert np.abs(picture.pixels / 255 - seen.permute(1, 2, 0).numpy()).max() <= 0.501 / 255


def test_images_of_other_modes(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "transparent.png")
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "deep.png")
    for picture in read_pictures(find_images([tmp_path]), square(4)):
        assert (picture.pixels == 255).all()


def test_an_image_and_its_mask_are_turned_upright(tmp_path):
    image = Image.new("RGB", (60, 30))
    image.paste((200, 200, 200), (0, 0, 30, 30))  # the left half, which is the upper one when upright
    save_rotated(image, tmp_path / "photo.jpg")
    mask = Image.new("L", (30, 60))
    mask.paste(255, (0, 0, 30, 30))
    (tmp_path / "upright").mkdir()
    (tmp_path / "rotated").mkdir()
    mask.save(tmp_path / "upright" / "photo.png")
    save_rotated(mask.transpose(Image.Transpose.ROTATE_90), tmp_path / "rotated" / "photo.png")
    for masks in ("upright", "rotated"):
        (picture,) = read_pictures([tmp_path / "photo.jpg"], square(20), tmp_path / masks)
        assert picture.pixels[:8].min() > 150 and picture.pixels[12:].max() < 50
        assert picture.mask[:10].all() and not picture.mask[10:].any()


@pytest.mark.parametrize("kind", ["grey", "16 bits", "alpha", "grey and alpha", "palette"])
def test_a_mask_is_read_from_alpha_or_else_from_grey_values(kind, tmp_path):
    values = np.array([[0, 127], [128, 255]], np.uint8)
    masks = {
        "grey": Image.fromarray(values),
        "16 bits": Image.fromarray(values.astype(np.uint16) * 257),
        "alpha": Image.fromarray(np.dstack([255 - values] * 3 + [values])),
        "grey and alpha": Image.fromarray(np.dstack([255 - values, values])),
        "palette": Image.fromarray(np.array([[0, 0], [1, 1]], np.uint8)).convert("P"),
    }
    masks["palette"].putpalette([255, 255, 255, 0, 0, 0])
    options = {"transparency": 0} if kind == "palette" else {}  # the first colour
    masks[kind].save(tmp_path / "mask.png", **options)
    mask = read_mask(tmp_path / "mask.png", square(2), (2, 2), Path("image.png"))
    assert mask.tolist() == [[False, False], [True, True]]


def test_pictures_of_equal_stems_get_different_names(tmp_path):
    files = [tmp_path / name for name in ("a.png", "a.bmp", "a-2.png", "a.gif")]
    for file in files:
        Image.new("RGB", (4, 4)).save(file)
    assert [picture.name for picture in read_pictures(files, square(4))] == ["a", "a-2", "a-2-2", "a-3"]


def test_the_error_of_an_unreadable_file_has_its_path_and_the_reason(tmp_path):
    Image.new("L", (40, 40), 255).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:50])
    with pytest.raises(InputError, match=r"cut\.png cannot be read as an image \(.*truncated.*\): remove or repair it"):
        read_pictures([tmp_path / "cut.png"], square(4))
    with pytest.raises(InputError, match=r"cut\.png cannot be read as an image \(.*truncated.*\): remove or repair it"):
        read_mask(tmp_path / "cut.png", square(4), (40, 40), tmp_path / "image.png")
    Image.new("L", (40, 40), 127).save(tmp_path / "dark.png")
    with pytest.raises(InputError, match=r"the mask .*dark\.png marks no pixel"):
        read_mask(tmp_path / "dark.png", square(4), (40, 40), tmp_path / "image.png")


def test_one_error_names_all_unreadable_images_or_they_are_left_out(tmp_path, capsys):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_text("<html>")
    with pytest.raises(InputError, match=r"^3 images cannot be read: .*a\.png \(an HTML page.*b\.png .*c\.png \("):
        read_pictures(find_images([tmp_path]), square(4))
    with pytest.raises(InputError, match="3 images cannot be read"):
        read_pictures(find_images([tmp_path]), square(4), skip_unreadable=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "d.png")
    for size in (4, 5):  # the names are printed once
        assert [picture.name for picture in read_pictures(find_images([tmp_path]), square(size), None, True)] == ["d"]
    assert capsys.readouterr().err.count("b.png (an HTML page") == 1


def test_a_name_that_is_not_utf_8_is_printable(tmp_path):
    path = os.fsencode(tmp_path / "caf") + b"\xe9.png"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", path)  # noqa: PTH104
    (picture,) = read_pictures(find_images([tmp_path]), square(4))
    assert picture.name == "caf\\xe9"
