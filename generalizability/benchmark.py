"""Measure S3-Net's training speed and memory against the published formulation and the baselines.

    python generalizability/benchmark.py                   # everything: about 14 minutes on 2 cores
    python generalizability/benchmark.py --only data       # the augmentation against PIL with a DataLoader
    python generalizability/benchmark.py --only decoding   # LMDB against an image folder and the decoder
    python generalizability/benchmark.py --compile         # also S3-Net under torch.compile, and the time it compiles
    python generalizability/benchmark.py --compile --graphs    # on a GPU, also with steps replayed as CUDA graphs

Each contender trains in a fresh process, the contenders take turns, and each number is the median over the rounds. A
training step fetches and augments a batch of images and runs the forward pass, the backward pass and the update. The
published formulation is given its batch, so its time excludes fetching and augmentation. CPU time is the time of all
threads, summed. Prints tables and writes `benchmark.json`.
"""

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Literal

from recipes import RECIPES
from s3net_common.command_line import OVERWRITE, THREADS, answer_flags, flag, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import claim_folder, default_out, relative, run_record, write_json

NETWORKS = {  # measured networks by title: name and options
    "S3-Net k=12": ("s3net_cifar", {"growth_rate": 12}),
    "S3-Net k=64": ("s3net_cifar", {"growth_rate": 64}),
    "ResNet-20": ("resnet20_cifar", {}),
    "DenseNet k=12": ("densenet_cifar", {}),
    "DenseNet k=12, depth=22": ("densenet_cifar", {"depth": 22}),  # of S3-Net's size
}


@dataclass
class Args:
    """Measure training speed and memory, and the speed of the augmentation and of reading encoded images."""

    only: Literal["all", "training", "data", "decoding"] = "all"
    """What to measure."""
    networks: tuple[Literal[tuple(NETWORKS)], ...] = tuple(NETWORKS)
    """Networks whose training is measured; an S3-Net is measured beside its published formulation."""
    batch_size: int = 64
    """Images per training step."""
    rounds: int = 3
    """Number of runs of each contender."""
    seconds: float = 8.0
    """Training time of each run in seconds, at least 3 steps."""
    compile: bool = False
    """Also measure S3-Net under torch.compile."""
    graphs: bool = False
    """Also measure S3-Net with its training step replayed as a CUDA graph."""
    device: flag(str, "DEVICE", "a GPU if there is one") = None
    """Device to train on: cpu, cuda or mps."""
    images: flag(Path, "DIR", "crops of two photographs") = None
    """Images for "decoding": a folder with a subfolder for each class."""
    out: Path = field(default_factory=lambda: default_out("benchmark"))
    """Folder for benchmark.json. The file of an earlier run is replaced."""
    overwrite: OVERWRITE = False
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from data.batches import TrainingBatches
from data.image_sets import ImageSet
from decoding_benchmark import benchmark_decoding, print_decoding
from distributed import Ranks, device_name, join_ranks
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.progress import ProgressBar
from s3net_networks import create_network
from training.cuda_graphs import GraphedStep
from training.engine import Precision, Trainer

try:
    import resource
except ImportError:  # Windows
    resource = None

# ---- The published formulation ------------------------------------------------------------------------------------


class PublishedFormulation(nn.Module):
    """The CIFAR network, formulated as in the published code.

    Every layer concatenates its output with all earlier ones, and a transition pools after its 1x1 convolution. The
    function and its parameters are those of `models.create_model("s3net_cifar")`, in the same order.
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
        """Return BatchNorm, ReLU and a convolution."""
        conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False)
        return nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True), conv)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `(N, num_classes)` of images `(N, 3, 32, 32)`."""
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            shortcuts = x
            for layer in block:
                x = layer(x)
                shortcuts = torch.cat([shortcuts, x], dim=1)
            x = self.transitions[i](shortcuts) if i < 2 else shortcuts
        return self.classifier(F.relu(self.norm(x)).mean(dim=(2, 3)))


# ---- One contender, in its own process ----------------------------------------------------------------------------


