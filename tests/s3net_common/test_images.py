"""Reading image files of every kind, and listing the images of folders."""

import os
import pickle
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features
from processes import run_python

from s3net_common.errors import InputError, printable
from s3net_common.images import (
    class_images,
    class_names,
    decode,
    find_images,
    limit_pixels,
    read_rgb,
    read_square,
    to_rgb,
)
from s3net_common.unused_files import UnreadableImage, unreadable_images

RED, GREY, WHITE = [255, 0, 0], [156, 156, 156], [255, 255, 255]


@pytest.fixture(autouse=True)
def pillows_limit():
    yield
    limit_pixels(None)


def png(values: np.ndarray, colour_type: int, transparent: bytes = b"") -> bytes:
    """Return a PNG with 16 bits per channel, which Pillow cannot write in colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", transparent) if transparent else b""]
    return b"".join([b"\x89PNG\r\n\x1a\n", *parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def save_rotated(path: Path, orientation: int = 6) -> np.ndarray:
    """Save a photograph whose camera was turned. Return its stored pixels."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16], pixels[8:, 16:] = (200, 40, 40), (40, 200, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **({} if path.suffix == ".png" else {"quality": 100}))
    return pixels


# -- Reading: the same photograph in other modes --


def test_an_orientation_is_followed_for_users_photographs_only(tmp_path):
    for name in ("a.jpg", "b.png"):
        stored = save_rotated(tmp_path / name)
        upright = np.rot90(stored, -1)
        assert np.abs(np.asarray(decode(tmp_path / name)).astype(int) - stored).mean() < 3
        for image in (decode(tmp_path / name, orient=True), read_rgb((tmp_path / name).read_bytes())):
            assert np.abs(np.asarray(image).astype(int) - upright).mean() < 3
    assert read_square(tmp_path / "b.png", 16)[0, 0].tolist() == [0, 0, 0]
    for orientation in range(1, 9):  # the upper left corner of the upright image
        save_rotated(tmp_path / "c.png", orientation)
        corner = decode(tmp_path / "c.png", orient=True).getpixel((0, 0))
        assert (max(corner) > 0) == (orientation in (1, 3, 5, 7))


def test_damaged_exif_data_do_not_matter(tmp_path):
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(tmp_path / "a.png", orient=True).getpixel((0, 0)) == (9, 9, 9)


def test_cmyk_is_converted_to_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert decode(tmp_path / "a.jpg").getpixel((0, 0)) == pytest.approx((254, 0, 0), abs=3)


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
def test_a_png_with_16_bits(colour_type):
    """Grey, colour, grey and alpha, colour and alpha. Dark values stay dark."""
    for value, expected in ((40_000, 156), (200, 0), (65_535, 255)):
        channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
        values = np.full((2, 2, channels), value)
        if channels in (2, 4):
            values[..., -1] = 65_535
        assert np.unique(decode(png(values, colour_type))).tolist() == [expected]


def test_a_transparent_colour_with_16_bits_becomes_white():
    values = np.array([[[1000, 300, 3], [40_000] * 3]])
    assert np.asarray(decode(png(values, 2, struct.pack(">HHH", 1000, 300, 3)))).tolist() == [[WHITE, GREY]]
    assert np.asarray(decode(png(values[..., :1], 0, struct.pack(">H", 1000)))).tolist() == [[WHITE, GREY]]


@pytest.mark.parametrize("scale", [1, 255, 65_535])
def test_a_floating_point_tiff(tmp_path, scale):
    values = np.array([[0, 0.25], [0.5, 1], [np.nan, -0.1]], np.float32) * scale
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(decode(tmp_path / "a.tif"))[..., 0].tolist() == [[0, 64], [128, 255], [0, 0]]


