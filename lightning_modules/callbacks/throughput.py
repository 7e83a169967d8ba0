"""How fast a training runs and how long it waits for data."""

import resource
import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.tensorboard import Tag


def peak_memory_gib() -> float:
    """Most memory held so far: of the GPU's allocator, or of this process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes / 2**20


def log_interval(trainer: Trainer) -> int:
    """Optimizer steps between two log entries."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set in the Trainer's constructor
    return interval


class Throughput(Callback):
    """Log images/s, step time and data-wait share over the steps since the last log entry.

    A step lasts from the end of the batch before it to its own end; the part before its batch is on the device is the
    wait for data. Validation, checkpoints and the first batch after them are left out. Images are those of all ranks,
    times are this rank's.
    """

    def __init__(self) -> None:
        self._batch_ended_s: float | None = None
        self._batch_began_s = 0.0
        self._steps_s: list[float] = []
        self._waits_s: list[float] = []
        self._num_images = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is here."""
        self._batch_began_s = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log at Lightning's interval."""
        now_s = time.perf_counter()
        if self._batch_ended_s is not None:
            self._steps_s.append(now_s - self._batch_ended_s)
            self._waits_s.append(self._batch_began_s - self._batch_ended_s)
            self._num_images += len(batch["image"])
        self._batch_ended_s = now_s
        if self._steps_s and trainer.global_step % log_interval(trainer) == 0:
            pl_module.log_dict(self._summary(trainer), rank_zero_only=True)
            self._steps_s, self._waits_s, self._num_images = [], [], 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not count the pause as a step."""
        self._batch_ended_s = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not count the pause between epochs as a step."""
        self._batch_ended_s = None

    def _summary(self, trainer: Trainer) -> dict[str, float]:
        total_s = sum(self._steps_s)
        p50, p95 = np.percentile(self._steps_s, [50, 95])
        summary = {
            Tag.IMAGES_PER_S: self._num_images * trainer.world_size / total_s,
            Tag.STEP_P50_MS: 1e3 * p50,
            Tag.STEP_P95_MS: 1e3 * p95,
            Tag.DATA_WAIT_SHARE: sum(self._waits_s) / total_s,
            Tag.PEAK_GIB: peak_memory_gib(),
        }
        return {str(tag): float(value) for tag, value in summary.items()}
