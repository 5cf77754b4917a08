"""Train S3-Net, or a network to compare it with, on images.

One process (a GPU if there is one, else the CPU):
    python train_s3net.py                                     # S3-Net k=12, depth=40 on CIFAR-100, as in the paper
    python train_s3net.py --dataset digits                    # a minute on 2 cores, nothing to download
    python train_s3net.py --dataset folder --data-dir my/images --image-size 64
    python train_s3net.py --recipe fast                       # CIFAR-100 in 15 epochs, not as in the paper
    python train_s3net.py --resume                            # resume an interrupted run
    python train_s3net.py --init pretrained --lr 0.02 --dataset folder --data-dir my/images    # start from weights

Several GPUs of one node, each batch divided between them:
    torchrun --nproc_per_node=4 train_s3net.py

Several nodes (the same on each of them):
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_s3net.py

Evaluate saved weights:
    python train_s3net.py --eval-only --checkpoint runs/cifar100-s3net_cifar-s0/best.safetensors

Export the last epoch's weights of a run, with a model card:
    python train_s3net.py --export runs/cifar100-s3net_cifar-s0
"""

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipes import (
    CONNECTIONS,
    DECODERS,
    DEFAULT_DATASET,
    NAMED_RECIPES,
    NETWORK_FLAGS,
    RECIPES,
    SCHEDULES,
    RunConfig,
)
from s3net_common.command_line import THREADS, answer_flags, flag, given_flags, run_script
from s3net_common.errors import InputError
from s3net_common.images import MAX_PIXELS, limit_pixels
from s3net_common.output_files import ROOT, default_out, relative

RECIPE, DATASET, NETWORK = "the recipe's", "the data set's", "the network's own"  # what --help says about a default


