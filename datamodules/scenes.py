"""Scenes composed of handwritten digits: a small detection and segmentation dataset made of real images, offline.

Every number is drawn by integer hashing of (seed, split, scene), so a scene never depends on another one or on a
library's random stream. Digits are placed one after the other; each covers what lies below it, and a place that would
leave less than 75 % of any digit visible is tried again. Masks hold the visible pixels, boxes enclose them.

Legend: H, W pixels of the canvas, n digits in a scene, m digits to choose from.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.annotations import IGNORE, Objects, encode_class_map, encode_mask
from datamodules.order import Role, hash_key, mix64
from datamodules.sources_base import SourceSample

SIDES = (96, 160)
"""Smallest and largest side of a canvas in pixels."""

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
_DIGITS = (2, 6)
_EMPTY_SHARE = 1 / 40  # scenes without a digit: images without objects occur in every real dataset
_SCALE = (3.5, 6.5)  # canvas pixels per digit pixel: digits 28 to 52 pixels high
_MAX_DEGREES = 25.0
_TRIES = 12
_VISIBLE = 0.75  # of every digit: at 8x8 pixels, what is hidden further is anybody's guess
_RIM = 4  # the rim is opaque where a digit covers a quarter of a pixel,
_HIDES = 0.5 / _RIM  # and hides more than it shows from here on
_BYTES = 12 << 10  # of a scene, about

Grey = NDArray[np.uint8]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scene:
    """A composed scene.

    Attributes:
        image: pixels (H, W, 3), uint8.
        masks: the visible pixels of every digit (n, H, W).
        edges: pixels (H, W) on the blurred rim of a digit, which belong to nothing for certain.
        chosen: which of the m digits each one is, n numbers.
    """

    image: Grey
    masks: Mask
    edges: Mask
    chosen: list[int]


class Draw:
    """A stream of numbers from a 64-bit key: splitmix64, the same everywhere and for ever."""

    def __init__(self, key: int) -> None:
        self._state = key

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        self._state += _GOLDEN
        return low + (high - low) * (mix64(self._state) >> 11) * 2.0**-53

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return min(int(self.uniform(low, high + 1)), high)

    def array(self, low: float, high: float, *shape: int) -> Floats:
        """Numbers in [low, high)."""
        numbers = [self.uniform(low, high) for _ in range(math.prod(shape))]
        return np.array(numbers, dtype=np.float32).reshape(shape)


def compose(digits: Grey, key: int) -> Scene:
    """Place digits on a canvas.

    Args:
        digits: images (m, 8, 8) to choose from, 0 = background.
        key: 64 bits that decide everything.
    """
    draw = Draw(key)
    height, width = draw.integer(*SIDES), draw.integer(*SIDES)
    count = 0 if draw.uniform(0, 1) < _EMPTY_SHARE else draw.integer(*_DIGITS)
    dark = draw.uniform(0, 1) < 0.5
    background = _background(draw, height, width, dark)
    image, owner = background.copy(), np.full((height, width), -1)
    edges = np.zeros((height, width), dtype=np.bool_)
    areas: list[int] = []
    chosen: list[int] = []
    for _ in range(count):
        ink = draw.array(150, 255, 3) if dark else draw.array(0, 100, 3)
        for _ in range(_TRIES):
            number = draw.integer(0, len(digits) - 1)
            cover = _placed(draw, digits[number], height, width)
            after = np.where(cover > _HIDES, -1, owner)  # the rim hides what lies below, but belongs to no digit
            after[cover > 0.5] = len(areas)
            grown = [*areas, int((cover > 0.5).sum())]
            if grown[-1] and _all_visible(after, grown):
                owner, areas = after, grown
                edges = (edges & (cover <= 0.25)) | ((cover > 0.25) & (cover <= 0.5))
                chosen.append(number)
                _paint(image, background, cover, ink)
                break
    masks = owner[None] == np.arange(len(areas))[:, None, None]
    return Scene(np.rint(image).clip(0, 255).astype(np.uint8), masks, edges, chosen)


def _background(draw: Draw, height: int, width: int, dark: bool) -> Floats:
    """A soft colour gradient (H, W, 3)."""
    grid = (draw.array(10, 90, 3, 3, 3) if dark else draw.array(165, 245, 3, 3, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR)).astype(np.float32)


def _placed(draw: Draw, digit: Grey, height: int, width: int) -> Floats:
    """How much of every canvas pixel (H, W) a scaled and rotated digit covers, 0 to 1, wholly inside the canvas."""
    scale, angle = draw.uniform(*_SCALE), math.radians(draw.uniform(-_MAX_DEGREES, _MAX_DEGREES))
    reach = scale * 4 * (abs(math.cos(angle)) + abs(math.sin(angle)))  # half the rotated square's side
    x, y = draw.uniform(reach, width - reach), draw.uniform(reach, height - reach)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    # output pixel -> pixel of the digit, which is padded so that interpolation sees its background
    matrix = (cos, sin, 6 - cos * x - sin * y, -sin, cos, 6 + sin * x - cos * y)
    padded = Image.fromarray(np.pad(digit, 2))
    moved = padded.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.asarray(moved).astype(np.float32) / np.float32(255)


def _all_visible(owner: NDArray[np.int64], areas: Sequence[int]) -> bool:
    seen = np.bincount(owner[owner >= 0], minlength=len(areas))
    return bool((seen >= _VISIBLE * np.array(areas)).all())


def _paint(image: Floats, background: Floats, cover: Floats, ink: Floats) -> None:
    """Paint a digit in place, with a rim of background that sets it off from those below."""
    rim = np.clip(cover * _RIM, 0, 1)[..., None]
    solid = np.clip((cover - 0.35) / 0.3, 0, 1)[..., None]
    image[:] = (image * (1 - rim) + background * rim) * (1 - solid) + ink * solid


def scene_samples(
    digits: Grey, labels: Sequence[int], task: Literal["detection", "segmentation"], seed: int, split: int, count: int
) -> list[SourceSample]:
    """The scenes of one split.

    Args:
        digits: images (m, 8, 8) to compose from.
        labels: their m classes, 0 to 9.
        task: which annotation a scene gets.
        seed: any integer.
        split: number that keeps the splits' scenes apart.
        count: number of scenes.
    """
    render = _detection if task == "detection" else _segmentation
    return [
        SourceSample(
            f"scene-{number:06d}", _BYTES, f"{seed} {split}", partial(render, digits, labels, seed, split, number)
        )
        for number in range(count)
    ]


def _detection(digits: Grey, labels: Sequence[int], seed: int, split: int, number: int) -> dict[str, bytes]:
    """Image and json; class number = digit + 1."""
    scene = compose(digits, hash_key(seed, Role.SCENE, split, number))
    height, width = scene.image.shape[:2]
    objects = Objects(
        image_id=number,
        width=width,
        height=height,
        boxes=[_box(mask) for mask in scene.masks],
        labels=[labels[index] + 1 for index in scene.chosen],
        iscrowd=[0] * len(scene.chosen),
        area=[float(mask.sum()) for mask in scene.masks],
        masks=[encode_mask(mask) for mask in scene.masks],
    )
    return {"png": _png(scene.image), "json": objects.encode()}


def _segmentation(digits: Grey, labels: Sequence[int], seed: int, split: int, number: int) -> dict[str, bytes]:
    """Image and class map; 0 = background, digit + 1, the digits' rims ignored."""
    scene = compose(digits, hash_key(seed, Role.SCENE, split, number))
    class_map = np.zeros(scene.edges.shape, dtype=np.uint8)
    for mask, index in zip(scene.masks, scene.chosen, strict=True):
        class_map[mask] = labels[index] + 1
    class_map[scene.edges] = IGNORE
    return {"png": _png(scene.image), "seg.png": encode_class_map(class_map)}


def _box(mask: Mask) -> list[float]:
    """The smallest box [x0, y0, x1, y1] around a mask (H, W)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def _png(pixels: Grey) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
