"""Segmentation: an image and its class map go through the same geometry; see transforms.py for the randomness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import Mask

from datamodules.annotations import IGNORE
from datamodules.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Interpolation,
    channels,
    check_range,
    check_std,
    normalise,
)
from datamodules.types import DataError
from datamodules.views import View, fitted, padded, random_cut, scaled, uniform

ClassMap = NDArray[np.uint8]
SegmentationPipeline = Callable[[Image.Image, ClassMap], tuple[Tensor, Tensor]]

CROP_TRIES = 10


@dataclass(frozen=True)
class SegmentationTrainTransform:
    """Training augmentation; the defaults are the recipe of ADE20K.

    Attributes:
        crop_size: side of the square output in pixels; smaller images are padded and the padding ignored.
        short_side: the shorter side before the random scale; null keeps the image's size.
        long_side: the longer side before the random scale never exceeds this.
        scale: smallest and largest random factor.
        max_share: a crop in which one class takes more of the pixels than this is drawn again, up to 10 times; 1 takes
            the first one.
        hflip: probability of a horizontal flip.
        photometric: probability of each of four distortions: brightness, contrast, saturation, hue.
        interpolation: for every resampling of the image; class maps take the nearest pixel.
        mean: per channel, of images in [0, 1], subtracted.
        std: per channel, divided by.
    """

    crop_size: int = 512
    short_side: int | None = 512
    long_side: int = 2048
    scale: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75
    hflip: float = 0.5
    photometric: float = 0.5
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class SegmentationEvalTransform:
    """Evaluation: resize the whole image, normalise; the class map keeps its size.

    Attributes:
        short_side: the shorter side in pixels; null keeps the image's size.
        long_side: the longer side never exceeds this.
        interpolation: for the resize.
        mean: per channel, of images in [0, 1], subtracted.
        std: per channel, divided by.
    """

    short_side: int | None = 512
    long_side: int = 2048
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def segmentation_train_pipeline(transform: SegmentationTrainTransform) -> SegmentationPipeline:
    """Build the training pipeline; its random numbers come from torch, see seeded.

    Args:
        transform: what to do.

    Returns:
        A function from an RGB image and its class map (H, W) to a normalised tensor (3, crop_size, crop_size),
        float32, and its class map (crop_size, crop_size), int64.

    Raises:
        DataError: a value out of its range, naming the field.
    """
    _check_train(transform)
    mean, std = channels(transform.mean), channels(transform.std)
    distort = _distortions(transform.photometric)
    side = transform.crop_size

    def pipeline(image: Image.Image, class_map: ClassMap) -> tuple[Tensor, Tensor]:
        view = View(image, Mask(torch.from_numpy(class_map)))
        size = _base(view.size, transform.short_side, transform.long_side)
        view = view.resized(scaled(size, uniform(*transform.scale)), transform.interpolation)
        view = _crop(view, side, transform.max_share)
        if transform.hflip > 0 and uniform(0, 1) < transform.hflip:
            view = view.flipped()
        assert view.masks is not None
        target = view.masks.as_subclass(Tensor).long()
        return padded(normalise(distort(view.image), mean, std), side, side, 0), padded(target, side, side, IGNORE)

    return pipeline


def segmentation_eval_pipeline(transform: SegmentationEvalTransform) -> SegmentationPipeline:
    """Build the evaluation pipeline, which uses no random numbers.

    Args:
        transform: what to do.

    Returns:
        A function from an RGB image and its class map (H, W) to a normalised tensor (3, h, w), float32, and the class
        map in its own size, int64.

    Raises:
        DataError: a value out of its range, naming the field.
    """
    _check_base("eval_transform", transform.short_side, transform.long_side)
    check_std("eval_transform", transform.std)
    mean, std = channels(transform.mean), channels(transform.std)

    def pipeline(image: Image.Image, class_map: ClassMap) -> tuple[Tensor, Tensor]:
        size = _base((image.height, image.width), transform.short_side, transform.long_side)
        shown = View(image, None).resized(size, transform.interpolation).image
        return normalise(shown, mean, std), torch.from_numpy(class_map).long()

    return pipeline


def is_varied(class_map: Tensor, max_share: float) -> bool:
    """Whether no class takes more than max_share of the pixels that count; false where only one class is seen."""
    counts = torch.bincount(class_map.flatten(), minlength=IGNORE + 1)[:IGNORE]
    largest, total = int(counts.max()), int(counts.sum())
    return largest < total and largest <= max_share * total


def _crop(view: View, side: int, max_share: float) -> View:
    """A random cut that is varied, or the last one that was tried."""
    assert view.masks is not None
    for _ in range(CROP_TRIES):
        cut = random_cut(view.size, side, side)
        top, left, height, width = cut
        part = view.masks[top : top + height, left : left + width]
        if max_share >= 1 or is_varied(part, max_share):
            break
    return view.cropped(*cut)


def _distortions(probability: float) -> Callable[[Image.Image], Image.Image]:
    """The four distortions, one after the other, each with that probability."""
    kinds = {"brightness": 32 / 255, "contrast": 0.5, "saturation": 0.5, "hue": 0.1}
    steps = [v2.RandomApply([v2.ColorJitter(**{name: strength})], probability) for name, strength in kinds.items()]

    def distort(image: Image.Image) -> Image.Image:
        for step in steps:
            image = step(image)
        return image

    return distort if probability > 0 else lambda image: image


def _base(size: tuple[int, int], short_side: int | None, long_side: int) -> tuple[int, int]:
    return size if short_side is None else fitted(size, short_side, long_side)


def _check_base(name: str, short_side: int | None, long_side: int) -> None:
    if short_side is not None:
        check_range(f"{name}.short_side", short_side, 1)
        check_range(f"{name}.long_side", long_side, short_side)


def _check_train(transform: SegmentationTrainTransform) -> None:
    check_range("train_transform.crop_size", transform.crop_size, 1)
    _check_base("train_transform", transform.short_side, transform.long_side)
    for name in ("hflip", "photometric", "max_share"):
        check_range(f"train_transform.{name}", getattr(transform, name), 0, 1)
    low, high = transform.scale
    if not 0 < low <= high:
        raise DataError(f"data.train_transform.scale is {low} {high}; it must be 0 < min <= max")
    check_std("train_transform", transform.std)
