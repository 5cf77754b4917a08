"""Optimizer, learning-rate schedule and average of the weights of a run, and the trainer that uses them."""

import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from data.batches import step_part
from distributed import Ranks
from recipes import RunConfig
from training.cuda_graphs import GraphedStep
from training.engine import Precision, Trainer

# Each builds the learning-rate schedule of a run of `steps` steps.
SCHEDULES = {
    "step": lambda optimizer, config, steps: torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [max(1, round(share * steps)) for share in config.milestones]
    ),
    "onecycle": lambda optimizer, config, steps: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=max(steps, 4), cycle_momentum=False
    ),
    "cosine": lambda optimizer, config, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
}


def make_trainer(
    model: nn.Module, config: RunConfig, steps: int, compiled: bool, ranks: Ranks, graphs: bool = False
) -> Trainer:
    """Wrap the network for training (distributed, compiled), and build its optimizer and schedule.

    Args:
        model: the network. With `config.sync_bn` and several ranks, its BatchNorms are replaced.
        config: of the run.
        steps: number of steps per epoch.
        compiled: whether to compile the network.
        ranks: this process among the distributed ranks.
        graphs: whether to replay a step as a CUDA graph.
    """
    if config.sync_bn and ranks.world_size > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = make_optimizer(model, config, fused=ranks.device.type in ("cpu", "cuda"))
    average = make_average(model) if config.average_epochs else None
    if ranks.world_size > 1:
        model = distribute(model, ranks)
    torch.manual_seed(config.seed + 1_000_003 * (ranks.rank + 1))  # dropout differs between ranks
    on_cuda = ranks.device.type == "cuda"
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        scheduler=SCHEDULES[config.schedule](optimizer, config, config.epochs * steps),
        precision=Precision(ranks.device, config.amp),
        ranks=ranks,
        accumulation_steps=config.accumulate,
        compiled=torch.compile(model, dynamic=False) if compiled else None,
        compiled_size=-(-share_of_batch(config, ranks) // config.accumulate),
        learning_rate=torch.zeros((), device=ranks.device) if on_cuda else None,
        label_smoothing=config.label_smoothing,
        average=average,
        average_from=config.epochs - config.average_epochs,
        early_size=config.early_size,
        early_epochs=config.early_epochs,
    )
    if trainer.precision.scaler.is_enabled() and config.momentum:
        # If the first gradients of float16 overflow, the fused optimizer leaves its new buffers uninitialised.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    if graphs:
        trainer.graphed = GraphedStep(trainer._compute, share_of_batch(config, ranks))
    return trainer


def distribute(model: nn.Module, ranks: Ranks) -> DistributedDataParallel:
    """Wrap the network so that its gradients are averaged over the ranks.

    Running statistics are averaged before each evaluation instead of broadcast at each step.
    """
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    with warnings.catch_warnings():
        # Newer PyTorch renamed the argument; older versions lack the new name.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def make_optimizer(model: nn.Module, config: RunConfig, fused: bool) -> torch.optim.SGD:
    """Return SGD with the settings of a run; without `norm_decay`, BatchNorm and biases have no weight decay."""
    decayed, others = [], []
    for parameter in model.parameters():
        (decayed if parameter.ndim > 1 or config.norm_decay else others).append(parameter)
    groups = [{"params": decayed}] + ([{"params": others, "weight_decay": 0.0}] if others else [])
    return torch.optim.SGD(
        groups, config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov, fused=fused
    )


def make_average(model: nn.Module) -> AveragedModel:
    """Return an average of weights that has not begun. BatchNorm's statistics are averaged, too, not recomputed."""
    average = AveragedModel(model, avg_fn=get_swa_avg_fn(), use_buffers=True)
    average.n_averaged = average.n_averaged.cpu()  # else the host would wait for the device to read it
    return average


def share_of_batch(config: RunConfig, ranks: Ranks) -> int:
    """Return the number of images of a full batch that this rank computes."""
    part = step_part(0, config.batch_size, config.train_images, ranks.rank, ranks.world_size)[0]
    return part.stop - part.start
