"""Folders of runs as train_s3net.py writes them, without training."""

import json


def write_run(folder, errors=(40.0, 30.0, 31.0), seed=0, dataset="cifar100", epochs=None, **config):
    """Write a run's folder with the top-1 errors of its epochs. With fewer errors than epochs it is unfinished."""
    epochs = epochs or len(errors)
    config = {
        "dataset": dataset,
        "model": "s3net_cifar",
        "model_options": {"growth_rate": 12},
        "num_classes": 100,
        "epochs": epochs,
        "batch_size": 64,
        "lr": 0.2,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": "step",
        "milestones": [0.25, 0.5, 0.75],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "flip": True,
        "crop_padding": 0.125,
        "amp": True,
        "seed": seed,
        "image_size": 32,
        "limit_train": None,
        "limit_val": None,
        "train_images": 50_000,
        "val_images": 10_000,
        "classes": ["a", "b"],
        **config,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {
            "epoch": i + 1,
            "lr": config["lr"],
            "train_error": error - 1,
            "val_error": error,
            "val_top5_error": error / 4,
            "images_per_second": 400.0,
            "seconds": 3600.0,
        }
        for i, error in enumerate(errors)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if len(errors) == epochs:
        (folder / "summary.json").write_text(json.dumps({"parameters": 272836, "multiply_adds": 42780192}))
    return folder
