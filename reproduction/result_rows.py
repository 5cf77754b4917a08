"""Rows of the page's tables, from the scripts' JSON files. A row is a dict by column title."""

Row = dict[str, object]


def figure_3_rows(results: dict) -> list[Row]:
    """Return the computed and the printed errors, by K."""
    columns = {
        "K": results["K"],
        "residual": results["residual"],
        "proposed": results["proposed"],
        "chain": results["chain"],
        "residual, paper": results["paper"]["residual"],
        "proposed, paper": results["paper"]["proposed"],
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def sensitivity_rows(results: dict) -> list[Row]:
    """Return the number of settings in which each topology is better, by data and W_std."""
    rows = []
    for verdict in results["verdicts"]:
        row: Row = {"data": f"{verdict['dataset']}, {verdict['scaling']}", "W_std": verdict["w_std"]}
        row["settings"] = verdict["settings"]
        for rival, counts in (("residual", verdict), ("chain", verdict["chain"])):
            for better in ("proposed", rival):
                title = f"{better} better than {rival if better == 'proposed' else 'proposed'}"
                row[title] = f"{counts[f'{better}_surely_better']} ({counts[f'{better}_better_after_holm']})"
        rows.append(row)
    return rows


def one_neuron_rows(results: dict) -> list[Row]:
    """Return the largest error at even and odd depths, and its lower bound without shortcuts."""
    odd = results["odd"]
    curves = zip(results["depths"], results["errors"], odd["depths"], odd["errors"], strict=True)
    bound = results["without_shortcuts"]["bound_at_any_depth"]
    return [
        *(
            {"layers": even, "largest error": error, "layers, odd": depth, "largest error, odd": odd_error}
            for even, error, depth, odd_error in curves
        ),
        {"layers": "any, no shortcuts", "largest error": bound, "layers, odd": "", "largest error, odd": ""},
    ]


def universal_approximation_rows(results: dict) -> list[Row]:
    """Return the mean largest error by depth, and the difference from the shallow network."""
    return [
        {
            "layers": row["depth"],
            "parameters": row["parameters"],
            "largest error": row["mean_error"],
            "difference from the shallow network": f"{row['largest_difference_from_shallow']:.1e}",
        }
        for row in results["rows"]
    ]


def gradient_rows(results: dict) -> list[Row]:
    """Return the decades of each kind of connection with and without BatchNorm, by depth."""
    kinds = dict.fromkeys(row["kind"] for row in results["initial"])
    rows: dict[tuple, Row] = {}
    for result in results["initial"]:
        key = (result["depth"], result["normalisation"])
        row = rows.setdefault(key, {"layers": key[0], "BatchNorm": key[1], **dict.fromkeys(kinds, "")})
        low, high = result["outputs"]["ci95"]
        row[result["kind"]] = f"{result['outputs']['mean']:.2f} ({low:.2f} to {high:.2f})"
    return list(rows.values())


def run_rows(summary: dict) -> list[Row]:
    """Return the errors and the size of a training run."""
    return [
        {
            "network": summary["model"],
            "epochs": summary["epochs"],
            "error after the last epoch, %": f"{summary['last_val_error']:.2f}",
            "best error, %": f"{summary['best_val_error']:.2f} (epoch {summary['best_epoch']})",
            "parameters": summary["parameters"],
            "multiply-adds": summary["multiply_adds"],
        }
    ]


def saliency_rows(results: dict) -> list[Row]:
    """Return the most probable classes of each image, and the completeness error of its map."""
    return [
        {
            "image": saliency["image"],
            **{
                f"class {rank}": f"{name} {probability:.2f}"
                for rank, (name, probability) in enumerate(saliency["most_probable"], start=1)
            },
            "completeness error": f"{saliency['completeness_error']:.1e}",
        }
        for saliency in results["maps"]
    ]


def score_rows(results: dict) -> list[Row]:
    """Return the mean scores against the masks, by method."""
    percentile = f"at the {results['percentile']:g}th percentile"
    titles = {"dice_at": f"Dice {percentile}", "iou_at": f"IoU {percentile}", "pointing": "pointing game"}
    return [
        {
            "map": f"FullGrad ({method})" if method in results["largest_completeness_error"] else method,
            **{titles.get(name, name): f"{score:.4f}" for name, score in scores.items()},
        }
        for method, scores in results["mean"].items()
    ]


def faithfulness_rows(results: dict) -> list[Row]:
    """Return the mean areas under the insertion and deletion curves, by method."""
    ((_, methods),) = results["networks"].items()
    return [
        {
            "map": method,
            **{
                f"{kind} ({better} is better)": f"{curves[f'{kind}_area']:.4f}"
                for kind, better in (("insertion", "higher"), ("deletion", "lower"))
            },
        }
        for method, curves in methods.items()
    ]


def comparison_rows(results: dict) -> list[Row]:
    """Return the accuracy and the mean scores of each network's FullGrad maps."""
    return [
        {
            "network": name,
            "parameters": row["parameters"],
            "accuracy": f"{row['mean_accuracy']:.3f}",
            **{score.replace("_", " "): f"{value['mean']:.3f}" for score, value in row["scores"]["FullGrad"].items()},
        }
        for name, row in results["networks"].items()
    ]
