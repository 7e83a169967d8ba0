"""Image pipelines as pure functions of two frozen dataclasses, with randomness that belongs to the sample.

A sample's augmentation depends on (seed, epoch, sample id, copy) only: not on the rank, the worker, the batch or what
was drawn before. So a resumed or resized run sees the very images of the uninterrupted one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from datamodules.order import Role, hash_key
from datamodules.types import DataError

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Pipeline = Callable[[Image.Image], Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LENT = np.random.MT19937(0)


@dataclass(frozen=True)
class TrainTransform:
    """Training augmentation; the defaults are the 224-pixel ImageNet recipe of DeiT and Swin.

    Attributes:
        image_size: side of the square output in pixels.
        crop: random resized crop; false resizes the whole image to the output instead.
        scale: smallest and largest crop, as a share of the image's area.
        ratio: smallest and largest aspect ratio (width / height) of the crop.
        interpolation: for every resampling.
        hflip: probability of a horizontal flip.
        degrees: largest rotation to either side.
        translate: largest shift to either side, as a share of the side.
        zoom: smallest and largest magnification; 1 1 for none.
        auto_augment: a timm policy such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original; null for none.
        color_jitter: strength of brightness, contrast and saturation jitter. A policy in auto_augment takes its place,
            as in timm, whose recipes name both.
        random_erasing: probability of replacing a rectangle by noise.
        mean: per channel, of images in [0, 1], subtracted.
        std: per channel, divided by.
    """

    image_size: int = 224
    crop: bool = True
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    hflip: float = 0.5
    degrees: float = 0.0
    translate: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    random_erasing: float = 0.25
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class EvalTransform:
    """Evaluation: resize, centre crop, normalise.

    Attributes:
        image_size: side of the square output in pixels.
        resize: length of the shorter side before the centre crop; null resizes the whole image to the output.
        interpolation: for the resize.
        mean: per channel, of images in [0, 1], subtracted.
        std: per channel, divided by.
    """

    image_size: int = 224
    resize: int | None = 256
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def train_pipeline(transform: TrainTransform) -> Pipeline:
    """Build the training pipeline; its random numbers come from random, NumPy and torch, see seeded.

    Args:
        transform: what to do.

    Returns:
        A function from an RGB image to a normalised tensor (3, image_size, image_size), float32.

    Raises:
        DataError: a value out of its range, naming the field.
    """
    _check_train(transform)
    interpolation = InterpolationMode(transform.interpolation)
    size = [transform.image_size, transform.image_size]
    steps: list[Callable[[Image.Image], Image.Image]] = []
    if transform.crop:
        steps.append(v2.RandomResizedCrop(size, transform.scale, transform.ratio, interpolation))
    else:
        steps.append(v2.Resize(size, interpolation))
    if transform.hflip > 0:
        steps.append(v2.RandomHorizontalFlip(transform.hflip))
    if transform.degrees or transform.translate or transform.zoom != (1.0, 1.0):
        steps.append(_affine(transform))
    if transform.auto_augment is not None:
        steps.append(_policy(transform, transform.auto_augment))
    elif transform.color_jitter > 0:
        steps.append(v2.ColorJitter(*[transform.color_jitter] * 3))
    erase = RandomErasing(transform.random_erasing, mode="pixel", device="cpu")
    mean, std = channels(transform.mean), channels(transform.std)

    def pipeline(image: Image.Image) -> Tensor:
        for step in steps:
            image = step(image)
        tensor = normalise(image, mean, std)
        return erase(tensor) if transform.random_erasing > 0 else tensor

    return pipeline


def eval_pipeline(transform: EvalTransform) -> Pipeline:
    """Build the evaluation pipeline, which uses no random numbers.

    Args:
        transform: what to do.

    Returns:
        A function from an RGB image to a normalised tensor (3, image_size, image_size), float32.

    Raises:
        DataError: a value out of its range, naming the field.
    """
    check_range("eval_transform.image_size", transform.image_size, 1)
    if transform.resize is not None:
        check_range("eval_transform.resize", transform.resize, transform.image_size)
    check_std("eval_transform", transform.std)
    interpolation = InterpolationMode(transform.interpolation)
    size = [transform.image_size, transform.image_size]
    resize = v2.Resize(size if transform.resize is None else [transform.resize], interpolation)
    crop = nn.Identity() if transform.resize is None else v2.CenterCrop(size)
    mean, std = channels(transform.mean), channels(transform.std)

    def pipeline(image: Image.Image) -> Tensor:
        return normalise(crop(resize(image)), mean, std)

    return pipeline


def _affine(transform: TrainTransform) -> v2.RandomAffine:
    # Pillow's affine maps know nearest, bilinear and bicubic; black corners suit images on a black ground
    return v2.RandomAffine(
        transform.degrees,
        translate=(transform.translate, transform.translate),
        scale=transform.zoom,
        interpolation=InterpolationMode(transform.interpolation),
    )


def _policy(transform: TrainTransform, name: str) -> Callable[[Image.Image], Image.Image]:
    """One of timm's policies, with the constants its own ImageNet pipeline uses."""
    resampling = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}
    constants = {
        "translate_const": int(transform.image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in transform.mean),
        "interpolation": resampling.get(transform.interpolation, Image.Resampling.BICUBIC),
    }
    try:
        if name.startswith("rand"):
            return _mended(rand_augment_transform(name, constants))
        if name.startswith("augmix"):
            return _mended(augment_and_mix_transform(name, {**constants, "translate_pct": 0.3}))
        return _mended(auto_augment_transform(name, constants))
    except (AssertionError, ValueError, KeyError):
        raise DataError(
            f"data.train_transform.auto_augment {name!r} is no timm policy; an example is rand-m9-mstd0.5-inc1"
        ) from None


