"""What differs between the tasks: how a sample's annotation is read, transformed and put into a batch. Nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.annotations import IGNORE, Objects, parse_class_map, parse_objects
from datamodules.collate import collate_classification, collate_detection, collate_segmentation
from datamodules.decode import parse_label
from datamodules.sources_base import Task as TaskName
from datamodules.transforms import EvalTransform, TrainTransform, eval_pipeline, train_pipeline
from datamodules.transforms_detection import (
    DetectionEvalTransform,
    DetectionTrainTransform,
    detection_eval_pipeline,
    detection_train_pipeline,
)
from datamodules.transforms_segmentation import (
    ClassMap,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
    segmentation_eval_pipeline,
    segmentation_train_pipeline,
)
from datamodules.types import Batch, CorruptSampleError, DetectionTarget, LoadedSample

UNKNOWN = -1
"""Class id of an image of a plain folder."""
BLANK_SIDE = 32
"""Sides of the image in place of a sample that is skipped or padding: the smallest that every backbone takes."""

Size = tuple[int, int]
"""Width and height, as Pillow gives them."""


@dataclass(frozen=True)
class Task:
    """One task; its parts are functions.

    Attributes:
        name: as dataset.json calls it.
        annotation: extension of the field beside the image.
        parse: field, number of classes, the image's size and a text that names the sample -> annotation; raises
            CorruptSampleError.
        unlabelled: the image's size and the sample's id -> the annotation of an image that has none.
        train_transform: type of the randomised transform.
        train_pipeline: such a transform -> a function from image and annotation to tensor and target.
        eval_pipeline: the same for the other transform.
        blank: either transform -> tensor and target of a sample that is skipped or padding.
        collate: samples -> batch.
    """

    name: TaskName
    annotation: str
    parse: Callable[[bytes, int, Size, str], Any]
    unlabelled: Callable[[Size, int], Any]
    train_transform: type
    train_pipeline: Callable[[Any], Callable[[Image.Image, Any], tuple[Tensor, Any]]]
    eval_pipeline: Callable[[Any], Callable[[Image.Image, Any], tuple[Tensor, Any]]]
    blank: Callable[[Any], tuple[Tensor, Any]]
    collate: Callable[[Sequence[LoadedSample]], Batch]


def _parse_label(data: bytes, num_classes: int, size: Size, where: str) -> int:
    label = parse_label(data, len(data), where)
    if label >= num_classes:
        raise CorruptSampleError(f"{where}: label {label} is not below the {num_classes} classes", "label")
    return label


def _labelled(pipeline: Callable[[Image.Image], Tensor], image: Image.Image, label: int) -> tuple[Tensor, int]:
    return pipeline(image), label


def _train_labelled(transform: TrainTransform) -> Callable[[Image.Image, int], tuple[Tensor, int]]:
    return partial(_labelled, train_pipeline(transform))


def _eval_labelled(transform: EvalTransform) -> Callable[[Image.Image, int], tuple[Tensor, int]]:
    return partial(_labelled, eval_pipeline(transform))


def _no_label(size: Size, sample: int) -> int:
    return UNKNOWN


def _blank_label(transform: TrainTransform | EvalTransform) -> tuple[Tensor, int]:
    return torch.zeros(3, transform.image_size, transform.image_size), 0


CLASSIFICATION = Task(
    name="classification",
    annotation="cls",
    parse=_parse_label,
    unlabelled=_no_label,
    train_transform=TrainTransform,
    train_pipeline=_train_labelled,
    eval_pipeline=_eval_labelled,
    blank=_blank_label,
    collate=collate_classification,
)


def _parse_objects(data: bytes, num_classes: int, size: Size, where: str, *, with_masks: bool) -> Objects:
    objects = parse_objects(data, num_classes, where)
    if (objects.width, objects.height) != size:
        listed = f"{objects.width}x{objects.height}"
        raise CorruptSampleError(f"{where}.json: for an image of {listed}, the image has {size[0]}x{size[1]}", "label")
    return objects if with_masks else replace(objects, masks=None)


def _no_objects(size: Size, sample: int) -> Objects:
    return Objects(sample, *size, boxes=[], labels=[], iscrowd=[], area=[])


def _blank_objects(transform: object) -> tuple[Tensor, DetectionTarget]:
    image = Image.new("RGB", (BLANK_SIDE, BLANK_SIDE))
    keep_size = DetectionEvalTransform(short_side=None)
    tensor, target = detection_eval_pipeline(keep_size)(image, _no_objects(image.size, -1))
    return torch.zeros_like(tensor), target


def detection(with_masks: bool = True) -> Task:
    """The detection task, with or without the masks that a dataset may have."""
    return Task(
        name="detection",
        annotation="json",
        parse=partial(_parse_objects, with_masks=with_masks),
        unlabelled=_no_objects,
        train_transform=DetectionTrainTransform,
        train_pipeline=detection_train_pipeline,
        eval_pipeline=detection_eval_pipeline,
        blank=_blank_objects,
        collate=collate_detection,
    )


def _no_classes(size: Size, sample: int) -> ClassMap:
    return np.full((size[1], size[0]), IGNORE, dtype=np.uint8)


def _blank_map(transform: SegmentationTrainTransform | SegmentationEvalTransform) -> tuple[Tensor, Tensor]:
    side = transform.crop_size if isinstance(transform, SegmentationTrainTransform) else BLANK_SIDE
    return torch.zeros(3, side, side), torch.full((side, side), IGNORE)


SEGMENTATION = Task(
    name="segmentation",
    annotation="seg.png",
    parse=parse_class_map,
    unlabelled=_no_classes,
    train_transform=SegmentationTrainTransform,
    train_pipeline=segmentation_train_pipeline,
    eval_pipeline=segmentation_eval_pipeline,
    blank=_blank_map,
    collate=collate_segmentation,
)
