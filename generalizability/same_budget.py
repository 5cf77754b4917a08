"""Compare S3-Net with a ResNet and a DenseNet of its size under one budget, and ablate its shortcuts.

    python generalizability/same_budget.py --jobs 2         # everything, on CIFAR-100: about 10 hours on 2 cores
    python generalizability/same_budget.py --only search comparison --seeds 1
    python generalizability/same_budget.py --dataset digits --hold-out 300 --seeds 1
    python generalizability/same_budget.py --adopt runs/elsewhere --search-epochs 30 --search-images None

The three parts consist of runs of train_s3net.py. Interrupted runs are resumed and finished runs are not repeated. A
finished run with other flags in the same folder is an error. On Ctrl-C and SIGTERM the runs save themselves and end.

    search      One short run for each network and peak learning rate, on a part of the training images. The runs are
                judged on held-out training images, so the test images have no influence on the choice. On CIFAR-100
                the short search chose poor peaks: --search-epochs 30 --search-images None searches at full length.
    comparison  Each network with its best peak. Images, augmentation, batch size, epochs and one-cycle schedule are
                the same for all.
    ablation    S3-Net's layers with its shortcuts, with no shortcuts (a chain) and with dense connections, at the same
                width and at about the same number of parameters. Each runs on a part of the training images, at two
                peaks.

Writes results.json, tables.md, curves.png, search.png and ablation.png to --out, next to the runs.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from s3net_common.command_line import OVERWRITE, THREADS, answer_flags, flag, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import claim_folder, default_out

PARTS = ("search", "comparison", "ablation")


@dataclass
class Args:
    """Compare S3-Net with a ResNet and a DenseNet of its size under one budget, and ablate its shortcuts."""

    only: tuple[Literal["search", "comparison", "ablation"], ...] = PARTS
    """Parts to run. `comparison` and `ablation` need the runs of `search`."""
    dataset: Literal["cifar100", "digits"] = "cifar100"
    """Data set to train on."""
    data_dir: flag(Path, "DIR", "data/<dataset>") = None
    """Folder of the data set."""
    growth_rate: int = 12
    """Growth rate of S3-Net."""
    depth: int = 40
    """Depth of S3-Net."""
    seeds: int = 3
    """Runs of each network in the comparison, with seeds 0, 1, ..."""
    epochs: int = 30
    """Epochs of each run of the comparison."""
    batch_size: int = 128
    """Images per step in all runs."""
    peaks: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
    """Peak learning rates that the search tries for each network."""
    search_epochs: int = 8
    """Epochs of each run of the search."""
    search_images: int | None = 10_000
    """Training images of each run of the search; None for all."""
    hold_out: int = 5_000
    """Training images that the search holds out and validates on."""
    ablation_epochs: int = 20
    """Epochs of each run of the ablation."""
    ablation_images: int | None = 10_000
    """Training images of each run of the ablation; None for all."""
    ablation_peaks: tuple[float, ...] = (0.2, 1.6)
    """Peak learning rates of the ablation: the paper's learning rate, and S3-Net's best in the short search."""
    jobs: int = 1
    """Runs at a time. If there are several, each computes with one thread on a CPU."""
    device: flag(str, "DEVICE", "a GPU if there is one") = None
    """Device to train on: cpu, cuda or mps."""
    out: Path = field(default_factory=lambda: default_out("same_budget"))
    """Folder for the runs and the results. The results of an earlier call are replaced; finished runs are kept."""
    adopt: flag(tuple[Path, ...], "DIR...", "none") = ()
    """Train nothing: copy finished runs with these flags from DIR (a run, or a folder of runs) to --out, and report."""
    overwrite: OVERWRITE = False
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

from comparison.adoption import adopt_runs, report_rest, runs_below
from comparison.budget_report import REPORT_FILES, write_report
from comparison.jobs import Job, flag_name, run_jobs
from comparison.runs import Run
from s3net_networks.size import count_parameters


@dataclass(frozen=True)
class Network:
    """A network of the comparison or the ablation: its title, and the trainer's settings that build it."""

    title: str
    settings: dict[str, str | int]

    @property
    def folder(self) -> str:
        """The network's part of a run folder's name."""
        return "-".join(f"{name.replace('_', '-')}-{value}" for name, value in self.settings.items())


