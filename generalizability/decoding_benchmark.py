"""How fast training images come from an LMDB file, from an image folder, and from a decoder that waits for no disk.

All three sides give the same images through the same transform (ImageNet's for training) to the same DataLoader:

- "decoder": the files' bytes lie in a list in memory. No way of storing JPEG files can be faster than this.
- "LMDB": `ImageFolderLMDB`.
- "folder": torchvision's `ImageFolder`.

"Warm" is with the data in the system's page cache; "cold" with them dropped from it before each pass
(POSIX_FADV_DONTNEED; the folder's directories and inodes stay cached, which takes root to drop). Each pass starts its
own workers, so that none holds the data in its memory map while they are dropped.
"""

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import folder2lmdb
from data.image_lmdb import ImageFolderLMDB
from recipes import IMAGENET_MEAN, IMAGENET_STD
from s3net_common.errors import InputError
from s3net_common.images import decode

IMAGES, CLASSES, SIZE = 512, 8, (500, 375)  # the size of ImageNet's typical photograph
BATCH = 32
SIDES = {"decoder, warm": False, "LMDB, warm": False, "folder, warm": False, "LMDB, cold": True, "folder, cold": True}


class EncodedInMemory(Dataset):
    """The image files' bytes in memory, decoded when asked for."""

    def __init__(self, data: ImageFolderLMDB, transform: Callable) -> None:
        self.items, self.transform = [data.encoded(i) for i in range(len(data))], transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        encoded, label = self.items[index]
        return self.transform(decode(encoded)), label


def training_transform() -> transforms.Compose:
    """ImageNet's usual training transform, at 224x224."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def make_photographs(folder: Path) -> None:
    """`IMAGES` JPEG files of the size of ImageNet's, in class folders: crops of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    chosen = random.Random(0)
    for i in tqdm(range(IMAGES), desc="making images", unit="image", disable=None, leave=False):
        photograph = photographs[i % len(photographs)]
        left, top = (chosen.randrange(whole - part) for whole, part in zip(photograph.size, SIZE, strict=True))
        (folder / f"class{i % CLASSES}").mkdir(exist_ok=True)
        crop = photograph.crop((left, top, left + SIZE[0], top + SIZE[1]))
        crop.save(folder / f"class{i % CLASSES}" / f"{i}.jpg", quality=92)


def benchmark_decoding(rounds: int, images: Path | None = None) -> dict:
    """Images/s of each side, with 0 and 2 workers, and the ratios to the bare decoder and the folder.

    Args:
        rounds: passes of each side; they take turns, and a ratio is of two passes of the same round. Other work on the
            machine disturbs short passes: it takes some 15 for a median that is good to a few per cent.
        images: a folder with <class>/*; made-up photographs for None.

    Raises:
        InputError: the folder has no images, or one cannot be decoded.
    """
    with tempfile.TemporaryDirectory(prefix="decoding-") as temporary:
        folder, file = images, Path(temporary) / "images.lmdb"
        if folder is None:
            folder = Path(temporary) / "images"
            folder.mkdir()
            make_photographs(folder)
        folder2lmdb.build(folder2lmdb.Args(file, folder), os.cpu_count() or 1)
        return measure(folder, file, rounds) | {"images": "crops of two photographs" if images is None else "given"}


def measure(folder: Path, file: Path, rounds: int) -> dict:
    """Every side in turn, `rounds` times with each number of workers."""
    transform = training_transform()
    data = ImageFolderLMDB(file)
    in_memory, names = EncodedInMemory(data, transform), [folder / data.name(i) for i in range(len(data))]
    sizes = [len(encoded) for encoded, _ in in_memory.items]
    del data  # closes the file: what is mapped stays in the page cache
    make = {
        "decoder": lambda: in_memory,
        "LMDB": lambda: ImageFolderLMDB(file, transform),
        "folder": lambda: ImageFolder(str(folder), transform),
    }
    results = {"count": len(sizes), "mean_bytes": round(statistics.mean(sizes)), "workers": {}}
    for workers in (0, 2):
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        with tqdm(total=rounds * len(SIDES), desc=f"decoding, {workers} workers", unit="pass", disable=None) as bar:
            for turn in range(rounds):
                for side in rotated(list(SIDES), turn):
                    bar.set_postfix_str(side)
                    if SIDES[side]:
                        drop_from_page_cache([file] if side.startswith("LMDB") else names)
                    rates[side].append(images_per_second(make[side.split(",")[0]](), workers))
                    bar.update()
        results["workers"][str(workers)] = summarize(rates)
    return results


def rotated(items: list, turn: int) -> list:
    """The items from another one onwards each turn, so that none always follows the same one."""
    turn %= len(items)
    return items[turn:] + items[:turn]


def drop_from_page_cache(files: list[Path]) -> None:
    """Make the system forget what it holds of files in memory. None of them may be mapped by a process."""
    if not hasattr(os, "posix_fadvise"):
        raise InputError("this system cannot be told to drop files from its page cache: run the benchmark on Linux")
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def images_per_second(data: Dataset, workers: int) -> float:
    """One pass in random order, the workers' start included."""
    torch.manual_seed(0)  # the same order and the same crops on every side
    started = time.perf_counter()
    for _ in DataLoader(data, BATCH, shuffle=True, num_workers=workers):
        pass
    return len(data) / (time.perf_counter() - started)


def summarize(rates: dict[str, list[float]]) -> dict:
    """Medians, and medians of the ratios by round."""

    def ratio(one: str, other: str) -> dict:
        by_round = [a / b for a, b in zip(rates[one], rates[other], strict=True)]
        return {"median": statistics.median(by_round), "by_round": by_round}

    return {
        "images_per_second": {side: statistics.median(values) for side, values in rates.items()},
        "share_of_the_decoder": {side: ratio(side, "decoder, warm") for side in rates if side != "decoder, warm"},
        "times_the_folder": {state: ratio(f"LMDB, {state}", f"folder, {state}") for state in ("warm", "cold")},
        "images_per_second_by_round": rates,
    }


def print_decoding(results: dict) -> None:
    """The table."""
    print(f"\n{results['count']} images of {results['mean_bytes'] / 1e3:.0f} kB on average, 224x224 crops")
    print(f"{'':20}" + "".join(f"{f'{workers} workers':>16}{'of the decoder':>16}" for workers in results["workers"]))
    for side in SIDES:
        line = f"{side:20}"
        for of in results["workers"].values():
            share = of["share_of_the_decoder"].get(side, {"median": 1.0})["median"]
            line += f"{of['images_per_second'][side]:9.1f} images/s{share:14.3f}"
        print(line)
