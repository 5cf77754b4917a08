import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pictures import read_mask, read_pictures
from s3net_common.errors import InputError
from s3net_common.images import find_images

ROTATED = 6  # EXIF orientation: the camera was turned by 90 degrees


def save_rotated(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    image.save(path, exif=exif)


def test_an_rgb_image_is_resized_without_cropping(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(pixels).save(tmp_path / name)
        (picture,) = read_pictures([tmp_path / name], 24)
        with Image.open(tmp_path / name) as image:
            expected = np.asarray(image.convert("RGB").resize((24, 24), Image.Resampling.BILINEAR))
        assert np.array_equal(picture.pixels, expected)
        assert picture.mask is None


def test_images_of_other_modes(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "transparent.png")
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "deep.png")
    for picture in read_pictures(find_images([tmp_path]), 4):
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
        (picture,) = read_pictures([tmp_path / "photo.jpg"], 20, tmp_path / masks)
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
    mask = read_mask(tmp_path / "mask.png", 2, (2, 2), Path("image.png"))
    assert mask.tolist() == [[False, False], [True, True]]


def test_pictures_of_equal_stems_get_different_names(tmp_path):
    files = [tmp_path / name for name in ("a.png", "a.bmp", "a-2.png", "a.gif")]
    for file in files:
        Image.new("RGB", (4, 4)).save(file)
    assert [picture.name for picture in read_pictures(files, 4)] == ["a", "a-2", "a-2-2", "a-3"]


def test_the_error_of_an_unreadable_file_has_its_path_and_the_reason(tmp_path):
    Image.new("L", (40, 40), 255).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:50])
    with pytest.raises(InputError, match=r"cut\.png cannot be read as an image \(.*truncated.*\): remove or repair it"):
        read_pictures([tmp_path / "cut.png"], 4)
    with pytest.raises(InputError, match=r"cut\.png cannot be read as an image \(.*truncated.*\): remove or repair it"):
        read_mask(tmp_path / "cut.png", 4, (40, 40), tmp_path / "image.png")
    Image.new("L", (40, 40), 127).save(tmp_path / "dark.png")
    with pytest.raises(InputError, match=r"the mask .*dark\.png marks no pixel"):
        read_mask(tmp_path / "dark.png", 4, (40, 40), tmp_path / "image.png")


def test_one_error_names_all_unreadable_images_or_they_are_left_out(tmp_path, capsys):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_text("<html>")
    with pytest.raises(InputError, match=r"^3 images cannot be read: .*a\.png \(an HTML page.*b\.png .*c\.png \("):
        read_pictures(find_images([tmp_path]), 4)
    with pytest.raises(InputError, match="3 images cannot be read"):
        read_pictures(find_images([tmp_path]), 4, skip_unreadable=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "d.png")
    for size in (4, 5):  # the names are printed once
        assert [picture.name for picture in read_pictures(find_images([tmp_path]), size, None, True)] == ["d"]
    assert capsys.readouterr().err.count("b.png (an HTML page") == 1


def test_a_name_that_is_not_utf_8_is_printable(tmp_path):
    path = os.fsencode(tmp_path / "caf") + b"\xe9.png"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", path)  # noqa: PTH104
    (picture,) = read_pictures(find_images([tmp_path]), 4)
    assert picture.name == "caf\\xe9"