def main(args: Args) -> None:
    """Run the jobs that are not finished, then write the report on all finished ones.

    Raises:
        InputError: a flag is out of range, a path of --adopt holds no run, a run fails, or the search is not finished.
    """
    check_flags(args)
    named, contained = runs_below(args.adopt)
    claim_folder(args.out, *REPORT_FILES, overwrite=args.overwrite)
    networks = compared_networks(args)
    jobs = {"search": search_jobs(args, networks)}
    if args.adopt:
        adopt_and_report(args, networks, jobs["search"], named, contained)
        return
    if "search" in args.only:
        run_jobs(jobs["search"].values(), args.jobs, "search")
    if any(not job.finished() for job in jobs["search"].values()):
        raise InputError("the search for the learning rates is not finished: run it first, with --only search")
    peaks = best_peaks(networks, jobs["search"])
    jobs["comparison"] = comparison_jobs(args, networks, peaks)
    jobs["ablation"] = ablation_jobs(args)
    if "comparison" in args.only:
        first_seed = [job for (_, seed), job in jobs["comparison"].items() if seed == 0]
        run_jobs(first_seed, args.jobs, "comparison, seed 0")
    if "ablation" in args.only:
        run_jobs(jobs["ablation"].values(), args.jobs, "ablation")
    if "comparison" in args.only:
        run_jobs(jobs["comparison"].values(), args.jobs, "comparison, other seeds")
    write_report(args.out, jobs, peaks)


def adopt_and_report(
    args: Args, networks: list[Network], search: dict[tuple[str, float], Job], named: list[Run], contained: list[Run]
) -> None:
    """Take the runs of --adopt into --out, and report on all finished runs. No network is trained.

    Runs of the search are taken first: they decide which peaks the runs of the comparison must have.

    Raises:
        InputError: a run of `named` does not fit, two runs have the same flags, or nothing has finished.
    """
    rest = adopt_runs([*named, *contained], [*search.values()])
    peaks = best_peaks(networks, search)
    jobs = {"search": search, "comparison": comparison_jobs(args, networks, peaks), "ablation": ablation_jobs(args)}
    for part in ("comparison", "ablation"):
        rest = adopt_runs(rest, [*jobs[part].values()])
    every_job = [job for part in jobs.values() for job in part.values()]
    report_rest(rest, named, every_job)
    if not any(job.finished() for job in every_job):
        raise InputError("there is no finished run with these flags to report on: run or adopt one first")
    write_report(args.out, jobs, peaks)


def check_flags(args: Args) -> None:
    """Raise an InputError if a flag is out of range."""
    numbers = ("seeds", "epochs", "batch_size", "search_epochs", "search_images", "hold_out", "ablation_epochs")
    for name in (*numbers, "ablation_images", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"{flag_name(name)} {value} is not possible: give 1 or more")
    for name in ("peaks", "ablation_peaks"):
        peaks = getattr(args, name)
        if not peaks or not all(peak > 0 for peak in peaks):
            raise InputError(f"{flag_name(name)} needs one or more learning rates above 0")
    if not args.only:
        raise InputError(f"--only needs one or more of {', '.join(PARTS)}")


# ---- The networks -------------------------------------------------------------------------------------------------


def compared_networks(args: Args) -> list[Network]:
    """Return S3-Net, ResNet-20, and the DenseNet with S3-Net's growth rate that is closest to it in parameters."""
    k, depth = args.growth_rate, args.depth
    target = count_parameters("s3net_cifar", growth_rate=k, depth=depth)
    dense_depth = min(
        range(7, depth + 1, 3), key=lambda d: abs(count_parameters("densenet_cifar", growth_rate=k, depth=d) - target)
    )
    return [
        Network(f"S3-Net k={k}, depth={depth}", s3net_settings(k, depth)),
        Network("ResNet-20", {"model": "resnet20_cifar"}),
        Network(
            f"DenseNet k={k}, depth={dense_depth}",
            {"model": "densenet_cifar", "growth_rate": k, "depth": dense_depth},
        ),
    ]


