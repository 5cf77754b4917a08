"""Small folders of real images in the layouts of Tiny ImageNet and ImageNet."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

SHARED = Path(__file__).parents[3] / "shared" / "data"


def digit_photos(count, size):
    """Yield enlarged, coloured images of handwritten digits, `(image, digit)`. The classes take turns."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.argsort([10 * np.count_nonzero(labels[:i] == label) + label for i, label in enumerate(labels[:200])])
    for i in order[:count]:
        grey = (pixels[i].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(np.stack([grey, 255 - grey, np.roll(grey, 1)], axis=2))
        yield image.resize(size, Image.Resampling.BICUBIC), int(labels[i])


def real_photos(crops, size, cifar_classes=0, cifar_images=0):
    """Yield `(image, class name)`: crops of ImageNet photographs from the shared data, and enlarged CIFAR-100 images.

    Each of the 60 photographs gives `crops` square crops at random positions (with a fixed seed), resized to `size`.
    """
    files = sorted((SHARED / "imagenet_sample").glob("*/*.JPEG"))
    if not files:
        pytest.skip("the shared data are missing")
    generator = np.random.default_rng(0)
    for path in files:
        photo = Image.open(path).convert("RGB")
        side = min(photo.size) * 2 // 3
        for left, top in generator.random((crops, 2)) * (np.array(photo.size) - side):
            yield (
                photo.crop((left, top, left + side, top + side)).resize(size, Image.Resampling.BICUBIC),
                path.parent.name,
            )
    cifar = Path(__file__).parents[2] / "data" / "cifar100" / "train"
    for folder in sorted(cifar.iterdir())[:cifar_classes] if cifar_classes else []:
        for path in sorted(folder.iterdir())[:cifar_images]:
            yield Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC), folder.name


def make_tiny_imagenet(root, photos):
    """Write photos in the layout of Tiny ImageNet's zip; return the folder. Half of each class is for validation."""
    folder, counts = root / "tiny-imagenet-200", {}
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for i, (image, name) in enumerate(photos):
        wnid = name if isinstance(name, str) else f"n{name:08d}"
        counts[wnid] = counts.get(wnid, 0) + 1
        if counts[wnid] % 2:
            path = folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            path = folder / "val" / "images" / f"val_{i}.JPEG"
            lines.append(f"{path.name}\t{wnid}\t0\t0\t62\t62\n")
        image.save(path, quality=90)
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def make_imagenet(root, photos):
    """Write photos as `{train,val}/<class>/*.JPEG`; return the root. A third of each class is for validation."""
    counts = {}
    for i, (image, name) in enumerate(photos):
        counts[name] = counts.get(name, 0) + 1
        split = "train" if counts[name] % 3 else "val"
        path = root / split / f"class{name}" / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    return root
