"""The steps of reproduce.py: which scripts run under which budget, and what of their results the page shows.

To change the story, change the lists below. A command is what one would type in the repository's root, without
`python`; `{out}` stands for the folder of all results and `{here}` for the step's own folder in it. A word with a `*`
becomes the paths that match it, as in a shell, and such a step is repeated every time.
"""

import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

EXPERIMENTS = ("expressibility", "generalizability", "interpretability")
LOG = "log"  # among what a step shows: what its script printed


@dataclass(frozen=True)
class Table:
    """A table from a file of results: a Markdown file as it is, or rows out of a JSON file.

    Attributes:
        file: its name in the step's folder.
        caption: what the table says, in a sentence.
        rows: from the content of the JSON file to rows, each by column.
    """

    file: str
    caption: str = ""
    rows: Callable[[dict], list[dict]] | None = None


@dataclass(frozen=True)
class Step:
    """One run of one script.

    Attributes:
        name: of its folder, its log and its place on the page.
        experiment: one of `EXPERIMENTS`.
        title: its heading on the page.
        about: what it shows, in a few sentences.
        command: see above.
        shows: pictures (names of files in its folder), tables, and `LOG`.
        needs: a path in the repository without which the step is left out.
        otherwise: what to do where that is missing.
        processes: above 1 it runs under torchrun.
    """

    name: str
    experiment: str
    title: str
    about: str
    command: str
    shows: tuple[str | Table, ...] = ()
    needs: str | None = None
    otherwise: str = ""
    processes: int = 1

    @property
    def repeated(self) -> bool:
        """Whether it reads what other steps write, and so is run every time."""
        return "*" in self.command

    def words(self, out: Path) -> list[str]:
        """The script and its arguments, with the folders filled in."""
        return [word.format(out=out, here=out / self.name) for word in shlex.split(self.command)]


def steps_of(budget: str, gpus: int = 1) -> list[Step]:
    """The steps of a budget ("quick", "cpu" or "gpu"), in the order in which they run.

    Args:
        budget: quick takes minutes and downloads nothing, cpu takes days on a few cores, gpu days on a GPU.
        gpus: how many there are, for the budget of that name; training is divided between them.
    """
    if budget == "quick":
        return [FIGURE_3, sensitivity(splits=10), ONE_NEURON, DIGITS, QUICK_SAME_BUDGET, QUICK_TABLE, *SALIENCY]
    shared = [finite_width(), sensitivity(splits=100), ONE_NEURON, KERNEL_BENCHMARK]
    if budget == "cpu":
        training = [WEIGHTS, SAME_BUDGET, cifar100(12, 40), CIFAR100_TABLE, DIGITS, TRAINING_BENCHMARK]
    else:
        compiled = [cifar100(k, depth, "--compile", gpus) for k, depth in PAPER_CIFAR100]
        tiny = [tiny_imagenet(name, gpus) for name in TINY_IMAGENET_NETWORKS]
        training = [WEIGHTS, SAME_BUDGET, *compiled, CIFAR100_TABLE, *tiny, TINY_IMAGENET_TABLE, TRAINING_BENCHMARK]
    return [*shared, *training, *SALIENCY, SALIENCY_BENCHMARK]


# ---- Expressibility -----------------------------------------------------------------------------------------------