def ablated_networks(args: Args) -> list[Network]:
    """Return S3-Net, and its layers as a chain and densely connected, at its growth rate and at about its size."""
    k, depth = args.growth_rate, args.depth
    target = count_parameters("s3net_cifar", growth_rate=k, depth=depth)
    networks = [Network(f"sparse shortcuts, k={k}", s3net_settings(k, depth))]
    for connections, title in (("chain", "no shortcuts"), ("dense", "dense connections")):
        parameters = {
            width: count_parameters("s3net_cifar", growth_rate=width, depth=depth, connections=connections)
            for width in range(1, 4 * k)
        }
        same_size = min(parameters, key=lambda width, counts=parameters: abs(counts[width] - target))
        for width in sorted({k, same_size}):
            settings = s3net_settings(width, depth) | {"connections": connections}
            networks.append(Network(f"{title}, k={width}", settings))
    return networks


def s3net_settings(growth_rate: int, depth: int) -> dict[str, str | int]:
    """Return the trainer's settings for an S3-Net."""
    return {"model": "s3net_cifar", "growth_rate": growth_rate, "depth": depth}


# ---- The runs -----------------------------------------------------------------------------------------------------


def search_jobs(args: Args, networks: list[Network]) -> dict[tuple[str, float], Job]:
    """Return a short run for every network and peak learning rate."""
    budget = {
        "hold_out": args.hold_out,
        "epochs": args.search_epochs,
        "seed": 1000,
        "limit_train": args.search_images,
    }
    return {
        (network.title, peak): make_job(args, f"search/{network.folder}-lr-{peak:g}", network, peak, budget)
        for network in networks
        for peak in args.peaks
    }


def comparison_jobs(args: Args, networks: list[Network], peaks: dict[str, float]) -> dict[tuple[str, int], Job]:
    """Return the full run of every network and seed, with the network's best peak."""
    return {
        (network.title, seed): make_job(
            args,
            f"comparison/{network.folder}-s{seed}",
            network,
            peaks[network.title],
            {"epochs": args.epochs, "seed": seed, "limit_train": None},
        )
        for seed in range(args.seeds)
        for network in networks
        if network.title in peaks
    }


def ablation_jobs(args: Args) -> dict[tuple[str, float], Job]:
    """Return a run for every kind of connections and peak learning rate."""
    budget = {"epochs": args.ablation_epochs, "seed": 0, "limit_train": args.ablation_images}
    return {
        (network.title, peak): make_job(args, f"ablation/{network.folder}-lr-{peak:g}", network, peak, budget)
        for peak in args.ablation_peaks
        for network in ablated_networks(args)
    }


def make_job(args: Args, folder: str, network: Network, peak: float, budget: dict[str, int | None]) -> Job:
    """Return the run of a network with a peak learning rate and a budget, in a folder below --out."""
    settings = {"dataset": args.dataset, **network.settings, "schedule": "onecycle", "lr": peak}
    settings |= {"batch_size": args.batch_size, **budget, "data_dir": args.data_dir, "device": args.device}
    return Job(args.out / folder, settings)


def best_peaks(networks: list[Network], search: dict[tuple[str, float], Job]) -> dict[str, float]:
    """Return the peak learning rate of each network with the lowest last error on the held-out images.

    Networks without a finished run of the search are left out.
    """
    errors = {key: job.summary()["last_val_error"] for key, job in search.items() if job.finished()}
    peaks = {}
    for network in networks:
        tried = [peak for title, peak in errors if title == network.title]
        if tried:
            peaks[network.title] = min(tried, key=lambda peak, title=network.title: errors[title, peak])
    return peaks


if __name__ == "__main__":
    run_script(main, Args, __doc__, resume="run the same command again to continue")
