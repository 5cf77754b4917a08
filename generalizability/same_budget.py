"""S3-Net, a ResNet and a DenseNet of its size under one budget, and S3-Net without its shortcuts or with dense ones.

    python same_budget.py --jobs 2                  # all of it on CIFAR-100: about 10 hours on 2 cores
    python same_budget.py --only search comparison --seeds 1
    python same_budget.py --dataset digits --hold-out 300 --epochs 4 --search-epochs 1 --ablation-epochs 2 --seeds 1

Three parts, each made of runs of train_s3net.py that are resumed where they stand; a finished one is not repeated, and
one in the same folder that had other flags is an error. On Ctrl-C and SIGTERM the runs save themselves and end.

    search      each network, one short run for each peak learning rate, on a part of the training images, judged on
                training images that were held out: the test images are not looked at.
    comparison  each network with its own best peak: the same images, augmentation, batch, epochs, one-cycle schedule.
    ablation    S3-Net's layers with its shortcuts, with none (a chain) and with dense connections, at the same width
                and at about the same number of parameters; on a part of the training images, each with two peaks.

Writes results.json, tables.md, curves.png, search.png and ablation.png into --out, beside the runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from comparison.budget_report import write_report
from comparison.jobs import Job, read_summary, run_jobs
from s3net_common.command_line import run_script
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT, make_folder
from s3net_networks.size import count_parameters

PARTS = ("search", "comparison", "ablation")


@dataclass
class Args:
    """S3-Net, a ResNet and a DenseNet of its size under one budget, and an ablation of the shortcuts."""

    only: tuple[Literal["search", "comparison", "ablation"], ...] = PARTS
    """The parts to run; `comparison` and `ablation` need the runs of `search`."""
    dataset: Literal["cifar100", "digits"] = "cifar100"
    """Images to train on."""
    data_dir: Path | None = None
    """Where they are; data/<dataset> by default."""
    growth_rate: int = 12
    """S3-Net's growth rate."""
    depth: int = 40
    """S3-Net's depth."""
    seeds: int = 3
    """Runs of each network in the comparison: seeds 0, 1, ..."""
    epochs: int = 30
    """Epochs of the comparison."""
    batch_size: int = 128
    """Images a step, everywhere."""
    peaks: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
    """Peak learning rates that the search tries with each network."""
    search_epochs: int = 8
    """Epochs of each run of the search."""
    search_images: int | None = 10_000
    """Training images of the search; None for all."""
    hold_out: int = 5_000
    """Training images that judge the search's runs."""
    ablation_epochs: int = 20
    """Epochs of each run of the ablation."""
    ablation_images: int | None = 10_000
    """Training images of the ablation; None for all."""
    ablation_peaks: tuple[float, ...] = (0.2, 1.6)
    """Its peak learning rates: the paper's learning rate, and what the search finds best for S3-Net on CIFAR-100."""
    jobs: int = 1
    """Runs at a time; with more than 1, each computes in one thread on a CPU."""
    device: str | None = None
    """Where to compute; a GPU if there is one by default."""
    out: Path = ROOT / "runs" / "same_budget"
    """Folder for the runs and the results."""


@dataclass(frozen=True)
class Network:
    """One side: what it is called, and the flags that choose it."""

    title: str
    flags: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Its part of a run folder's name."""
        return "-".join(flag.removeprefix("--") for flag in self.flags)


def main(args: Args) -> None:
    """Run what is missing, then write the report on what there is.

    Raises:
        InputError: a flag is out of its range, a run fails, or the search is missing.
    """
    check(args)
    make_folder(args.out)
    networks = compared_networks(args)
    report = {"search": search_jobs(args, networks)}
    if "search" in args.only:
        run_jobs(report["search"].values(), args.jobs, "search")
    peaks = best_peaks(networks, report["search"])
    report["comparison"] = comparison_jobs(args, networks, peaks)
    report["ablation"] = ablation_jobs(args)
    if "comparison" in args.only:
        first_seeds = [job for (_, seed), job in report["comparison"].items() if seed == 0]
        run_jobs(first_seeds, args.jobs, "comparison, seed 0")
    if "ablation" in args.only:
        run_jobs(report["ablation"].values(), args.jobs, "ablation")
    if "comparison" in args.only:
        run_jobs(report["comparison"].values(), args.jobs, "comparison, other seeds")
    write_report(args.out, report, peaks)


def check(args: Args) -> None:
    """Raises InputError for a number out of its range."""
    numbers = ("seeds", "epochs", "batch_size", "search_epochs", "search_images", "hold_out", "ablation_epochs")
    for name in (*numbers, "ablation_images", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} is not possible: give 1 or more")
    for flag, peaks in (("--peaks", args.peaks), ("--ablation-peaks", args.ablation_peaks)):
        if not peaks or not all(peak > 0 for peak in peaks):
            raise InputError(f"{flag} needs one or more learning rates above 0")
    if not args.only:
        raise InputError(f"--only needs one or more of {', '.join(PARTS)}")


