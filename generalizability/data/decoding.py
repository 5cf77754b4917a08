"""From the content of an image file to a cropped image: by Pillow, by Pillow at a reduced size, or on a GPU."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as transforms

from data.image_sets import Source
from s3net_common.errors import InputError
from s3net_common.images import read_rgb

Transform = Callable[[Image.Image], Tensor]  # from an RGB image to uint8 pixels
Item = tuple[int, int | None]  # index of an image, and the seed of its random transform (None: it is not random)


# ---- Crops --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image that is resized to a square of `size` pixels, and mirrored if `flip`.

    `left`, `top`, `width` and `height` are pixels of the image.
    """

    left: int
    top: int
    width: int
    height: int
    size: int
    flip: bool

    def of_image(self, image: Image.Image, reduction: float = 1) -> Tensor:
        """Return uint8 `(3, size, size)` of an RGB image whose width and height were divided by `reduction`."""
        right, bottom = self.left + self.width, self.top + self.height
        box = [value / reduction for value in (self.left, self.top, right, bottom)] if reduction > 1 else None
        box = box or (self.left, self.top, right, bottom)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box)
        return transforms.pil_to_tensor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image)

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Return uint8 `(3, size, size)` of an image as uint8 `(3, H, W)`, on the same device."""
        part = pixels[None, :, self.top : self.top + self.height, self.left : self.left + self.width].float()
        part = F.interpolate(part, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        part = part[0].round_().clamp_(0, 255).to(torch.uint8)
        return part.flip(2) if self.flip else part

    def smallest_image(self, width: int, height: int) -> tuple[int, int]:
        """Return the smallest size of a whole image, now `width x height`, at which the crop is not enlarged."""
        return math.ceil(width * self.size / self.width), math.ceil(height * self.size / self.height)


def draw_crop(width: int, height: int, size: int, flip: bool) -> Crop:
    """Draw a crop of an image of `width x height` pixels, mirrored at random if `flip`.

    The crop has 8% to 100% of the area and an aspect ratio of 3/4 to 4/3. The random numbers are torch's.
    """
    image = torch.empty(3, height, width, device="meta")
    top, left, crop_height, crop_width = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
    return Crop(left, top, crop_width, crop_height, size, flip and bool(torch.rand(()) < 0.5))


def random_crop(image: Image.Image, size: int, flip: bool) -> Tensor:
    """Convert an RGB image to uint8 `(3, size, size)`: a crop that `draw_crop` draws."""
    return draw_crop(*image.size, size, flip).of_image(image)


# ---- Decoding by Pillow -------------------------------------------------------------------------------------------


def reduced_random_crop(encoded: bytes | memoryview, name: str, size: int, flip: bool) -> Tensor:
    """Decode a JPEG at the smallest size that does not enlarge a random crop, and return the crop.

    A JPEG can be decoded at 1/2, 1/4 or 1/8 of its width and height, which takes less time than in full. Other formats
    are decoded in full. The crop is that of `random_crop`; its pixels differ a little, since they are averages of
    pixels in the JPEG's blocks.

    Raises:
        UnreadableImage: the image cannot be decoded.
    """
    crop, reduction = None, 1.0

    def draw_and_reduce(image: Image.Image) -> None:
        nonlocal crop, reduction
        crop, width = draw_crop(*image.size, size, flip), image.size[0]
        if (reduced := image.draft(None, crop.smallest_image(*image.size))) is not None:
            reduction = width / reduced[1][2]

    image = read_rgb(encoded, name, orient=False, prepare=draw_and_reduce)
    return crop.of_image(image, reduction)


class Decoder(Dataset):
    """Decoded and transformed images of a source.

    `decoder[index, seed]` is `(pixels, label, problem)`: the transformed image, its label and, if it cannot be decoded,
    the error, with black pixels. A raised exception would reach the main process with its worker's traceback in it.

    Args:
        source: the images.
        transform: applied to each image; it may draw torch's random numbers.
    """

    def __init__(self, source: Source, transform: Transform) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, item: Item) -> tuple[Tensor, int, InputError | None]:
        index, seed = item
        label = 0
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPU's, for dropout
            try:
                encoded, label = self.source.encoded(index)
                return self.read(encoded, self.source.name(index)), label, None
            except InputError as error:
                return self.blank(), label, error

    def read(self, encoded: bytes | memoryview, name: str) -> Tensor:
        """Return the transformed image.

        Raises:
            UnreadableImage: the image cannot be decoded.
        """
        return self.transform(read_rgb(encoded, name, orient=False))

    def blank(self) -> Tensor:
        """Return what takes the place of an image that cannot be decoded."""
        return self.transform(Image.new("RGB", (64, 64)))


class DraftDecoder(Decoder):
    """Random crops of a source, decoded by `reduced_random_crop`. Arguments: as there."""

    def __init__(self, source: Source, size: int, flip: bool) -> None:
        super().__init__(source, partial(random_crop, size=size, flip=flip))
        self.size, self.flip = size, flip

    def read(self, encoded: bytes | memoryview, name: str) -> Tensor:
        """As `Decoder.read`."""
        return reduced_random_crop(encoded, name, self.size, self.flip)


def collate(items: list[tuple[Tensor, int, InputError | None]]) -> tuple[Tensor, Tensor, Tensor, list[InputError]]:
    """Return the pixels `(B, ...)`, labels `(B,)` and whether each could be read, bool `(B,)`; and the problems."""
    pixels, labels, problems = zip(*items, strict=True)
    readable = torch.tensor([problem is None for problem in problems])
    return torch.stack(pixels), torch.tensor(labels), readable, list(filter(None, problems))


# ---- Decoding on a GPU --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedCrop:
    """The content of a JPEG, uint8 `(bytes,)`, and the crop to be taken; or pixels `(3, size, size)` without a crop."""

    content: Tensor
    crop: Crop | None
    name: str


class CropDrawer(Decoder):
    """Draws random crops of the images of a source, and leaves JPEGs encoded. Other images are decoded.

    `drawer[index, seed]` is `(encoded crop, label, problem)`.
    """

    def __init__(self, source: Source, size: int, flip: bool) -> None:
        super().__init__(source, partial(random_crop, size=size, flip=flip))
        self.size, self.flip = size, flip

    def read(self, encoded: bytes | memoryview, name: str) -> EncodedCrop:
        """Return the file's content with a random crop, or the crop's pixels."""
        size = jpeg_size(encoded)
        if size is None:
            return EncodedCrop(super().read(encoded, name), None, name)
        content = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        return EncodedCrop(content, draw_crop(*size, self.size, self.flip), name)

    def blank(self) -> EncodedCrop:
        """Return black pixels."""
        return EncodedCrop(torch.zeros(3, self.size, self.size, dtype=torch.uint8), None, "")


def jpeg_size(encoded: bytes | memoryview) -> tuple[int, int] | None:
    """Return width and height of a JPEG of grey or RGB pixels, from its header; None for other files."""
    size = None

    def look(image: Image.Image) -> None:
        nonlocal size
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            size = image.size
        raise InputError("the header is all that is needed")

    try:
        read_rgb(encoded, "", orient=False, prepare=look)
    except InputError:
        return size


@dataclass(frozen=True)
class EncodedBatch:
    """The encoded crops of a batch, in one tensor: each tensor that a worker sends takes a file descriptor."""

    content: Tensor
    shapes: list[torch.Size]
    crops: list[Crop | None]
    names: list[str]

    def items(self) -> list[EncodedCrop]:
        """Return the encoded crops."""
        parts = self.content.split([math.prod(shape) for shape in self.shapes])
        contents = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return [EncodedCrop(*item) for item in zip(contents, self.crops, self.names, strict=True)]


def collate_encoded(
    items: list[tuple[EncodedCrop, int, InputError | None]],
) -> tuple[EncodedBatch, Tensor, Tensor, list[InputError]]:
    """Return the encoded crops; the rest is as of `collate`."""
    crops, labels, problems = zip(*items, strict=True)
    content = torch.cat([crop.content.flatten() for crop in crops])
    shapes, names = [crop.content.shape for crop in crops], [crop.name for crop in crops]
    batch = EncodedBatch(content, shapes, [crop.crop for crop in crops], names)
    readable = torch.tensor([problem is None for problem in problems])
    return batch, torch.tensor(labels), readable, list(filter(None, problems))


def decode_crops(batch: EncodedBatch, device: torch.device) -> tuple[Tensor, list[InputError | None]]:
    """Decode JPEGs on a device, a whole batch at a time, and take the crops.

    Returns:
        uint8 `(B, 3, size, size)` on the device, and the problem of each image, None without one. An image with a
        problem has black pixels.
    """
    from torchvision.io import ImageReadMode, decode_jpeg  # deprecated since torchvision 0.29

    crops = batch.items()
    encoded = [crop.content for crop in crops if crop.crop]
    try:
        decoded = iter(decode_jpeg(encoded, ImageReadMode.RGB, device=device) if encoded else [])
    except RuntimeError:  # one of them is damaged, or of a kind that this decoder lacks: Pillow says which
        decoded = None
    pixels, problems = [], []
    for crop in crops:
        part, problem = crop.content, None
        if crop.crop and decoded is not None:
            part = crop.crop.of_pixels(next(decoded))
        elif crop.crop:
            try:
                part = crop.crop.of_image(read_rgb(memoryview(crop.content.numpy()), crop.name, orient=False))
            except InputError as error:
                part, problem = torch.zeros(3, crop.crop.size, crop.crop.size, dtype=torch.uint8), error
        pixels.append(part.to(device))
        problems.append(problem)
    return torch.stack(pixels), problems
