"""How fast S3-Net trains here, beside a plain reading of the published formulation and beside the baselines.

    python benchmark.py                       # everything: about 13 minutes on 2 cores
    python benchmark.py --only data           # only the augmentation, beside PIL and a DataLoader
    python benchmark.py --only decoding       # only LMDB, beside an image folder and the bare decoder
    python benchmark.py --compile             # also S3-Net under torch.compile, with what compiling costs

Every side runs in a fresh process, the sides take turns, and each figure is the median over the rounds. A step is
what the trainer does: fetch and augment a batch of 64, forward, backward, update. The published formulation gets its
batch for nothing. Prints the tables and writes `benchmark.json`.
"""

import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from data.batches import TrainingBatches
from data.image_sets import ImageSet
from decoding_benchmark import benchmark_decoding, print_decoding
from distributed import join_ranks
from recipes import RECIPES
from s3net_common.command_line import run_script
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT, make_folder, write_atomically
from s3net_networks import create_network
from training.engine import Precision, Trainer

BATCH = 64
NETWORKS = {  # what is measured: name -> (network, options)
    "S3-Net k=12": ("s3net_cifar", {"growth_rate": 12}),
    "S3-Net k=64": ("s3net_cifar", {"growth_rate": 64}),
    "ResNet-20": ("resnet20_cifar", {}),
    "DenseNet k=12": ("densenet_cifar", {}),
}


@dataclass
class Args:
    """Measure training speed, memory, and the speed of the augmentation and of reading encoded images."""

    only: Literal["all", "training", "data", "decoding"] = "all"
    """What to measure."""
    rounds: int = 3
    """How often each side is run."""
    seconds: float = 8.0
    """How long each side trains in a round (3 steps at least)."""
    compile: bool = False
    """Also measure S3-Net compiled."""
    device: str | None = None
    """Where to train: cpu, cuda or mps; a GPU if there is one by default."""
    images: Path | None = None
    """Images for "decoding", in <class>/*; crops of two photographs by default."""
    out: Path = ROOT / "runs" / "benchmark"
    """Folder for benchmark.json."""


# ---- The published formulation ------------------------------------------------------------------------------------