# ---- What is compared ---------------------------------------------------------------------------------------------


def compared_networks(args: Args) -> list[Network]:
    """S3-Net, ResNet-20, and the DenseNet of S3-Net's growth rate that is nearest to it in parameters."""
    k, depth = args.growth_rate, args.depth
    target = count_parameters("s3net_cifar", growth_rate=k, depth=depth)
    dense = min(
        range(7, depth + 1, 3), key=lambda d: abs(count_parameters("densenet_cifar", growth_rate=k, depth=d) - target)
    )
    return [
        Network(f"S3-Net k={k}, depth={depth}", s3net_flags(k, depth)),
        Network("ResNet-20", ("--model", "resnet20_cifar")),
        Network(
            f"DenseNet k={k}, depth={dense}",
            ("--model", "densenet_cifar", "--growth-rate", str(k), "--depth", str(dense)),
        ),
    ]


def ablated_networks(args: Args) -> list[Network]:
    """S3-Net, and its layers as a chain and densely connected: at its growth rate, and with about its parameters."""
    k, depth = args.growth_rate, args.depth
    target = count_parameters("s3net_cifar", growth_rate=k, depth=depth)
    networks = [Network(f"sparse shortcuts, k={k}", s3net_flags(k, depth))]
    for connections, title in (("chain", "no shortcuts"), ("dense", "dense connections")):
        same_size = min(
            range(1, 4 * k),
            key=lambda width, c=connections: abs(
                count_parameters("s3net_cifar", growth_rate=width, depth=depth, connections=c) - target
            ),
        )
        for width in sorted({k, same_size}):
            flags = (*s3net_flags(width, depth), "--connections", connections)
            networks.append(Network(f"{title}, k={width}", flags))
    return networks


def s3net_flags(growth_rate: int, depth: int) -> tuple[str, ...]:
    """The flags of an S3-Net."""
    return ("--model", "s3net_cifar", "--growth-rate", str(growth_rate), "--depth", str(depth))


# ---- The runs -----------------------------------------------------------------------------------------------------


def search_jobs(args: Args, networks: list[Network]) -> dict[tuple[str, float], Job]:
    """A short run for every network and peak learning rate."""
    budget = ["--hold-out", str(args.hold_out), "--epochs", str(args.search_epochs), "--seed", "1000"]
    budget += ["--limit-train", str(args.search_images)] if args.search_images else []
    return {
        (network.title, peak): make_job(args, f"search/{network.folder}-lr-{peak:g}", network, peak, budget)
        for network in networks
        for peak in args.peaks
    }


def comparison_jobs(args: Args, networks: list[Network], peaks: dict[str, float]) -> dict[tuple[str, int], Job]:
    """The full run of every network and seed, with the network's best peak."""
    return {
        (network.title, seed): make_job(
            args,
            f"comparison/{network.folder}-s{seed}",
            network,
            peaks[network.title],
            ["--epochs", str(args.epochs), "--seed", str(seed)],
        )
        for seed in range(args.seeds)
        for network in networks
    }


def ablation_jobs(args: Args) -> dict[tuple[str, float], Job]:
    """A run of every kind of connections with every peak learning rate."""
    budget = ["--epochs", str(args.ablation_epochs), "--seed", "0"]
    budget += ["--limit-train", str(args.ablation_images)] if args.ablation_images else []
    return {
        (network.title, peak): make_job(args, f"ablation/{network.folder}-lr-{peak:g}", network, peak, budget)
        for peak in args.ablation_peaks
        for network in ablated_networks(args)
    }


def make_job(args: Args, name: str, network: Network, peak: float, budget: list[str]) -> Job:
    """The command line of one run."""
    folder = args.out / name
    flags = ["--dataset", args.dataset, *network.flags, "--schedule", "onecycle", "--lr", f"{peak:g}"]
    flags += ["--batch-size", str(args.batch_size), *budget, "--out", str(folder)]
    flags += ["--data-dir", str(args.data_dir)] if args.data_dir else []
    flags += ["--device", args.device] if args.device else []
    return Job(folder, tuple(flags))


def best_peaks(networks: list[Network], search: dict[tuple[str, float], Job]) -> dict[str, float]:
    """The peak learning rate of each network whose last error on the held-out images is lowest.

    Raises:
        InputError: a run of the search isn't finished.
    """
    if any(not job.finished() for job in search.values()):
        raise InputError("the search for the learning rates is not finished: run it first, with --only search")
    errors = {key: read_summary(job.folder)["last_val_error"] for key, job in search.items()}
    return {
        network.title: min(
            (peak for title, peak in search if title == network.title), key=lambda p: errors[network.title, p]
        )
        for network in networks
    }


if __name__ == "__main__":
    run_script(main, Args, __doc__)
