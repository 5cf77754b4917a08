"""Steps of reproduce.py: the scripts that each budget runs, and the results that the page shows.

A command is written as typed in the repository's root, without `python`. `{out}` is replaced by the folder of all
results, and `{here}` by the step's own folder in it. As in a shell, a word that contains `*` is replaced by the paths
that match it. A step with such a word is run every time.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reproduction.result_rows import (
    Row,
    comparison_rows,
    faithfulness_rows,
    figure_3_rows,
    gradient_rows,
    one_neuron_rows,
    run_rows,
    saliency_rows,
    score_rows,
    sensitivity_rows,
    universal_approximation_rows,
)

EXPERIMENTS = ("expressibility", "generalizability", "interpretability")
LOG = "log"  # in `Step.shows`: what the script printed


@dataclass(frozen=True)
class Table:
    """A table that the page shows: a Markdown file, or rows from a JSON file.

    Attributes:
        file: name of the file in the step's folder.
        caption: one or two sentences above the table.
        rows: function from the content of the JSON file to rows by column; None for a Markdown file.
    """

    file: str
    caption: str = ""
    rows: Callable[[dict], list[Row]] | None = None


@dataclass(frozen=True)
class Step:
    """One run of one script.

    Attributes:
        name: name of the step's folder and log, and anchor on the page.
        experiment: one of `EXPERIMENTS`.
        title: heading on the page.
        about: a few sentences below the heading.
        command: see the module's docstring.
        shows: figures (names of files in the step's folder), tables, and `LOG`.
        needs: a path in the repository; if it is missing, the step is left out.
        otherwise: what to do if that path is missing.
        on_gpu: whether the step is a training run on one GPU. Such steps run side by side, one on each GPU.
    """

    name: str
    experiment: str
    title: str
    about: str
    command: str
    shows: tuple[str | Table, ...] = ()
    needs: str | None = None
    otherwise: str = ""
    on_gpu: bool = False

    @property
    def repeated(self) -> bool:
        """Whether the step is run every time, because it reads the results of other steps."""
        return "*" in self.command

    def words(self, out: Path) -> list[str]:
        """Return the script and its arguments, with the folders filled in."""
        return [word.format(out=out, here=out / self.name) for word in shlex.split(self.command)]


def steps_of(budget: str) -> list[Step]:
    """Return the steps of a budget in the order in which they run.

    Args:
        budget: "quick" takes minutes and downloads nothing, "cpu" takes days on a few cores, "gpu" days on a GPU.
    """
    if budget == "quick":
        expressibility = [FIGURE_3, sensitivity(splits=10), ONE_NEURON, universal_approximation(QUICK_DEPTHS)]
        training = [DIGITS, QUICK_SAME_BUDGET, QUICK_TABLE, gradient_flow(QUICK_GRADIENTS)]
        training += [NETWORK_SIZES, spectral_bounds("--seeds 1 --images 100 --epochs 3")]
        return [*expressibility, *training, *QUICK_SALIENCY]
    expressibility = [finite_width(), sensitivity(100), ONE_NEURON, universal_approximation(), KERNEL_BENCHMARK]
    if budget == "cpu":
        training = [WEIGHTS, SAME_BUDGET, cifar100(12, 40), CIFAR100_TABLE, DIGITS, TRAINING_BENCHMARK]
    else:
        networks = [cifar100(k, depth, "--compile", on_gpu=True) for k, depth in PAPER_CIFAR100]
        networks += [tiny_imagenet(name) for name in TINY_IMAGENET_NETWORKS]
        training = [WEIGHTS, SAME_BUDGET, *networks, CIFAR100_TABLE, TINY_IMAGENET_TABLE, TRAINING_BENCHMARK]
    training += [gradient_flow("--jobs 2"), NETWORK_SIZES, spectral_bounds("--seeds 5 --epochs 30")]
    return [*expressibility, *training, *SALIENCY, SALIENCY_BENCHMARK]


# ---- Expressibility -----------------------------------------------------------------------------------------------

FIGURE_3 = Step(
    name="ntk_comparison",
    experiment="expressibility",
    title="Figure 3: the error of both topologies and of a chain by depth",
    about=(
        "Boston housing with the paper's split, networks of infinite width, trained until convergence. The error is "
        "the paper's: the mean squared error, divided once more by the 51 test rows. The numbers of the residual and "
        "the proposed topology reproduce the outputs saved in the published notebook. The printed figure comes from an "
        "earlier run. The chain has the same layers without shortcuts. The paper does not compare with it."
    ),
    command="expressibility/ntk_comparison.py --out {here}",
    shows=("ntk_results.png", Table("ntk_results.json", "Error, computed here and as printed.", figure_3_rows)),
)


def finite_width() -> Step:
    """Return the step for Figure 3 that also measures finite networks."""
    return Step(
        name="ntk_comparison",
        experiment="expressibility",
        title=FIGURE_3.title,
        about=FIGURE_3.about
        + " The last figure shows that the kernels of finite networks, in which every layer exists once, approach the "
        "kernels of infinite width.",
        command=FIGURE_3.command + " --finite-width",
        shows=(*FIGURE_3.shows, "finite_width.png"),
    )


def sensitivity(splits: int) -> Step:
    """Return the step that compares the topologies of Figure 3 on other splits, data and settings."""
    return Step(
        name="ntk_sensitivity",
        experiment="expressibility",
        title="Figure 3 on other splits, data and settings",
        about=(
            f"Figure 3 uses one split of one data set. This step uses {splits} random splits of two data sets, raw "
            "and standardised, with 7 depths, 5 strengths of regularisation and 3 standard deviations of the weights."
        ),
        command=f"expressibility/ntk_sensitivity.py --splits {splits} --out {{here}}",
        shows=(
            "sensitivity.png",
            Table(
                "sensitivity.json",
                "Number of settings in which a topology has the smaller error and the 95% interval of the paired "
                "difference excludes zero; in brackets, those that remain with Holm's correction over all settings.",
                sensitivity_rows,
            ),
            "sensitivity_chain.png",
            "baselines.png",
        ),
    )


ONE_NEURON = Step(
    name="one_neuron",
    experiment="expressibility",
    title="Theorem 1: one neuron per layer is wide enough",
    about=(
        "A chain of layers with one ReLU neuron each, whose outputs all take a shortcut to the end. Its weights are "
        "constructed, not trained. Without the shortcuts, the chain is monotone at any depth."
    ),
    command="expressibility/one_neuron_approximation.py --out {here}",
    shows=(
        "one_neuron.png",
        Table(
            "one_neuron.json",
            "Largest error by number of layers. The function has a kink at 0, which is a knot at even depths only. "
            "Last row: a lower bound for the chain without shortcuts.",
            one_neuron_rows,
        ),
    ),
)


QUICK_DEPTHS = "--depths 8 32 128 --seeds 2"


def universal_approximation(flags: str = "") -> Step:
    """Return the step that constructs the network of Theorem 2."""
    return Step(
        name="universal_approximation",
        experiment="expressibility",
        title="Theorem 2: width D + 1 suffices in D dimensions",
        about=(
            "A network with one hidden layer of N neurons on the unit square, and the network of width 3 with N layers "
            "and sparse shortcuts that equals it. The weights are constructed, not trained."
        ),
        command=f"expressibility/universal_approximation.py {flags} --out {{here}}",
        shows=(
            "universal_approximation.png",
            Table(
                "universal_approximation.json",
                "Largest error by number of layers, mean over draws of the neurons.",
                universal_approximation_rows,
            ),
        ),
    )


KERNEL_BENCHMARK = Step(
    name="kernel_benchmark",
    experiment="expressibility",
    title="Speed and memory of the kernels",
    about=(
        "The closed form compared with the formulation of the published notebook, and the cost of one kernel matrix by "
        "number of points."
    ),
    command="expressibility/benchmark.py --out {here}",
    shows=("benchmark.png", LOG),
)

# ---- Generalizability ---------------------------------------------------------------------------------------------

RUN_TABLE = Table("summary.json", rows=run_rows)

DIGITS = Step(
    name="digits",
    experiment="generalizability",
    title="S3-Net on handwritten digits",
    about="S3-Net (k=12, depth=40) on scikit-learn's digits. The data need no download.",
    command="generalizability/train_s3net.py --dataset digits --resume --out {here}",
    shows=("curves.png", RUN_TABLE),
)

BUDGET_SHOWS = (Table("tables.md"), "search.png", "curves.png", "ablation.png")
ABLATION = (
    " The ablation removes S3-Net's shortcuts (a chain) or connects its layers densely, at the same width and at about "
    "the same number of parameters."
)
QUICK_SAME_BUDGET = Step(
    name="same_budget",
    experiment="generalizability",
    title="S3-Net, ResNet and DenseNet under one budget, reduced version",
    about=(
        "The comparison that the larger budgets make on CIFAR-100, here on digits with small networks and few epochs. "
        "The numbers show that the scripts work. They do not show which network is better. A search selects the peak "
        "learning rate of each network; then all networks train with the same settings." + ABLATION
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
    title="S3-Net, ResNet and DenseNet of the same size under one budget",
    about=(
        "CIFAR-100, 30 epochs with the one-cycle schedule. Images and augmentation are the same for all networks. Each "
        "network uses the peak learning rate with its lowest error on held-out training images." + ABLATION
    ),
    command="generalizability/same_budget.py --out {here}",
    shows=BUDGET_SHOWS,
)
WEIGHTS = Step(
    name="weights",
    experiment="generalizability",
    title="Error of the trained weights in this repository",
    about="Evaluated on the 10,000 test images of CIFAR-100.",
    command="generalizability/train_s3net.py --eval-only --checkpoint weights/s3net_cifar/last.safetensors",
    shows=(LOG,),
)

PAPER_CIFAR100 = ((12, 40), (24, 40), (40, 40), (64, 40), (64, 70))  # growth rate and depth of the paper's S3-Nets


def cifar100(growth_rate: int, depth: int, flags: str = "", on_gpu: bool = False) -> Step:
    """Return the step that trains one of the paper's networks on CIFAR-100 with the paper's recipe."""
    return Step(
        name=f"cifar100_k{growth_rate}_d{depth}",
        experiment="generalizability",
        title=f"CIFAR-100 with the paper's recipe: S3-Net k={growth_rate}, depth={depth}",
        about="200 epochs, batch size 64, learning rate 0.2, divided by 10 after each quarter of the epochs.",
        command=(
            f"generalizability/train_s3net.py --growth-rate {growth_rate} --depth {depth} {flags} --resume "
            "--out {here}"
        ),
        shows=("curves.png", RUN_TABLE),
        on_gpu=on_gpu,
    )


def comparison(name: str, title: str, runs: str) -> Step:
    """Return the step that compares runs with the results printed in the paper."""
    return Step(
        name=name,
        experiment="generalizability",
        title=title,
        about="Each row is marked as measured here or quoted.",
        command=f"generalizability/compare_results.py {runs} --out {{here}}",
        shows=(Table("table.md"), "scatter.png"),
    )


QUICK_TABLE = comparison("table", "All of these runs in one table", "{out}/digits* {out}/same_budget/comparison/*")
CIFAR100_TABLE = comparison(
    "cifar100_table", "CIFAR-100, compared with the paper", "{out}/cifar100_k* {out}/same_budget/comparison/*"
)
TINY_IMAGENET_TABLE = comparison("tinyimagenet_table", "Tiny ImageNet, compared with the paper", "{out}/tiny_*")

TINY_IMAGENET_NETWORKS = (
    "s3net_tiny_k108", "s3net_tiny_k96", "randwire_ws", "efficientnet_b0", "mobilenet_v2", "ghostnet", "octresnet50",
    "scalenet50", "se_resnet50", "lambda_resnet50",
)  # fmt: skip


def tiny_imagenet(network: str) -> Step:
    """Return the step that trains one network of the paper's Tiny ImageNet table with the paper's recipe."""
    return Step(
        name=f"tiny_{network}",
        experiment="generalizability",
        title=f"Tiny ImageNet with the paper's recipe: {network}",
        about="90 epochs at 224x224 pixels, with the batch size and learning rate of this network.",
        command=f"generalizability/train_s3net.py --dataset tinyimagenet --model {network} --resume --out {{here}}",
        shows=("curves.png", RUN_TABLE),
        needs="data/tinyimagenet",
        otherwise="download it with python generalizability/train_s3net.py --dataset tinyimagenet --download",
        on_gpu=True,
    )


QUICK_GRADIENTS = "--depths 10 50 --seeds 3 --training-depths 10 --training-seeds 2 --peaks 0.2 --steps 30 --jobs 2"


def gradient_flow(flags: str) -> Step:
    """Return the step that measures the gradients along a block, and trains deep networks for a few steps."""
    return Step(
        name="gradient_flow",
        experiment="generalizability",
        title="Gradients and training of deep blocks, by kind of connection",
        about=(
            "The gradient of the loss along a block of layers that form a chain, or have sparse, dense or residual "
            "connections; and short training runs of deep networks on digits at 8x8."
        ),
        command=f"generalizability/gradient_flow.py {flags} --out {{here}}",
        shows=(
            "gradient_flow.png",
            Table(
                "gradient_flow.json",
                "Decades: log10 of the ratio of the gradient norms of the first and the last layer's output, with 95% "
                "intervals of the mean. Above 0 gradients explode, below 0 they vanish.",
                gradient_rows,
            ),
            "deep_training.png",
        ),
    )


NETWORK_SIZES = Step(
    name="network_sizes",
    experiment="generalizability",
    title="Parameters and multiply-adds of every network",
    about=(
        "The share of the parameters in transitions, and the multiply-adds with the transitions' pools before their "
        "convolutions (as here) and after them (the published order)."
    ),
    command="generalizability/network_sizes.py --out {here}",
    shows=(LOG,),
)


def spectral_bounds(flags: str) -> Step:
    """Return the step that compares a spectral margin bound with the gaps of small networks on digits."""
    return Step(
        name="spectral_bounds",
        experiment="generalizability",
        title="A spectral margin bound and true generalization gaps",
        about=(
            "The bound of Bartlett, Foster and Telgarsky (2017), adapted to networks with shortcuts, without constants "
            "and logarithms. All bounds are vacuous; the question is whether they rank the networks."
        ),
        command=f"generalizability/spectral_bounds.py {flags} --out {{here}}",
        shows=("spectral_bounds.png", LOG),
    )


TRAINING_BENCHMARK = Step(
    name="training_benchmark",
    experiment="generalizability",
    title="Training speed",
    about=(
        "A whole step of the trainer, including augmentation, compared with the published formulation and with other "
        "networks."
    ),
    command="generalizability/benchmark.py --out {here}",
    shows=(LOG,),
)

# ---- Interpretability ---------------------------------------------------------------------------------------------

FULLGRAD = Step(
    name="fullgrad",
    experiment="interpretability",
    title="Saliency maps of photographs",
    about=(
        "FullGrad maps of the S3-Net whose weights are in this repository. It was trained on CIFAR-100. The images "
        "are parts of two photographs, a temple at a lake and a dahlia, which were not among its training images; "
        "neither is one of its 100 classes. Each map explains the class that the network finds most probable, "
        "right or wrong. The completeness error is the difference between the sum of the map's terms and the "
        "network's output, relative to that output."
    ),
    command="interpretability/interpret_fullgrad.py --squash --out {here}",
    shows=(
        "figure.png",
        Table("saliency.json", "The three most probable classes, with their probabilities.", saliency_rows),
    ),
)


def segmentation(scenes: int) -> Step:
    """Return the step that scores maps of so many digit scenes."""
    return Step(
        name="segmentation",
        experiment="interpretability",
        title="Saliency maps scored against true masks",
        about=(
            "A small S3-Net, trained by this step, classifies the digit in a scene of clutter. Its training labels do "
            "not contain the digit's position. The top tenth of the pixels of its map is compared with the digit's "
            "strokes. Other gradient methods explain the same network. Three maps are baselines: random numbers; a "
            "centred Gaussian, which does not depend on the image; and the image's edges, which do not depend on the "
            "network. The true mask as a map is the ceiling of the scores against the mask."
        ),
        command=f"interpretability/plot_segmentation_map.py --faithfulness --scenes {scenes} --out {{here}}",
        shows=(
            "segmentation.png",
            Table(
                "scores.json",
                "Scores against the masks, means over the images; 1 is the best. Pointing game: the share of images "
                "in which the map's largest pixel lies on the digit.",
                score_rows,
            ),
            "dice.png",
            Table(
                "faithfulness.json",
                "Does the network depend on the salient pixels? Area under the curve of the class's probability while "
                "pixels are revealed on a blurred copy of the image (insertion) or replaced by the mean colour "
                "(deletion), in order of decreasing map value.",
                faithfulness_rows,
            ),
            "faithfulness.png",
        ),
    )


def saliency_comparison(flags: str, about: str) -> Step:
    """Return the step that compares networks by their maps."""
    return Step(
        name="saliency_comparison",
        experiment="interpretability",
        title="Maps of the sparse topology and of other networks",
        about=(
            "Five networks of similar size name the digit in scenes of clutter. FullGrad's maps and the absolute "
            "gradients are scored against the digit's strokes, by insertion and deletion, and by their sharpness. "
            + about
        ),
        command=f"interpretability/saliency_comparison.py {flags} --out {{here}}",
        shows=(
            "comparison.png",
            Table("comparison.json", "Accuracy, and mean scores of FullGrad's maps.", comparison_rows),
            "maps.png",
        ),
    )


QUICK_SALIENCY = (
    FULLGRAD,
    segmentation(scenes=60),
    saliency_comparison(
        "--depth 10 --epochs 2 --batch-size 32 --peaks 0.1 --seeds 1 --scenes 20 --scene-size 24",
        "Here with shallow networks and 2 epochs: the numbers show that the script works, not which network is better.",
    ),
)
SALIENCY = (
    FULLGRAD,
    segmentation(scenes=359),
    saliency_comparison("", "The learning rate of each is tuned. Intervals are over 5 seeds and all scenes."),
)

SALIENCY_BENCHMARK = Step(
    name="saliency_benchmark",
    experiment="interpretability",
    title="Time and completeness of saliency maps",
    about=(
        "Seconds per map, compared with the published method and with a plain gradient; and the completeness error by "
        "network."
    ),
    command="interpretability/benchmark.py --out {here}",
    shows=(LOG,),
)
