"""Randomness that depends on where training is, not on how it got there."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def step_seed(seed: int, epoch: int, batch_idx: int, rank: int) -> int:
    """A 64-bit seed for one batch on one rank.

    Args:
        seed: the run's seed.
        epoch: from 0.
        batch_idx: index of the global batch within the epoch.
        rank: global rank.

    Returns:
        A well mixed integer in [0, 2**63).
    """
    words = np.random.SeedSequence((seed, epoch, batch_idx, rank)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


class StepSeed(Callback):
    """Seed torch, numpy and random before every training batch.

    Drop path, dropout and mixup after a resume are then those of the uninterrupted run, bit for bit.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed every generator that a training step may draw from."""
        seed = step_seed(self._seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - the generator timm draws from
        random.seed(seed)
