"""Samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import default_collate

from datamodules.types import ClassificationBatch, ClassificationSample, DataError, LoadedBatch


def collate_classification(samples: Sequence[ClassificationSample]) -> ClassificationBatch:
    """Stack b samples; in a worker the images go straight to shared memory (what default_collate is used for)."""
    return ClassificationBatch(
        image=default_collate([sample.image for sample in samples]),
        label=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
        weight=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
        id=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
    )


def collate_or_fault(samples: Sequence[ClassificationSample] | DataError) -> LoadedBatch | DataError:
    """Collate, or hand an error on as it is: raised in a worker it would arrive buried in a traceback's text."""
    if isinstance(samples, DataError):
        return samples
    faults = tuple(sample.fault for sample in samples if sample.fault is not None)
    return LoadedBatch(collate_classification(samples), faults)
