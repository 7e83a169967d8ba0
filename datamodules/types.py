"""The shapes that travel between the parts of the data plane, and the one error meant for its users."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, get_args

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
            frames) or "label" (a class, object or class map that does not fit the dataset or the image).
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
        label: class ids (b,), int64; -1 where it is not known (a plain folder of images).
        weight: (b,) float32. Training: N * b / B on every sample, N the number of ranks, so that averaging
            `(weight * loss).mean()` over ranks gives the mean over the global batch. Evaluation: 1 for a real sample,
            0 for padding. A skipped bad sample has a zero image and weight 0 in both.
        id: sample ids within the split (b,), int64; -1 for padding.
    """

    image: Tensor
    label: Tensor
    weight: Tensor
    id: Tensor


class DetectionTarget(TypedDict):
    """The n objects of one image.

    In training: in pixels of the transformed image, without crowds and without objects that it no longer shows. In
    evaluation: all objects, in pixels of the original image, whatever was done to the image.

    Attributes:
        boxes: (n, 4) float32, x0 y0 x1 y1 in pixels, x1 and y1 exclusive.
        labels: (n,) int64, from 1; class_names[label - 1] names them.
        masks: (n, H, W) bool; absent if the dataset has none or the data module leaves them out.
        iscrowd: (n,) int64, 1 for a group of objects.
        area: (n,) float32 in pixels: in evaluation as the dataset gives it, in training of the mask, else of the box.
        image_id: () int64, the dataset's number of the image; in a plain folder its sample id.
        size: (2,) int64, height and width of the original image.
    """

    boxes: Tensor
    labels: Tensor
    masks: NotRequired[Tensor]
    iscrowd: Tensor
    area: Tensor
    image_id: Tensor
    size: Tensor


class DetectionBatch(TypedDict):
    """One rank's share of a global batch; images differ in size, so they come as a list.

    Attributes:
        image: b normalised images (3, h, w), float32.
        target: b targets.
        weight: see ClassificationBatch; a skipped or padding sample is a small zero image without objects.
        id: see ClassificationBatch.
    """

    image: list[Tensor]
    target: list[DetectionTarget]
    weight: Tensor
    id: Tensor


class SegmentationBatch(TypedDict):
    """One rank's share of a global batch; smaller images and maps are padded on the right and at the bottom.

    In training all are crops of one size, with their maps. In evaluation a map keeps its original size, whatever was
    done to the image: logits are resized to mask_size before they are compared.

    Attributes:
        image: normalised images (b, 3, h, w), float32, padded with 0.
        mask: class ids (b, H, W), int64, 255 = ignore, padded with 255.
        weight: see ClassificationBatch; a skipped or padding sample is a zero image with a map of 255.
        id: see ClassificationBatch.
        size: (b, 2) int64, height and width of each image without padding.
        mask_size: (b, 2) int64, height and width of each map without padding.
    """

    image: Tensor
    mask: Tensor
    weight: Tensor
    id: Tensor
    size: Tensor
    mask_size: Tensor


Batch = ClassificationBatch | DetectionBatch | SegmentationBatch


class LoadedBatch(NamedTuple):
    """What a worker sends: a batch, and the samples in it that were skipped."""

    batch: Batch
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
class LoadedSample:
    """One decoded and transformed sample, ready to be collated.

    Attributes:
        image: (3, H, W) float32.
        target: what its task's collation expects: a class id, a DetectionTarget or a class map (H, W) int64.
        weight: see ClassificationBatch.
        id: within the split, -1 for padding.
        fault: why it was skipped.
    """

    image: Tensor
    target: Any
    weight: float
    id: int
    fault: Fault | None = None
