"""Compare networks by their saliency maps: are those of the sparse topology sharper, or more accurate?

    python interpretability/saliency_comparison.py                                    # 24 epochs, 5 seeds
    python interpretability/saliency_comparison.py --depth 10 --epochs 2 --peaks 0.1 --seeds 1 --scenes 20

Five networks of similar size name the digit in scenes of clutter (digit_scenes.py): S3-Net, ResNet-20, DenseNet-22, and
S3-Net with dense connections or none, in the widths that match its size at depth 40. The peak learning rate of each is
the one with the best accuracy on held-out training digits. Each network is then trained with several seeds. FullGrad's
map and the absolute gradient of the digit's class are scored on scenes of test digits: against the true mask (Dice,
IoU, pointing game, average precision), by insertion and deletion, and by their sharpness (Gini coefficient, share of
the map on the digit, autocorrelation of the gradient). Intervals are 95% of a bootstrap over seeds and scenes.

Maps depend on how well a network has learnt. So the scores are also computed at equal accuracy: at the end of the first
epoch with --equal-accuracy on the held-out digits, for networks of which every seed reaches it.

Files written into --out: `comparison.json`, `comparison.png`, `maps.png` (with `maps-2.png`, ...), and a folder of
trained networks. After an interruption the same command continues: finished trainings and evaluations are not redone.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from network_flags import DEVICES, SIZE, TEST
from s3net_common.command_line import OVERWRITE, THREADS, answer_flags, flag, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import ROOT, claim_folder, run_record, write_json

FAITHFULNESS_STEPS = 10
DRAWN_SCENES = 6
MAPS = ("FullGrad", "gradient")
SCORES = ("dice", "iou", "pointing", "average_precision", "insertion", "deletion", "gini", "mass")
STAGES = ("trained", "equal")  # after the last epoch, and at equal accuracy


@dataclass
class Args:
    """Compare networks by their saliency maps."""

    depth: int = 40
    """Depth of S3-Net and of its variants: 4 more than a multiple of 3."""
    epochs: int = 24
    """Passes over the training digits, in each of which every digit gets a new scene."""
    tuning_epochs: flag(int, "N", "as --epochs") = None
    """Epochs of the trainings that choose the peak learning rate."""
    peaks: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Peak learning rates to choose from; with one there is no choice."""
    seeds: int = 5
    """Trainings of each network."""
    batch_size: int = 64
    """Scenes in one step."""
    held_out: int = 238
    """Training digits that are left out of the training, for choosing the learning rate and the equal accuracy."""
    equal_accuracy: float = 0.8
    """Accuracy on held-out digits, in [0, 1], at which the networks are also compared."""
    scenes: int = TEST
    """Scenes of test digits on which the maps are scored."""
    faithfulness_scenes: flag(int, "N", "as --scenes") = None
    """Scenes of test digits on which insertion and deletion are measured."""
    scene_size: int = SIZE
    """Height and width of the scenes in pixels, 18 or more."""
    device: flag(str, DEVICES, "a GPU if there is one") = None
    """Device to compute on."""
    out: Path = ROOT / "runs" / "saliency_comparison"
    """Folder to write the files into. Finished trainings in it are used again."""
    overwrite: OVERWRITE = False
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import numpy as np
import torch
from torch import nn

from digit_scenes import normalise, scene_pictures
from explain_images import choose_device
from faithfulness import area, deletion_curve, insertion_curve
from full_grad import FullGrad
from map_scores import autocorrelation, bootstrap, interval, score_map, sharpness
from pictures import Picture
from rival_maps import gradients
from s3net_common.checkpoints import load_weights
from s3net_common.cpu_kernels import keep_freed_memory, plain_operations
from s3net_common.progress import ProgressBar
from s3net_common.weight_files import read_header
from s3net_networks import create_network
from saliency_figures import draw_comparison, draw_segmentations, page_names
from scene_training import Training, accuracy_on_held_out_digits, accuracy_on_test_digits, save_network, train

