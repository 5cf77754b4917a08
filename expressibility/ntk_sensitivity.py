"""Does "proposed beats residual" survive other splits, scalings, regularisers, depths and data?

    python expressibility/ntk_sensitivity.py
    python expressibility/ntk_sensitivity.py --csv houses.csv --target price --splits 200

Figure 3 rests on one split of one data set. Here both topologies are fitted on 100 random splits of Boston
housing and of diabetes, raw and standardised, for seven depths and five regularisers, and compared split by
split; the mean, ridge regression and a Gaussian process see the same splits. Writes sensitivity.json,
sensitivity.png and baselines.png. A run that was stopped goes on where it was when it is started again with
the same options.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tqdm import tqdm

import sensitivity_figures
import tabular
from baseline_regressors import BASELINES
from kernel_regression import mean_squared_error, ntk_matrices, predict
from kernels import DENSE_LAYERS_BESIDE_DEPTH, TOPOLOGIES
from ntk_comparison import DIAG_REG, FIGURE_3_DEPTHS, check_depths
from s3net_common.command_line import run_script
from s3net_common.errors import InputError
from s3net_common.output_files import default_out, make_folder, run_record, save_figure, write_json

SCALINGS = ("raw", "standardised")


@dataclass
class Arguments:
    """Options of the study."""

    out: Path = field(default_factory=lambda: default_out("ntk_sensitivity"))
    """Folder for sensitivity.json, sensitivity.png and baselines.png; created if it isn't there."""
    splits: int = 100
    """Random splits, at least 2: nine tenths for training, one for testing; their seeds are 0, 1, 2, ..."""
    depths: tuple[int, ...] = FIGURE_3_DEPTHS
    """Numbers of blocks, each at least 1. Figure 3's K, which counts Dense layers, is two more."""
    diag_regs: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Regularisers relative to the mean of the kernel's diagonal, above 0; the paper's is 0.1."""
    csv: Path | None = None
    """A comma-separated file to study instead of Boston housing and diabetes: column names, then numbers."""
    target: str | None = None
    """The column of --csv to predict; all others are features."""


def checked(arguments: Arguments) -> tuple[list[tabular.Table], dict[str, Any]]:
    """The data sets, and the settings that decide every number.

    Raises:
        InputError: an option makes no sense, or the CSV can't be used.
    """
    if arguments.splits < 2:
        raise InputError(f"--splits is {arguments.splits}: at least 2 are needed for an interval")
    if not arguments.diag_regs or not all(0 < reg < np.inf for reg in arguments.diag_regs):
        raise InputError("--diag-regs must be one or more numbers above 0, such as --diag-regs 0.01 0.1")
    if (arguments.csv is None) != (arguments.target is None):
        raise InputError("--csv and --target go together: --csv FILE --target COLUMN")
    if arguments.csv is None:
        tables = [tabular.boston(), tabular.diabetes()]
    else:
        tables = [tabular.load_csv(arguments.csv, arguments.target)]
    settings = {
        "datasets": {table.name: _fingerprint(table) for table in tables},
        "splits": arguments.splits,
        "depths": list(check_depths(arguments.depths)),
        "diag_regs": sorted(set(arguments.diag_regs)),
    }
    return tables, settings


def _fingerprint(table: tabular.Table) -> dict[str, int]:
    rows, features = table.features.shape
    checksum = zlib.crc32(table.features.tobytes() + table.target.tobytes())
    return {"rows": rows, "features": features, "crc32": checksum}


def evaluate(split: tabular.Split, depths: list[int], diag_regs: list[float]) -> dict[str, list[list[float]]]:
    """Test mean squared errors of both topologies, by depth (rows) and regulariser (columns)."""
    errors = {}
    for topology in TOPOLOGIES:
        matrices = ntk_matrices(split.x_train, split.x_test, topology, depths)
        try:
            errors[topology] = [
                [mean_squared_error(predict(matrices[depth], split.y_train, reg), split.y_test) for reg in diag_regs]
                for depth in depths
            ]
        except ValueError as error:
            raise InputError(f"{error} than the least of --diag-regs") from None
    return errors


def records(tables: list[tabular.Table], settings: dict[str, Any], partial: Path) -> Iterator[dict[str, Any]]:
    """Yields the errors on every split of every data set and scaling, taking from `partial` what it has.

    `partial` holds the settings in its first line and one record in each other; records are appended as they
    come.
    """
    done = _read_partial(partial, settings)
    rewritten = partial.with_suffix(".rewritten")  # without the line that a kill cut short
    rewritten.write_text("".join(json.dumps(line) + "\n" for line in (settings, *done.values())))
    rewritten.replace(partial)
    with partial.open("a") as file:
        keys = [(t, scaling, seed) for t in tables for scaling in SCALINGS for seed in range(settings["splits"])]
        for table, scaling, seed in tqdm(keys, desc="splits", disable=None):
            record = done.get((table.name, scaling, seed))
            if record is None:
                raw = tabular.split(table, seed)
                split = raw if scaling == "raw" else raw.standardised()
                record = {"dataset": table.name, "scaling": scaling, "seed": seed}
                record |= evaluate(split, settings["depths"], settings["diag_regs"])
                if scaling == "standardised":
                    record["baselines"] = {
                        name: mean_squared_error(fit(split), split.y_test) for name, fit in BASELINES.items()
                    }
                print(json.dumps(record), file=file, flush=True)
            yield record


def _read_partial(partial: Path, settings: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, Any]]:
    lines = []
    if partial.exists():
        for text in partial.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    if not lines or lines[0] != settings:
        return {}
    return {(record["dataset"], record["scaling"], record["seed"]): record for record in lines[1:]}


def paired_difference(first: np.ndarray, second: np.ndarray, test_share: float) -> dict[str, Any]:
    """Compares two predictors' errors over the same random splits.

    Random splits share most of their rows, so that their differences are not independent: the interval is
    that of the corrected resampled t-test (Nadeau and Bengio, 2003), whose variance has test / training rows
    added to 1 / n.

    Args:
        first: (n,) errors.
        second: (n,) errors on the same splits.
        test_share: share of the rows used for testing, between 0 and 1.

    Returns:
        `difference`: mean of first - second, positive where the second is better; `ci95`: its 95% interval;
        `percent`: the difference relative to the first's mean error; `win_rate`: share of the splits on which
        the second has the smaller error.
    """
    difference = first - second
    n = len(difference)
    scale = np.sqrt((1 / n + test_share / (1 - test_share)) * difference.var(ddof=1))
    half = float(stats.t.ppf(0.975, n - 1) * scale)
    mean = float(difference.mean())
    return {
        "difference": mean,
        "ci95": [mean - half, mean + half],
        "percent": 100 * mean / float(first.mean()),
        "win_rate": float(np.mean(difference > 0)),
    }


def cells(found: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One comparison of the topologies for each data set, scaling, depth and regulariser."""
    compared = []
    for dataset in settings["datasets"]:
        for scaling in SCALINGS:
            mine = [record for record in found if (record["dataset"], record["scaling"]) == (dataset, scaling)]
            errors = {topology: np.array([record[topology] for record in mine]) for topology in TOPOLOGIES}
            for i, depth in enumerate(settings["depths"]):
                for j, diag_reg in enumerate(settings["diag_regs"]):
                    residual, proposed = (errors[topology][:, i, j] for topology in ("residual", "proposed"))
                    compared.append(
                        {
                            "dataset": dataset,
                            "scaling": scaling,
                            "K": depth + DENSE_LAYERS_BESIDE_DEPTH,
                            "diag_reg": diag_reg,
                            "residual_mse": float(residual.mean()),
                            "proposed_mse": float(proposed.mean()),
                            **paired_difference(residual, proposed, tabular.TEST_SHARE),
                        }
                    )
    return compared


