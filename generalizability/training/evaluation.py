"""Evaluation of a file of weights on the validation images of a data set, for `train_s3net.py --eval-only`."""

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch

from data.batches import make_evaluation_batches
from data.image_sets import DiskImages, ImageSet
from distributed import Ranks
from s3net_common.class_names import match_classes
from s3net_common.errors import InputError
from s3net_common.output_files import json_line, relative, run_record, write_json
from s3net_networks.size import model_size
from training.confusion import ConfusionMatrix
from training.engine import Precision, Trainer, evaluate
from training.run_folder import Run
from training.trained_network import TrainedNetwork

RESULTS, PICTURE = "evaluation.json", "confusion.png"


def check_out(out: Path, replace: bool) -> None:
    """Check before the evaluation that its files can be written into the folder `out`.

    Raises:
        InputError: they cannot, or one of them exists and must not be replaced.
    """
    Run(out).check_writable()
    for name in (RESULTS, PICTURE):
        if (out / name).exists() and not replace:
            raise InputError(f"{relative(out / name)} exists already: pass --overwrite to replace it, or another --out")


def evaluate_trained_network(
    trained: TrainedNetwork, val: ImageSet | DiskImages, precision: Precision, ranks: Ranks, loader_workers: int
) -> tuple[dict, ConfusionMatrix]:
    """Evaluate a file of weights. Lines about what was assumed are printed on the main rank.

    Args:
        trained: the file of weights.
        val: the images; those in memory have been resized to `trained.preparation.resize`, unless their data set has
            a fixed size.
        precision: numerical precision of the forward pass.
        ranks: this process among the distributed ranks.
        loader_workers: DataLoader workers that decode images, if they are on disk.

    Returns:
        The metrics (`val_loss`, `val_error`, `val_top5_error`; if the images have some of the classes only, also
        `val_error_restricted` and `val_top5_error_restricted`, with the logits restricted to these classes), number
        of `images`, `parameters` and `multiply_adds`; and the confusion matrix.

    Raises:
        InputError: the classes or the weights do not match, or no image can be read.
    """
    outputs = trained.outputs or len(val.classes)
    match = match_classes(val.classes, trained.classes, outputs, trained.file)
    if ranks.is_main:
        for line in filter(None, [*trained.notes, match.note]):
            print(line, flush=True)
    preparation = trained.preparation
    val = val.with_classes(match.names, match.outputs)
    if isinstance(val, ImageSet):
        val.images = preparation.crop_centre(val.images)
    model = trained.build(outputs, print if ranks.is_main else None)
    model.to(ranks.device, memory_format=torch.channels_last)
    size = model_size(model, preparation.image_size, ranks.device)
    confusion = ConfusionMatrix(match.names, match.outputs)
    batches = make_evaluation_batches(
        val,
        ranks,
        preparation.mean,
        preparation.std,
        preparation.image_size,
        loader_workers,
        transform=preparation.pixels,
    )
    with closing(batches):
        metrics = evaluate(model, batches, Trainer(model, None, None, precision, ranks), confusion.add)
    confusion.reduce(ranks)
    if match.subset:
        names = ("val_error_restricted", "val_top5_error_restricted")
        metrics |= {
            name: 100 * errors / confusion.images
            for name, errors in zip(names, confusion.restricted_errors, strict=True)
        }
    return metrics | {"images": confusion.images} | size, confusion


def report_evaluation(
    out: Path, trained: TrainedNetwork, dataset: str, results: dict, confusion: ConfusionMatrix
) -> None:
    """Print the results, and write them with the errors by class and the confusions into the folder `out`.

    Raises:
        InputError: the files cannot be written.
    """
    record = {
        "kind": "evaluation",
        "checkpoint": str(trained.file),
        "dataset": dataset,
        "model": trained.name,
        "model_options": trained.options,
        "preparation": asdict(trained.preparation),
        **json.loads(json_line(results)),  # without NaN and infinity
        **confusion.as_json(),
        **run_record(),
    }
    write_json(out / RESULTS, record)
    confusion.draw(out / PICTURE, f"{trained.name} on {dataset}: error {results['val_error']:.2f}%")
    print(
        f"{trained.name} on {dataset}: error {results['val_error']:.2f}%, top-5 error "
        f"{results['val_top5_error']:.2f}%, loss {results['val_loss']:.4f} over {results['images']:,} images"
    )
    if "val_error_restricted" in results:
        print(
            f"with the logits restricted to the {len(confusion.present)} classes of the images: error "
            f"{results['val_error_restricted']:.2f}%, top-5 error {results['val_top5_error_restricted']:.2f}%"
        )
    print(f"errors by class and confusions are in {relative(out)}")
    print(json_line(results))
