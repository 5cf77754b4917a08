"""Compare two combined recipes of few epochs with the plain one-cycle schedule.

    python generalizability/fast_recipes.py --jobs 2    # 9 runs of 15 epochs on CIFAR-100
    python generalizability/fast_recipes.py --dataset digits --hold-out 300 --epochs 4 --seeds 2

The network is S3-Net as it is. All recipes have the same images, augmentation, batch size, peak learning rate, epochs
and seeds, and are judged on held-out training images, so that the test images have no influence on the choice. A recipe
wins if its error is smaller by at least a point and the 95% interval of the difference, paired by seed, lies below 0.

    plain         SGD with momentum and the one-cycle schedule
    regularised   also a larger weight decay, which spares BatchNorm and biases, label smoothing, Nesterov momentum, and
                  the weights averaged over the last fifth of the epochs
    progressive   the same, and images at three quarters of their size in the first half of the epochs
                  (train_s3net.py --recipe fast)

Interrupted runs are resumed and finished runs are not repeated. Writes results.json, tables.md and curves.png to --out,
next to the runs.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recipes import FAST, RECIPES, fast_settings
from s3net_common.command_line import OVERWRITE, THREADS, answer_flags, flag, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import claim_folder, default_out


@dataclass
class Args:
    """Compare two combined recipes with the plain one-cycle schedule."""

    dataset: Literal["cifar100", "digits"] = "cifar100"
    """Data set to train on."""
    data_dir: flag(Path, "DIR", "data/<dataset>") = None
    """Folder of the data set."""
    growth_rate: int = 12
    """Growth rate of S3-Net."""
    depth: int = 40
    """Depth of S3-Net."""
    epochs: int = FAST["epochs"]
    """Epochs of each run: a complete schedule."""
    seeds: int = 3
    """Runs of each recipe, with seeds 0, 1, ..."""
    lr: float = FAST["lr"]
    """Peak learning rate of all recipes."""
    batch_size: int = FAST["batch_size"]
    """Images per step."""
    hold_out: int = 5_000
    """Training images that are held out and validated on."""
    limit_train: flag(int, "N", "all") = None
    """Train on N of the training images only."""
    jobs: int = 1
    """Runs at a time. If there are several, each computes with one thread on a CPU."""
    device: flag(str, "DEVICE", "a GPU if there is one") = None
    """Device to train on: cpu, cuda or mps."""
    adopt: flag(tuple[Path, ...], "DIR...", "none") = ()
    """Train nothing: copy finished runs with these flags from DIR (a run, or a folder of runs) to --out, and report."""
    out: Path = field(default_factory=lambda: default_out("fast_recipes"))
    """Folder for the runs and the results. The results of an earlier call are replaced; finished runs are kept."""
    overwrite: OVERWRITE = False
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

from comparison.adoption import adopt_runs, report_rest, runs_below
from comparison.budget_report import comparison_table, draw_comparison, result_row, seed_differences
from comparison.jobs import Job, flag_name, run_jobs
from s3net_common.output_files import relative, save_figure, shell_command, write_atomically, write_json

FILES = ("results.json", "tables.md", "curves.png")
PLAIN = "plain"
CLAIM = 1.0  # percentage points: two seeds of one recipe differ by about as much


def main(args: Args) -> None:
    """Run what is not finished, or adopt runs, then write the report.

    Raises:
        InputError: a flag is out of range, a run fails, or a run cannot be adopted.
    """
    for name in ("epochs", "seeds", "lr", "batch_size", "hold_out", "jobs"):
        if getattr(args, name) <= 0:
            raise InputError(f"{flag_name(name)} {getattr(args, name)} is not possible: give a number above 0")
    if args.epochs < 2:
        raise InputError("--epochs 1 is not possible: give 2 or more, of which progressive has half on smaller images")
    claim_folder(args.out, *FILES, overwrite=args.overwrite)
    jobs = recipe_jobs(args)
    if args.adopt:
        named, contained = runs_below(args.adopt)
        rest = adopt_runs([*named, *contained], [*jobs.values()])
        report_rest(rest, named, [*jobs.values()])
    else:
        run_jobs(jobs.values(), args.jobs, "recipes")
    write_report(args.out, jobs)


def recipe_jobs(args: Args) -> dict[tuple[str, int], Job]:
    """Return the run of every recipe and seed. All recipes of a seed come together."""
    common = {"dataset": args.dataset, "model": "s3net_cifar", "growth_rate": args.growth_rate, "depth": args.depth}
    common |= {"schedule": FAST["schedule"], "lr": args.lr, "batch_size": args.batch_size, "epochs": args.epochs}
    common |= {"hold_out": args.hold_out, "limit_train": args.limit_train}
    common |= {"data_dir": args.data_dir, "device": args.device}
    return {
        (name, seed): Job(args.out / f"{name}-s{seed}", common | settings | {"seed": seed})
        for seed in range(args.seeds)
        for name, settings in combined_recipes(args.dataset, args.epochs).items()
    }


def combined_recipes(dataset: str, epochs: int) -> dict[str, dict]:
    """Return the settings of each recipe, which are added to the common ones."""
    progressive = fast_settings(epochs, RECIPES[dataset].image_size)
    regularised = {name: value for name, value in progressive.items() if not name.startswith("early_")}
    return {PLAIN: {}, "regularised": regularised, "progressive": progressive}


def write_report(out: Path, jobs: dict[tuple[str, int], Job]) -> None:
    """Write and print the results of all finished runs."""
    rows = [result_row(name, job) for (name, _), job in jobs.items() if job.finished()]
    if not rows:
        raise InputError(f"{relative(out)} has no finished run to report on")
    differences = [gain(row) for row in seed_differences(rows, PLAIN)]
    unfinished = sum(not job.finished() for job in jobs.values())
    facts = {"command": shell_command(), "unfinished_runs": unfinished, "differences": differences, "runs": rows}
    write_json(out / "results.json", facts)
    lines = [
        f"- {row['recipe']}: {row['mean']:+.2f} points against {PLAIN} over {len(row['seeds'])} "
        f"seed{'s' if len(row['seeds']) > 1 else ''}"
        + (interval_text(row, len(differences)) if row["interval"] else " (no interval)")
        + (": it wins" if row["wins"] else ": no claim")
        for row in differences
    ]
    tables = "\n".join(
        ["Errors on held-out training images after the last epoch", "", comparison_table(rows), *lines, ""]
    )
    write_atomically(out / "tables.md", lambda path: path.write_text(tables, encoding="utf-8"))
    save_figure(out / "curves.png", draw_comparison(rows, "Recipes", "held-out training images"), dpi=110)
    print(tables)
    print(f"written to {relative(out)}" + (f"; {unfinished} runs are not finished" if unfinished else ""))


def interval_text(row: dict, count: int) -> str:
    """Return the interval of a difference; for `count` > 1 differences also the one with Bonferroni's correction."""
    text = "95% interval {:+.2f} to {:+.2f}".format(*row["interval"])
    if count > 1:
        low, high = row["corrected_interval"]
        text += f"; with Bonferroni's correction for {count} differences {low:+.2f} to {high:+.2f}"
    return f" ({text})"


def gain(row: dict) -> dict:
    """Return a difference as a recipe's error minus the plain one's, and whether the recipe wins."""
    difference = {"recipe": row["second"], "seeds": row["seeds"], "mean": -row["mean"]}
    for name in ("interval", "corrected_interval"):
        difference[name] = row[name] and (-row[name][1], -row[name][0])
    interval = difference["interval"]
    return difference | {"wins": interval is not None and interval[1] < 0 and row["mean"] >= CLAIM}


if __name__ == "__main__":
    run_script(main, Args, __doc__, resume="run the same command again to continue")
