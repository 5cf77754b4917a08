"""Print the most probable classes of images, with their probabilities, and write them to a CSV file.

    python generalizability/predict.py photo.jpg --checkpoint runs/my-run/best.safetensors
    python generalizability/predict.py my/images more/images "scans/*.png" --checkpoint FILE --top 5

The images are files, folders (with all folders in them) and patterns. They are prepared as in the training of the
network: the checkpoint knows the size and the normalisation. Photographs are rotated as their EXIF orientation says.

The CSV file has a row for each image: its path, and the K most probable classes with their probabilities. Control
characters in names are escaped, and an apostrophe goes before a name that a spreadsheet would compute as a formula.
"""

import csv
import glob
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from s3net_common.command_line import THREADS, answer_flags, flag, run_script
from s3net_common.errors import InputError, nearest_names, printable
from s3net_common.images import IMAGE_SUFFIXES, MAX_PIXELS, find_images, limit_pixels, read_rgb
from s3net_common.output_files import csv_cell, default_out, make_folder, relative, write_atomically
from s3net_common.unused_files import UnreadableImage, report_once, unreadable_images

CHECKPOINTS = "the checkpoint's"  # what --help says about a default
SHOWN_ROWS = 50  # images in the table on the screen
LONGEST_PATH = 60  # characters of a path in this table


@dataclass
class Args:
    """Print the most probable classes of images."""

    images: tyro.conf.Positional[flag(tuple[Path, ...], "IMAGE ...", "none")] = ()
    """Image files, folders of them, or patterns such as "photos/*.jpg"."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(required)")] = None
    """Weights: of this repository (best.safetensors, last.pt), a plain state dict, or published by the authors."""
    top: int = 3
    """Classes listed for each image."""
    skip_unreadable: bool = False
    """Skip images that cannot be read, and list them, instead of stopping."""
    max_pixels: flag(int, "N", f"{MAX_PIXELS:,}") = None
    """Refuse images of more pixels, which could be decompression bombs."""
    batch_size: int = 32
    """Images in one pass."""
    device: flag(str, "{cpu,cuda,cuda:N,mps}", "a GPU if there is one") = None
    """Device to compute on."""
    out: flag(Path, "FILE", "runs/predict/predictions.csv") = None
    """CSV file for the predictions."""
    overwrite: bool = False
    """Replace the file if it exists."""

    model: flag(str, "NAME", CHECKPOINTS) = None
    """Network, if the checkpoint does not name it; train_s3net.py --list-models lists the names."""
    model_options: flag(str, "JSON", CHECKPOINTS) = None
    """Options of the network, if the checkpoint has none: '{"growth_rate": 24, "depth": 40}'."""
    num_classes: flag(int, "N", "the checkpoint's, or the number of class names") = None
    """Outputs of the network, if the checkpoint does not give their number."""
    classes: flag(Path, "FILE", CHECKPOINTS) = None
    """File with the class name of each output in order, one per line, if the checkpoint has no names."""
    dataset: flag(str, "NAME", CHECKPOINTS) = None
    """Data set that the network was trained on, if the checkpoint does not say how its images are prepared."""
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import torch
from torch import Tensor, nn

from distributed import join_ranks
from s3net_common.checkpoints import read_options
from s3net_common.cpu_kernels import keep_freed_memory
from s3net_common.progress import ProgressBar
from s3net_networks import list_networks
from s3net_networks.size import count_multiply_adds
from training.trained_network import TrainedNetwork, read_trained_network


@dataclass
class Prediction:
    """The most probable classes of an image.

    Attributes:
        image: path of the image file.
        classes: names, the most probable first.
        probabilities: of these classes, 0 to 1.
    """

    image: Path
    classes: list[str]
    probabilities: list[float]


def main(args: Args) -> int:
    """Predict the classes of the images, print them, and write the CSV file."""
    check_flags(args)
    limit_pixels(args.max_pixels)
    keep_freed_memory()
    device = join_ranks(args.device).device
    out = args.out or default_out("predict") / "predictions.csv"
    check_out(out, args.overwrite or args.out is None)  # without --out, earlier predictions are replaced
    files = find_files(args.images)
    trained = read_trained_network(
        args.checkpoint, args.model, read_options(args.model_options), args.num_classes, args.classes, args.dataset
    )
    outputs = trained.outputs or (100 if trained.name.endswith("_cifar") else 1000)
    model = trained.build(outputs, print).to(device, memory_format=torch.channels_last)
    count_multiply_adds(model, trained.preparation.image_size, device)  # a check that it takes images of this size
    names = [*(trained.classes or []), *(f"output {i}" for i in range(len(trained.classes or []), outputs))]
    for note in trained.notes:
        print(note, flush=True)
    predictions, errors = [], []
    with ProgressBar(total=len(files), unit="image", leave=False) as bar:
        for paths, pixels in read_batches(files, trained, args.batch_size, errors):
            if paths and (args.skip_unreadable or not errors):
                predictions += predict_batch(model, names, trained, args.top, paths, pixels.to(device))
            bar.update(args.batch_size)
    if errors and not (args.skip_unreadable and predictions):
        raise unreadable_images(errors)
    report_once(errors, set())
    write_atomically(out, lambda path: write_csv(path, predictions))
    print(table(predictions))
    images = f"{len(predictions):,} image{'s' if len(predictions) > 1 else ''}"
    print(f"{images}: written to {relative(out)}", flush=True)
    return 0


def check_flags(args: Args) -> None:
    """Check names and ranges.

    Raises:
        InputError: a flag is missing, a name is unknown, or a number is out of range.
    """
    if args.checkpoint is None:
        raise InputError("the weights are missing: pass --checkpoint FILE")
    if not args.images:
        raise InputError("the images are missing: give files, folders or patterns")
    if args.model is not None and args.model not in list_networks():
        raise InputError(f"there is no network {args.model!r}: {nearest_names(args.model, list_networks())}")
    for name in ("top", "batch_size", "num_classes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} is not possible: give a number of 1 or more")


def check_out(out: Path, overwrite: bool) -> None:
    """Check before the prediction that the CSV file can be written.

    Raises:
        InputError: it cannot, or it exists and must not be replaced.
    """
    make_folder(out.parent)
    if out.is_dir():
        raise InputError(f"{relative(out)} is a folder: pass --out with a file")
    if out.exists() and not overwrite:
        raise InputError(f"{relative(out)} exists already: pass --overwrite to replace it, or another --out")


# ---- Images -------------------------------------------------------------------------------------------------------


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return the image files that the paths name, each once: files, those below folders, and those of patterns.

    Hidden files and folders below a folder are left out.

    Raises:
        InputError: a path does not exist, or a folder or pattern has no image.
    """
    expanded: dict[Path, None] = {}
    for path in paths:
        matches = [path] if path.exists() else _match(str(path))
        if not matches:
            raise InputError(f"there is no image or folder {printable(path)}")
        expanded |= dict.fromkeys(matches)
    return list(dict.fromkeys(find_images(list(expanded))))