def verdicts(compared: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each data set and scaling: in how many settings which topology is ahead, and how far."""
    found = []
    for dataset, scaling in dict.fromkeys((cell["dataset"], cell["scaling"]) for cell in compared):
        mine = [cell for cell in compared if (cell["dataset"], cell["scaling"]) == (dataset, scaling)]
        percents = [cell["percent"] for cell in mine]
        found.append(
            {
                "dataset": dataset,
                "scaling": scaling,
                "settings": len(mine),
                "proposed_better": sum(cell["difference"] > 0 for cell in mine),
                "proposed_surely_better": sum(cell["ci95"][0] > 0 for cell in mine),
                "residual_surely_better": sum(cell["ci95"][1] < 0 for cell in mine),
                "percent_range": [min(percents), max(percents)],
                "win_rate_range": [f(cell["win_rate"] for cell in mine) for f in (min, max)],
            }
        )
    return found


def baselines(
    found: list[dict[str, Any]], compared: list[dict[str, Any]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Mean errors of everything on the same splits, by data set, each compared with ridge regression.

    The kernels appear twice: as in Figure 3 (raw features, diag_reg 0.1, the greatest depth) and in the
    setting with the least mean test error of all, which no one could have chosen without the test rows.
    """
    rows = []
    for dataset in settings["datasets"]:
        mine = [record for record in found if record["dataset"] == dataset]
        standard = [record for record in mine if record["scaling"] == "standardised"]
        errors = {name: np.array([record["baselines"][name] for record in standard]) for name in BASELINES}
        described = dict.fromkeys(BASELINES, "standardised features")
        settled = [cell for cell in compared if cell["dataset"] == dataset]
        for topology in TOPOLOGIES:
            best = min(settled, key=lambda cell, topology=topology: cell[f"{topology}_mse"])
            chosen = {f"{topology} NTK, best in hindsight": best}
            for cell in settled:
                if (cell["scaling"], cell["K"], cell["diag_reg"]) == ("raw", settled[-1]["K"], DIAG_REG):
                    chosen[f"{topology} NTK, as in Figure 3"] = cell
            for name, cell in chosen.items():
                i = settings["depths"].index(cell["K"] - DENSE_LAYERS_BESIDE_DEPTH)
                j = settings["diag_regs"].index(cell["diag_reg"])
                errors[name] = np.array([r[topology][i][j] for r in mine if r["scaling"] == cell["scaling"]])
                described[name] = f"{cell['scaling']} features, K = {cell['K']}, diag_reg {cell['diag_reg']:g}"
        for name, error in errors.items():
            row = {
                "dataset": dataset,
                "predictor": name,
                "setting": described[name],
                "mse": float(error.mean()),
            }
            if name != "ridge":
                row["against_ridge"] = paired_difference(errors["ridge"], error, tabular.TEST_SHARE)
            rows.append(row)
    return rows


def report(found: dict[str, Any]) -> str:
    """The finding as lines of text."""
    lines = []
    for verdict in found["verdicts"]:
        low, high = verdict["percent_range"]
        lines.append(
            f"{verdict['dataset']}, {verdict['scaling']}: proposed surely better in "
            f"{verdict['proposed_surely_better']} of {verdict['settings']} settings, residual in "
            f"{verdict['residual_surely_better']}; proposed's error is {low:.2f}% to {high:.2f}% smaller"
        )
    lines += [
        f"{row['dataset']}: {row['predictor']} ({row['setting']}): MSE {row['mse']:.2f}" for row in found["baselines"]
    ]
    return "\n".join(lines)


def main(arguments: Arguments) -> None:
    """Runs the study, or what is left of it, and writes its results."""
    tables, settings = checked(arguments)
    out = make_folder(arguments.out)
    partial = out / "sensitivity.partial.jsonl"
    measured = list(records(tables, settings, partial))
    compared = cells(measured, settings)
    found = {
        "settings": settings,
        "verdicts": verdicts(compared),
        "baselines": baselines(measured, compared, settings),
        "cells": compared,
    }
    write_json(out / "sensitivity.json", run_record() | found)
    save_figure(out / "sensitivity.png", sensitivity_figures.draw_cells(found))
    save_figure(out / "baselines.png", sensitivity_figures.draw_baselines(found))
    partial.unlink()
    print(report(found))
    print(f"Wrote {out / 'sensitivity.json'}, {out / 'sensitivity.png'} and {out / 'baselines.png'}")


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
