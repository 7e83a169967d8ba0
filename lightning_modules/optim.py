"""Optimiser, parameter groups and learning-rate schedule: what is updated, how strongly, when.

Rules kept here and nowhere else: norms, biases, layer scales and mirrors are not decayed; layer-wise decay and the
backbone's factor multiply the learning rate of a group; the schedule is a pure function of the optimizer step, and its
length comes from the plan (epochs, batches, accumulation), so asking for it never touches a data loader.
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
        layer_decay: factor of the learning rate from one layer of the backbone to the one below; 1 = one rate for all.
        backbone_scale: factor of the backbone's learning rate below a detector or segmenter.
        schedule: shape after the warm-up; "poly" falls to min_lr with `power` (1 is a straight line), "steps"
            multiplies by `gamma` at every milestone.
        warmup_steps: linear warm-up in optimizer steps; give this or warmup_epochs.
        warmup_epochs: linear warm-up in epochs, fractions allowed.
        warmup_lr: learning rate of the first warm-up step.
        min_lr: learning rate at the end of "cosine" and "poly".
        power: exponent of "poly".
        milestones: of "steps", in epochs, fractions allowed.
        gamma: factor of "steps".
        reference_batch: when given, every learning rate is multiplied by samples-per-step / reference_batch.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    layer_decay: float = 1.0
    backbone_scale: float = 1.0
    schedule: Literal["cosine", "constant", "poly", "steps"] = "cosine"
    warmup_steps: int = 0
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    power: float = 0.9
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
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
        if self.backbone_scale <= 0:
            raise ValueError(f"optim.backbone_scale {self.backbone_scale} must be above 0; see model.frozen_stages")
        if self.power <= 0 or self.gamma <= 0:
            raise ValueError(f"optim.power {self.power} and optim.gamma {self.gamma} must be above 0")
        if list(self.milestones) != sorted(self.milestones) or bool(self.milestones) != (self.schedule == "steps"):
            raise ValueError(
                f'optim.milestones {list(self.milestones)} with optim.schedule {self.schedule!r}: "steps" needs '
                "ascending epochs, for example [8, 11], and the others none"
            )


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


def learning_rate(
    step: int, total_steps: int, warmup_steps: int, config: OptimConfig, steps_per_epoch: int = 1
) -> float:
    """Learning rate of one optimizer step, before layer decay and batch scaling.

    Args:
        step: index of the optimizer step, from 0.
        total_steps: optimizer steps of the run; later steps keep the last value.
        warmup_steps: linear steps from warmup_lr to lr.
        config: peak, floor and shape.
        steps_per_epoch: for milestones.

    Returns:
        warmup_lr at step 0 (with warm-up), lr at step warmup_steps, min_lr at the last step of "cosine" and "poly".
    """
    if step < warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "steps":
        return config.lr * config.gamma ** sum(step >= round(m * steps_per_epoch) for m in config.milestones)
    decay_steps = max(1, total_steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / decay_steps)
    floor = min(config.min_lr, config.lr)
    share = (1 - progress) ** config.power if config.schedule == "poly" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (config.lr - floor) * share


def undecayed_names(model: nn.Module) -> set[str]:
    """Names that a model or its parts want undecayed (mirrors, tables), beside every tensor of one dimension."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        listing: Callable[[], Iterable[str]] | None = getattr(module, "no_weight_decay", None)
        if listing is not None:
            names |= {f"{prefix}.{name}" if prefix else name for name in listing()}
    return names


def parameter_groups(model: nn.Module, config: OptimConfig, backbone: nn.Module | None = None) -> list[dict[str, Any]]:
    """Split the trainable parameters by decay, by backbone and head, and, with layer decay, by depth.

    Args:
        model: everything that learns; timm's `no_weight_decay()` and `group_matcher()` are used when present.
        config: decay, layer decay, the backbone's factor and peak learning rate.
        backbone: the part below the head; None if the whole model is one.

    Returns:
        Groups for AdamW with `params`, `weight_decay`, `lr` (scaled by depth), `lr_scale` and a readable `name`.

    Raises:
        ValueError: a factor for the backbone of a model that has no other part.
    """
    if backbone is None:
        if config.backbone_scale != 1:
            raise ValueError(
                f"optim.backbone_scale {config.backbone_scale} is for detectors and segmenters; a classifier has "
                "optim.layer_decay"
            )
        return _named(_split(model, config, config.layer_decay), config, "", 1.0)
    below = {id(parameter) for parameter in backbone.parameters()}
    above = _split(model, config, 1.0)
    for group in above:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in below]
    groups = _named(_split(backbone, config, config.layer_decay), config, "backbone_", config.backbone_scale)
    return groups + _named([group for group in above if group["params"]], config, "head_", 1.0)


def _split(model: nn.Module, config: OptimConfig, layer_decay: float) -> list[dict[str, Any]]:
    undecayed = undecayed_names(model)
    if layer_decay < 1:
        return list(
            param_groups_layer_decay(
                model, config.weight_decay, no_weight_decay_list=undecayed, layer_decay=layer_decay
            )
        )
    return list(param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=undecayed))


def _named(groups: list[dict[str, Any]], config: OptimConfig, prefix: str, factor: float) -> list[dict[str, Any]]:
    for group in groups:
        depth = group.setdefault("lr_scale", 1.0)
        group["name"] = prefix + _group_name(depth, group["weight_decay"] > 0)
        group["lr_scale"] = depth * factor
        group["lr"] = config.lr * depth * factor
    return groups


def build_optimizer(
    model: nn.Module, config: OptimConfig, plan: Plan, backbone: nn.Module | None = None
) -> tuple[AdamW, LambdaLR]:
    """AdamW over the model's groups and the schedule that steps once per optimizer step.

    Args:
        model: the trained module.
        config: recipe.
        plan: length of the run.
        backbone: see parameter_groups.

    Returns:
        The optimizer and a LambdaLR; both hold plain numbers only, so their state loads with weights_only=True.
    """
    warmup = warmup_length(config, plan.steps_per_epoch)
    scale = plan.samples_per_step / config.reference_batch if config.reference_batch else 1.0

    def factor(step: int) -> float:
        return scale * learning_rate(step, plan.total_steps, warmup, config, plan.steps_per_epoch) / config.lr

    optimizer = AdamW(parameter_groups(model, config, backbone), lr=config.lr, betas=config.betas, eps=config.eps)
    return optimizer, LambdaLR(optimizer, factor)


def _group_name(scale: float, decayed: bool) -> str:
    suffix = "decay" if decayed else "no_decay"
    return suffix if scale == 1.0 else f"x{scale:.3g}_{suffix}"