def _match(pattern: str) -> list[Path]:
    """Return the folders and the image files that match a pattern, sorted by path."""
    paths = map(Path, sorted(glob.glob(pattern, recursive=True)))  # noqa: PTH207  pathlib takes no absolute patterns
    return [path for path in paths if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES]


def read_batches(
    files: Sequence[Path], trained: TrainedNetwork, batch_size: int, errors: list[UnreadableImage]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Read and prepare images in threads; the next batch is read while the caller works on one.

    Args:
        files: image files.
        trained: says how the images are prepared.
        batch_size: images in a batch.
        errors: receives an error for each image that cannot be read.

    Yields:
        Paths and uint8 pixels `(b, 3, crop, crop)` of the readable images of each batch.
    """

    def read(path: Path) -> Tensor | UnreadableImage:
        try:
            return trained.preparation.pixels(read_rgb(path))
        except UnreadableImage as error:
            return error

    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    with ThreadPoolExecutor() as pool:
        pending = [pool.submit(read, path) for path in batches[0]]
        try:
            for batch, following in zip(batches, [*batches[1:], []], strict=True):
                futures, pending = pending, [pool.submit(read, path) for path in following]
                images = [(path, future.result()) for path, future in zip(batch, futures, strict=True)]
                readable = [(path, pixels) for path, pixels in images if isinstance(pixels, Tensor)]
                errors += [error for _, error in images if isinstance(error, UnreadableImage)]
                stacked = torch.stack([pixels for _, pixels in readable]) if readable else torch.empty(0)
                yield [path for path, _ in readable], stacked
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---- Predictions --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict_batch(
    model: nn.Module, names: Sequence[str], trained: TrainedNetwork, top: int, paths: Sequence[Path], pixels: Tensor
) -> list[Prediction]:
    """Return the `top` most probable classes of each image; pixels are uint8 `(b, 3, crop, crop)` on the device."""
    try:
        logits = model(trained.preparation.normalization(pixels.device)(pixels))
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise InputError(f"{len(paths)} images do not fit into memory: pass a smaller --batch-size") from error
        raise
    probabilities, indices = logits.float().softmax(dim=1).topk(min(top, len(names)))
    return [
        Prediction(path, [names[i] for i in row_indices], row)
        for path, row_indices, row in zip(paths, indices.tolist(), probabilities.tolist(), strict=True)
    ]


def write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write a row for each image: its path, then each class with its probability."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        ranks = range(1, len(predictions[0].classes) + 1)
        writer.writerow(["image", *(title for rank in ranks for title in (f"class_{rank}", f"probability_{rank}"))])
        for prediction in predictions:
            pairs = zip(prediction.classes, prediction.probabilities, strict=True)
            cells = [cell for name, p in pairs for cell in (csv_cell(name), f"{p:.6f}")]
            writer.writerow([csv_cell(str(prediction.image)), *cells])


def table(predictions: Sequence[Prediction]) -> str:
    """Return the first `SHOWN_ROWS` predictions as lines for the terminal."""
    shown = predictions[:SHOWN_ROWS]
    paths = [printable(str(prediction.image)) for prediction in shown]
    paths = [path if len(path) <= LONGEST_PATH else "…" + path[1 - LONGEST_PATH :] for path in paths]
    columns = [paths]
    for rank in range(len(shown[0].classes)):
        columns.append([f"{printable(p.classes[rank])} {100 * p.probabilities[rank]:.1f}%" for p in shown])
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]
    if len(predictions) > SHOWN_ROWS:
        lines.append(f"... and {len(predictions) - SHOWN_ROWS:,} more in the CSV file")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