FAITHFULNESS = {"insertion": insertion_curve, "deletion": deletion_curve}


def main(args: Args) -> None:
    """Train the networks, score their maps, and write report and figures."""
    check_flags(args)
    device = choose_device(args.device)
    keep_freed_memory()
    claim_folder(args.out, "comparison.json", "comparison.png", *page_names("maps.png"), overwrite=args.overwrite)
    if not (args.out / "comparison.json").exists():
        write_json(args.out / "comparison.json", run_record() | {"networks": {}})
    trainings, tuning = choose_trainings(args, device)
    train_all([training for seeds in trainings.values() for training in seeds], args, device, "training")
    pictures = scene_pictures(args.scenes, args.scene_size)
    evaluations = evaluate_all(trainings, pictures, args, device)
    report = {
        "settings": {name: value for name, value in asdict(args).items() if name not in ("out", "device", "overwrite")},
        "scenes": len(pictures),
        "networks": {
            name: describe_network(seeds, args) | tuning[name] | summarise(evaluations, name, "trained")
            for name, seeds in trainings.items()
        },
        "equal_accuracy": {
            name: summarise(evaluations, name, "equal") for name in trainings if (name, "equal") in evaluations
        },
        "not_reached": [name for name in trainings if (name, "equal") not in evaluations],
        "cpu_seconds": cpu_seconds(args, trainings, evaluations),
    }
    write_json(args.out / "comparison.json", run_record() | {"device": device.type} | report)
    draw_comparison(args.out / "comparison.png", report)
    drawn = pictures[:DRAWN_SCENES]
    columns = [(name, drawn, first_maps(seeds[0], args)) for name, seeds in trainings.items()]
    draw_segmentations(args.out / "maps.png", drawn, columns, percentile=90)
    print_table(report)
    print(f"written to {args.out}")


def check_flags(args: Args) -> None:
    """Check ranges of the flags.

    Raises:
        InputError: a flag is out of its range.
    """
    least = dict.fromkeys(("epochs", "tuning_epochs", "seeds", "batch_size", "held_out", "scenes"), 1)
    for name, number in (least | {"faithfulness_scenes": 1, "scene_size": 18}).items():
        if (value := getattr(args, name)) is not None and value < number:
            raise InputError(f"--{name.replace('_', '-')} {value} is too small: give {number} or more")
    if args.scenes > TEST:
        raise InputError(f"--scenes {args.scenes} is too large: there are {TEST} test digits")
    if not args.peaks or min(args.peaks) <= 0:
        raise InputError("--peaks needs at least one learning rate, and all above 0")
    if not 0 < args.equal_accuracy <= 1:
        raise InputError(f"--equal-accuracy {args.equal_accuracy} is not above 0 and at most 1")
    largest = Training().digits - args.batch_size
    if args.held_out > largest:
        raise InputError(f"--held-out {args.held_out} leaves no batch to train on: give at most {largest}")


