"""What the training of every task shares, as functions: plan, optimizer, logging, compiling, checking classes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lightning_modules.backbone import BackboneConfig
from lightning_modules.callbacks.throughput import log_interval
from lightning_modules.ema import ExponentialAverage
from lightning_modules.optim import OptimConfig, Plan, build_optimizer, plan_steps
from lightning_modules.tensorboard import Tag


def accumulation_scale(batch_idx: int, num_batches: int, accumulate: int) -> float:
    """Factor that makes a partial last accumulation window a mean over its own batches.

    Lightning divides every loss by `accumulate`, also where the epoch ends inside a window.

    Args:
        batch_idx: index of the batch within the epoch, from 0.
        num_batches: batches in the epoch.
        accumulate: batches per optimizer step.

    Returns:
        1 in full windows, accumulate / length in the last partial one.
    """
    start = batch_idx // accumulate * accumulate
    return accumulate / min(accumulate, num_batches - start)


def accumulated(loss: Tensor, trainer: Trainer, batch_idx: int) -> Tensor:
    """The loss as Lightning must get it; see accumulation_scale."""
    return loss * accumulation_scale(batch_idx, int(trainer.num_training_batches), trainer.accumulate_grad_batches)


def is_log_step(trainer: Trainer) -> bool:
    """Whether the metrics of the current batch reach TensorBoard."""
    return (trainer.global_step + 1) % log_interval(trainer) == 0


def log_losses(module: LightningModule, total: Tensor, terms: Mapping[str, Tensor], batch_size: int) -> None:
    """Log the loss and its terms, averaged over ranks.

    Args:
        module: the training module.
        total: the loss of this rank's share.
        terms: its parts by name.
        batch_size: samples of this rank.
    """
    module.log(Tag.TRAIN_LOSS, total.detach(), prog_bar=True, sync_dist=True, batch_size=batch_size)
    for name, value in terms.items():
        module.log(f"{Tag.LOSS_TERM}/{name}", value.detach(), sync_dist=True, batch_size=batch_size)


def log_gradients(module: LightningModule, network: nn.Module, optimizer: Optimizer) -> None:
    """Log the gradient norm before clipping and the learning rate of every group, where the step is logged."""
    if not is_log_step(module.trainer):
        return
    if gradients := [p.grad for p in network.parameters() if p.grad is not None]:  # DeepSpeed keeps them to itself
        norm = nn.utils.get_total_norm(gradients)
        module.log(Tag.GRAD_NORM, norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    for group in optimizer.param_groups:
        module.log(f"{Tag.LEARNING_RATE}/{group['name']}", group["lr"])


def make_plan(trainer: Trainer) -> Plan:
    """Length of the run, from the Trainer's limits and the data's epoch.

    Raises:
        ValueError: there is no datamodule to ask, or the training has no end.
    """
    data = getattr(trainer, "datamodule", None)
    if data is None:
        raise ValueError("the schedule needs a datamodule with batches_per_epoch and batch_size; give --data")
    batches, limit = data.batches_per_epoch, trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return plan_steps(batches, data.batch_size, trainer.accumulate_grad_batches, trainer.max_epochs, trainer.max_steps)


def optimization(
    trainer: Trainer, network: nn.Module, config: OptimConfig, backbone: nn.Module | None = None
) -> dict[str, Any]:
    """AdamW and its schedule, stepping with the optimizer, as Lightning wants them.

    Args:
        trainer: gives the length of the run.
        network: everything that learns.
        config: recipe.
        backbone: the part of the network with learning rates of its own.
    """
    optimizer, scheduler = build_optimizer(network, config, make_plan(trainer), backbone)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def averaged(network: nn.Module, decay: float | None, warmup: bool) -> ExponentialAverage | None:
    """The averaged copy of a network; None without a decay."""
    return None if decay is None else ExponentialAverage(network, decay, warmup)


def follow(average: ExponentialAverage | None, network: nn.Module, trainer: Trainer) -> None:
    """Let the average take in the weights of the step just done: before any callback can save a checkpoint."""
    if average is not None:
        average.update(network, step=trainer.global_step + 1)


def share_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0, such as BatchNorm's running statistics: the ones a checkpoint keeps.

    Without it ranks validate with statistics of their own, and a resumed run with others than the run it goes on from.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)


def known_classes(trainer: Trainer, num_classes: int, names: list[str]) -> list[str]:
    """Class names of the run: the data's, or those known before where the data has none.

    Args:
        trainer: its datamodule, if any, has class_names; a folder of plain pictures has none.
        num_classes: what the model was built for.
        names: from the checkpoint.

    Raises:
        ValueError: the data has another number of classes; the mend is named.
    """
    found = list(getattr(getattr(trainer, "datamodule", None), "class_names", None) or ())
    if found and len(found) != num_classes:
        raise ValueError(
            f"model.num_classes {num_classes} differs from the data's {len(found)} classes; "
            f"use --model.num_classes {len(found)} or other data"
        )
    return [str(name) for name in found] or names


def check_num_classes(num_classes: int, at_least: int) -> None:
    """Refuse a number of classes that cannot be trained.

    Raises:
        ValueError: naming the number and the smallest valid one.
    """
    if num_classes < at_least:
        raise ValueError(f"model.num_classes {num_classes} must be {at_least} or above")


def describe(config: BackboneConfig, network: nn.Module, head: str, num_classes: int, decay: float | None) -> str:
    """One line about a model: name, head, parameters, classes, attention layout, averaging."""
    # DeepSpeed's stage 3 leaves parameters empty between uses.
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in network.parameters()) / 1e6
    attention = f", attention {' '.join(config.layout)}" if config.name.startswith("mirrorla_") else ""
    average = f", EMA {decay}" if decay is not None else ""
    name = f"{config.name} {head}".rstrip()
    return f"{name}, {parameters:.2f} M parameters, {num_classes} classes{attention}{average}"


def memory_format(channels_last: bool) -> torch.memory_format:
    """The layout of convolutions' inputs and weights."""
    return torch.channels_last if channels_last else torch.contiguous_format


@contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """The network in evaluation mode, without gradients; its mode comes back afterwards."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield network
    finally:
        network.train(was_training)
