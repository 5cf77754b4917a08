"""A run's training curves as a picture."""

from pathlib import Path

from matplotlib.figure import Figure


def draw_curves(history: list[dict], path: Path, title: str) -> None:
    """Draw loss and error of each epoch, in training and validation, and the learning rate."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, error, rate = figure.subplots(1, 3)
    style = {"marker": "o" if len(epochs) < 40 else None, "markersize": 3}
    for axes, quantity, unit in ((loss, "loss", "cross-entropy"), (error, "error", "top-1 error (%)")):
        axes.plot(epochs, [row[f"train_{quantity}"] for row in history], label="training", **style)
        axes.plot(epochs, [row[f"val_{quantity}"] for row in history], label="validation", **style)
        axes.set(xlabel="epoch", ylabel=unit, yscale="log" if quantity == "loss" else "linear")
        axes.legend()
    best = min(history, key=lambda row: row["val_error"])
    error.axhline(best["val_error"], color="gray", linewidth=0.8, linestyle=":")
    error.set_title(f"best {best['val_error']:.2f}% at epoch {best['epoch']}", fontsize="medium")
    rate.plot(epochs, [row["lr"] for row in history], color="tab:green", **style)
    rate.set(xlabel="epoch", ylabel="learning rate", yscale="log")
    for axes in (loss, error, rate):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
