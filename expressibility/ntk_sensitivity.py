"""Test whether the ranking of Figure 3 depends on split, scaling, regulariser, depth, weights or data.

    python expressibility/ntk_sensitivity.py
    python expressibility/ntk_sensitivity.py --csv houses.csv --target price --splits 200

Figure 3 uses a single split of a single data set. This script evaluates both topologies, and a chain without
shortcuts, on 100 random splits of Boston housing and of diabetes, with raw and standardised features, seven depths,
five regularisers and three standard deviations of the weights, and compares their errors split by split. The training
mean, ridge regression and a Gaussian process are evaluated on the same splits. Writes sensitivity.json,
sensitivity.png (residual and proposed), sensitivity_chain.png (chain and proposed) and baselines.png.

A run that was interrupted continues if the script is started again with the same flags.
"""

import itertools
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from figure_3 import FIGURE_3_DEPTHS, W_STD, check_depths
from s3net_common.command_line import THREADS, answer_flags, flag, run_script
from s3net_common.errors import InputError
from s3net_common.output_files import (
    claim_folder,
    default_out,
    run_record,
    save_figure,
    write_atomically,
    write_json,
)

SCALINGS = ("raw", "standardised")
DEFAULT_DATA = "Boston housing and diabetes"
PICTURES = ("sensitivity.png", "sensitivity_chain.png", "baselines.png")
MAX_W_STD = 100.0
LEVEL = 0.05
Rival = Literal["residual", "chain"]


@dataclass
class Args:
    """Flags of the study."""

    out: Path = field(default_factory=lambda: default_out("ntk_sensitivity"))
    """Folder for sensitivity.json and the pictures, created if missing. Those of an earlier run are replaced, and an
    interrupted study with the same flags is continued."""
    overwrite: bool = False
    """Replace files in --out that this script did not write, and an interrupted study with other flags."""
    splits: int = 100
    """Number of random splits, at least 2, with a tenth of the rows for testing. Their seeds are 0, 1, 2, ..."""
    depths: tuple[int, ...] = FIGURE_3_DEPTHS
    """Numbers of blocks, each at least 1. Figure 3's K counts Dense layers and is larger by 2."""
    diag_regs: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Regularisers relative to the mean of the kernel's diagonal, above 0. The paper's is 0.1."""
    w_stds: tuple[float, ...] = (1.0, W_STD, 2.0)
    """Standard deviations of the weights times the square root of the layer's inputs, above 0. The paper's is 1.5."""
    csv: flag(Path, "FILE", DEFAULT_DATA) = None
    """Table to study instead: a line of column names, then lines of numbers, separated by commas, semicolons or tabs.
    Needs --target."""
    target: flag(str, "COLUMN", "none") = None
    """Column of --csv to predict. All other columns are features."""
    threads: THREADS = None


if __name__ == "__main__":
    answer_flags(Args, __doc__)

import numpy as np
from scipy import stats

import sensitivity_figures
import tabular
from baseline_regressors import BASELINES
from jax_backend import jax_backend
from kernel_regression import mean_squared_error, ntk_matrices, predict
from kernels import DENSE_LAYERS_BESIDE_DEPTH, TOPOLOGIES
from ntk_comparison import DIAG_REG
from s3net_common.progress import ProgressBar


def check_args(args: Args) -> tuple[list[tabular.Table], dict[str, Any]]:
    """Return the data sets and the settings of the study.

    The settings determine all results, so a run that was interrupted continues only if they are equal.

    Raises:
        InputError: a flag has an invalid value, or the CSV file cannot be used.
    """
    if args.splits < 2:
        raise InputError(f"--splits is {args.splits}: at least 2 are needed for an interval")
    if not args.diag_regs or not all(0 < diag_reg < np.inf for diag_reg in args.diag_regs):
        raise InputError("--diag-regs must be one or more numbers above 0, such as --diag-regs 0.01 0.1")
    if not args.w_stds or not all(0 < w_std <= MAX_W_STD for w_std in args.w_stds):
        raise InputError(f"--w-stds must be one or more numbers above 0 and at most {MAX_W_STD:g}, such as 1.0 1.5")
    if (args.csv is None) != (args.target is None):
        raise InputError("--csv and --target must be given together: --csv FILE --target COLUMN")
    tables = [tabular.load_csv(args.csv, args.target)] if args.csv else [tabular.boston(), tabular.diabetes()]
    settings = {
        "datasets": {table.name: _fingerprint(table) for table in tables},
        "splits": args.splits,
        "depths": list(check_depths(args.depths)),
        "diag_regs": sorted(set(args.diag_regs)),
        "w_stds": sorted(set(args.w_stds)),
    }
    return tables, settings


def _fingerprint(table: tabular.Table) -> dict[str, int]:
    rows, features = table.features.shape
    checksum = zlib.crc32(table.features.tobytes() + table.target.tobytes())
    return {"rows": rows, "features": features, "crc32": checksum}


# ---- Errors on every split ----------------------------------------------------------------------------------------


def evaluate(
    split: tabular.Split, depths: list[int], diag_regs: list[float], w_stds: Sequence[float] = (W_STD,)
) -> dict[str, list[list[list[float]]]]:
    """Return by topology the mean squared errors on the test rows, by W_std, then depth, then regulariser.

    Raises:
        InputError: the smallest regulariser leaves a kernel matrix singular.
    """
    errors: dict[str, list[list[list[float]]]] = {topology: [] for topology in TOPOLOGIES}
    for topology in TOPOLOGIES:
        for w_std in w_stds:
            matrices = ntk_matrices(split.x_train, split.x_test, topology, depths, w_std=w_std)
            try:
                errors[topology].append(
                    [
                        [
                            mean_squared_error(predict(matrices[depth], split.y_train, diag_reg), split.y_test)
                            for diag_reg in diag_regs
                        ]
                        for depth in depths
                    ]
                )
            except ValueError as error:
                raise InputError(f"{error} than the smallest of --diag-regs") from None
    return errors


def evaluate_splits(
    tables: list[tabular.Table], settings: dict[str, Any], partial: Path, overwrite: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a record of errors for every data set, scaling and split.

    Each record is also appended to the file `partial`, whose first line contains the settings. Records that the file
    already contains are not computed again.

    Raises:
        InputError: `partial` has other settings or is another file, and `overwrite` is False.
    """
    finished = _read_partial(partial, settings, overwrite)
    # Without a last line that is incomplete since the process was killed while writing it.
    text = "".join(json.dumps(line) + "\n" for line in (settings, *finished.values()))
    write_atomically(partial, lambda temporary: temporary.write_text(text))
    with partial.open("a") as file:
        keys = [
            (table, scaling, seed) for table in tables for scaling in SCALINGS for seed in range(settings["splits"])
        ]
        for table, scaling, seed in ProgressBar(keys, desc="splits"):
            record = finished.get((table.name, scaling, seed))
            if record is None:
                record = _evaluate_split(table, scaling, seed, settings)
                print(json.dumps(record), file=file, flush=True)
            yield record


