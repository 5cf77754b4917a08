"""Images/s of an LMDB file, of an image folder, and of a decoder that reads no file.

All three give the same images through the same transform (ImageNet's for training) to the same DataLoader:

- "decoder": the files' bytes are in a list in memory. No storage of JPEG files can be faster.
- "LMDB": `ImageFolderLMDB`.
- "folder": torchvision's `ImageFolder`.

"Warm": the data are in the system's page cache. "Cold": they are dropped from it before each pass (POSIX_FADV_DONTNEED;
the folder's directories and inodes stay cached, because only root can drop them). Each pass starts its own workers, so
that no worker has the data in its memory map when they are dropped. benchmark.py runs this and writes the results.
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

import folder2lmdb
from data.image_lmdb import ImageFolderLMDB
from s3net_common.errors import InputError
from s3net_common.images import decode
from s3net_common.normalisation import IMAGENET_MEAN, IMAGENET_STD
from s3net_common.progress import ProgressBar

IMAGES, CLASSES, SIZE = 512, 8, (500, 375)  # the size of a typical ImageNet photograph
BATCH = 32
CASES = ("decoder, warm", "LMDB, warm", "folder, warm", "LMDB, cold", "folder, cold")


class EncodedInMemory(Dataset):
    """Image files in memory, decoded at each access."""

    def __init__(self, data: ImageFolderLMDB, transform: Callable) -> None:
        self.items, self.transform = [data.encoded(i) for i in range(len(data))], transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        encoded, label = self.items[index]
        return self.transform(decode(encoded)), label


def training_transform() -> transforms.Compose:
    """Return ImageNet's usual training transform, with 224x224 crops."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def make_photographs(folder: Path) -> None:
    """Write `IMAGES` JPEG files of ImageNet's size in class folders: crops of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    generator = random.Random(0)
    for i in ProgressBar(range(IMAGES), desc="making images", unit="image", leave=False):
        photograph = photographs[i % len(photographs)]
        left, top = (generator.randrange(whole - part) for whole, part in zip(photograph.size, SIZE, strict=True))
        (folder / f"class{i % CLASSES}").mkdir(exist_ok=True)
        crop = photograph.crop((left, top, left + SIZE[0], top + SIZE[1]))
        crop.save(folder / f"class{i % CLASSES}" / f"{i}.jpg", quality=92)


def benchmark_decoding(rounds: int, images: Path | None = None) -> dict:
    """Measure the images/s of each of `CASES` with 0 and 2 workers, and the ratios to the decoder and the folder.

    Args:
        rounds: number of passes of each case. The cases take turns, and each ratio compares two passes of one round.
            Other work on the machine disturbs short passes; a median within a few per cent takes about 15 rounds.
        images: a folder with <class>/*, or None to make photographs.

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
    """Run all cases in turn, `rounds` times with each number of workers."""
    transform = training_transform()
    data = ImageFolderLMDB(file)
    in_memory, names = EncodedInMemory(data, transform), [folder / data.name(i) for i in range(len(data))]
    sizes = [len(encoded) for encoded, _ in in_memory.items]
    del data  # closes the file: pages in a memory map cannot be dropped from the page cache
    open_dataset = {
        "decoder": lambda: in_memory,
        "LMDB": lambda: ImageFolderLMDB(file, transform),
        "folder": lambda: ImageFolder(str(folder), transform),
    }
    results = {"count": len(sizes), "mean_bytes": round(statistics.mean(sizes)), "workers": {}}
    for workers in (0, 2):
        rates: dict[str, list[float]] = {case: [] for case in CASES}
        with ProgressBar(total=rounds * len(CASES), desc=f"decoding, {workers} workers", unit="pass") as bar:
            for turn in range(rounds):
                for case in rotate(CASES, turn):
                    bar.set_postfix_str(case)
                    storage, cache = case.split(", ")
                    if cache == "cold":
                        drop_from_page_cache([file] if storage == "LMDB" else names)
                    rates[case].append(images_per_second(open_dataset[storage](), workers))
                    bar.update()
        results["workers"][str(workers)] = summarize(rates)
    return results


def rotate(cases: tuple[str, ...], turn: int) -> tuple[str, ...]:
    """Return the cases in the order of a turn: each turn starts with another case."""
    turn %= len(cases)
    return cases[turn:] + cases[:turn]


def drop_from_page_cache(files: list[Path]) -> None:
    """Drop files from the system's page cache. No process may have them in a memory map.

    Raises:
        InputError: the system cannot do this.
    """
    if not hasattr(os, "posix_fadvise"):
        raise InputError("this system cannot drop files from its page cache: run the benchmark on Linux")
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def images_per_second(data: Dataset, workers: int) -> float:
    """Measure one pass in random order, including the start of the workers."""
    torch.manual_seed(0)  # the same order and the same crops in every case
    started = time.perf_counter()
    for _ in DataLoader(data, BATCH, shuffle=True, num_workers=workers):
        pass
    return len(data) / (time.perf_counter() - started)


def summarize(rates: dict[str, list[float]]) -> dict:
    """Return the median images/s, and the medians of the ratios of each round."""

    def ratio(case: str, reference: str) -> dict:
        by_round = [rate / base for rate, base in zip(rates[case], rates[reference], strict=True)]
        return {"median": statistics.median(by_round), "by_round": by_round}

    return {
        "images_per_second": {case: statistics.median(values) for case, values in rates.items()},
        "share_of_the_decoder": {case: ratio(case, "decoder, warm") for case in rates if case != "decoder, warm"},
        "times_the_folder": {cache: ratio(f"LMDB, {cache}", f"folder, {cache}") for cache in ("warm", "cold")},
        "images_per_second_by_round": rates,
    }


def print_decoding(results: dict) -> None:
    """Print the results of `benchmark_decoding` as a table."""
    print(f"\n{results['count']} images of {results['mean_bytes'] / 1e3:.0f} kB on average, 224x224 crops")
    print(f"{'':20}" + "".join(f"{f'{workers} workers':>16}{'of the decoder':>16}" for workers in results["workers"]))
    for case in CASES:
        line = f"{case:20}"
        for summary in results["workers"].values():
            share = summary["share_of_the_decoder"].get(case, {"median": 1.0})["median"]
            line += f"{summary['images_per_second'][case]:9.1f} images/s{share:14.3f}"
        print(line)