class PublishedFormulation(nn.Module):
    """The CIFAR network as a plain reading of the published code has it.

    What the shortcuts have brought so far is concatenated anew at every layer, and a transition pools after its 1x1
    convolution. The same function as `models.create_model("s3net_cifar")`, parameter by parameter in the same order.
    """

    def __init__(self, growth_rate: int, layers: int = 12, num_classes: int = 100) -> None:
        super().__init__()
        channels = 24
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for block in range(3):
            widths = [channels] + [growth_rate] * (layers - 1)
            self.blocks.append(nn.ModuleList(self.unit(width, growth_rate, 3) for width in widths))
            channels += layers * growth_rate
            if block < 2:
                self.transitions.append(nn.Sequential(*self.unit(channels, channels, 1), nn.AvgPool2d(2)))
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)

    @staticmethod
    def unit(in_channels: int, out_channels: int, size: int) -> nn.Sequential:
        """BatchNorm, ReLU, convolution."""
        conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False)
        return nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True), conv)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, num_classes)` of `(N, 3, 32, 32)`."""
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            shortcuts = x
            for layer in block:
                x = layer(x)
                shortcuts = torch.cat([shortcuts, x], dim=1)
            x = self.transitions[i](shortcuts) if i < 2 else shortcuts
        return self.classifier(F.relu(self.norm(x)).mean(dim=(2, 3)))


# ---- One side, in a process of its own ----------------------------------------------------------------------------


def measure_side(side: str, seconds: float, device: str | None) -> dict[str, float]:
    """Train one side for a while; images/s and memory in MiB."""
    workers = join_ranks(device)
    step = published_step(side, workers.device) if side.startswith("published") else our_step(side, workers)
    before = peak_memory()
    started = time.perf_counter()
    step()
    first = time.perf_counter() - started
    step()
    times = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        step()
        if workers.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    result = {"images_per_second": BATCH / statistics.median(times), "first_step_seconds": first}
    if workers.device.type == "cuda":
        return result | {"memory": torch.cuda.max_memory_allocated() / 2**20}
    return result | {"process_memory": peak_memory(), "training_memory": peak_memory() - before}


def peak_memory() -> float:
    """The largest resident memory of this process so far, in MiB."""
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def published_step(side: str, device: torch.device):
    """A training step in float32, channels first, with the default SGD."""
    torch.manual_seed(0)
    model = PublishedFormulation(growth_rate=int(side.rpartition("=")[2])).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    images, labels = torch.randn(BATCH, 3, 32, 32, device=device), torch.randint(100, (BATCH,), device=device)

    def step() -> None:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_step(side: str, workers):
    """A step of the trainer as it runs by default: "ours NAME", or "compiled NAME"."""
    kind, _, name = side.partition(" ")
    keep_freed_memory()
    torch.manual_seed(0)
    network, options = NETWORKS[name]
    model = create_network(network, 100, **options).to(workers.device, memory_format=torch.channels_last)
    fused = workers.device.type in ("cpu", "cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=fused)
    trainer = Trainer(
        model=torch.compile(model) if kind == "compiled" else model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        precision=Precision(workers.device, Precision.is_faster(workers.device)),
        workers=workers,
    )
    batches = cifar_like_batches(workers.device)

    def forever():
        for epoch in range(10**6):
            yield from batches.epoch(epoch)

    stream = forever()

    def step() -> None:
        loss, _ = trainer._step(*next(stream))
        loss.item()

    return step


def cifar_like_batches(device: torch.device) -> TrainingBatches:
    """Batches of 64 of CIFAR-100's shape and augmentation, of random images."""
    recipe, generator = RECIPES["cifar100"], torch.Generator().manual_seed(0)
    images = torch.randint(256, (100 * BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = ImageSet(images, torch.randint(100, (len(images),), generator=generator), [str(i) for i in range(100)])
    return TrainingBatches(
        data, BATCH, device, recipe.mean, recipe.std, flip=recipe.flip, crop_padding=recipe.crop_padding, seed=0
    )


# ---- The tables ---------------------------------------------------------------------------------------------------


def benchmark_training(args: Args) -> dict:
    """Every side, `rounds` times, taking turns."""
    sides = ["published k=12", "published k=64", *(f"ours {name}" for name in NETWORKS)]
    if args.compile:
        sides += ["compiled S3-Net k=12", "compiled S3-Net k=64"]
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    with tqdm(total=args.rounds * len(sides), desc="training", unit="run", disable=None) as bar:
        for _ in range(args.rounds):
            for side in sides:
                bar.set_postfix_str(side)
                runs[side].append(run_side(side, args))
                bar.update()
    medians = {side: {key: statistics.median(run[key] for run in of) for key in of[0]} for side, of in runs.items()}
    ratios = {}
    for side in sides:
        if "S3-Net" in side:
            published = f"published {side.split()[-1]}"
            ratios[side] = {
                key: medians[side][key] / medians[published][key]
                for key in medians[side]
                if key != "first_step_seconds"
            }
            ratios[side]["images_per_second_by_round"] = [
                ours["images_per_second"] / theirs["images_per_second"]
                for ours, theirs in zip(runs[side], runs[published], strict=True)
            ]
    return {"medians": medians, "ratios_to_published": ratios, "runs": runs}


def run_side(side: str, args: Args) -> dict[str, float]:
    """One side in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_side, side, args.seconds, args.device).result()


class PilImages(Dataset):
    """The same images and transforms, an image at a time."""

    def __init__(self, data: ImageSet) -> None:
        recipe = RECIPES["cifar100"]
        self.images, self.labels = data.images.permute(0, 2, 3, 1).contiguous().numpy(), data.labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(recipe.mean, recipe.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def benchmark_data(rounds: int) -> dict:
    """Images/s of one pass over 6,400 images: ours on the CPU, and PIL with a DataLoader of 0 and 2 workers."""
    keep_freed_memory()
    batches = cifar_like_batches(torch.device("cpu"))
    pil = PilImages(ImageSet(batches.images, batches.labels, []))
    sides = {
        "ours": lambda epoch: batches.epoch(epoch),
        "PIL, DataLoader with 0 workers": lambda epoch: DataLoader(pil, BATCH, shuffle=True),
        "PIL, DataLoader with 2 workers": lambda epoch: DataLoader(pil, BATCH, shuffle=True, num_workers=2),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for epoch in tqdm(range(max(rounds, 5)), desc="data", unit="round", disable=None):
        for name, make in sides.items():
            started = time.perf_counter()
            for _ in make(epoch):
                pass
            rates[name].append(len(pil) / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "images_per_second": medians,
        "times_as_fast": {n: medians["ours"] / rate for n, rate in medians.items() if n != "ours"},
    }


def print_training(results: dict) -> None:
    """The training table."""
    columns = [key for key in next(iter(results["medians"].values())) if key != "first_step_seconds"]
    titles = {
        "images_per_second": "images/s",
        "process_memory": "process MiB",
        "training_memory": "of it training",
        "memory": "GPU MiB",
    }
    print(f"\n{'':24}" + "".join(f"{titles[key]:>16}" for key in columns))
    for side, medians in results["medians"].items():
        print(f"{side:24}" + "".join(f"{medians[key]:16.0f}" for key in columns))
    print("\ntimes the published formulation's")
    for side, ratios in results["ratios_to_published"].items():
        print(f"{side:24}" + "".join(f"{ratios[key]:16.2f}" for key in columns))


def main(args: Args) -> None:
    """Measure, print and write."""
    if args.rounds < 1:
        raise InputError(f"--rounds {args.rounds} is too small: give 1 or more")
    join_ranks(args.device)  # raises for a device that is not there
    make_folder(args.out)
    results = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "threads": torch.get_num_threads(),
        "batch_size": BATCH,
    }
    if args.only in ("all", "data"):
        results["data"] = benchmark_data(args.rounds)
        for name, rate in results["data"]["images_per_second"].items():
            print(f"{name:34}{rate:12,.0f} images/s")
    if args.only in ("all", "decoding"):
        results["decoding"] = benchmark_decoding(5 * args.rounds, args.images)
        print_decoding(results["decoding"])
    if args.only in ("all", "training"):
        results["training"] = benchmark_training(args)
        print_training(results["training"])
    write_atomically(args.out / "benchmark.json", lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))
    print(f"\nwritten to {args.out / 'benchmark.json'}")


if __name__ == "__main__":
    run_script(main, Args, __doc__)
