"""Detection: an image, its boxes and its masks go through the same geometry; see transforms.py for the randomness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as geometry
from torchvision.tv_tensors import Mask

from datamodules.annotations import Objects, decode_mask
from datamodules.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Interpolation,
    channels,
    check_range,
    check_std,
    normalise,
)
from datamodules.types import DataError, DetectionTarget
from datamodules.views import View, as_boxes, choice, extents, fitted, random_cut, scaled, uniform

DetectionPipeline = Callable[[Image.Image, Objects], tuple[Tensor, DetectionTarget]]


@dataclass(frozen=True)
class DetectionTrainTransform:
    """Training augmentation; the defaults are the 1x recipe of COCO.

    Attributes:
        short_sides: the shorter side in pixels, one of these for each image: 480 512 … 800 is the 3x recipe's.
        long_side: the longer side never exceeds this; the shorter one then falls below its value.
        crop: probability of the 3x recipe's crop before that resize.
        crop_short_sides: the shorter side before the crop, one of these.
        crop_sides: smallest and largest side of the cut, drawn for each side; never more than the image has.
        large_scale: smallest and largest factor of large-scale jitter, such as 0.1 2.0: the image is scaled by it from
            the size that fits into a square of long_side pixels, and cut to that square. It takes the place of
            short_sides and crop. Null: none.
        hflip: probability of a horizontal flip.
        color_jitter: strength of brightness, contrast and saturation jitter.
        min_side: objects whose box has a shorter side than this afterwards are left out, in pixels.
        interpolation: for every resampling of the image; masks take the nearest pixel.
        mean: per channel, of images in [0, 1], subtracted.
        std: per channel, divided by.
    """

    short_sides: tuple[int, ...] = (800,)
    long_side: int = 1333
    crop: float = 0.0
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_sides: tuple[int, int] = (384, 600)
    large_scale: tuple[float, float] | None = None
    hflip: float = 0.5
    color_jitter: float = 0.0
    min_side: float = 1.0
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class DetectionEvalTransform:
    """Evaluation: resize, normalise; the objects stay in pixels of the original image.

    Attributes:
        short_side: the shorter side in pixels; null keeps the image's size.
        long_side: the longer side never exceeds this.
        interpolation: for the resize.
        mean: per channel, of images in [0, 1], subtracted.
        std: per channel, divided by.
    """

    short_side: int | None = 800
    long_side: int = 1333
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def detection_train_pipeline(transform: DetectionTrainTransform) -> DetectionPipeline:
    """Build the training pipeline; its random numbers come from torch, see seeded.

    Args:
        transform: what to do.

    Returns:
        A function from an RGB image and its objects to a normalised tensor (3, h, w), float32, and the target in its
        pixels, without crowds and objects that it no longer shows.

    Raises:
        DataError: a value out of its range, naming the field.
    """
    _check_train(transform)
    mean, std = channels(transform.mean), channels(transform.std)
    jitter = v2.ColorJitter(*[transform.color_jitter] * 3)

    def pipeline(image: Image.Image, objects: Objects) -> tuple[Tensor, DetectionTarget]:
        objects = without_crowds(objects)
        view = _moved(look(image, objects), transform)
        shown = jitter(view.image) if transform.color_jitter > 0 else view.image
        return normalise(shown, mean, std), _train_target(view, objects, transform.min_side)

    return pipeline


def detection_eval_pipeline(transform: DetectionEvalTransform) -> DetectionPipeline:
    """Build the evaluation pipeline, which uses no random numbers.

    Args:
        transform: what to do.

    Returns:
        A function from an RGB image and its objects to a normalised tensor (3, h, w), float32, and the target in
        pixels of the image as it was given, crowds included.

    Raises:
        DataError: a value out of its range, naming the field.
    """
    if transform.short_side is not None:
        check_range("eval_transform.short_side", transform.short_side, 1)
        check_range("eval_transform.long_side", transform.long_side, transform.short_side)
    check_std("eval_transform", transform.std)
    mean, std = channels(transform.mean), channels(transform.std)

    def pipeline(image: Image.Image, objects: Objects) -> tuple[Tensor, DetectionTarget]:
        target = _eval_target(objects)
        if transform.short_side is not None:
            size = fitted((image.height, image.width), transform.short_side, transform.long_side)
            image = View(image, None).resized(size, transform.interpolation).image
        return normalise(image, mean, std), target

    return pipeline


def without_crowds(objects: Objects) -> Objects:
    """The single objects: a crowd's box says nothing about where its members are."""
    if not any(objects.iscrowd):
        return objects
    kept = [number for number, flag in enumerate(objects.iscrowd) if not flag]
    return replace(
        objects,
        boxes=[objects.boxes[number] for number in kept],
        labels=[objects.labels[number] for number in kept],
        iscrowd=[0] * len(kept),
        area=[objects.area[number] for number in kept],
        masks=None if objects.masks is None else [objects.masks[number] for number in kept],
    )