def _evaluate_split(table: tabular.Table, scaling: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    split = tabular.split(table, seed)
    if scaling == "standardised":
        split = split.standardised()
    record = {"dataset": table.name, "scaling": scaling, "seed": seed}
    record |= evaluate(split, settings["depths"], settings["diag_regs"], settings["w_stds"])
    if scaling == "standardised":
        record["baselines"] = {
            name: mean_squared_error(predict_test(split), split.y_test) for name, predict_test in BASELINES.items()
        }
    return record


def _read_partial(
    partial: Path, settings: dict[str, Any], overwrite: bool
) -> dict[tuple[str, str, int], dict[str, Any]]:
    lines = []
    if not partial.exists():
        return {}
    for text in partial.read_text(errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    if not lines or lines[0] != settings:
        if overwrite:
            return {}
        raise InputError(
            f"{partial} belongs to an interrupted study with other flags or data: repeat its command to continue it, "
            "pass another --out, or --overwrite to replace it"
        )
    return {(record["dataset"], record["scaling"], record["seed"]): record for record in lines[1:]}


# ---- Comparison of the errors -------------------------------------------------------------------------------------


def paired_difference(first: np.ndarray, second: np.ndarray, test_share: float) -> dict[str, Any]:
    """Compare the errors of two predictors on the same random splits.

    Random splits share most of their rows, so the differences are not independent. The interval is that of the
    corrected resampled t-test (Nadeau and Bengio, 2003): the factor 1 / n of the variance is replaced by
    1 / n + test rows / training rows.

    Args:
        first: (n,) errors.
        second: (n,) errors on the same splits.
        test_share: share of the rows used for testing, between 0 and 1.

    Returns:
        `difference`: mean of first - second, positive if the second predictor is better; `ci95`: its 95% confidence
        interval; `p_value`: two-sided, of a difference of 0; `percent`: the difference relative to the first
        predictor's mean error; `win_rate`: share of the splits on which the second predictor has the smaller error.
    """
    difference = first - second
    n = len(difference)
    standard_error = np.sqrt((1 / n + test_share / (1 - test_share)) * difference.var(ddof=1))
    half_width = float(stats.t.ppf(0.975, n - 1) * standard_error)
    mean = float(difference.mean())
    t = abs(mean) / standard_error if standard_error > 0 else (math.inf if mean else 0.0)
    return {
        "difference": mean,
        "ci95": [mean - half_width, mean + half_width],
        "p_value": float(2 * stats.t.sf(t, n - 1)),
        "percent": 100 * mean / float(first.mean()),
        "win_rate": float(np.mean(difference > 0)),
    }


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return the p-values adjusted for their number (Holm 1979): the share of families with an error is bounded."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def compare_topologies(records: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a cell for each data set, scaling, W_std, depth and regulariser.

    A cell has the topologies' mean errors and the difference residual - proposed; its `chain` has the difference chain
    - proposed. `holm_p_value` is adjusted over all cells, for each of the two comparisons.
    """
    cells = []
    places = list(itertools.product(*(enumerate(settings[axis]) for axis in ("w_stds", "depths", "diag_regs"))))
    for dataset, scaling in itertools.product(settings["datasets"], SCALINGS):
        selected = [record for record in records if (record["dataset"], record["scaling"]) == (dataset, scaling)]
        errors = {topology: np.array([record[topology] for record in selected]) for topology in TOPOLOGIES}
        for (w, w_std), (i, depth), (j, diag_reg) in places:
            by_split = {topology: errors[topology][:, w, i, j] for topology in TOPOLOGIES}
            cells.append(
                {
                    "dataset": dataset,
                    "scaling": scaling,
                    "w_std": w_std,
                    "K": depth + DENSE_LAYERS_BESIDE_DEPTH,
                    "diag_reg": diag_reg,
                    **{f"{topology}_mse": float(error.mean()) for topology, error in by_split.items()},
                    **paired_difference(by_split["residual"], by_split["proposed"], tabular.TEST_SHARE),
                    "chain": paired_difference(by_split["chain"], by_split["proposed"], tabular.TEST_SHARE),
                }
            )
    for comparisons in (cells, [cell["chain"] for cell in cells]):
        adjusted = holm([comparison["p_value"] for comparison in comparisons])
        for comparison, p_value in zip(comparisons, adjusted, strict=True):
            comparison["holm_p_value"] = float(p_value)
    return cells


def count(cells: list[dict[str, Any]], rival: Rival) -> dict[str, Any]:
    """Count the settings in which the proposed topology or its rival is better.

    "Surely" means that the 95% interval of the difference excludes 0, "after Holm" that the difference differs from 0
    at the 5% level with Holm's correction.

    Args:
        cells: as `compare_topologies` returns them, at least one.
        rival: "residual" or "chain".
    """
    compared = [cell if rival == "residual" else cell["chain"] for cell in cells]
    percents = [cell["percent"] for cell in compared]
    win_rates = [cell["win_rate"] for cell in compared]
    after_holm = [math.copysign(cell["holm_p_value"] < LEVEL, cell["difference"]) for cell in compared]
    return {
        "settings": len(cells),
        "proposed_better": sum(cell["difference"] > 0 for cell in compared),
        "proposed_surely_better": sum(cell["ci95"][0] > 0 for cell in compared),
        f"{rival}_surely_better": sum(cell["ci95"][1] < 0 for cell in compared),
        "proposed_better_after_holm": after_holm.count(1.0),
        f"{rival}_better_after_holm": after_holm.count(-1.0),
        "percent_range": [min(percents), max(percents)],
        "win_rate_range": [min(win_rates), max(win_rates)],
    }


def summarise(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the counts against the residual topology, and as `chain` those against the chain, by data and W_std."""
    keys = ("dataset", "scaling", "w_std")
    verdicts = []
    for values in dict.fromkeys(tuple(cell[key] for key in keys) for cell in cells):
        selected = [cell for cell in cells if tuple(cell[key] for key in keys) == values]
        dataset, scaling, w_std = values
        verdict = {
            "name": f"{dataset.capitalize()}, {scaling}, W_std {w_std:g}",
            **dict(zip(keys, values, strict=True)),
        }
        verdicts.append(verdict | count(selected, "residual") | {"chain": count(selected, "chain")})
    return verdicts


def count_by_grid(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the counts of smaller grids of settings, with Holm's correction over each grid alone."""
    grids = {
        "all settings": cells,
        f"W_std {W_STD:g}": [cell for cell in cells if cell["w_std"] == W_STD],
        f"diag_reg {DIAG_REG:g}": [cell for cell in cells if cell["diag_reg"] == DIAG_REG],
        f"W_std {W_STD:g}, diag_reg {DIAG_REG:g}": [
            cell for cell in cells if (cell["w_std"], cell["diag_reg"]) == (W_STD, DIAG_REG)
        ],
        "largest K": [cell for cell in cells if cell["K"] == cells[-1]["K"]],
        "raw features": [cell for cell in cells if cell["scaling"] == "raw"],
    }
    counts = []
    for name, selected in grids.items():
        if selected:
            corrected = []
            adjusted = (holm([cell["p_value"] for cell in part]) for part in (selected, [c["chain"] for c in selected]))
            for cell, p_value, p_value_chain in zip(selected, *adjusted, strict=True):
                chain = cell["chain"] | {"holm_p_value": p_value_chain}
                corrected.append(cell | {"holm_p_value": p_value, "chain": chain})
            counts.append({"grid": name, **count(corrected, "residual"), "chain": count(corrected, "chain")})
    return counts


def compare_predictors(
    records: list[dict[str, Any]], cells: list[dict[str, Any]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the mean error of every predictor by data set, and its difference to ridge regression.

    Each kernel appears twice: in Figure 3's setting (raw features, W_std 1.5, diag_reg 0.1, the largest depth), and in
    the setting with the smallest mean test error. The second choice uses the test rows, so its error is optimistic.
    """
    rows = []
    for dataset in settings["datasets"]:
        selected = [record for record in records if record["dataset"] == dataset]
        errors = {
            name: np.array([record["baselines"][name] for record in selected if "baselines" in record])
            for name in BASELINES
        }
        descriptions = dict.fromkeys(BASELINES, "standardised features")
        for name, topology, cell in _kernel_settings([cell for cell in cells if cell["dataset"] == dataset]):
            i = settings["depths"].index(cell["K"] - DENSE_LAYERS_BESIDE_DEPTH)
            j = settings["diag_regs"].index(cell["diag_reg"])
            w = settings["w_stds"].index(cell["w_std"])
            errors[name] = np.array(
                [record[topology][w][i][j] for record in selected if record["scaling"] == cell["scaling"]]
            )
            descriptions[name] = (
                f"{cell['scaling']} features, W_std {cell['w_std']:g}, K = {cell['K']}, diag_reg {cell['diag_reg']:g}"
            )
        for name, error in errors.items():
            row = {
                "dataset": dataset,
                "predictor": name,
                "setting": descriptions[name],
                "mse": float(error.mean()),
            }
            if name != "ridge":
                row["against_ridge"] = paired_difference(errors["ridge"], error, tabular.TEST_SHARE)
            rows.append(row)
    return rows


def _kernel_settings(cells: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (predictor's name, topology, cell) of the two settings in which each kernel is compared."""
    for topology in TOPOLOGIES:
        best = min(cells, key=lambda cell, topology=topology: cell[f"{topology}_mse"])
        yield f"{topology} NTK, best in hindsight", topology, best
        for cell in cells:
            place = (cell["scaling"], cell["w_std"], cell["K"], cell["diag_reg"])
            if place == ("raw", W_STD, cells[-1]["K"], DIAG_REG):
                yield f"{topology} NTK, as in Figure 3", topology, cell


# ---- Results ------------------------------------------------------------------------------------------------------


def format_report(results: dict[str, Any]) -> str:
    """Return the results as lines of text."""
    lines = []
    for verdict in results["verdicts"]:
        place = f"{verdict['dataset']}, {verdict['scaling']}, W_std {verdict['w_std']:g}"
        for rival, counts in (("residual", verdict), ("chain", verdict["chain"])):
            low, high = counts["percent_range"]
            lines.append(
                f"{place}: of {counts['settings']} settings proposed surely better in "
                f"{counts['proposed_surely_better']} ({counts['proposed_better_after_holm']} after Holm's correction), "
                f"{rival} in {counts[f'{rival}_surely_better']} ({counts[f'{rival}_better_after_holm']}); proposed's "
                f"error is {low:.2f}% to {high:.2f}% smaller"
            )
    lines += [
        f"{row['dataset']}: {row['predictor']} ({row['setting']}): MSE {row['mse']:.2f}" for row in results["baselines"]
    ]
    return "\n".join(lines)


def main(args: Args) -> None:
    """Run or continue the study, print the report and write the results."""
    tables, settings = check_args(args)
    jax_backend()  # raises InputError before the folder is made
    out = claim_folder(args.out, "sensitivity.json", *PICTURES, overwrite=args.overwrite)
    partial = out / "sensitivity.partial.jsonl"
    records = list(evaluate_splits(tables, settings, partial, args.overwrite))
    cells = compare_topologies(records, settings)
    results = {
        "settings": settings,
        "verdicts": summarise(cells),
        "counts_by_grid": count_by_grid(cells),
        "baselines": compare_predictors(records, cells, settings),
        "cells": cells,
    }
    write_json(out / "sensitivity.json", run_record() | results)
    for picture, figure in zip(PICTURES, sensitivity_figures.draw_all(results), strict=True):
        save_figure(out / picture, figure)
    partial.unlink()
    print(format_report(results))
    print(f"Wrote {', '.join(str(out / name) for name in ('sensitivity.json', *PICTURES))}")


if __name__ == "__main__":
    run_script(main, Args, __doc__, resume="run the same command again to continue")