def figure_3_rows(found: dict) -> list[dict]:
    """The computed errors beside the printed ones, by K."""
    columns = {
        "K": found["K"],
        "residual": found["residual"],
        "proposed": found["proposed"],
        "residual, paper": found["paper"]["residual"],
        "proposed, paper": found["paper"]["proposed"],
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def verdict_rows(found: dict) -> list[dict]:
    """In how many settings each topology is ahead beyond doubt."""
    return [
        {
            "data": f"{verdict['dataset']}, {verdict['scaling']}",
            "settings": verdict["settings"],
            "proposed surely better": verdict["proposed_surely_better"],
            "residual surely better": verdict["residual_surely_better"],
            "undecided": verdict["settings"] - verdict["proposed_surely_better"] - verdict["residual_surely_better"],
        }
        for verdict in found["verdicts"]
    ]


FIGURE_3 = Step(
    name="ntk_comparison",
    experiment="expressibility",
    title="Figure 3: the error of both topologies by depth",
    about=(
        "Boston housing, the paper's split, networks of infinite width trained to the end. The error is the paper's: "
        "mean squared error, divided once more by the 51 test rows. The printed figure came from an older run than "
        "the published notebook's saved outputs, which these numbers reproduce."
    ),
    command="expressibility/ntk_comparison.py --out {here}",
    shows=("ntk_results.png", Table("ntk_results.json", "Error, computed here and as printed.", figure_3_rows)),
)


def finite_width() -> Step:
    """Figure 3, and finite networks beside it."""
    return Step(
        name="ntk_comparison",
        experiment="expressibility",
        title=FIGURE_3.title,
        about=FIGURE_3.about + " Below: finite networks, each layer existing once, approach the same kernel.",
        command=FIGURE_3.command + " --finite-width",
        shows=(*FIGURE_3.shows, "finite_width.png"),
    )


def sensitivity(splits: int) -> Step:
    """Does the ranking of Figure 3 survive?"""
    return Step(
        name="ntk_sensitivity",
        experiment="expressibility",
        title='Does "proposed beats residual" survive?',
        about=(
            f"Figure 3 rests on one split of one data set. Here: {splits} random splits of two data sets, raw and "
            'standardised, 7 depths, 5 regularisers. "Surely": the 95% interval of the paired difference excludes 0.'
        ),
        command=f"expressibility/ntk_sensitivity.py --splits {splits} --out {{here}}",
        shows=(
            "sensitivity.png",
            Table("sensitivity.json", "Settings in which either topology is surely better.", verdict_rows),
            "baselines.png",
        ),
    )


ONE_NEURON = Step(
    name="one_neuron",
    experiment="expressibility",
    title="The first theorem: one neuron a layer is wide enough",
    about=(
        "A chain of single ReLU neurons whose outputs all take a shortcut to the end, constructed and not trained. "
        "The same chain without shortcuts can only clip, however deep it is."
    ),
    command="expressibility/one_neuron_approximation.py --out {here}",
    shows=(
        "one_neuron.png",
        Table(
            "one_neuron.json",
            "The greatest error falls with the square of the depth.",
            lambda found: [
                *(
                    {"layers": depth, "greatest error": error}
                    for depth, error in zip(found["depths"], found["errors"], strict=True)
                ),
                {
                    "layers": "any, without shortcuts",
                    "greatest error": found["without_shortcuts"]["bound_at_any_depth"],
                },
            ],
        ),
    ),
)

KERNEL_BENCHMARK = Step(
    name="kernel_benchmark",
    experiment="expressibility",
    title="Speed and memory of the kernels",
    about="The closed form against the published notebook's formulation, and one kernel matrix by number of points.",
    command="expressibility/benchmark.py --out {here}",
    shows=("benchmark.png", LOG),
)

# ---- Generalizability ---------------------------------------------------------------------------------------------

RUN_TABLE = Table(
    "summary.json",
    "",
    lambda run: [
        {
            "network": run["model"],
            "epochs": run["epochs"],
            "error after the last epoch, %": f"{run['last_val_error']:.2f}",
            "best error, %": f"{run['best_val_error']:.2f} (epoch {run['best_epoch']})",
            "parameters": run["parameters"],
            "multiply-adds": run["multiply_adds"],
        }
    ],
)

DIGITS = Step(
    name="digits",
    experiment="generalizability",
    title="S3-Net learns to read digits",
    about="S3-Net (k=12, depth=40) on scikit-learn's digits: the whole trainer on data that need no download.",
    command="generalizability/train_s3net.py --dataset digits --resume --out {here}",
    shows=("curves.png", RUN_TABLE),
)

BUDGET_SHOWS = (Table("tables.md"), "search.png", "curves.png", "ablation.png")
ABLATION = (
    " The ablation takes S3-Net's shortcuts away (a chain), or connects its layers densely, at the same width and at "
    "about the same number of parameters."
)
QUICK_SAME_BUDGET = Step(
    name="same_budget",
    experiment="generalizability",
    title="S3-Net, ResNet and DenseNet under one budget, in miniature",
    about=(
        "The machinery of the comparison on CIFAR-100, run on digits with small networks for a few epochs: the "
        "numbers show that it works, not which network is better. First each network's peak learning rate is "
        "searched, then all train alike." + ABLATION
    ),
    command=(
        "generalizability/same_budget.py --dataset digits --depth 22 --seeds 1 --peaks 0.1 0.4 --hold-out 300 "
        "--search-epochs 3 --epochs 10 --ablation-epochs 6 --ablation-peaks 0.2 --jobs 2 --out {here}"
    ),
    shows=BUDGET_SHOWS,
)
SAME_BUDGET = Step(
    name="same_budget",
    experiment="generalizability",
    title="S3-Net, ResNet and DenseNet of its size under one budget",
    about=(
        "CIFAR-100, 30 epochs of the one-cycle schedule, the same images and augmentation; each network with the peak "
        "learning rate that was best for it on held-out training images." + ABLATION
    ),
    command="generalizability/same_budget.py --out {here}",
    shows=BUDGET_SHOWS,
)
WEIGHTS = Step(
    name="weights",
    experiment="generalizability",
    title="The error of the weights in this repository",
    about="Measured again from the file, on the 10,000 test images of CIFAR-100.",
    command="generalizability/train_s3net.py --eval-only --checkpoint weights/s3net_cifar/best.safetensors",
    shows=(LOG,),
)

PAPER_CIFAR100 = ((12, 40), (24, 40), (40, 40), (64, 40), (64, 70))  # growth rate and depth of the table's S3-Nets


def cifar100(growth_rate: int, depth: int, flags: str = "", processes: int = 1) -> Step:
    """One of the paper's networks on CIFAR-100 with the paper's recipe."""
    return Step(
        name=f"cifar100_k{growth_rate}_d{depth}",
        experiment="generalizability",
        title=f"CIFAR-100 as in the paper: S3-Net k={growth_rate}, depth={depth}",
        about="200 epochs, batch 64, learning rate 0.2 and a tenth of it after each quarter.",
        command=(
            f"generalizability/train_s3net.py --growth-rate {growth_rate} --depth {depth} {flags} --resume "
            "--out {here}"
        ),
        shows=("curves.png", RUN_TABLE),
        processes=processes,
    )


def compared(name: str, title: str, runs: str) -> Step:
    """A table of runs beside the paper's."""
    return Step(
        name=name,
        experiment="generalizability",
        title=title,
        about="Every row says whether it was measured here, or is quoted.",
        command=f"generalizability/compare_results.py {runs} --out {{here}}",
        shows=(Table("table.md"), "scatter.png"),
    )


QUICK_TABLE = compared("table", "All of these runs in one table", "{out}/digits* {out}/same_budget/comparison/*")
CIFAR100_TABLE = compared(
    "cifar100_table", "CIFAR-100, beside the paper", "{out}/cifar100_k* {out}/same_budget/comparison/*"
)
TINY_IMAGENET_TABLE = compared("tinyimagenet_table", "Tiny ImageNet, beside the paper", "{out}/tiny_*")

TINY_IMAGENET_NETWORKS = (
    "s3net_tiny_k108", "s3net_tiny_k96", "randwire_ws", "efficientnet_b0", "mobilenet_v2", "ghostnet", "octresnet50",
    "scalenet50", "se_resnet50", "lambda_resnet50",
)  # fmt: skip


def tiny_imagenet(network: str, processes: int) -> Step:
    """One network of the paper's Tiny ImageNet table with its recipe."""
    return Step(
        name=f"tiny_{network}",
        experiment="generalizability",
        title=f"Tiny ImageNet as in the paper: {network}",
        about="90 epochs at 224x224 with the network's own batch and learning rate.",
        command=f"generalizability/train_s3net.py --dataset tinyimagenet --model {network} --resume --out {{here}}",
        shows=("curves.png", RUN_TABLE),
        needs="data/tinyimagenet",
        otherwise="python generalizability/train_s3net.py --dataset tinyimagenet --download fetches it",
        processes=processes,
    )


TRAINING_BENCHMARK = Step(
    name="training_benchmark",
    experiment="generalizability",
    title="Training speed",
    about="The trainer's whole step beside a plain reading of the published formulation, and beside other networks.",
    command="generalizability/benchmark.py --out {here}",
    shows=(LOG,),
)

# ---- Interpretability ---------------------------------------------------------------------------------------------


def saliency_rows(found: dict) -> list[dict]:
    """What the network says of each image, and how complete its map is."""
    return [
        {
            "image": row["image"],
            **{
                f"class {place}": f"{name} {probability:.2f}"
                for place, (name, probability) in enumerate(row["most_probable"], start=1)
            },
            "completeness error": f"{row['completeness_error']:.1e}",
        }
        for row in found["maps"]
    ]


def score_rows(found: dict) -> list[dict]:
    """The mean scores against the masks, by method."""
    at = f"at the {found['percentile']:g}th percentile"
    names = {"dice_at": f"Dice {at}", "iou_at": f"IoU {at}", "pointing": "pointing game"}
    return [
        {
            "map": f"FullGrad ({method})" if method in found["largest_completeness_error"] else method,
            **{names.get(name, name): f"{score:.4f}" for name, score in scores.items()},
        }
        for method, scores in found["mean"].items()
    ]


def faithfulness_rows(found: dict) -> list[dict]:
    """The mean areas under the insertion and the deletion curves, by method."""
    ((_, methods),) = found["networks"].items()
    return [
        {
            "map": method,
            **{
                f"{kind} ({better} is better)": f"{statistics.mean(curves[f'{kind}_area']):.4f}"
                for kind, better in (("insertion", "higher"), ("deletion", "lower"))
            },
        }
        for method, curves in methods.items()
    ]


FAITHFULNESS = (
    "Does the network itself need the pixels? Areas under the curves of the class's probability while the pixels are "
    "revealed on a blurred copy (insertion) or painted over (deletion), those with the largest values first."
)
SALIENCY = (
    Step(
        name="fullgrad",
        experiment="interpretability",
        title="What the network looks at",
        about=(
            "FullGrad maps of the S3-Net whose weights are in this repository, trained on CIFAR-100, on parts of two "
            "photographs that it has never seen: a temple at a lake and a dahlia, neither of them among its 100 "
            "classes. The maps show what speaks for the class that it names first, right or wrong. The completeness "
            "error says how far the terms of the map are from adding up to the network's output, relative to it."
        ),
        command="interpretability/interpret_fullgrad.py --out {here}",
        shows=(
            "figure.png",
            Table("saliency.json", "The three most probable classes, with their probabilities.", saliency_rows),
        ),
    ),
    Step(
        name="segmentation",
        experiment="interpretability",
        title="Saliency maps scored against true masks",
        about=(
            "A small S3-Net, trained here, names the digit in a scene of clutter; where it is, nobody has told it. The "
            "top tenth of its map against the digit's strokes, and two maps that any method must beat: a centred "
            "Gaussian, which never saw the image, and the image's edges, which never saw the network."
        ),
        command="interpretability/plot_segmentation_map.py --faithfulness --out {here}",
        shows=(
            "segmentation.png",
            Table(
                "scores.json",
                "Scores against the masks, means over the images; 1 is the best. Pointing game: the share of images "
                "in which the map's largest pixel lies on the digit.",
                score_rows,
            ),
            "dice.png",
            Table("faithfulness.json", FAITHFULNESS, faithfulness_rows),
            "faithfulness.png",
        ),
    ),
)

SALIENCY_BENCHMARK = Step(
    name="saliency_benchmark",
    experiment="interpretability",
    title="What a map costs, and how complete it is",
    about="Seconds a map beside the published way and beside one plain pass; the error of completeness by network.",
    command="interpretability/benchmark.py --out {here}",
    shows=(LOG,),
)