def look(image: Image.Image, objects: Objects) -> View:
    """An image and its objects as what moves together."""
    boxes = torch.tensor(objects.boxes, dtype=torch.float32).reshape(-1, 4)
    masks = None if objects.masks is None else Mask(_masks(objects))
    return View(image, masks, as_boxes(boxes, (objects.height, objects.width)))


def _masks(objects: Objects) -> Tensor:
    """(n, H, W), uint8: torchvision scales no bool."""
    masks = [decode_mask(mask) for mask in objects.masks or []]
    stacked = np.stack(masks) if masks else np.empty((0, objects.height, objects.width), np.bool_)
    return torch.from_numpy(stacked.view(np.uint8))


def _moved(view: View, transform: DetectionTrainTransform) -> View:
    """The random geometry of training."""
    interpolation = transform.interpolation
    if transform.large_scale is not None:
        square = transform.long_side
        size = scaled(view.size, uniform(*transform.large_scale) * square / max(view.size))
        view = _cut(view.resized(size, interpolation), square, square)
    else:
        if transform.crop > 0 and uniform(0, 1) < transform.crop:
            low, high = transform.crop_sides
            size = fitted(view.size, choice(transform.crop_short_sides), transform.long_side)
            view = _cut(view.resized(size, interpolation), choice(range(low, high + 1)), choice(range(low, high + 1)))
        view = view.resized(fitted(view.size, choice(transform.short_sides), transform.long_side), interpolation)
    return view.flipped() if transform.hflip > 0 and uniform(0, 1) < transform.hflip else view


def _cut(view: View, height: int, width: int) -> View:
    """A random cut; boxes of objects with masks then enclose what is left of these."""
    if height >= view.size[0] and width >= view.size[1]:
        return view
    cut = view.cropped(*random_cut(view.size, height, width))
    return cut if cut.masks is None else cut._replace(boxes=as_boxes(extents(cut.masks), cut.size))


def _train_target(view: View, objects: Objects, min_side: float) -> DetectionTarget:
    assert view.boxes is not None
    boxes = geometry.clamp_bounding_boxes(view.boxes).as_subclass(Tensor)
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    kept = (torch.minimum(widths, heights) >= min_side) & (widths > 0) & (heights > 0)
    area = widths * heights
    if view.masks is not None:
        masks = view.masks.as_subclass(Tensor).bool()
        # torch's sum of bools takes a hundred times as long
        area = torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()], dtype=torch.float32)
        kept &= area > 0
    target = _target(boxes[kept], torch.tensor(objects.labels, dtype=torch.int64)[kept], area[kept], objects)
    if view.masks is not None:
        target["masks"] = masks[kept]
    return target


def _eval_target(objects: Objects) -> DetectionTarget:
    boxes = torch.tensor(objects.boxes, dtype=torch.float32).reshape(-1, 4)
    labels, area = torch.tensor(objects.labels, dtype=torch.int64), torch.tensor(objects.area, dtype=torch.float32)
    target = _target(boxes, labels, area, objects)
    target["iscrowd"] = torch.tensor(objects.iscrowd, dtype=torch.int64)
    if objects.masks is not None:
        target["masks"] = _masks(objects).bool()
    return target


def _target(boxes: Tensor, labels: Tensor, area: Tensor, objects: Objects) -> DetectionTarget:
    return DetectionTarget(
        boxes=boxes,
        labels=labels,
        iscrowd=torch.zeros(len(labels), dtype=torch.int64),
        area=area,
        image_id=torch.tensor(objects.image_id, dtype=torch.int64),
        size=torch.tensor([objects.height, objects.width], dtype=torch.int64),
    )


def _check_train(transform: DetectionTrainTransform) -> None:
    for name in ("short_sides", "crop_short_sides"):
        if not getattr(transform, name):
            raise DataError(f"data.train_transform.{name} is empty; give at least one length in pixels")
        check_range(f"train_transform.{name}", min(getattr(transform, name)), 1)
    least = 1 if transform.large_scale is not None else max(transform.short_sides)  # which large_scale does not use
    check_range("train_transform.long_side", transform.long_side, least)
    for name in ("hflip", "crop"):
        check_range(f"train_transform.{name}", getattr(transform, name), 0, 1)
    for name in ("color_jitter", "min_side"):
        check_range(f"train_transform.{name}", getattr(transform, name), 0)
    for name, pair in (("crop_sides", transform.crop_sides), ("large_scale", transform.large_scale)):
        if pair is not None and not 0 < pair[0] <= pair[1]:
            raise DataError(f"data.train_transform.{name} is {pair[0]} {pair[1]}; it must be 0 < min <= max")
    check_std("train_transform", transform.std)
