"""The shapes that travel between the parts of the data plane, and the one error meant for its users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
Weights = NDArray[np.float32]

PADDING_ID = -1
"""Sample id of a slot that only fills up an evaluation batch (weight 0, zero image)."""


class DataError(ValueError):
    """A user's data or data setting is wrong; the message is one line: what, where, the value and the mend."""


class CorruptSampleError(DataError):
    """The bytes of one sample are not those that were indexed, or do not decode."""


class ClassificationBatch(TypedDict):
    """One rank's share of a global batch of B samples (b of them here).

    Attributes:
        image: normalised images (b, 3, H, W), float32.
        label: class ids (b,), int64.
        weight: (b,) float32. Training: N * b / B on every sample, N the number of ranks, so that averaging
            `(weight * loss).mean()` over ranks gives the mean over the global batch. Evaluation: 1 for a real sample,
            0 for padding.
        id: sample ids within the split (b,), int64; -1 for padding.
    """

    image: Tensor
    label: Tensor
    weight: Tensor
    id: Tensor


@dataclass(frozen=True)
class BatchRequest:
    """What a sampler asks of the dataset: one rank's share of one global batch.

    Attributes:
        ids: sample ids (b,), -1 for padding.
        repeats: which copy of the sample each slot is (b,), 0 without repeated augmentation.
        weights: (b,), see ClassificationBatch.
        epoch: the pass over the data, which keys the augmentation.
    """

    ids: Ids
    repeats: Ids
    weights: Weights
    epoch: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class ClassificationSample:
    """One decoded and transformed sample: image (3, H, W) float32, its class, weight and id."""

    image: Tensor
    label: int
    weight: float
    id: int
