"""The shapes that travel between the parts of the data plane, and the one error meant for its users."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
Weights = NDArray[np.float32]

PADDING_ID = -1
"""Sample id of a slot that only fills up an evaluation batch (weight 0, zero image)."""


class DataError(ValueError):
    """A user's data or data setting is wrong; the message is one line: what, where, the value and the mend."""


FaultKind = Literal["damaged", "undecodable", "over_limit", "label"]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


class CorruptSampleError(DataError):
    """One sample cannot be used.

    Args:
        message: one line.
        kind: "damaged" (its bytes are not those that were indexed), "undecodable", "over_limit" (bytes, pixels or
            frames) or "label" (no class of the dataset).
    """

    def __init__(self, message: str, kind: FaultKind = "damaged") -> None:
        super().__init__(message)
        self.kind: FaultKind = kind


class Fault(NamedTuple):
    """A sample that was skipped: its id within the split, why, and the error's line."""

    sample: int
    kind: FaultKind
    message: str


class ClassificationBatch(TypedDict):
    """One rank's share of a global batch of B samples (b of them here).

    Attributes:
        image: normalised images (b, 3, H, W), float32.
        label: class ids (b,), int64.
        weight: (b,) float32. Training: N * b / B on every sample, N the number of ranks, so that averaging
            `(weight * loss).mean()` over ranks gives the mean over the global batch. Evaluation: 1 for a real sample,
            0 for padding. A skipped bad sample has a zero image and weight 0 in both.
        id: sample ids within the split (b,), int64; -1 for padding.
    """

    image: Tensor
    label: Tensor
    weight: Tensor
    id: Tensor


class LoadedBatch(NamedTuple):
    """What a worker sends: a batch, and the samples in it that were skipped."""

    batch: ClassificationBatch
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class BatchRequest:
    """What a sampler asks of the dataset: one rank's share of one global batch.

    Attributes:
        ids: sample ids (b,), -1 for padding.
        repeats: which copy of the sample each slot is (b,), 0 without repeated augmentation.
        weights: (b,), see ClassificationBatch.
        epochs: the pass over its data that each slot belongs to (b,), which keys the augmentation.
    """

    ids: Ids
    repeats: Ids
    weights: Weights
    epochs: Ids

    def __len__(self) -> int:
        return len(self.ids)

    def slots(self) -> Iterator[tuple[int, int, int, float]]:
        """Sample id, pass, copy and weight of every slot."""
        return zip(self.ids.tolist(), self.epochs.tolist(), self.repeats.tolist(), self.weights.tolist(), strict=True)


@dataclass(frozen=True, slots=True)
class ClassificationSample:
    """One decoded and transformed sample: image (3, H, W) float32, its class, weight and id; its fault if skipped."""

    image: Tensor
    label: int
    weight: float
    id: int
    fault: Fault | None = None