def networks(depth: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return name and options of each network in `s3net_networks`, by its name in tables."""
    s3net = {"depth": depth}
    return {
        "S3-Net k=12": ("s3net_cifar", {"growth_rate": 12} | s3net),
        "ResNet-20": ("resnet20_cifar", {}),
        "DenseNet-22 k=12": ("densenet_cifar", {"growth_rate": 12, "depth": 22}),
        "dense k=5": ("s3net_cifar", {"growth_rate": 5, "connections": "dense"} | s3net),
        "chain k=28": ("s3net_cifar", {"growth_rate": 28, "connections": "chain"} | s3net),
    }


# ---- Trainings ------------------------------------------------------------------------------------------------------


def candidates(args: Args) -> dict[str, list[Training]]:
    """Return the trainings that choose the peak learning rate of each network."""
    return {
        name: [
            Training(
                network,
                options,
                epochs=args.tuning_epochs or args.epochs,
                batch_size=args.batch_size,
                peak_lr=peak,
                held_out=args.held_out,
                size=args.scene_size,
            )
            for peak in args.peaks
        ]
        for name, (network, options) in networks(args.depth).items()
    }


def choose_trainings(args: Args, device: torch.device) -> tuple[dict[str, list[Training]], dict[str, dict]]:
    """Tune the peak learning rate of each network.

    Returns:
        For each network: the trainings of all seeds, and `peak_lr` and `tuning` (held-out accuracy by peak) for the
        report.
    """
    groups, trainings, tuning = candidates(args), {}, {}
    if len(args.peaks) > 1:
        train_all([training for group in groups.values() for training in group], args, device, "tuning")
    for name, group in groups.items():
        accuracies = {}
        if len(group) > 1:
            accuracies = {t.peak_lr: read_results(weight_file(args, t))["held_out_accuracy"][-1] for t in group}
        best = max(group, key=lambda t: accuracies.get(t.peak_lr, 0))
        trainings[name] = [replace(best, epochs=args.epochs, seed=seed) for seed in range(args.seeds)]
        tuning[name] = {"peak_lr": best.peak_lr, "tuning": {f"{peak:g}": value for peak, value in accuracies.items()}}
    return trainings, tuning


def train_all(trainings: list[Training], args: Args, device: torch.device, title: str) -> None:
    """Train what is not trained yet: all networks with seed 0 first, then with seed 1, and so on."""
    with ProgressBar(total=sum(training.steps for training in trainings), desc=title, unit="step") as bar:
        for training in sorted(trainings, key=lambda training: training.seed):
            if is_finished(weight_file(args, training), training, args):
                bar.update(training.steps)
            else:
                train_one(training, args, device, bar)


def train_one(training: Training, args: Args, device: torch.device, bar: ProgressBar) -> None:
    """Train one network, and write it as it is at equal accuracy and at the end."""
    results = {"held_out_accuracy": [], "equal_accuracy": args.equal_accuracy}
    equal = weight_file(args, training, "equal")
    equal.unlink(missing_ok=True)

    def after_epoch(model: nn.Module) -> None:
        results["held_out_accuracy"].append(accuracy_on_held_out_digits(model, args.held_out, args.scene_size))
        if results["held_out_accuracy"][-1] >= args.equal_accuracy and not equal.is_file():
            save_network(equal, training, model, results | measured(model, args, started))

    started = time.process_time()
    with plain_operations():  # the images are small
        model = train(training, device, bar.update, after_epoch)
    save_network(weight_file(args, training), training, model, results | measured(model, args, started))


def measured(model: nn.Module, args: Args, started: float) -> dict[str, float]:
    """Return the accuracy on test digits, and the CPU seconds since `started`."""
    seconds = round(time.process_time() - started, 3)
    return {"test_accuracy": accuracy_on_test_digits(model, args.scene_size), "cpu_seconds": seconds}


def weight_file(args: Args, training: Training, stage: str = "trained") -> Path:
    """Return the file of a trained network, or of the same network at equal accuracy."""
    options = "-".join(f"{name}{value}" for name, value in training.options.items())
    settings = f"peak{training.peak_lr:g}-epochs{training.epochs}-seed{training.seed}"
    name = "-".join(filter(None, (training.network, options, settings, "" if stage == "trained" else stage)))
    return args.out / "networks" / f"{name}.safetensors"


def is_finished(file: Path, training: Training, args: Args) -> bool:
    """Return whether a file holds the result of this training with the same settings."""
    if not file.is_file():
        return False
    results = read_results(file)
    return results.get("training") == asdict(training) and results.get("equal_accuracy") == args.equal_accuracy


def read_results(file: Path) -> dict[str, Any]:
    """Return what `train_one` has stored with the weights."""
    stored = read_header(file)
    names = ("training", "held_out_accuracy", "equal_accuracy", "test_accuracy", "cpu_seconds")
    return {name: json.loads(stored[name]) for name in names if name in stored}


# ---- Maps and scores ------------------------------------------------------------------------------------------------


def evaluate_all(
    trainings: dict[str, list[Training]], pictures: list[Picture], args: Args, device: torch.device
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the scores of every trained network, by network and stage, in the order of the seeds.

    The stage "equal" is left out for networks of which a seed did not reach the equal accuracy.
    """
    files = {
        (name, stage): [weight_file(args, training, stage) for training in seeds]
        for name, seeds in trainings.items()
        for stage in STAGES
    }
    files = {key: paths for key, paths in files.items() if all(path.is_file() for path in paths)}
    evaluations = {}
    with ProgressBar(total=sum(map(len, files.values())), desc="maps", unit="network") as bar:
        for (name, stage), paths in files.items():
            pairs = zip(paths, trainings[name], strict=True)
            evaluations[name, stage] = []
            for path, training in pairs:
                evaluations[name, stage].append(evaluate(path, training, pictures, args, device))
                bar.update()
    return evaluations


def evaluate(
    path: Path, training: Training, pictures: list[Picture], args: Args, device: torch.device
) -> dict[str, Any]:
    """Return the scores of a network's maps, from the file of an earlier run if it scored the same weights.

    Returns:
        `accuracy` on all test digits; `scores`: for each of `MAPS` a list over the scenes for each of `SCORES`;
        `autocorrelation` of the gradient, by scene.
    """
    file = path.with_suffix(".json")
    measured_scenes = min(args.faithfulness_scenes or len(pictures), len(pictures))
    key = {
        "results": read_results(path),
        "scenes": [picture.name for picture in pictures],
        "faithfulness_scenes": measured_scenes,
        "maps": list(MAPS),
    }
    if file.is_file() and (stored := json.loads(file.read_text())).get("key") == key:
        return stored
    started = time.process_time()
    model = create_network(training.network, 10, **training.options).eval()
    load_weights(model, path).to(device)
    maps, gradient = maps_of(model, pictures, device)
    np.savez(path.with_suffix(".npz"), **{name: values[:DRAWN_SCENES] for name, values in maps.items()})
    evaluation = {
        "key": key,
        "cpu_seconds": round(time.process_time() - started, 3),
        "accuracy": key["results"]["test_accuracy"],
        "scores": {
            name: scores_of(pictures, values) | faithfulness_of(model, pictures, values[:measured_scenes], device)
            for name, values in maps.items()
        },
        "autocorrelation": [autocorrelation(values) for values in gradient],
    }
    write_json(file, evaluation)
    return evaluation


def maps_of(
    model: nn.Module, pictures: list[Picture], device: torch.device
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the maps `(N, H, W)` of the digit's class by each of `MAPS`, and its gradient `(N, 3, H, W)`."""
    images, target = tensors(pictures, device)
    gradient = torch.cat([gradients(model, x, y) for x, y in zip(images.split(64), target.split(64), strict=True)])
    saliency = FullGrad(model).explain(images, target).maps[:, 0]
    absolute = gradient.abs().sum(dim=1)
    return dict(zip(MAPS, (saliency.cpu().numpy(), absolute.cpu().numpy()), strict=True)), gradient.cpu().numpy()


def scores_of(pictures: list[Picture], maps: np.ndarray) -> dict[str, list[float]]:
    """Return the scores of maps `(N, H, W)` against the masks and of their sharpness, by scene."""
    rows = []
    for saliency, picture in zip(maps, pictures, strict=True):
        row = score_map(saliency, picture.mask) | sharpness(saliency, picture.mask)
        rows.append(row | {"dice": row["dice_at"], "iou": row["iou_at"]})
    return {score: [float(row[score]) for row in rows] for score in SCORES if score not in FAITHFULNESS}


def faithfulness_of(
    model: nn.Module, pictures: list[Picture], maps: np.ndarray, device: torch.device
) -> dict[str, list[float]]:
    """Return the areas under the insertion and deletion curves of the first scenes, those that have a map."""
    images, target = tensors(pictures[: len(maps)], device)
    stacked = torch.from_numpy(maps).to(device, images.dtype)[:, None]
    return {
        name: area(measure(model, images, stacked, target, FAITHFULNESS_STEPS)).tolist()
        for name, measure in FAITHFULNESS.items()
    }


def tensors(pictures: list[Picture], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised scenes `(N, 3, H, W)` and the classes of their digits `(N,)`."""
    images = normalise(np.stack([picture.pixels for picture in pictures]))
    return images.to(device), torch.tensor([picture.label for picture in pictures], device=device)


def first_maps(training: Training, args: Args) -> list[np.ndarray]:
    """Return FullGrad's maps of the first scenes by a trained network."""
    with np.load(weight_file(args, training).with_suffix(".npz")) as stored:
        return list(stored[MAPS[0]])


# ---- Report ---------------------------------------------------------------------------------------------------------


def describe_network(seeds: list[Training], args: Args) -> dict[str, Any]:
    """Return number of parameters and CPU seconds of a network's trainings."""
    model = create_network(seeds[0].network, 10, **seeds[0].options)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cpu_seconds": [read_results(weight_file(args, training))["cpu_seconds"] for training in seeds],
    }


def cpu_seconds(
    args: Args, trainings: dict[str, list[Training]], evaluations: dict[tuple[str, str], list[dict]]
) -> dict[str, float]:
    """Return the CPU time of the trainings that chose the learning rates, of the other trainings, and of the scores."""
    tuned = {weight_file(args, training) for group in candidates(args).values() for training in group}
    trained = {weight_file(args, training) for seeds in trainings.values() for training in seeds} - tuned
    files = {"tuning": tuned if len(args.peaks) > 1 else set(), "training": trained}
    seconds = {name: sum(read_results(file)["cpu_seconds"] for file in paths) for name, paths in files.items()}
    return seconds | {"scores": sum(run["cpu_seconds"] for runs in evaluations.values() for run in runs)}


def summarise(evaluations: dict[tuple[str, str], list[dict]], name: str, stage: str) -> dict[str, Any]:
    """Return accuracy and scores of a network: means, 95% intervals, and differences to S3-Net with intervals."""
    names = list(dict.fromkeys(key[0] for key in evaluations))
    first, number = names[0], names.index(name)

    def values(network: str, kind: str, score: str) -> np.ndarray:
        runs = evaluations[network, stage]
        return np.array([run["scores"][kind][score] if kind else run[score] for run in runs], dtype=float)

    def summary(kind: str, score: str) -> dict[str, Any]:
        scores = values(name, kind, score)
        means = bootstrap(scores, number)
        result = {"mean": float(scores.mean()), "interval": interval(means)}
        if number and (first, stage) in evaluations:
            reference = values(first, kind, score)
            difference = interval(means - bootstrap(reference, 0))
            result |= {"difference": float(scores.mean() - reference.mean()), "difference_interval": difference}
        return result

    return {
        "accuracy": [run["accuracy"] for run in evaluations[name, stage]],
        "mean_accuracy": float(np.mean([run["accuracy"] for run in evaluations[name, stage]])),
        "scores": {kind: {score: summary(kind, score) for score in SCORES} for kind in MAPS},
        "autocorrelation": summary("", "autocorrelation"),
    }


def print_table(report: dict[str, Any]) -> None:
    """Print accuracy and mean scores of each network's FullGrad maps, after training and at equal accuracy."""
    for title in ("networks", "equal_accuracy"):
        if report[title]:
            print(f"{title.replace('_', ' '):20}{'accuracy':>10}" + "".join(f"{score[:9]:>11}" for score in SCORES))
        for name, row in report[title].items():
            scores = row["scores"][MAPS[0]]
            means = "".join(f"{scores[score]['mean']:11.3f}" for score in SCORES)
            print(f"{name:20}{row['mean_accuracy']:10.3f}{means}")


if __name__ == "__main__":
    run_script(main, Args, __doc__, resume="run the same command again to continue")
