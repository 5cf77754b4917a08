"""An epoch of training and an evaluation, in one process or in many."""

import math
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.batches import DiskEvaluationBatches, DiskTrainingBatches, EvaluationBatches, TrainingBatches
from distributed import Ranks
from recipes import RunConfig
from s3net_common.errors import InputError, LocalError

VALIDATION = ("val_loss", "val_error", "val_top5_error")


METRICS = ("epoch", "lr", "train_loss", "train_error", *VALIDATION, "images_per_second", "seconds")


@dataclass
class Progress:
    """How far a run is: the finished epochs' metrics, and what the epoch under way has added up so far.

    Attributes:
        epoch: finished epochs.
        history: the metrics of each of them, as `metrics.jsonl` has them (null there is NaN or infinite here).
        step: steps done in the epoch under way; the following are sums over these.
        losses: this process's summed cross-entropy, a number a step.
        errors: this process's wrongly classified images.
        images: images of all processes.
        seconds: time spent training on them.
        lr: learning rate at the epoch's first step.
    """

    epoch: int = 0
    history: list[dict] = field(default_factory=list)
    step: int = 0
    losses: list[float] = field(default_factory=list)
    errors: int = 0
    images: int = 0
    seconds: float = 0.0
    lr: float = 0.0

    def describe_epoch(self, world_size: int) -> str:
        """The epoch so far, for a progress bar: this process's loss and error, and the images/s of all."""
        images = max(1, self.images // world_size)
        return (
            f"loss {sum(self.losses) / images:.3f}, error {100 * self.errors / images:.1f}%, "
            f"{self.images / max(self.seconds, 1e-9):.0f} images/s"
        )

    def finish_epoch(self, training: dict[str, float], validation: dict[str, float], seconds: float) -> None:
        """Add the epoch's line to the history and begin the next epoch. `seconds` went by in the evaluation."""
        self.epoch += 1
        metrics = training | validation | {"epoch": self.epoch, "lr": self.lr, "seconds": self.seconds + seconds}
        self.history.append({name: metrics[name] for name in METRICS})
        self.step, self.losses, self.errors, self.images, self.seconds = 0, [], 0, 0, 0.0

    def best(self) -> dict:
        """The metrics of the epoch with the lowest validation error, the first of several."""
        return min(self.history, key=lambda row: row["val_error"])


class Precision:
    """The number format of a network's arithmetic: float32, or mixed with bfloat16 or float16.

    float16, for CUDA devices without bfloat16, comes with a gradient scaler.
    """

    def __init__(self, device: torch.device, mixed: bool) -> None:
        self.device, self.dtype = device, torch.float32
        if mixed:
            no_bfloat16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = torch.float16 if no_bfloat16 else torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> AbstractContextManager:
        """The context to run a forward pass in."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    @staticmethod
    def is_faster(device: torch.device) -> bool:
        """Whether mixed precision is faster there: CUDA, and CPUs with bfloat16 arithmetic."""
        if device.type != "cpu":
            return device.type == "cuda"
        return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


class StopSignal:
    """Remembers that Ctrl-C or SIGTERM asked the run to end; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self.number is not None


class NonFiniteLossError(Exception):
    """The loss of a step is infinite or not a number."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss at step {step} is not finite")
        self.step = step


@dataclass
class Trainer:
    """Everything that takes a training step.

    Attributes:
        model: the network as it runs: compiled, distributed, or plain.
        optimizer, scheduler: stepped once a batch.
        precision: number format of the forward pass.
        ranks: this process among the others.
        stop_requested: asked now and then; training then ends after the current step.
        accumulate: parts that a process's share of a batch is computed in, one after the other.
        checkpoint: called after every `checkpoint_every` steps of an epoch but its last, in all processes.
        checkpoint_every: steps; 0 for never.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    precision: Precision
    ranks: Ranks
    stop_requested: Callable[[], bool] = lambda: False
    accumulate: int = 1
    checkpoint: Callable[[], None] = lambda: None
    checkpoint_every: int = 0

    def train_epoch(self, batches: TrainingBatches | DiskTrainingBatches, progress: Progress) -> bool:
        """Train on from where the progress stands, and add to it, until the epoch ends or a stop is asked for.

        Returns whether the epoch was finished.

        Raises:
            NonFiniteLossError: with the step, from 1, since the beginning of the run.
        """
        self.model.train()
        # Looking at a loss makes the host wait for a GPU, and processes for each other: not at every step.
        interval = 1 if self.ranks.world_size == 1 and self.ranks.device.type == "cpu" else 20
        if progress.step == 0:
            progress.lr = self.optimizer.param_groups[0]["lr"]
        bar = progress_bar(self.ranks, f"epoch {progress.epoch + 1}", len(batches), progress.step)
        pending: list[tuple[Tensor, Tensor, int]] = []
        started = time.perf_counter()
        with bar:
            for images, labels, weights, whole_batch in batches.epoch(progress.epoch, progress.step):
                pending.append((*self._step(images, labels, weights, whole_batch), whole_batch))
                step = progress.step + len(pending)
                due = self.checkpoint_every > 0 and step % self.checkpoint_every == 0
                if len(pending) < interval and step < len(batches) and not due:
                    continue
                self._settle(pending, progress, progress.epoch * len(batches))
                now = time.perf_counter()
                progress.seconds, started = progress.seconds + (now - started), now
                bar.update(len(pending))
                bar.set_postfix_str(progress.describe_epoch(self.ranks.world_size), refresh=False)
                pending = []
                if progress.step == len(batches):
                    break
                if self.should_stop():
                    return False
                if due:
                    self.checkpoint()
                    started = time.perf_counter()
        return True

    def should_stop(self) -> bool:
        """Whether any of the processes was asked to stop."""
        return bool(self.ranks.reduce([float(self.stop_requested())], dist.ReduceOp.MAX)[0])

    def _step(self, images: Tensor, labels: Tensor, weights: Tensor, batch_images: int) -> tuple[Tensor, Tensor]:
        """One update; returns this process's summed loss and number of errors, still on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        # Fewer parts where there are fewer images; every process takes the gradients' exchange with its last one.
        parts = list(zip(*(t.chunk(self.accumulate) for t in (images, labels, weights)), strict=True))
        sums = [self._add_gradient(*part, batch_images, last=part is parts[-1]) for part in parts]
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        self.scheduler.step()
        total, errors = (torch.stack(column).sum() for column in zip(*sums, strict=True))
        return total, errors

    def _add_gradient(
        self, images: Tensor, labels: Tensor, weights: Tensor, batch_images: int, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward of one part of a step; processes exchange gradients with the last.

        Raises:
            LocalError: BatchNorm gets one value a channel, from a single image.
        """
        with nullcontext() if last or self.ranks.world_size == 1 else self.model.no_sync():
            try:
                with self.precision.autocast():
                    logits = self.model(images)
            except ValueError as error:
                if len(images) > 1:
                    raise
                raise LocalError(
                    f"this network cannot be trained on a single image at a time ({str(error).splitlines()[0]}): give "
                    "a --batch-size, --limit-train or --accumulate that leaves no single image"
                ) from error
            total = (F.cross_entropy(logits.float(), labels, reduction="none") * weights).sum()
            # DDP averages over processes; their parts of a batch may differ in size, so scale to the mean of images.
            self.precision.scaler.scale(total * (self.ranks.world_size / batch_images)).backward()
        return total.detach(), ((logits.detach().argmax(dim=1) != labels) * weights).sum()

    def _settle(self, pending: list[tuple[Tensor, Tensor, int]], progress: Progress, steps_before: int) -> None:
        """Check the pending steps and add them to the progress."""
        losses = torch.stack([loss for loss, _, _ in pending]).tolist()
        first = steps_before + progress.step + 1
        bad = next((first + i for i, loss in enumerate(losses) if not math.isfinite(loss)), math.inf)
        (bad,) = self.ranks.reduce([bad], dist.ReduceOp.MIN)
        if math.isfinite(bad):
            raise NonFiniteLossError(int(bad))
        progress.losses += losses
        progress.errors += int(torch.stack([errors for _, errors, _ in pending]).sum().item())
        progress.images += sum(images for _, _, images in pending)
        progress.step += len(pending)

    def training_metrics(self, progress: Progress) -> dict[str, float]:
        """Mean loss, error in percent and images/s of an epoch, over all processes."""
        loss, errors = self.ranks.reduce([math.fsum(progress.losses), float(progress.errors)])
        return {
            "train_loss": loss / progress.images,
            "train_error": 100 * errors / progress.images,
            "images_per_second": progress.images / progress.seconds,
        }

    def state(self) -> dict:
        """What resuming needs of the optimizer, the schedule and the gradient scaler."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
        }

    def load_state(self, state: dict) -> None:
        """Put back what `state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.precision.scaler.load_state_dict(state["scaler"])


# Each makes the learning rate's course over a run of so many steps.
SCHEDULES = {
    "step": lambda optimizer, config, steps: torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [max(1, round(share * steps)) for share in config.milestones]
    ),
    "onecycle": lambda optimizer, config, steps: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=max(steps, 4), cycle_momentum=False
    ),
    "cosine": lambda optimizer, config, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
}


def make_trainer(model: nn.Module, config: RunConfig, steps: int, compiled: bool, ranks: Ranks) -> Trainer:
    """The network as it is trained (distributed, compiled), with its optimizer and schedule; `steps` an epoch."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
        fused=ranks.device.type in ("cpu", "cuda"),
    )
    if ranks.world_size > 1:
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        with warnings.catch_warnings():
            # Running statistics are averaged before each evaluation instead of broadcast at each step. Newer PyTorch
            # has another name for that, which older ones do not know.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            model = DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
    torch.manual_seed(config.seed + 1_000_003 * (ranks.rank + 1))  # dropout differs between processes
    return Trainer(
        model=torch.compile(model) if compiled else model,
        optimizer=optimizer,
        scheduler=SCHEDULES[config.schedule](optimizer, config, config.epochs * steps),
        precision=Precision(ranks.device, config.amp),
        ranks=ranks,
        accumulate=config.accumulate,
    )


def progress_bar(ranks: Ranks, what: str, total: int, initial: int = 0) -> tqdm:
    """A bar on the main process's terminal; nothing where the output goes elsewhere."""
    hidden = None if ranks.is_main else True
    return tqdm(total=total, initial=initial, desc=what, unit="batch", disable=hidden, leave=False)


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: EvaluationBatches | DiskEvaluationBatches, trainer: Trainer
) -> dict[str, float]:
    """Mean cross-entropy, top-1 and top-5 error in percent, every image counted once over all processes.

    Raises:
        InputError: none of the images can be read.
    """
    model.eval()
    ranks, loss, errors, errors_top5, count = trainer.ranks, 0.0, 0.0, 0.0, 0
    with progress_bar(ranks, "evaluating", len(range(ranks.rank, len(batches), ranks.world_size))) as bar:
        for images, labels in batches.part(ranks.rank, ranks.world_size):
            with trainer.precision.autocast():
                logits = model(images)
            logits = logits.float()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            wrong, wrong_top5 = top_errors(logits, labels)
            errors, errors_top5, count = errors + wrong, errors_top5 + wrong_top5, count + len(labels)
            bar.update()
    loss, errors, errors_top5, count = ranks.reduce([loss, errors, errors_top5, count])
    if not count:
        raise InputError("none of the validation images can be read")
    return {
        "val_loss": loss / count,
        "val_error": 100 * errors / count,
        "val_top5_error": 100 * errors_top5 / count,
    }


def top_errors(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """Top-1 and top-5 errors of logits `(N, outputs)` for labels `(N,)`; an image with a NaN or infinity is one.

    With fewer than 6 outputs the top-5 error is that of as many guesses as there are outputs, 0.
    """
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    hits &= logits.isfinite().all(dim=1, keepdim=True)
    return len(labels) - int(hits[:, 0].sum()), len(labels) - int(hits.sum())


def average_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Replace BatchNorm's running statistics by their mean over the processes, each of which saw its own images."""
    if ranks.world_size == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= ranks.world_size