def measure_contender(contender: str, batch_size: int, seconds: float, device: str | None) -> dict[str, float]:
    """Train one contender for some seconds.

    Returns:
        Images per second, CPU time in milliseconds per image, the first step's seconds, and memory in MiB.
    """
    ranks = join_ranks(device)
    is_published = contender.startswith("published")
    make_step = published_step if is_published else trainer_step
    step = make_step(contender, batch_size, ranks)
    memory_before = peak_memory()
    started = time.perf_counter()
    step()
    first = time.perf_counter() - started
    step()
    times = []
    cpu_before = time.process_time()
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        step()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    cpu_seconds = time.process_time() - cpu_before
    result = {
        "images_per_second": batch_size / statistics.median(times),
        "cpu_ms_per_image": 1000 * cpu_seconds / (len(times) * batch_size),
        "first_step_seconds": first,
    }
    if ranks.device.type == "cuda":
        return result | {"memory": torch.cuda.max_memory_allocated() / 2**20}
    if memory_before is None:
        return result
    return result | {"process_memory": peak_memory(), "training_memory": peak_memory() - memory_before}


def peak_memory() -> float | None:
    """Return the peak resident memory of this process in MiB, or None on Windows, where Python cannot tell."""
    if resource is None:
        return None
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def published_step(contender: str, batch_size: int, ranks: Ranks) -> Callable[[], None]:
    """Return a training step of "published k=K" in float32, channels first, with PyTorch's default SGD."""
    device = ranks.device
    torch.manual_seed(0)
    model = PublishedFormulation(growth_rate=int(contender.rpartition("=")[2])).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    images, labels = torch.randn(batch_size, 3, 32, 32, device=device), torch.randint(100, (batch_size,), device=device)

    def step() -> None:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def trainer_step(contender: str, batch_size: int, ranks: Ranks) -> Callable[[], None]:
    """Return a step of the trainer with its default settings, for "ours NAME", "compiled NAME" or "graphs NAME"."""
    kind, _, name = contender.partition(" ")
    keep_freed_memory()
    torch.manual_seed(0)
    network, options = NETWORKS[name]
    model = create_network(network, 100, **options).to(ranks.device, memory_format=torch.channels_last)
    fused = ranks.device.type in ("cpu", "cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=fused)
    trainer = Trainer(
        model=model,
        compiled=torch.compile(model, dynamic=False) if kind == "compiled" else None,
        compiled_size=batch_size,
        learning_rate=torch.zeros((), device=ranks.device) if ranks.device.type == "cuda" else None,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        precision=Precision(ranks.device, Precision.is_faster(ranks.device)),
        ranks=ranks,
    )
    if kind == "graphs":
        trainer.graphed = GraphedStep(trainer._compute, batch_size)
    batches = cifar_like_batches(batch_size, ranks.device)

    stream = chain.from_iterable(batches.epoch(epoch) for epoch in count())

    def step() -> None:
        loss, _ = trainer._step(*next(stream))
        loss.item()

    return step


def cifar_like_batches(batch_size: int, device: torch.device) -> TrainingBatches:
    """Return 100 batches of random images of CIFAR-100's shape, with its augmentation."""
    recipe, generator = RECIPES["cifar100"], torch.Generator().manual_seed(0)
    images = torch.randint(256, (100 * batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = ImageSet(images, torch.randint(100, (len(images),), generator=generator), [str(i) for i in range(100)])
    return TrainingBatches(
        data, batch_size, device, recipe.mean, recipe.std, flip=recipe.flip, crop_padding=recipe.crop_padding, seed=0
    )


# ---- The tables ---------------------------------------------------------------------------------------------------


def benchmark_training(args: Args) -> dict:
    """Measure every contender in turn, `args.rounds` times. Return medians, ratios and all measurements."""
    s3nets = [name for name in args.networks if name.startswith("S3-Net")]
    contenders = [f"published {name.split()[-1]}" for name in s3nets] + [f"ours {name}" for name in args.networks]
    if args.compile:
        contenders += [f"compiled {name}" for name in s3nets]
    if args.graphs:
        contenders += [f"graphs {name}" for name in s3nets]
    runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in contenders}
    with ProgressBar(total=args.rounds * len(contenders), desc="training", unit="run") as bar:
        for _ in range(args.rounds):
            for contender in contenders:
                bar.set_postfix_str(contender)
                runs[contender].append(measure_in_new_process(contender, args))
                bar.update()
    medians = {
        contender: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        for contender, measured in runs.items()
    }
    ratios = {}
    for contender in contenders:
        if "S3-Net" in contender:
            published = f"published {contender.split()[-1]}"
            ratios[contender] = {
                key: value / medians[published][key]
                for key, value in medians[contender].items()
                if key != "first_step_seconds"
            }
            ratios[contender]["images_per_second_by_round"] = [
                run["images_per_second"] / published_run["images_per_second"]
                for run, published_run in zip(runs[contender], runs[published], strict=True)
            ]
    return {"medians": medians, "ratios_to_published": ratios, "runs": runs}


def measure_in_new_process(contender: str, args: Args) -> dict[str, float]:
    """Return the measurements of one contender in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_contender, contender, args.batch_size, args.seconds, args.device).result()


class PilImages(Dataset):
    """The same images and augmentation, one PIL image at a time."""

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


def benchmark_data(batch_size: int, rounds: int) -> dict:
    """Measure images per second on the CPU over 100 batches, for our batches and for PIL with 0 and 2 workers."""
    keep_freed_memory()
    batches = cifar_like_batches(batch_size, torch.device("cpu"))
    pil = PilImages(ImageSet(batches.images, batches.labels, []))
    contenders = {
        "ours": lambda epoch: batches.epoch(epoch),
        "PIL, DataLoader with 0 workers": lambda epoch: DataLoader(pil, batch_size, shuffle=True),
        "PIL, DataLoader with 2 workers": lambda epoch: DataLoader(pil, batch_size, shuffle=True, num_workers=2),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for epoch in ProgressBar(range(max(rounds, 5)), desc="data", unit="round"):
        for name, make_batches in contenders.items():
            started = time.perf_counter()
            for _ in make_batches(epoch):
                pass
            rates[name].append(len(pil) / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "images_per_second": medians,
        "times_as_fast": {n: medians["ours"] / rate for n, rate in medians.items() if n != "ours"},
    }


def print_training(results: dict) -> None:
    """Print the training table."""
    columns = [key for key in next(iter(results["medians"].values())) if key != "first_step_seconds"]
    titles = {
        "images_per_second": "images/s",
        "cpu_ms_per_image": "CPU ms/image",
        "process_memory": "process MiB",
        "training_memory": "training MiB",
        "memory": "GPU MiB",
    }
    print(f"\n{'':30}" + "".join(f"{titles[key]:>16}" for key in columns))
    for contender, medians in results["medians"].items():
        print(f"{contender:30}" + "".join(f"{medians[key]:16,.1f}" for key in columns))
    if results["ratios_to_published"]:
        print("\nratio to the published formulation")
    for contender, ratios in results["ratios_to_published"].items():
        print(f"{contender:30}" + "".join(f"{ratios[key]:16.2f}" for key in columns))


def main(args: Args) -> None:
    """Run the measurements, then print and write them."""
    if args.rounds < 1:
        raise InputError(f"--rounds {args.rounds} is too small: give 1 or more")
    if not args.networks:
        raise InputError("--networks names no network: give one or more, or leave it out for all")
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size} is too small: give 1 or more")
    device = join_ranks(args.device).device  # raises an InputError if the device is missing
    if args.graphs and device.type != "cuda":
        raise InputError("--graphs needs a CUDA GPU: leave it out")
    claim_folder(args.out, "benchmark.json", overwrite=args.overwrite)
    results = {"threads": torch.get_num_threads(), "batch_size": args.batch_size, "device": device_name(device)}
    results["precision"] = Precision(device, Precision.is_faster(device)).name
    if args.only in ("all", "data"):
        results["data"] = benchmark_data(args.batch_size, args.rounds)
        for name, rate in results["data"]["images_per_second"].items():
            print(f"{name:34}{rate:12,.0f} images/s")
    if args.only in ("all", "decoding"):
        results["decoding"] = benchmark_decoding(5 * args.rounds, args.images)
        print_decoding(results["decoding"])
    if args.only in ("all", "training"):
        results["training"] = benchmark_training(args)
        print_training(results["training"])
    write_json(args.out / "benchmark.json", run_record() | results)
    print(f"\nwritten to {relative(args.out / 'benchmark.json')}")


if __name__ == "__main__":
    run_script(main, Args, __doc__)