def _mended(policy: Any) -> Callable[[Image.Image], Image.Image]:
    """Let timm's policies posterize to 0 bits, a black image, as when they were published; Pillow 13 refuses it."""
    operations = policy.ops if hasattr(policy, "ops") else [one for pair in policy.policy for one in pair]
    for operation in operations:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits: int, **unused: object) -> Image.Image:
    mask = 0xFF & ~(0xFF >> bits)
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


def normalise(image: Image.Image, mean: Tensor, std: Tensor) -> Tensor:
    """An RGB image (H, W) to a contiguous normalised tensor (3, H, W), float32."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)  # np.array copies: writable
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)


def channels(values: tuple[float, float, float]) -> Tensor:
    """Three numbers as a tensor (3, 1, 1), float32."""
    return torch.tensor(values, dtype=torch.float32).reshape(3, 1, 1)


def denormalise(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Undo the normalisation of images (..., 3, H, W); the result lies in [0, 1]."""
    return (images * channels(std).to(images) + channels(mean).to(images)).clamp(0, 1)


@contextmanager
def seeded(seed: int, epoch: int, sample: int, repeat: int) -> Iterator[None]:
    """Seed random, NumPy and torch's CPU generator from one sample's key; afterwards they go on as if untouched.

    Args:
        seed: of the run.
        epoch: pass over the data.
        sample: id within the split.
        repeat: which copy of the sample.
    """
    key = hash_key(seed, epoch, Role.AUGMENTATION, sample, repeat)
    with generators_kept():
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)  # noqa: NPY002
        torch.default_generator.manual_seed(key >> 1)  # torch.manual_seed would also queue a seed for every GPU
        yield


@contextmanager
def generators_kept() -> Iterator[None]:
    """Let random, NumPy and torch's CPU generator go on afterwards as if untouched; inside another one, nothing.

    Around a batch it costs once what `seeded` would cost for every sample. Only NumPy's legacy normal numbers, which
    are made in pairs, go on with a new pair.
    """
    if np.random.mtrand.get_bit_generator() is _LENT:
        yield
        return
    states = random.getstate(), torch.default_generator.get_state()
    numpy = np.random.mtrand.get_bit_generator()
    np.random.mtrand.set_bit_generator(_LENT)  # 2 us; to copy the state and back takes 50 us
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.mtrand.set_bit_generator(numpy)
        torch.default_generator.set_state(states[1])


def _check_train(transform: TrainTransform) -> None:
    check_range("train_transform.image_size", transform.image_size, 1)
    for name in ("hflip", "random_erasing", "translate"):
        check_range(f"train_transform.{name}", getattr(transform, name), 0, 1)
    check_range("train_transform.degrees", transform.degrees, 0, 180)
    check_range("train_transform.color_jitter", transform.color_jitter, 0)
    for name, largest in (("scale", 1.0), ("ratio", 100.0), ("zoom", 100.0)):
        low, high = getattr(transform, name)
        if not 0 < low <= high <= largest:
            raise DataError(f"data.train_transform.{name} is {low} {high}; it must be 0 < min <= max <= {largest:g}")
    check_std("train_transform", transform.std)


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise DataError for an option of the data whose value is out of its range."""
    if not low <= value <= high:
        limits = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise DataError(f"data.{name} is {value}; it must be {limits}")


def check_std(name: str, std: tuple[float, float, float]) -> None:
    """Raise DataError for a transform whose std would divide by 0."""
    if not all(value > 0 for value in std):
        raise DataError(f"data.{name}.std is {std}; every channel must be above 0")