@dataclass
class Args:
    """Train S3-Net, or a network to compare it with, on images."""

    dataset: flag(str, f"{{{','.join(RECIPES)}}}", DEFAULT_DATASET) = None
    """Images to train on: scikit-learn's digits (embedded), CIFAR-100, Tiny ImageNet, ImageNet, or your own."""
    data_dir: flag(Path, "DIR", "data/<dataset>") = None
    """Folder of the images: cifar-100-python/, tiny-imagenet-200/, train.lmdb and val.lmdb, train/<class>/* and
    val/<class>/* (or test/<class>/*), or, with --hold-out, <class>/*."""
    download: bool = False
    """Download Tiny ImageNet (237 MiB) if it is missing. CIFAR-100 is downloaded without this flag."""
    model: flag(str, "NAME", DATASET) = None
    """Network to train; --list-models names them."""
    growth_rate: flag(int, "INT", NETWORK) = None
    """Output channels of each layer (k)."""
    depth: flag(int, "INT", NETWORK) = None
    """Total number of layers of a CIFAR network; depth - 4 must be divisible by 3."""
    drop_rate: flag(float, "FLOAT", NETWORK) = None
    """Dropout after each layer, 0 to below 1."""
    connections: flag(str, f"{{{','.join(CONNECTIONS)}}}", "sparse") = None
    """Connections inside a block: sparse (S3-Net), chain (no shortcuts), dense (as in DenseNet) or residual."""
    num_classes: flag(int, "INT", "the data's") = None
    """Outputs of the network."""
    init: flag(str, "{FILE,pretrained}", "random weights") = None
    """Start from the weights of a file, or from the network's published ones. The file's network, image size and
    normalisation become the defaults. The classifier keeps the rows of classes with the same names."""

    recipe: flag(str, f"{{{','.join(NAMED_RECIPES)}}}", "the data set's, which is the paper's if it has one") = None
    """Recipe that gives the defaults of the flags below. fast: 15 epochs, for CIFAR-100."""
    epochs: flag(int, "INT", RECIPE) = None
    """Passes over the training images."""
    batch_size: flag(int, "INT", RECIPE) = None
    """Images per step, over all distributed ranks together."""
    accumulate: flag(int, "N", "1") = None
    """Gradient accumulation steps: compute each batch in N parts, to save memory. The gradient is that of the whole
    batch; BatchNorm normalises each part separately."""
    lr: flag(float, "FLOAT", RECIPE) = None
    """Learning rate of SGD: the peak for onecycle, else the initial one."""
    momentum: flag(float, "FLOAT", RECIPE) = None
    """Momentum of SGD."""
    weight_decay: flag(float, "FLOAT", RECIPE) = None
    """L2 penalty."""
    norm_decay: bool = True
    """Apply the L2 penalty also to the parameters of BatchNorm and to biases."""
    nesterov: bool = False
    """Nesterov momentum."""
    label_smoothing: flag(float, "FLOAT", "0") = None
    """Label smoothing of the training loss, 0 to below 1."""
    average_epochs: flag(int, "N", "0") = None
    """Average the weights, and BatchNorm's running statistics, over all steps of the last N epochs. The average is what
    is validated and kept as the best weights."""
    early_size: flag(int, "INT", "the full size") = None
    """Height and width in pixels of the training images in the first --early-epochs epochs, smaller to save time."""
    early_epochs: flag(int, "N", "0") = None
    """Epochs that train on images of --early-size."""
    schedule: flag(str, f"{{{','.join(SCHEDULES)}}}", RECIPE) = None
    """Learning-rate schedule: step (divide by 10 at each milestone), onecycle or cosine."""
    image_size: flag(int, "INT", DATASET) = None
    """Height and width in pixels of the images that the network reads."""
    augment: bool = True
    """Crop the training images at random, and flip them if the data set's recipe does so."""
    seed: flag(int, "INT", "0") = None
    """Seed of the initial weights, the order of the images and their augmentation."""
    hold_out: flag(int | float, "N|FRACTION", "the data set's own validation images") = None
    """Hold out N training images, or a fraction of each class (0.1), and validate on them instead of on the validation
    set. A folder needs no validation set then."""
    limit_train: flag(int, "N", "all") = None
    """Train on N of the training images only, always the same ones."""
    limit_val: flag(int, "N", "all") = None
    """Evaluate on N of the validation images only, always the same ones."""

    device: flag(str, "{cpu,cuda,cuda:N,mps}", "a GPU if there is one") = None
    """Device to compute on. Under torchrun, each rank gets the GPU of its LOCAL_RANK."""
    amp: flag(bool, None, "where it is faster") = True
    """Mixed precision: bfloat16, or float16 with a gradient scaler on CUDA devices that lack it. --no-amp: float32,
    whose products CUDA devices since Ampere compute in TF32 (10 bits of mantissa)."""
    compile: bool = False
    """Compile the network with torch.compile, for the size of a full batch (on a CPU it needs a C++ compiler)."""
    graphs: bool = False
    """Replay each training step as one CUDA graph, which takes the host little time. For one process on one GPU. Not
    yet tried on a GPU: compare its first losses with those of a run without it."""
    sync_bn: bool = False
    """BatchNorm over the images of all GPUs of a step instead of those of each GPU (SyncBatchNorm)."""
    workers: flag(int, "N", "one a processor, at most 16") = None
    """DataLoader workers of each rank, which decode image files: processes for ImageNet, whose images stay on disk (0:
    decode in the training process), threads for the other data sets."""
    decode: flag(str, f"{{{','.join(DECODERS)}}}", "cpu") = None
    """How ImageNet's training images are decoded: cpu (in full), draft (JPEGs at the smallest size that the crop
    allows: faster, with slightly different pixels) or gpu (JPEGs on the CUDA GPU). Evaluation decodes in full."""
    skip_unreadable: bool = False
    """Skip image files that cannot be read, and list them, instead of stopping."""
    max_pixels: flag(int, "N", f"{MAX_PIXELS:,}") = None
    """Refuse images of more pixels, which could be decompression bombs."""

    out: flag(
        Path, "DIR", "runs/<dataset>-<model>-s<seed>, runs/evaluation/<folder>-<checkpoint> or runs/export/<run>"
    ) = None
    """Folder for everything that the run, the evaluation or the export writes."""
    resume: bool = False
    """Resume the run in --out, or start it if it does not exist. The run's folder knows all its flags."""
    checkpoint_every: flag(int, "N", "each epoch only") = None
    """Also save a checkpoint every N steps."""
    overwrite: bool = False
    """Replace the run, the evaluation or the export in --out, or files of something else with their names."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard events, into <out>/tensorboard."""

    eval_only: bool = False
    """Evaluate --checkpoint on the validation images, without training: errors, also by class, and confusions."""
    checkpoint: flag(Path, "FILE", "none") = None
    """Weights for --eval-only: ours (.safetensors, .pt) or a file that the paper's authors published."""
    export: flag(Path, "RUN", "none") = None
    """Export the last epoch's weights of a finished run with a model card, without training, to --out."""
    unfinished: bool = False
    """Let --export take a run that has epochs left. The card says so."""
    list_models: bool = False
    """Print the names of all networks and exit."""
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import torch

