"""Converts images of any mode to 8-bit RGB: transparency, palettes, and greys of 12, 16 or 32 bits."""

import numpy as np
from PIL import Image

from s3net_common.errors import InputError

BITS_PER_SAMPLE, PHOTOMETRIC_INTERPRETATION = 258, 262  # tags of a TIFF
WHITE_IS_ZERO = 0  # a photometric interpretation


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to 8-bit RGB. Transparent pixels become white; other ranges are scaled.

    Raises:
        InputError: the pixels have values above 16 bits, or below zero.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values, transparency = np.asarray(image), image.info.get("transparency")
        sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        grey = _to_8_bits(values, sixteen_bits)
        if transparency is not None:
            grey[values == transparency] = 255
        image = Image.fromarray(grey)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray, sixteen_bits: bool) -> np.ndarray:
    """Return grey values `(H, W)` as uint8.

    Values with 16 bits lose the lower 8 bits, as in Pillow's colour images. Other integers and floating-point numbers
    have no fixed range, so the largest value decides: floating-point numbers are in [0, 1] if it is below 2 and in
    [0, 255] if it is below 512 (resizing exceeds the range a little), integers are in [0, 255] if it is in this range,
    and all others have 16 bits.

    Raises:
        InputError: the largest value exceeds 16 bits, or values are as far below zero as no resizing makes them.
    """
    if sixteen_bits:
        return (values.clip(0, 65535) >> 8).astype(np.uint8)
    unit, byte = (2, 512) if values.dtype.kind == "f" else (0, 256)
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    least, peak = finite.min(initial=0), finite.max(initial=0)
    if peak >= 256 * byte or least < -peak / 4:
        raise InputError(f"its values are from {least:g} to {peak:g}: save it with 8 or 16 bits per channel, from 0 on")
    values = np.nan_to_num(values, nan=0, posinf=peak, neginf=0)
    scale = 255 if peak < unit else 1 if peak < byte else 1 / 257
    return (values * scale).round().clip(0, 255).astype(np.uint8)


def use_full_range(image: Image.Image) -> Image.Image:
    """Return a loaded TIFF of 12 or 16 bits with greys from black, 0, to white, 65535. Other images are unchanged.

    Pillow leaves 12 bits in the lower part of the range, and inverts images with 8 bits, but not those with 16, if the
    TIFF says that white is zero.
    """
    if image.format != "TIFF" or not image.mode.startswith("I;16"):
        return image
    values, tags = np.asarray(image).astype(np.uint16), image.tag_v2
    if tags.get(BITS_PER_SAMPLE) == (12,):
        values <<= 4
    if tags.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        values = 65535 - values
    return Image.fromarray(values)


def scale_transparency(image: Image.Image) -> None:
    """Scale a PNG's transparent colour to 8 bits, as Pillow scales the pixels. Call it before the pixels are loaded."""
    colour = image.info.get("transparency")
    rawmode = image.tile[0][3] if image.format == "PNG" and image.tile else None
    if isinstance(colour, tuple) and rawmode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif isinstance(colour, int) and rawmode in ("L;2", "L;4"):
        image.info["transparency"] = colour * (85 if rawmode == "L;2" else 17)
