"""Samples to a batch, one function for each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import default_collate

from datamodules.annotations import IGNORE
from datamodules.types import (
    Batch,
    ClassificationBatch,
    DataError,
    DetectionBatch,
    DetectionTarget,
    LoadedBatch,
    LoadedSample,
    SegmentationBatch,
)
from datamodules.views import padded


class TensorList(list[Tensor]):
    """Tensors of different shapes and one dtype, which cross to another process as one.

    Each tensor that a worker sends holds a file descriptor until it is freed; a few batches of single boxes, labels
    and masks would use up the 1024 that a process usually may have. The price is one copy in the worker.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        if not self:
            return TensorList, ()
        return _split, (torch.cat([tensor.reshape(-1) for tensor in self]), [tensor.shape for tensor in self])

    def __copy__(self) -> TensorList:
        return TensorList(self)


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> TensorList:
    parts = flat.split([shape.numel() for shape in shapes])
    return TensorList(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


class TargetList(list[DetectionTarget]):
    """Detection targets, which cross to another process as one tensor for each field, see TensorList."""

    def __reduce__(self) -> tuple[Any, ...]:
        fields = sorted({name for target in self for name in target})
        holders = {name: [number for number, target in enumerate(self) if name in target] for name in fields}
        columns = {
            name: (numbers, TensorList(cast(Any, self[number])[name] for number in numbers))
            for name, numbers in holders.items()
        }
        return _join, (len(self), columns)

    def __copy__(self) -> TargetList:
        return TargetList(self)


def _join(count: int, columns: dict[str, tuple[list[int], TensorList]]) -> TargetList:
    targets: list[Any] = [{} for _ in range(count)]
    for name, (numbers, values) in columns.items():
        for number, value in zip(numbers, values, strict=True):
            targets[number][name] = value
    return TargetList(targets)


def collate_classification(samples: Sequence[LoadedSample]) -> ClassificationBatch:
    """Stack b samples; in a worker the images go straight to shared memory (what default_collate is used for)."""
    return ClassificationBatch(
        image=default_collate([sample.image for sample in samples]),
        label=torch.tensor([sample.target for sample in samples], dtype=torch.int64),
        weight=_weights(samples),
        id=_ids(samples),
    )


def collate_detection(samples: Sequence[LoadedSample]) -> DetectionBatch:
    """List b samples, each in its own size."""
    return DetectionBatch(
        image=TensorList(sample.image for sample in samples),
        target=TargetList(sample.target for sample in samples),
        weight=_weights(samples),
        id=_ids(samples),
    )


def collate_segmentation(samples: Sequence[LoadedSample]) -> SegmentationBatch:
    """Stack b samples, images and maps each padded to the largest of them."""
    images, maps = [sample.image for sample in samples], [sample.target for sample in samples]
    return SegmentationBatch(
        image=_stacked(images, 0),
        mask=_stacked(maps, IGNORE),
        weight=_weights(samples),
        id=_ids(samples),
        size=_sizes(images),
        mask_size=_sizes(maps),
    )


def _weights(samples: Sequence[LoadedSample]) -> Tensor:
    return torch.tensor([sample.weight for sample in samples], dtype=torch.float32)


def _ids(samples: Sequence[LoadedSample]) -> Tensor:
    return torch.tensor([sample.id for sample in samples], dtype=torch.int64)


def _sizes(tensors: Sequence[Tensor]) -> Tensor:
    """Height and width of each (b, 2), int64."""
    return torch.tensor([tensor.shape[-2:] for tensor in tensors], dtype=torch.int64)


def _stacked(tensors: Sequence[Tensor], fill: int) -> Tensor:
    height, width = (max(tensor.shape[axis] for tensor in tensors) for axis in (-2, -1))
    stacked: Tensor = default_collate([padded(tensor, height, width, fill) for tensor in tensors])
    return stacked


def collate_or_fault(
    collate: Callable[[Sequence[LoadedSample]], Batch], samples: Sequence[LoadedSample] | DataError
) -> LoadedBatch | DataError:
    """Collate, or hand an error on as it is: raised in a worker it would arrive buried in a traceback's text."""
    if isinstance(samples, DataError):
        return samples
    faults = tuple(sample.fault for sample in samples if sample.fault is not None)
    return LoadedBatch(collate(samples), faults)
