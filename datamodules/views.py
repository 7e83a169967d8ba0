"""An image and what lies in it, moved together: boxes, masks and class maps follow every resize, cut and flip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as geometry
from torchvision.tv_tensors import BoundingBoxes, Mask

from datamodules.transforms import Interpolation


class View(NamedTuple):
    """What moves together.

    Attributes:
        image: (H, W), RGB.
        masks: one mask per object (n, H, W) or a class map (H, W), uint8; None if there is none.
        boxes: (n, 4), x0 y0 x1 y1; None where the task has none.
    """

    image: Image.Image
    masks: Mask | None
    boxes: BoundingBoxes | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.height, self.image.width

    def resized(self, size: tuple[int, int], interpolation: Interpolation) -> View:
        """Scaled to (height, width); a mask's pixel takes the value at its centre, where the image's is sampled too."""
        if size == self.size:
            return self
        kind = InterpolationMode(interpolation)
        image = geometry.resize(self.image, list(size), kind)
        view = self._each(lambda part: geometry.resize(part, list(size), InterpolationMode.NEAREST_EXACT))
        return view._replace(image=image)

    def cropped(self, top: int, left: int, height: int, width: int) -> View:
        """A part of it; boxes are cut at its border."""
        return self._each(lambda part: geometry.crop(part, top, left, height, width))

    def flipped(self) -> View:
        """Left and right exchanged."""
        return self._each(geometry.horizontal_flip)

    def _each(self, move: Callable[[Any], Any]) -> View:
        return View(*(None if part is None else move(part) for part in self))  # type: ignore[arg-type]


def as_boxes(boxes: Tensor, size: tuple[int, int]) -> BoundingBoxes:
    """Boxes (n, 4), x0 y0 x1 y1, that know the height and width of their image."""
    return BoundingBoxes(boxes, format="XYXY", canvas_size=size)


def fitted(size: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """Height and width with that shorter side, or a smaller one if the longer side would exceed its limit."""
    return scaled(size, min(short_side / min(size), long_side / max(size)))


def scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Height and width times a factor, at least 1."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def random_cut(size: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a cut anywhere in an image; no larger than the image."""
    height, width = min(height, size[0]), min(width, size[1])
    return choice(range(size[0] - height + 1)), choice(range(size[1] - width + 1)), height, width


def padded(values: Tensor, height: int, width: int, fill: int) -> Tensor:
    """Values (..., h, w) filled up on the right and at the bottom to (..., height, width)."""
    return pad(values, (0, width - values.shape[-1], 0, height - values.shape[-2]), value=fill)


def extents(masks: Tensor) -> Tensor:
    """The smallest boxes around masks (n, H, W): (n, 4) float32, x1 and y1 exclusive; an empty mask's is empty."""
    x0, x1 = _ends((masks != 0).any(1))
    y0, y1 = _ends((masks != 0).any(2))
    return torch.stack([x0, y0, x1, y1], 1).float()


def _ends(filled: Tensor) -> tuple[Tensor, Tensor]:
    """First filled place of every row (n, L), and the place after the last; 0 and 0 if there is none."""
    places = torch.arange(filled.shape[1]).expand(filled.shape)
    last = (places + 1).where(filled, 0).amax(1)
    return places.where(filled, filled.shape[1]).amin(1).minimum(last), last


def uniform(low: float, high: float) -> float:
    """A random number in [low, high), see seeded."""
    return low + (high - low) * float(torch.rand(()))


def choice(values: Sequence[int]) -> int:
    """One of the values at random, see seeded."""
    return values[int(torch.randint(len(values), ()))]