def test_integers_with_32_bits(tmp_path):
    for values, expected in (([0, 40, 255], [0, 40, 255]), ([0, 40_000, 65_535], [0, 156, 255])):
        Image.fromarray(np.array([values], np.int32)).save(tmp_path / "a.tif")
        assert np.asarray(decode(tmp_path / "a.tif"))[0, :, 0].tolist() == expected
    Image.fromarray(np.array([[0, 70_000]], np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="its values are from 0 to 70000: save it with 8 or 16 bits per channel"):
        decode(tmp_path / "a.tif")


def test_values_around_zero_are_refused_instead_of_losing_a_half(tmp_path):
    for values in (np.array([[-1, 0, 1]], np.float32), np.array([[-1024, 3000]], np.int32)):
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(InputError, match=r"its values are from -1\d* to .*: save it with 8 or 16 bits"):
            decode(tmp_path / "a.tif")


def tiff(raw: bytes, width: int, bits: int, photometric: int) -> bytes:
    """Return a TIFF of one row of greys, of kinds that Pillow cannot write."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 122, 277: 1, 278: 1, 279: len(raw)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return b"".join([b"II*\0", struct.pack("<IH", 8, len(tags)), entries, bytes(4), raw])


@pytest.mark.parametrize(
    ("raw", "bits", "photometric"),
    [
        (bytes.fromhex("0009c3fff9c3"), 12, 1),
        (np.array([0, 40_000, 65_535, 40_000], "<u2").tobytes(), 16, 1),
        (np.array([65_535, 25_535, 0, 25_535], "<u2").tobytes(), 16, 0),
        (bytes([255, 99, 0, 99]), 8, 0),
    ],
    ids=["12 bits", "16 bits", "16 bits, white is zero", "8 bits, white is zero"],
)
def test_greys_of_a_tiff(raw, bits, photometric):
    image = decode(tiff(raw, 4, bits, photometric))
    assert np.asarray(image)[..., 0].tolist() == [[0, 156, 255, 156]]


@pytest.mark.parametrize("scale", [1, 255])
def test_a_floating_point_pfm(tmp_path, scale):
    values = np.array([[0.25, 1], [0, 0.5]], "<f4") * scale  # its rows are stored from the bottom to the top
    (tmp_path / "a.pfm").write_bytes(b"Pf\n2 2\n-1.0\n" + values.tobytes())
    assert np.asarray(decode(tmp_path / "a.pfm"))[..., 0].tolist() == [[0, 128], [64, 255]]


def test_a_png_with_long_texts(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 3_000_000, zip=True)
    Image.new("RGB", (2, 2), (9, 8, 7)).save(tmp_path / "a.png", pnginfo=texts, icc_profile=bytes(2_000_000))
    assert decode(tmp_path / "a.png").getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "palette with alpha values"])
def test_transparent_pixels_become_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    path, red = tmp_path / "a.png", RED
    if mode.startswith("palette"):
        indexed = Image.new("P", (2, 1))
        indexed.putpalette([0, 0, 0, 255, 0, 0])
        indexed.putpixel((1, 0), 1)
        indexed.save(path, transparency=bytes([0, 255]))
    elif mode == "P":
        image.quantize(4).save(path)
    else:
        image.convert(mode).save(path)
        red = [76] * 3 if mode == "LA" else RED
    assert np.asarray(decode(path)).tolist() == [[WHITE, red]]
    if mode == "P":
        assert np.asarray(to_rgb(image.quantize(4).convert("PA"))).tolist() == [[WHITE, RED]]


def test_an_image_with_1_bit(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert np.asarray(decode(tmp_path / "a.png"))[..., 0].tolist() == [[255, 0]]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (1, 1), (0, 0, 0, 128)).save(tmp_path / "a.webp", lossless=True)
    assert decode(tmp_path / "a.webp").getpixel((0, 0)) == pytest.approx((127, 127, 127), abs=1)


# -- Reading: files that are refused --


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><html>404", "an HTML page instead of an image"),
        (b"<!-- cached -->\n<HTML>", "an HTML page instead of an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a pointer of Git LFS instead of the image"),
        (b"Access denied, please log in", "a text file that begins with 'Access denied, please log in'"),
        (bytes(5000), "only zeros"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "a HEIC image, which needs the package pillow-heif"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "a PostScript file"),
        (b'<?xml version="1.0"?>\n<svg/>', "an SVG drawing"),
        (b"\xff\x0a\1\2\3\4\5\6\7\x08\x09\x80", "a JPEG XL image"),
        (b"PK\3\4" + bytes(range(1, 99)), "a ZIP archive"),
        (b"8BPS\0\1" + bytes(30), "a Photoshop file: export it as PNG"),
        (b"PF\n2 2\n-1.0\n" + bytes(48), "a PFM image in colour or a PAM image, which Pillow cannot read"),
        (b"\x80\x81\x82" * 9, "none of the image formats that are read: save it as JPEG or PNG"),
    ],
)
def test_the_reason_for_refusing_a_file(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    for file in (tmp_path / "a.jpg", content):
        with pytest.raises(UnreadableImage) as error:
            read_rgb(file, tmp_path / "a.jpg")
        assert str(error.value).startswith(f"{tmp_path}/a.jpg cannot be read as an image ({reason}")
        assert str(error.value).endswith("remove or repair it, or pass --skip-unreadable")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".bmp", ".tif", ".webp", ".ppm", ".jp2"])
def test_a_truncated_file_is_named_as_such(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}")
    content = (tmp_path / f"a{suffix}").read_bytes()
    for size in (20, len(content) // 2):
        (tmp_path / f"a{suffix}").write_bytes(content[:size])
        with pytest.raises(InputError, match=r"(?i)truncated"):
            decode(tmp_path / f"a{suffix}")


def test_a_postscript_file_starts_no_program(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")

    def no_program(*arguments, **options):
        raise AssertionError(arguments)

    monkeypatch.setattr(subprocess, "Popen", no_program)
    with pytest.raises(InputError, match="a PostScript file, which has no pixels: export it as PNG"):
        decode(tmp_path / "a.jpg")


def test_missing_files_and_other_things(tmp_path):
    (tmp_path / "link.jpg").symlink_to("absent.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in {"link": "the link's target is missing", "absent": "No such file or directory"}.items():
        with pytest.raises(InputError, match=reason):
            decode(tmp_path / f"{name}.jpg")
    with pytest.raises(InputError, match=r"pipe.jpg is neither a file nor a folder"):
        find_images([tmp_path / "pipe.jpg"])


def test_the_limit_of_pixels(tmp_path):
    Image.new("1", (16_000, 12_000)).save(tmp_path / "scan.png")
    reason = "its 192,000,000 pixels exceed the limit of 178,956,970: if you trust it, pass --max-pixels 192000000"
    with pytest.raises(InputError) as error:
        decode(tmp_path / "scan.png")
    assert str(error.value) == reason
    limit_pixels(192_000_000)
    with Image.open(tmp_path / "scan.png") as image:
        assert image.size == (16_000, 12_000)
    Image.new("1", (11, 10)).save(tmp_path / "small.png")
    limit_pixels(109)
    with pytest.raises(InputError, match="its 110 pixels exceed the limit of 109"):
        decode(tmp_path / "small.png")
    limit_pixels(110)
    assert decode(tmp_path / "small.png").size == (11, 10)
    with pytest.raises(InputError, match="--max-pixels 0 is not possible"):
        limit_pixels(0)


def test_one_error_names_all_images(tmp_path):
    errors = [UnreadableImage(f"{i}.jpg", "the file is empty") for i in range(25)]
    message = str(unreadable_images(errors))
    assert message.startswith("25 images cannot be read: 0.jpg (the file is empty), 1.jpg (")
    assert "19.jpg (the file is empty) and 5 more; remove or repair them, or pass --skip-unreadable" in message
    assert str(unreadable_images(errors[:1])) == str(errors[0]) == str(pickle.loads(pickle.dumps(errors[0])))


# -- Listing --


def save_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, format=None if path.suffix in Image.registered_extensions() else "PNG")
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes, and much that is no image of theirs."""
    root = tmp_path / ".data" / "train"  # a hidden folder above the images does not matter
    images = ["cat/a.jpg", "cat/deep/b.jfif", "cat/c", "cat/d.JPEG", "dog/a-b.png", "dog/a/x.webp"]
    images += ["cat/.Trash/e.jpg", "cat/.ipynb_checkpoints/a-checkpoint.jpg", ".Trash-1000/old/g.jpg", "stray.jpg"]
    images += ["cat/@eaDir/a.jpg", "dog/#recycle/f.png", "__MACOSX/cat/h.jpg", "@eaDir/i.jpg", "lost+found/j.jpg"]
    for name in images:
        save_image(root / name)
    others = ["cat/._a.jpg", "cat/.DS_Store", "cat/Thumbs.db", "dog/desktop.ini", "dog/notes.txt", "dog/README"]
    for name in [*others, "dog/g.heic", "bird/k.HEIC"]:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7")
    (root / "empty").mkdir()
    os.mkfifo(root / "cat" / "pipe.jpg")
    return root


def names_below(root: Path) -> list[str]:
    return [f"{path.relative_to(root).as_posix()} {label}" for path, label in class_images(root, class_names(root))]


def test_the_images_of_classes_are_listed_and_the_rest_is_counted(folder, capsys):
    assert class_names(folder) == ["cat", "dog"]
    cats, dogs = ["cat/a.jpg 0", "cat/c 0", "cat/d.JPEG 0", "cat/deep/b.jfif 0"], ["dog/a/x.webp 1", "dog/a-b.png 1"]
    assert names_below(folder) == cats + dogs
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out of {folder}: ")
    for part in (
        "hidden files: 1 (cat/._a.jpg)",
        "hidden folders: 3 (cat/.Trash, cat/.ipynb_checkpoints, .Trash-1000)",
        "folders of the operating system or an archive program: 5 (cat/@eaDir, dog/#recycle, @eaDir, ...)",
        "pipes, sockets or devices: 1 (cat/pipe.jpg)",
        "HEIC images, which need the package pillow-heif: 2 (dog/g.heic, bird/k.HEIC)",
        "files without a suffix that are no images: 1 (dog/README)",
        "files with other suffixes: 1 (dog/notes.txt)",
        "class folders without images: 2 (bird, empty)",
        "images outside of class folders: 1 (stray.jpg)",
    ):
        assert part in line


def test_folders_of_classes_without_images_are_kept_on_request(folder, tmp_path):
    assert class_names(folder, keep=["empty", "absent"]) == ["cat", "dog", "empty"]
    assert class_names(folder, keep=None) == ["bird", "cat", "dog", "empty"]
    (tmp_path / "heic" / "a").mkdir(parents=True)
    (tmp_path / "heic" / "a" / "b.heic").touch()
    with pytest.raises(InputError, match=r"heic has no images in its class folders .*; left out: HEIC.*: 1 .a/b"):
        class_names(tmp_path / "heic")


SYSTEM_FOLDERS = ["@tmp", "~snapshot", "Temporary Items", "FOUND.000", "TheVolumeSettingsFolder", "LOST.DIR"]


@pytest.mark.parametrize("name", SYSTEM_FOLDERS)
def test_folders_that_systems_leave_are_no_classes(tmp_path, capsys, name):
    for path in ("cat/a.png", f"cat/{name}/a.png", f"{name}/cat/a.png", f"{name}/b.png"):
        save_image(tmp_path / path)
    assert names_below(tmp_path) == ["cat/a.png 0"]
    assert f"an archive program: 2 (cat/{name}, {name})" in capsys.readouterr().err


def test_accents_of_class_folders_are_composed(tmp_path):
    """The same name: "é" as one character, and as "e" with an accent, as macOS stores it. They sort differently."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for name in ("cafz", decomposed):
        save_image(tmp_path / name / "a.png")
    assert class_names(tmp_path) == ["cafz", composed]
    assert [(path.parent.name, label) for path, label in class_images(tmp_path, ["cafz", composed])] == [
        ("cafz", 0),
        (decomposed, 1),
    ]
    save_image(tmp_path / composed / "b.png")
    with pytest.raises(InputError, match="two folders café, whose accents are stored in different forms"):
        class_names(tmp_path)


def test_links_to_folders_are_followed_without_loops(tmp_path, capsys):
    root = tmp_path / "data" / "train"
    save_image(tmp_path / "elsewhere" / "a.png")
    save_image(tmp_path / "class" / "b.png")
    save_image(root / "cat" / "c.png")
    (root / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "loop").symlink_to(".")
    (root / "cat" / "parent").symlink_to("../..")
    (root / "cat" / "z").symlink_to(tmp_path / "elsewhere" / "a.png")
    (root / "cat" / "self").symlink_to("self")
    (root / "dog").symlink_to(tmp_path / "class")
    assert names_below(root) == ["cat/c.png 0", "cat/linked/a.png 0", "cat/z 0", "dog/b.png 1"]
    line = capsys.readouterr().err
    assert "links to folders that are listed already or contain the link: 2 (cat/loop, cat/parent)" in line
    assert "broken links: 1 (cat/self)" in line


def test_a_broken_link_with_the_name_of_an_image_is_listed_and_then_refused(tmp_path):
    save_image(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / "b.png").symlink_to("absent.png")
    assert names_below(tmp_path) == ["cat/a.png 0", "cat/b.png 0"]
    with pytest.raises(InputError, match=r"b.png cannot be read as an image \(the link's target is missing\)"):
        read_rgb(tmp_path / "cat" / "b.png")


def test_names_that_are_not_utf_8(tmp_path):
    root = os.fsencode(tmp_path / "caf") + b"\xe9"
    os.makedirs(root)  # noqa: PTH103
    save_image(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", root + b"/b\xff\n.png")  # noqa: PTH104
    ((path, label),) = class_images(tmp_path, class_names(tmp_path))
    assert os.fsencode(path) == root + b"/b\xff\n.png" and label == 0
    assert printable(path) == f"{tmp_path}/caf\\xe9/b\\xff\\n.png"
    assert decode(path).size == (4, 4)


def test_images_of_given_files_and_folders(folder, capsys):
    (folder / "plain").mkdir()
    for name in ("b.png", "a.JPG", "inner/c.pgm", "._a.jpg"):
        save_image(folder / "plain" / name)
    expected = [folder / "plain" / name for name in ("a.JPG", "b.png", "inner/c.pgm")]
    assert find_images([folder / "plain", folder / "stray.jpg"]) == [*expected, folder / "stray.jpg"]
    assert "hidden files: 1 (._a.jpg)" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"there is no image in .*bird .*; left out: HEIC images"):
        find_images([folder / "bird"])
    with pytest.raises(InputError, match=r"there is no image .*absent\.jpg"):
        find_images([folder / "absent.jpg"])


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot write AVIF")
def test_avif_images_are_listed_and_read(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "cat" / "a.avif", quality=100)
    assert names_below(tmp_path) == ["cat/a.avif 0"]
    assert decode(tmp_path / "cat" / "a.avif").getpixel((8, 8)) == pytest.approx((200, 30, 30), abs=6)


def test_heic_images_are_read_with_the_package(tmp_path):
    """A package of that name, which registers a decoder as pillow-heif does."""
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import Image, ImageFile\n"
        "class Heif(ImageFile.ImageFile):\n"
        "    format = 'HEIF'\n"
        "    def _open(self):\n"
        "        self._size, self._mode = (2, 2), 'L'\n"
        "        self.tile = [ImageFile._Tile('raw', (0, 0, 2, 2), 12, ('L', 0, 1))]\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', Heif, lambda start: start[4:12] == b'ftypheic')\n"
        "    Image.register_extensions('HEIF', ['.heic', '.heif'])\n"
    )
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes([7] * 4))
    program = (
        "import pathlib\nfrom s3net_common.images import find_images, decode\n"
        f"print([decode(path).getpixel((1, 1)) for path in find_images([pathlib.Path({str(tmp_path)!r})])])"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])
    done = run_python("-c", program, env={"PYTHONPATH": path})
    assert done.stdout == "[(7, 7, 7)]\n", done.stderr
