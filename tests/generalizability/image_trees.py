"""Small trees of real images in the layouts of Tiny ImageNet and ImageNet."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

SHARED = Path(__file__).parents[3] / "shared" / "data"


def digit_photos(count, size):
    """Handwritten digits in colours of their own, enlarged: `(image, digit)`, the classes taking turns."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.argsort([10 * np.count_nonzero(labels[:i] == label) + label for i, label in enumerate(labels[:200])])
    for i in order[:count]:
        grey = (pixels[i].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(np.stack([grey, 255 - grey, np.roll(grey, 1)], axis=2))
        yield image.resize(size, Image.Resampling.BICUBIC), int(labels[i])


def real_photos(crops, size, cifar_classes=0, cifar_images=0):
    """Real images, `(image, class name)`: cut from ImageNet's of the shared data, and of CIFAR-100 enlarged.

    `crops` squares are cut from each of the 60 ImageNet images at places of a fixed random order; each is resized.
    """
    files = sorted((SHARED / "imagenet_sample").glob("*/*.JPEG"))
    if not files:
        pytest.skip("no shared data here")
    places = np.random.default_rng(0)
    for path in files:
        photo = Image.open(path).convert("RGB")
        side = min(photo.size) * 2 // 3
        for left, top in places.random((crops, 2)) * (np.array(photo.size) - side):
            yield (
                photo.crop((left, top, left + side, top + side)).resize(size, Image.Resampling.BICUBIC),
                path.parent.name,
            )
    cifar = Path(__file__).parents[2] / "data" / "cifar100" / "train"
    for folder in sorted(cifar.iterdir())[:cifar_classes] if cifar_classes else []:
        for path in sorted(folder.iterdir())[:cifar_images]:
            yield Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC), folder.name


def make_tiny_imagenet(root, photos):
    """Photos as Tiny ImageNet's zip unpacks: every second one of a class is a validation image; returns the folder."""
    folder, seen = root / "tiny-imagenet-200", {}
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for i, (image, name) in enumerate(photos):
        wnid = name if isinstance(name, str) else f"n{name:08d}"
        seen[wnid] = seen.get(wnid, 0) + 1
        if seen[wnid] % 2:
            path = folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            path = folder / "val" / "images" / f"val_{i}.JPEG"
            lines.append(f"{path.name}\t{wnid}\t0\t0\t62\t62\n")
        image.save(path, quality=90)
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def make_imagenet(root, photos):
    """Photos as `{train,val}/<class>/*.JPEG`, every third of a class a validation image; returns the root."""
    seen = {}
    for i, (image, name) in enumerate(photos):
        seen[name] = seen.get(name, 0) + 1
        half = "train" if seen[name] % 3 else "val"
        path = root / half / f"class{name}" / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    return root
