"""The ten crops of the paper's final evaluation."""

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Resize, TenCrop
from torchvision.transforms.functional import pil_to_tensor

CENTER_CROP = 4  # index in torchvision's TenCrop: four corners, the centre, then the same of the mirrored image


def ten_crops(image: Image.Image, resize: int, crop: int) -> Tensor:
    """Convert an RGB image to uint8 `(10, 3, crop, crop)`: short side resized to `resize` pixels, then ten crops."""
    return torch.stack(TenCrop(crop)(pil_to_tensor(Resize(resize)(image))))