from data.datasets import load_dataset
from data.image_sets import Halves
from data.loader_workers import default_workers
from data.splits import SPLITS
from distributed import Ranks, join_ranks
from s3net_common.checkpoints import file_label
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_networks import list_networks
from s3net_networks.size import network_size
from training.config import (
    DATA_FLAGS,
    Flags,
    check_device,
    check_flags,
    check_same_data,
    check_same_recipe,
    environment_of,
    flags_of,
    resolve_config,
)
from training.engine import Precision
from training.evaluation import check_out, evaluate_trained_network, report_evaluation
from training.export import export_run
from training.initial_weights import build_network, complete_flags, open_start, recorded_init
from training.run_folder import Run
from training.trained_network import read_trained_network
from training.training_loop import train


def main(args: Args) -> int:
    """Train, evaluate a checkpoint or list the networks. Return the exit code.

    Raises:
        InputError: user input cannot be used.
    """
    if args.list_models:
        print("\n".join(list_networks()))
        return 0
    flags = given_flags(args)
    check_flags(flags)
    if "export" in flags:
        export_run(flags["export"], flags.get("out"), args.overwrite, args.unfinished)
        return 0
    if "init" in flags:
        flags["init"] = recorded_init(flags["init"])
    run = Run(flags.get("out") or default_folder(flags))
    if args.resume:
        flags = flags_of(run.environment()) | flags
        check_flags(flags)
    limit_pixels(flags.get("max_pixels"))
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if args.eval_only:
        return evaluate_checkpoint(flags)
    if was_restarted() and (code := run.exit_code_of_failed()):
        return code
    try:
        return start_or_resume(flags, run)
    except InputError as error:
        run.record_failure(error)
        raise
    finally:
        run.release()


def start_or_resume(flags: Flags, run: Run) -> int:
    """Train a new run, or the rest of the run in the folder. Return the exit code.

    Raises:
        InputError: as `main`.
    """
    ranks = join_ranks(flags.get("device"))
    check_tools(flags, ranks)
    start = ranks.on_main_rank(lambda: start_metadata(flags))
    completed = complete_flags(flags, start)
    if "out" not in flags:  # the file of --init may name another network
        run.folder = default_folder(completed)
    started = ranks.on_main_rank(lambda: open_run(flags, run))
    if started:  # the run's own images, also where the flags do not name them
        flags |= {name: getattr(started, name) for name in DATA_FLAGS}
    else:
        flags = completed
    data = read_data(flags, ranks)
    config = started or resolve_config(flags, data, ranks.device, start)
    check_device(config, flags, ranks)
    size = network_size(config.model, config.num_classes, config.model_options, config.image_size)
    if started:
        data = check_same_data(data, started, run.folder, ranks.is_main)
    restored = started is not None and ranks.on_main_rank(run.has_checkpoint)
    model = build_network(config, not restored, ranks)
    if started:
        ranks.on_main_rank(lambda: run.resume(config, environment_of(flags)))
    else:  # all flags are valid now, so the folder may be written
        ranks.on_main_rank(lambda: run.create(config, environment_of(flags)))
    return train(flags, run, config, model, size, data, ranks, loader_workers(flags))


def check_tools(flags: Flags, ranks: Ranks) -> None:
    """Check that everything that a flag needs is installed.

    Raises:
        InputError: TensorBoard or a C++ compiler is missing.
    """
    if flags.get("tensorboard") and find_spec("tensorboard") is None:
        raise InputError("TensorBoard is not installed: pip install tensorboard, or leave out --tensorboard")
    if flags.get("compile") and ranks.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
        raise InputError("--compile on a CPU needs a C++ compiler, and there is none: leave it out")


def default_folder(flags: Flags) -> Path:
    """Return `runs/<dataset>-<model>-s<seed>` in the repository."""
    dataset = flags.get("dataset", DEFAULT_DATASET)
    return default_out(f"{dataset}-{flags.get('model', RECIPES[dataset].model)}-s{flags.get('seed', 0)}")


def open_run(flags: Flags, run: Run) -> RunConfig | None:
    """Return the configuration of the run to be resumed, or None if a new one is to be started.

    Raises:
        InputError: the folder cannot be written; it holds a run, and neither --resume nor --overwrite is given; it
            holds other files with a run's names; or a flag differs from what the run was started with.
    """
    run.check_writable()  # before the data are read, which may take a while
    files = run.files()
    if not files or (flags.get("overwrite") and not (was_restarted() and "config.json" in files)):
        return None
    if flags.get("resume") or was_restarted():
        run.check_resumable()
    elif run.is_run():
        raise InputError(
            f"{relative(run.folder)} already holds a run: pass --resume to resume it, --overwrite to replace it, "
            "or another --out"
        )
    else:
        raise InputError(
            f"{relative(run.folder)} already holds {', '.join(files)} of something else: pass another --out, or "
            "--overwrite to replace these files"
        )
    started = run.read_config()
    check_same_recipe(flags, started, run.folder)
    return started


