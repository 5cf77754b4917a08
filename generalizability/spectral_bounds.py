"""A spectral margin bound of trained networks beside their true generalization gaps.

    python generalizability/spectral_bounds.py                # small networks on digits: minutes
    python generalizability/spectral_bounds.py --pretrained   # also the S3-Net whose weights are in this repository

The bound of Bartlett, Foster and Telgarsky (2017, theorem 1.1) is, up to constants and logarithms, the share of
training images with a margin below gamma, plus |X|_F R / (gamma n): X are the n training images, and R is the
network's spectral complexity. The theorem is about chains. For networks with shortcuts this script uses the Lipschitz
constants along the graph (lipschitz.py), with BatchNorm folded into the convolutions: our adaptation. A value above 1
says nothing about the error (it is vacuous). The question is whether the bound at least ranks the networks by their
gaps.

Each small network trains on a few digits without augmentation. Writes spectral_bounds.json and spectral_bounds.png.
"""

import math
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from recipes import RECIPES, RunConfig
from s3net_common.command_line import OVERWRITE, THREADS, answer_flags, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT, claim_folder, default_out, relative, run_record, save_figure, write_json

IMAGE_SIZE = 16  # height and width in pixels, to which the 8x8 digits are enlarged
QUANTILE = 0.1  # gamma: the margin that this share of the rightly classified training images does not exceed
NETWORKS = {  # title: name and options
    "sparse, k=8": ("s3net_cifar", {"growth_rate": 8, "depth": 13}),
    "dense, k=5": ("s3net_cifar", {"growth_rate": 5, "depth": 13, "connections": "dense"}),
    "chain, k=10": ("s3net_cifar", {"growth_rate": 10, "depth": 13, "connections": "chain"}),
    "residual, k=10": ("s3net_cifar", {"growth_rate": 10, "depth": 13, "connections": "residual"}),
    "ResNet-20": ("resnet20_cifar", {}),
    "DenseNet k=6": ("densenet_cifar", {"growth_rate": 6, "depth": 13}),
}


@dataclass
class Args:
    """Compare a spectral margin bound with true generalization gaps."""

    seeds: int = 3
    """Networks of each kind, with other initial weights and another order of the images."""
    epochs: int = 15
    """Passes over the training images."""
    images: int = 300
    """Digits to train on. The others test."""
    pretrained: bool = False
    """Also evaluate weights/s3net_cifar on images of CIFAR-100."""
    data_dir: Path = ROOT / "data" / "cifar100"
    """CIFAR-100, for --pretrained."""
    out: Path = field(default_factory=lambda: default_out("spectral_bounds"))
    """Folder for the results. Those of an earlier run are replaced."""
    overwrite: OVERWRITE = False
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import kendalltau, sem, t
from torch import Tensor, nn

from data.batches import EvaluationBatches, TrainingBatches
from data.datasets import load_dataset
from data.image_sets import ImageSet
from distributed import Ranks
from lipschitz import linear_layers, spectral_complexity
from models import create_model, pretrained_file, read_metadata
from s3net_common.cpu_kernels import keep_freed_memory, plain_operations
from s3net_common.progress import ProgressBar
from s3net_networks import create_network
from training.engine import Progress
from training.optimization import make_trainer

CPU = torch.device("cpu")
MEANS = ("parameters", "train_error", "test_error", "gap", "margin", "log10_complexity", "log10_bound")


def main(args: Args) -> None:
    """Train the networks, compute bounds and gaps, and write them."""
    if min(args.seeds, args.epochs) < 1 or not 50 <= args.images <= 1500:
        raise InputError("give 1 or more --seeds and --epochs, and 50 to 1500 --images")
    claim_folder(args.out, "spectral_bounds.json", "spectral_bounds.png", overwrite=args.overwrite)
    keep_freed_memory()
    train, test = digits(args.images)
    rows = []
    jobs = [(title, seed) for seed in range(args.seeds) for title in NETWORKS]
    for title, seed in ProgressBar(jobs, unit="network"):
        model = train_network(*NETWORKS[title], train, seed, args.epochs)
        recipe = RECIPES["digits"]
        row = {"network": title, "seed": seed} | bound_and_gap(model, train, test, recipe.mean, recipe.std)
        rows.append(row)
        ProgressBar.write(line(row))
    results = {"means": means(rows), "rows": rows, "rank_correlation": rank_correlation(rows)}
    if args.pretrained:
        results["pretrained"] = pretrained_row(args.data_dir)
        print(line(results["pretrained"]))
    correlation = results["rank_correlation"]
    print(f"Kendall's tau between bound and gap: {correlation['tau']:.2f} (p = {correlation['p']:.2f})")
    write_json(args.out / "spectral_bounds.json", run_record() | {"quantile": QUANTILE} | results)
    save_figure(args.out / "spectral_bounds.png", draw(rows, results.get("pretrained")), dpi=110)
    print(f"written to {relative(args.out / 'spectral_bounds.json')} and spectral_bounds.png")


def digits(count: int) -> tuple[ImageSet, ImageSet]:
    """Return `count` of scikit-learn's digits for training, and the others for testing."""
    halves = load_dataset("digits", ROOT / "data" / "digits", image_size=IMAGE_SIZE)
    images, labels = torch.cat([half.images for half in halves]), torch.cat([half.labels for half in halves])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order[:count], order[count:]
    return tuple(ImageSet(images[part], labels[part], halves[0].classes) for part in parts)


