"""Optimiser, parameter groups and learning-rate schedule: what is updated, how strongly, when.

Rules kept here and nowhere else: norms, biases, layer scales and mirrors are not decayed; layer-wise decay multiplies
the learning rate of a group; the schedule is a pure function of the optimizer step, and its length comes from the plan
(epochs, batches, accumulation), so asking for it never touches a data loader.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        lr: peak learning rate of the last layer's group.
        weight_decay: decoupled decay of matrices and filters; norms, biases and mirrors get none.
        betas: AdamW's two moments.
        eps: AdamW's epsilon.
        layer_decay: factor of the learning rate from one layer to the one below; 1 = one rate for all.
        schedule: shape after the warm-up.
        warmup_steps: linear warm-up in optimizer steps; give this or warmup_epochs.
        warmup_epochs: linear warm-up in epochs, fractions allowed.
        warmup_lr: learning rate of the first warm-up step.
        min_lr: learning rate at the end of the cosine.
        reference_batch: when given, every learning rate is multiplied by samples-per-step / reference_batch.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    layer_decay: float = 1.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    reference_batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot train.

        Raises:
            ValueError: naming the field, its value and the valid range.
        """
        if self.lr <= 0:
            raise ValueError(f"optim.lr {self.lr} must be above 0, for example 1e-3")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay {self.weight_decay} must be 0 or above")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay {self.layer_decay} must lie in (0, 1]; 1 turns it off")
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError(
                f"optim.warmup_steps {self.warmup_steps} and optim.warmup_epochs {self.warmup_epochs} are both set; "
                "leave one at 0"
            )
        if self.warmup_steps < 0 or self.warmup_epochs < 0:
            raise ValueError(f"optim warm-up {min(self.warmup_steps, self.warmup_epochs)} must be 0 or above")
        if self.reference_batch is not None and self.reference_batch < 1:
            raise ValueError(f"optim.reference_batch {self.reference_batch} must be 1 or above, or null")


@dataclass(frozen=True)
class Plan:
    """How long a training is, in optimizer steps.

    Attributes:
        steps_per_epoch: optimizer steps in one epoch; a partial last accumulation window counts as one.
        total_steps: optimizer steps of the whole run.
        samples_per_step: training samples behind one optimizer step, over all ranks.
    """

    steps_per_epoch: int
    total_steps: int
    samples_per_step: int


def plan_steps(
    batches_per_epoch: int, batch_size: int, accumulate: int, max_epochs: int | None, max_steps: int | None
) -> Plan:
    """Count the optimizer steps of a run.

    Args:
        batches_per_epoch: global batches in one epoch.
        batch_size: samples in one global batch.
        accumulate: batches per optimizer step.
        max_epochs: epochs to train; None or -1 = no limit.
        max_steps: optimizer steps to train; None or -1 = no limit.

    Returns:
        The plan; the smaller of the two limits counts.

    Raises:
        ValueError: when neither limit is given or an epoch is empty.
    """
    if batches_per_epoch < 1:
        raise ValueError(f"an epoch has {batches_per_epoch} batches; lower data.batch_size (now {batch_size})")
    steps_per_epoch = math.ceil(batches_per_epoch / accumulate)
    limits = []
    if max_epochs is not None and max_epochs >= 0:
        limits.append(max_epochs * steps_per_epoch)
    if max_steps is not None and max_steps >= 0:
        limits.append(max_steps)
    if not limits:
        raise ValueError("the training has no end: give trainer.max_epochs or trainer.max_steps")
    return Plan(steps_per_epoch, max(1, min(limits)), batch_size * accumulate)


def warmup_length(config: OptimConfig, steps_per_epoch: int) -> int:
    """Warm-up in optimizer steps, whichever way it was written."""
    return config.warmup_steps or round(config.warmup_epochs * steps_per_epoch)


def learning_rate(step: int, total_steps: int, warmup_steps: int, config: OptimConfig) -> float:
    """Learning rate of one optimizer step, before layer decay and batch scaling.

    Args:
        step: index of the optimizer step, from 0.
        total_steps: optimizer steps of the run; later steps keep the last value.
        warmup_steps: linear steps from warmup_lr to lr.
        config: peak, floor and shape.

    Returns:
        warmup_lr at step 0 (with warm-up), lr at step warmup_steps, min_lr at the last step of the cosine.
    """
    if step < warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup_steps
    if config.schedule == "constant":
        return config.lr
    decay_steps = max(1, total_steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / decay_steps)
    floor = min(config.min_lr, config.lr)
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def undecayed_names(model: nn.Module) -> set[str]:
    """Names the model itself asks to leave undecayed (mirrors, tables), beside every tensor of one dimension."""
    listing: Callable[[], Iterable[str]] | None = getattr(model, "no_weight_decay", None)
    return set(listing()) if listing is not None else set()


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split the trainable parameters by decay and, with layer decay, by depth.

    Args:
        model: a backbone; `no_weight_decay()` and `group_matcher()` (timm's convention) are used when present.
        config: decay, layer decay and peak learning rate.

    Returns:
        Groups for AdamW with `params`, `weight_decay`, `lr` (scaled by depth), `lr_scale` and a readable `name`.
    """
    undecayed = undecayed_names(model)
    if config.layer_decay < 1:
        groups = param_groups_layer_decay(
            model, config.weight_decay, no_weight_decay_list=undecayed, layer_decay=config.layer_decay
        )
    else:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=undecayed)
    for group in groups:
        scale = group.setdefault("lr_scale", 1.0)
        group["lr"] = config.lr * scale
        group["name"] = _group_name(scale, group["weight_decay"] > 0)
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig, plan: Plan) -> tuple[AdamW, LambdaLR]:
    """AdamW over the model's groups and the schedule that steps once per optimizer step.

    Args:
        model: the trained module.
        config: recipe.
        plan: length of the run.

    Returns:
        The optimizer and a LambdaLR; both hold plain numbers only, so their state loads with weights_only=True.
    """
    warmup = warmup_length(config, plan.steps_per_epoch)
    scale = plan.samples_per_step / config.reference_batch if config.reference_batch else 1.0

    def factor(step: int) -> float:
        return scale * learning_rate(step, plan.total_steps, warmup, config) / config.lr

    optimizer = AdamW(parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps)
    return optimizer, LambdaLR(optimizer, factor)


def _group_name(scale: float, decayed: bool) -> str:
    suffix = "decay" if decayed else "no_decay"
    return suffix if scale == 1.0 else f"x{scale:.3g}_{suffix}"
