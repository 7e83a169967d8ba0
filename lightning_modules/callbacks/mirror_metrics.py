"""What the mirrors do, on one fixed batch, after validations: the numbers and histograms of mirrorla.diagnostics."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_modules.callbacks.figures import MonitoringConfig, curve_step, is_last_validation
from mirrorla.diagnostics import mirror_histograms, mirror_metrics

PROBED_SIDE = 256
"""Pixels a side, at most, that a dense task's mirrors are measured on: its whole images would take gigabytes."""


def probed_images(batch: Any) -> Tensor:
    """A classifier's images as they are; of a dense task's the upper left part that all have, without padding.

    Returns:
        (B, 3, h, w).
    """
    if isinstance(batch["image"], Tensor) and "size" not in batch:
        return batch["image"]
    sizes = batch["size"].tolist() if "size" in batch else [image.shape[1:] for image in batch["image"]]
    height, width = (min(PROBED_SIDE, *sides) for sides in zip(*sizes, strict=True))
    return torch.stack([image[:, :height, :width] for image in batch["image"]])


def is_divided(network: nn.Module) -> bool:
    """Whether parameters are divided among ranks; fsdp2's look whole between a forward pass and the next step."""
    is_fsdp = any(isinstance(part, FSDPModule) for part in network.modules())
    return is_fsdp or any(hasattr(parameter, "ds_id") for parameter in network.parameters())


class MirrorMetrics(Callback):
    """Log the mirror metrics of the evaluated network on rank 0; nothing for a network without mirrors.

    Nothing either where parameters are divided among ranks (fsdp2, zero3): no rank has the mirrors' own whole.

    Args:
        config: how often and on how many images.
    """

    def __init__(self, config: MonitoringConfig) -> None:
        self._config = config
        self._num_validations = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure when it is time."""
        every = self._config.mirrors_every_n_validations
        if trainer.sanity_checking or every == 0:
            return
        is_time = self._num_validations % every == 0 or is_last_validation(trainer)
        self._num_validations += 1
        if not is_time or not trainer.is_global_zero or trainer.logger is None:
            return
        evaluated: nn.Module = getattr(pl_module, "evaluated", pl_module)
        if is_divided(evaluated):
            return
        network = getattr(evaluated, "backbone", evaluated)  # of a dense task's network, only this has mirrors
        batch = trainer.datamodule.probe_batch(self._config.num_probes)  # type: ignore[attr-defined]
        images = probed_images(batch).to(pl_module.device)
        step = curve_step(trainer)
        trainer.logger.log_metrics(mirror_metrics(network, images), step=step)
        for tag, values in mirror_histograms(network, images).items():
            trainer.logger.experiment.add_histogram(tag, values, step)  # type: ignore[attr-defined]