def start_metadata(flags: Flags) -> dict[str, Any]:
    """Return the metadata of the weights of --init, or {} without them.

    Raises:
        InputError: the file cannot be read. A run that is resumed does not need it.
    """
    if "init" not in flags:
        return {}
    dataset = flags.get("dataset", DEFAULT_DATASET)
    try:
        return open_start(flags["init"], flags.get("model", RECIPES[dataset].model))[1]
    except InputError:
        if "resume" in flags or was_restarted():
            return {}
        raise


def was_restarted() -> bool:
    """Whether torchrun restarted all ranks after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


# ---- Data ---------------------------------------------------------------------------------------------------------


def read_data(flags: Flags, ranks: Ranks, splits: tuple[str, ...] = SPLITS) -> Halves:
    """Read the training and validation images. One rank of each node reads first: it may have to download.

    Args:
        flags: with --hold-out, only the training images are read, and split.
        ranks: this process among the distributed ranks.
        splits: "train" and "val", or only what is needed.

    Returns:
        The images of each of `splits`.
    """
    dataset = flags.get("dataset", DEFAULT_DATASET)
    first_of_node = int(os.environ.get("LOCAL_RANK", 0)) == 0
    held_out = flags.get("hold_out")

    def read() -> Halves:
        return load_dataset(
            dataset,
            flags.get("data_dir", ROOT / "data" / dataset),
            splits=splits if held_out is None else ("train",),
            image_size=flags.get("image_size", RECIPES[dataset].image_size),
            workers=max(1, loader_workers(flags)),
            skip_unreadable=flags.get("skip_unreadable", False),
            download=flags.get("download", False),
        )

    halves = ranks.on_all_ranks(lambda: read() if first_of_node else None)
    halves = ranks.on_all_ranks(lambda: halves or read())
    if held_out is not None:
        both = dict(zip(SPLITS, ranks.on_all_ranks(lambda: halves[0].hold_out(held_out)), strict=True))
        halves = [both[split] for split in splits]
    limits = (flags.get(f"limit_{split}") for split in splits)
    return tuple(half.subset(limit) for half, limit in zip(halves, limits, strict=True))


def loader_workers(flags: Flags) -> int:
    """Return the number of DataLoader workers of this rank, or of threads that decode images."""
    if "workers" in flags:
        return flags["workers"]
    return default_workers()


# ---- Evaluation only ----------------------------------------------------------------------------------------------


def evaluate_checkpoint(flags: Flags) -> int:
    """Evaluate a file of weights. If a flag is missing, the file's metadata decide. Return the exit code.

    Raises:
        InputError: there is no file of weights, or the images cannot be evaluated by it.
    """
    ranks = join_ranks(flags.get("device"))
    check_tools(flags, ranks)
    if "checkpoint" not in flags:
        raise InputError("--eval-only needs the weights: pass --checkpoint FILE")
    trained = read_trained_network(
        flags["checkpoint"],
        name=flags.get("model"),
        options={option: flags[option] for option in NETWORK_FLAGS if option in flags},
        num_classes=flags.get("num_classes"),
        dataset=flags.get("dataset"),
        default_name=RECIPES[flags.get("dataset", DEFAULT_DATASET)].model,
    )
    dataset = flags.get("dataset") or trained.dataset or DEFAULT_DATASET
    check_flags(flags | {"dataset": dataset})  # the file may name a data set that is unknown here
    if "image_size" in flags:
        trained.preparation = trained.preparation.with_image_size(flags["image_size"])
    out = flags.get("out") or default_out("evaluation") / file_label(trained.file)
    # Without --out, an earlier evaluation of the same file is replaced.
    ranks.on_main_rank(lambda: check_out(out, "out" not in flags or "overwrite" in flags))
    (val,) = read_data(flags | {"dataset": dataset, "image_size": trained.preparation.resize}, ranks, ("val",))
    precision = Precision(ranks.device, flags.get("amp", Precision.is_faster(ranks.device)))
    results, confusion = evaluate_trained_network(trained, val, precision, ranks, loader_workers(flags))
    if ranks.is_main:
        report_evaluation(out, trained, dataset, results, confusion)
    return 0


if __name__ == "__main__":
    run_script(main, Args, __doc__)