def train_network(name: str, options: dict, train: ImageSet, seed: int, epochs: int) -> nn.Module:
    """Train a network without augmentation, with the recipe for digits and batches of 50 images."""
    recipe = {key: value for key, value in vars(RECIPES["digits"]).items() if key in RunConfig.__dataclass_fields__}
    recipe |= {"model": name, "model_options": options, "epochs": epochs, "batch_size": 50, "lr": 0.1}
    recipe |= {"flip": False, "crop_padding": 0.0, "image_size": IMAGE_SIZE}
    config = RunConfig(
        dataset="digits",
        num_classes=10,
        seed=seed,
        amp=False,
        limit_train=len(train),
        limit_val=None,
        train_images=len(train),
        val_images=0,
        classes=train.classes,
        **recipe,
    )
    torch.manual_seed(seed)
    model = create_network(name, 10, **options).to(memory_format=torch.channels_last)
    options = {"flip": False, "crop_padding": 0.0, "seed": seed}
    batches = TrainingBatches(train, config.batch_size, CPU, config.mean, config.std, **options)
    trainer = make_trainer(model, config, len(batches), compiled=False, ranks=Ranks(0, 1, CPU))
    with closing(batches), plain_operations():
        for epoch in range(epochs):
            trainer.train_epoch(batches, Progress(epoch=epoch))
    return model.eval()


# ---- Bound and gap ------------------------------------------------------------------------------------------------


def bound_and_gap(model: nn.Module, train: ImageSet, test: ImageSet, mean: tuple, std: tuple) -> dict:
    """Return the parts of the bound, and the true gap.

    Returns:
        `train_error` and `test_error` in percent and `gap`, their difference; `margin`, gamma; `norm`, the images'
        Frobenius norm; log10 of the `lipschitz` constant, of the `complexity` R and of the `bound`
        |X|_F R / (gamma n); `layers` and `parameters`.
    """
    margins, norm = margins_of(model, train, mean, std)
    test_margins, _ = margins_of(model, test, mean, std)
    right = margins[margins > 0]
    margin = float(right.quantile(QUANTILE)) if len(right) else math.nan
    layers, lipschitz = linear_layers(model, train.images.shape[-1])
    complexity = spectral_complexity(layers)
    errors = [100 * float((m <= 0).float().mean()) for m in (margins, test_margins)]
    return {
        "train_error": errors[0],
        "test_error": errors[1],
        "gap": errors[1] - errors[0],
        "margin": margin,
        "norm": norm,
        "log10_lipschitz": math.log10(lipschitz),
        "log10_complexity": math.log10(complexity),
        "log10_bound": math.log10(norm * complexity / (margin * len(margins))),
        "layers": len(layers),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@torch.inference_mode()
def margins_of(model: nn.Module, data: ImageSet, mean: tuple, std: tuple) -> tuple[Tensor, float]:
    """Return each image's margin, its class's logit minus the largest other one `(N,)`, and the images' norm."""
    margins, squares = [], 0.0
    for images, labels in EvaluationBatches(data, 250, CPU, mean, std).part():
        logits = model(images).float()
        right = logits.gather(1, labels[:, None])[:, 0]
        others = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
        margins.append(right - others)
        squares += float(images.square().sum())
    return torch.cat(margins), math.sqrt(squares)


def means(rows: list[dict]) -> list[dict]:
    """Return for each kind of network the means over seeds, and with 2 or more seeds `..._ci95`, their 95% intervals.

    The intervals are those of the t distribution, for the gap and the bound.
    """
    summaries = []
    for title in NETWORKS:
        selected = [row for row in rows if row["network"] == title]
        summary: dict = {"network": title, "seeds": len(selected)}
        summary |= {name: float(np.mean([row[name] for row in selected])) for name in MEANS}
        for name in ("gap", "log10_bound") if len(selected) > 1 else ():
            values = [row[name] for row in selected]
            summary[f"{name}_ci95"] = list(t.interval(0.95, len(values) - 1, np.mean(values), sem(values)))
        summaries.append(summary)
    return summaries


def rank_correlation(rows: list[dict]) -> dict[str, float]:
    """Return Kendall's tau between the bound and the gap of the kinds of network (means over seeds), and its p."""
    summaries = means(rows)
    result = kendalltau(*([summary[name] for summary in summaries] for name in ("log10_bound", "gap")))
    return {"tau": float(result.statistic), "p": float(result.pvalue)}


def pretrained_row(data_dir: Path) -> dict:
    """Return `bound_and_gap` of the weights in this repository, on 2,000 training and 2,000 test images."""
    train, test = (half.subset(2000) for half in load_dataset("cifar100", data_dir))
    metadata = read_metadata(pretrained_file("s3net_cifar"))
    model = create_model("s3net_cifar", pretrained=True).eval()
    row = bound_and_gap(model, train, test, metadata["mean"], metadata["std"])
    return {"network": "weights/s3net_cifar", "seed": 0} | row


def line(row: dict) -> str:
    """Return a row for the terminal."""
    errors = f"training error {row['train_error']:5.2f}%, test error {row['test_error']:5.2f}%, gap {row['gap']:5.2f}"
    bound = f"margin {row['margin']:.2f}, log10 of the bound {row['log10_bound']:.1f}"
    return f"{row['network']:20} seed {row['seed']}: {errors}; {bound}"


def draw(rows: list[dict], pretrained: dict | None) -> Figure:
    """Draw the gap against the bound, a colour and a marker for each kind of network."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for title, marker in zip(NETWORKS, "os^DvP", strict=False):
        chosen = [row for row in rows if row["network"] == title]
        axes.plot([row["log10_bound"] for row in chosen], [row["gap"] for row in chosen], marker, label=title)
    if pretrained:
        label = f"{pretrained['network']} (CIFAR-100)"
        axes.plot(pretrained["log10_bound"], pretrained["gap"], "k*", markersize=10, label=label)
    axes.axvline(0, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="log10 of the bound (above 0: vacuous)", ylabel="test error - training error (points)")
    axes.set_title("Spectral margin bound and true gap", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    run_script(main, Args, __doc__)
