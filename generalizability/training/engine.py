"""One epoch of training, and evaluation, on one or several distributed ranks."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from data.batches import DiskEvaluationBatches, DiskTrainingBatches, EvaluationBatches, TrainingBatches
from distributed import Ranks
from s3net_common.errors import InputError, LocalError
from s3net_common.progress import ProgressBar
from training.cuda_graphs import GraphedStep
from training.out_of_memory import is_out_of_memory, training_advice
from training.step_clock import StepClock
from training.stopping import Agreement, Stopped

AVERAGE = "average"  # key of the averaged weights in last.pt
VALIDATION = ("val_loss", "val_error", "val_top5_error")


METRICS = ("epoch", "lr", "train_loss", "train_error", *VALIDATION, "images_per_second", "seconds")


@dataclass
class Progress:
    """Progress of a run: the metrics of finished epochs, and running sums of the current epoch.

    Attributes:
        epoch: finished epochs.
        history: metrics of each finished epoch, as in `metrics.jsonl` (where NaN and infinity are null).
        step: finished steps of the current epoch. The following attributes are sums over these steps.
        losses: this rank's summed cross-entropy, one number per step.
        errors: number of this rank's misclassified images.
        images: number of images of all ranks.
        seconds: training time.
        lr: learning rate at the first step of the epoch.
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
        """Return this rank's loss and error and all ranks' images/s in the current epoch, for a progress bar."""
        images = max(1, self.images // world_size)
        return (
            f"loss {sum(self.losses) / images:.3f}, error {100 * self.errors / images:.1f}%, "
            f"{self.images / max(self.seconds, 1e-9):.0f} images/s"
        )

    def finish_epoch(self, training: dict[str, float], validation: dict[str, float], seconds: float) -> None:
        """Add the epoch's metrics to the history and reset the running sums. `seconds` is the evaluation's duration."""
        self.epoch += 1
        metrics = training | validation | {"epoch": self.epoch, "lr": self.lr, "seconds": self.seconds + seconds}
        self.history.append({name: metrics[name] for name in METRICS})
        self.step, self.losses, self.errors, self.images, self.seconds = 0, [], 0, 0, 0.0

    def best(self) -> dict:
        """Return the metrics of the epoch with the lowest validation error (the first, if several are equal)."""
        return min(self.history, key=lambda row: row["val_error"])


class Precision:
    """Numerical precision of the forward pass: float32, or mixed precision with bfloat16 or float16.

    CUDA devices without bfloat16 get float16 and a gradient scaler. In float32, CUDA devices since Ampere multiply
    matrices and convolve in TF32, which keeps 10 bits of the mantissa, as the scripts set it.
    """

    def __init__(self, device: torch.device, mixed: bool) -> None:
        self.device, self.dtype = device, torch.float32
        if mixed:
            no_bfloat16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = torch.float16 if no_bfloat16 else torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> AbstractContextManager:
        """Return the context manager for a forward pass."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    @property
    def name(self) -> str:
        """The precision in words: "bfloat16", "float16", "float32" or "float32 (products in TF32)"."""
        name = str(self.dtype).removeprefix("torch.")
        rounds = self.dtype == torch.float32 and self.device.type == "cuda"
        rounds = rounds and (torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest")
        if rounds and torch.cuda.get_device_capability(self.device) >= (8, 0):
            name += " (products in TF32)"
        return name

    @staticmethod
    def is_faster(device: torch.device) -> bool:
        """Whether mixed precision is faster on the device: on CUDA, and on CPUs with bfloat16 instructions."""
        if device.type != "cpu":
            return device.type == "cuda"
        return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


class NonFiniteError(Exception):
    """The loss of a step, or a weight after it, is infinite or NaN. Raised on all ranks; `step` counts from 1."""

    def __init__(self, quantity: str, step: int) -> None:
        super().__init__(f"{quantity} step {step} is not finite")
        self.step = step


@dataclass
class Trainer:
    """Everything that a training step needs.

    Attributes:
        model: the network as it runs: distributed or plain.
        compiled: the same network, compiled, for the parts of a batch that have `compiled_size` images; None for none.
            Compiling for one size only is faster. The last batch of an epoch may be smaller.
        compiled_size: images.
        label_smoothing: of the training loss, 0 to below 1.
        average: the average of the weights and of BatchNorm's statistics over the steps since the epoch
            `average_from`; None for no average.
        average_from, early_epochs: finished epochs when the average begins, and when images get their full size.
        early_size: height and width of the images before that, in pixels; None for the full size.
        learning_rate: on CUDA, a tensor that holds the rate of the current step, as a CUDA graph needs; else None.
        clock: watches the batches, and reports which side limits the speed.
        graphed: replays `_compute` as a CUDA graph; None to call it.
        optimizer, scheduler: stepped once per batch.
        precision: numerical precision of the forward pass.
        ranks: the distributed ranks.
        stop_requested: returns whether this rank was asked to stop; called about every 2 seconds.
        accumulation_steps: number of parts in which a rank's share of a batch is computed.
        checkpoint: called on all ranks after every `checkpoint_every` steps of an epoch except the last step, and
            before `Stopped` is raised in an epoch.
        checkpoint_every: steps; 0 for never.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    precision: Precision
    ranks: Ranks
    stop_requested: Callable[[], bool] = lambda: False
    accumulation_steps: int = 1
    checkpoint: Callable[[], None] = lambda: None
    checkpoint_every: int = 0
    compiled: nn.Module | None = None
    compiled_size: int = 0
    learning_rate: Tensor | None = None
    graphed: GraphedStep | None = None
    label_smoothing: float = 0.0
    average: AveragedModel | None = None
    average_from: int = 0
    early_size: int | None = None
    early_epochs: int = 0
    averages: bool = field(default=False, init=False)  # in the current epoch
    small_images: bool = field(default=False, init=False)  # in the current epoch
    clock: StepClock = field(init=False)

    def __post_init__(self) -> None:
        # Reading a loss makes the host wait for the GPU, and the ranks for each other.
        every_step = self.ranks.world_size == 1 and self.ranks.device.type == "cpu"
        self.agreement = Agreement(self.ranks, every_step)
        self.clock = StepClock(self.ranks.device, ProgressBar.write if self.ranks.is_main else lambda line: None)

    def train_epoch(self, batches: TrainingBatches | DiskTrainingBatches, progress: Progress) -> None:
        """Train the rest of the current epoch and update `progress`.

        Raises:
            NonFiniteError: the loss of a step is infinite or NaN.
            Stopped: a rank was asked to stop; the checkpoint is saved.
            LocalError: the memory is full. The message says which batch fits.
        """
        self.model.train()
        self.averages = self.average is not None and progress.epoch >= self.average_from
        self.small_images = self.early_size is not None and progress.epoch < self.early_epochs
        if progress.step == 0:
            progress.lr = self.optimizer.param_groups[0]["lr"]
        bar = progress_bar(self.ranks, f"epoch {progress.epoch + 1}", len(batches), progress.step)
        pending: list[tuple[Tensor, Tensor, int]] = []
        started = time.perf_counter()
        with bar:
            for images, labels, weights, whole_batch in self.clock.watch(batches.epoch(progress.epoch, progress.step)):
                pending.append((*self._fitting_step(images, labels, weights, whole_batch), whole_batch))
                step = progress.step + len(pending)
                save_due = step % len(batches) > 0 and self.checkpoint_every > 0 and step % self.checkpoint_every == 0
                if not (self.agreement.is_due() or save_due or step == len(batches)):
                    continue
                stop = self._add_to_progress(pending, progress, progress.epoch * len(batches))
                now = time.perf_counter()
                progress.seconds, started = progress.seconds + (now - started), now
                bar.update(len(pending))
                bar.set_postfix_str(progress.describe_epoch(self.ranks.world_size), refresh=False)
                pending = []
                if stop or save_due:
                    self.checkpoint()
                    started = time.perf_counter()
                if stop:
                    raise Stopped

    def _fitting_step(self, images: Tensor, labels: Tensor, *rest: Tensor | int) -> tuple[Tensor, Tensor]:
        """Call `_step`. A LocalError says which batch fits if memory is full."""
        try:
            return self._step(images, labels, *rest)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, which keeps the step's tensors alive.
        parts, size, images = self.accumulation_steps, self.ranks.world_size, self._resized(images)
        raise LocalError(training_advice(self.plain_model, images, labels, parts, size, self.precision.autocast()))

    @property
    def plain_model(self) -> nn.Module:
        """The network without the wrapper for several ranks."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is validated: the average once it has begun, else the trained network."""
        started = self.average is not None and self.average.n_averaged > 0
        return self.average.module if started else self.plain_model

    def check_weights(self, step: int) -> None:
        """Check that the weights are finite, which a loss before the last update does not tell.

        Raises:
            NonFiniteError: a weight is infinite or NaN. `step` is the number of the last step.
        """
        finite = torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()])
        if not finite.all():  # on all ranks: they have the same weights
            raise NonFiniteError("a weight after", step)

    def _step(self, images: Tensor, labels: Tensor, weights: Tensor, batch_images: int) -> tuple[Tensor, Tensor]:
        """Update the weights once. Return this rank's summed loss and number of errors, as tensors on the device."""
        if self.learning_rate is not None:
            self.learning_rate.fill_(self.optimizer.param_groups[0]["lr"])
        sums = (self.graphed or self._compute)(self._resized(images), labels, weights, batch_images)
        self.scheduler.step()
        if self.averages:
            self.average.update_parameters(self.plain_model)
        return sums

    def _resized(self, images: Tensor) -> Tensor:
        """Return the images, of which the first epochs may use smaller versions."""
        if not self.small_images:
            return images
        size = (self.early_size, self.early_size)
        return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)

    def _compute(self, images: Tensor, labels: Tensor, weights: Tensor, batch_images: int) -> tuple[Tensor, Tensor]:
        """Compute `_step` without the learning-rate schedule. The host reads nothing from the device."""
        self.optimizer.zero_grad(set_to_none=True)
        # A rank with fewer images than parts has fewer parts. Every rank exchanges gradients in its last part.
        parts = list(zip(*(t.chunk(self.accumulation_steps) for t in (images, labels, weights)), strict=True))
        sums = [self._add_gradient(*part, batch_images, last=part is parts[-1]) for part in parts]
        groups = self.optimizer.param_groups
        rate = groups[0]["lr"]  # the schedule and the checkpoint keep a number
        for group in groups if self.learning_rate is not None else []:
            group["lr"] = self.learning_rate
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        for group in groups:
            group["lr"] = rate
        total, errors = (torch.stack(column).sum() for column in zip(*sums, strict=True))
        return total, errors

    def _add_gradient(
        self, images: Tensor, labels: Tensor, weights: Tensor, batch_images: int, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward on one part of a batch. With the last part, ranks exchange gradients.

        Raises:
            LocalError: BatchNorm gets a single value per channel, from a single image.
        """
        with nullcontext() if last or self.ranks.world_size == 1 else self.model.no_sync():
            try:
                with self.precision.autocast():
                    logits = self._network(len(images))(images)
            except ValueError as error:
                if len(images) > 1:
                    raise
                raise LocalError(
                    f"this network cannot be trained on a single image at a time ({str(error).splitlines()[0]}): give "
                    "a --batch-size, --limit-train or --accumulate that leaves no single image"
                ) from error
            loss = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=self.label_smoothing)
            total = (loss * weights).sum()
            # DDP averages over ranks, whose shares of a batch may differ in size. Scale to the mean over all images.
            self.precision.scaler.scale(total * (self.ranks.world_size / batch_images)).backward()
        return total.detach(), ((logits.detach().argmax(dim=1) != labels) * weights).sum()

    def _network(self, images: int) -> nn.Module:
        """Return the network that computes that many images."""
        return self.model if self.compiled is None or images != self.compiled_size else self.compiled

    def _add_to_progress(
        self, pending: list[tuple[Tensor, Tensor, int]], progress: Progress, steps_before: int
    ) -> bool:
        """Add the pending steps to `progress`. Return whether any rank was asked to stop.

        Raises:
            NonFiniteError: a loss is infinite or NaN.
        """
        sums = torch.stack([total for *pair, _ in pending for total in pair]).tolist()  # the host waits for the device
        losses, errors = sums[::2], sums[1::2]
        first = steps_before + progress.step + 1
        bad = next((first + i for i, loss in enumerate(losses) if not math.isfinite(loss)), math.inf)
        stop, minus_bad = self.agreement.largest(float(self.stop_requested()), -bad)
        if math.isfinite(minus_bad):
            raise NonFiniteError("the loss at", int(-minus_bad))
        progress.losses += losses
        progress.errors += int(sum(errors))
        progress.images += sum(images for _, _, images in pending)
        progress.step += len(pending)
        return bool(stop)

    def training_metrics(self, progress: Progress) -> dict[str, float]:
        """Return mean loss, error (%) and images/s of an epoch, over all ranks."""
        loss, errors = self.ranks.reduce([math.fsum(progress.losses), float(progress.errors)])
        return {
            "train_loss": loss / progress.images,
            "train_error": 100 * errors / progress.images,
            "images_per_second": progress.images / progress.seconds,
        }

    def state(self) -> dict:
        """Return the states of the optimizer, the learning-rate schedule, the gradient scaler and the average."""
        average = {} if self.average is None else {AVERAGE: self.average.state_dict()}
        return average | {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
        }

    def load_state(self, state: dict) -> None:
        """Restore the states that `state` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.average is not None:
            self.average.load_state_dict(state[AVERAGE])
        if state["scaler"]:  # empty if the run had bfloat16 or float32: the scaler then starts anew
            self.precision.scaler.load_state_dict(state["scaler"])


def progress_bar(ranks: Ranks, description: str, total: int, initial: int = 0) -> ProgressBar:
    """Return a progress bar, shown on the main rank."""
    options = {"initial": initial, "desc": description, "unit": "batch", "leave": False}
    return ProgressBar(total=total, disable=not ranks.is_main, **options)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: EvaluationBatches | DiskEvaluationBatches,
    trainer: Trainer,
    observe: Callable[[Tensor, Tensor], object] = lambda logits, labels: None,
) -> dict[str, float]:
    """Return mean cross-entropy, top-1 and top-5 error (%). Every image counts once over all ranks.

    `observe` is called with the logits `(b, outputs)` and the labels `(b,)` of each of this rank's batches.

    Raises:
        InputError: no image can be read.
        Stopped: a rank was asked to stop.
    """
    model.eval()
    ranks, count = trainer.ranks, 0
    agreement, common_steps = Agreement(ranks), len(batches) // ranks.world_size  # a rank may have one step more
    sums: list[Tensor] = []  # of each batch, on the device: the host waits for them once, at the end
    with progress_bar(ranks, "evaluating", len(range(ranks.rank, len(batches), ranks.world_size))) as bar:
        for step, (images, labels) in enumerate(batches.part(ranks.rank, ranks.world_size), 1):
            if agreement.is_due() and step <= common_steps and agreement.largest(float(trainer.stop_requested()))[0]:
                raise Stopped
            if not len(labels):
                continue
            with trainer.precision.autocast():
                logits = model(images)
            logits = logits.float()
            sums.append(torch.stack([F.cross_entropy(logits, labels, reduction="sum"), *top_errors(logits, labels)]))
            count += len(labels)
            observe(logits, labels)
            bar.update()
    totals = [sum(column) for column in zip(*torch.stack(sums).tolist(), strict=True)] if sums else [0.0] * 3
    loss, errors, errors_top5, count = ranks.reduce([*totals, count])
    if not count:
        raise InputError("none of the validation images can be read")
    return {
        "val_loss": loss / count,
        "val_error": 100 * errors / count,
        "val_top5_error": 100 * errors_top5 / count,
    }


def top_errors(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Count top-1 and top-5 errors of logits `(N, outputs)` for labels `(N,)`, as tensors on their device.

    An image with a NaN or infinite logit is an error. With fewer than 6 outputs the other top-5 errors are 0.
    """
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    hits &= logits.isfinite().all(dim=1, keepdim=True)
    return len(labels) - hits[:, 0].sum(), len(labels) - hits.sum()


def average_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Replace BatchNorm's running statistics by their mean over the ranks, each of which saw other images."""
    if ranks.world_size == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= ranks.world_size
