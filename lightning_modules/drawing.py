"""Objects and class maps drawn on pictures: pure functions from arrays to arrays, colours fixed by class.

Legend: H, W pixels of a picture, n objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from datamodules.annotations import IGNORE
from datamodules.contact_sheet import class_colour

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

PAPER, INK, DARK = (24, 26, 30), (230, 230, 230), (12, 12, 12)
SHOWN_SIDE = 448
"""Longest side of a picture in TensorBoard, pixels; smaller ones are enlarged to it."""
SHOWN_OBJECTS = 60
"""Most objects drawn on one picture, the best first."""

_GAP = 8
_LINE = 20  # of text, pixels
_MASK_OPACITY, _MAP_OPACITY = 0.4, 0.65
_NEAREST_FROM = 4  # pixels enlarged that much are worth seeing


@dataclass(frozen=True)
class Shapes:
    """What is drawn on one picture.

    Attributes:
        boxes: x0, y0, x1, y1 (n, 4) in the pixels of `size`.
        labels: class ids from 0, n.
        size: height and width that boxes and masks refer to.
        scores: n probabilities; None for the truth.
        crowds: n flags; None where nothing is a crowd.
        masks: (n, H, W) of `size`; None without masks.
    """

    boxes: NDArray[np.float32]
    labels: Sequence[int]
    size: tuple[int, int]
    scores: Sequence[float] | None = None
    crowds: Sequence[bool] | None = None
    masks: Mask | None = None


def fitted(picture: Pixels, side: int = SHOWN_SIDE) -> Pixels:
    """Scale a picture (H, W, 3) so that its longest side has `side` pixels."""
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    method = Image.Resampling.NEAREST if factor >= _NEAREST_FROM else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize(size, method))


def draw_shapes(picture: Pixels, shapes: Shapes, names: Sequence[str]) -> Pixels:
    """Tint masks, outline boxes and name both, on a copy.

    Args:
        picture: (H, W, 3); boxes and masks are scaled to it.
        shapes: what to draw.
        names: by class id.
    """
    if len(shapes.labels) == 0:
        return picture.copy()
    order = _large_first(shapes)
    drawn = picture
    if shapes.masks is not None:
        for place in order:
            mask = _resized(shapes.masks[place], drawn.shape[:2])
            drawn = tint(drawn, mask, class_colour(shapes.labels[place]), _MASK_OPACITY)
            drawn = tint(drawn, _rim(mask), class_colour(shapes.labels[place]), 1.0)
    image = Image.fromarray(drawn)
    draw, font = ImageDraw.Draw(image), _font(13)
    factor = np.array([image.width / shapes.size[1], image.height / shapes.size[0]] * 2)
    corners = {place: (shapes.boxes[place] * factor).round().astype(int).tolist() for place in order}
    for place, (left, top, right, bottom) in corners.items():
        frame = (left, top, max(right - 1, left), max(bottom - 1, top))
        draw.rectangle(frame, outline=class_colour(shapes.labels[place]), width=2)
    for place, (left, top, _, _) in corners.items():  # above all frames
        _label(draw, font, (left, top), _caption(shapes, place, names), class_colour(shapes.labels[place]))
    return np.asarray(image)


def draw_class_map(picture: Pixels, class_map: NDArray[np.integer], names: Sequence[str]) -> Pixels:
    """Tint every class with its colour; ignored pixels are black, a class called background stays as it is.

    Args:
        picture: (H, W, 3).
        class_map: class ids (h, w), scaled to the picture.
        names: by class id.
    """
    scaled = _resized(class_map.astype(np.uint8), picture.shape[:2])
    palette = np.zeros((256, 3), np.float32)
    opacity = np.full(256, _MAP_OPACITY, np.float32)
    for number, name in enumerate(names[:IGNORE]):
        palette[number] = class_colour(number)
        opacity[number] = 0 if name == "background" else _MAP_OPACITY
    opacity[IGNORE] = 1
    alpha = opacity[scaled][..., None]
    return (picture * (1 - alpha) + palette[scaled] * alpha).round().astype(np.uint8)


def tint(picture: Pixels, mask: Mask, colour: tuple[int, int, int], opacity: float) -> Pixels:
    """Mix a colour into the pixels of a mask (H, W), on a copy."""
    tinted = picture.copy()
    tinted[mask] = (picture[mask] * (1 - opacity) + np.array(colour) * opacity).round()
    return tinted


def side_by_side(pictures: Sequence[Pixels], titles: Sequence[str]) -> Pixels:
    """Pictures of one height in a row, each with a title above."""
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] + _GAP for picture in pictures) - _GAP
    sheet = Image.new("RGB", (width, height + _LINE), PAPER)
    left = 0
    for picture, title in zip(pictures, titles, strict=True):
        head = Image.new("RGB", (picture.shape[1], _LINE), PAPER)  # of its own, so that a long title is cut
        ImageDraw.Draw(head).text((2, 2), title, INK, _font(13))
        sheet.paste(head, (left, 0))
        sheet.paste(Image.fromarray(picture), (left, _LINE))
        left += picture.shape[1] + _GAP
    return np.asarray(sheet)


def with_legend(picture: Pixels, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> Pixels:
    """Colours and their names in lines below a picture, as many lines as they need."""
    font, width = _font(12), picture.shape[1]
    places: list[tuple[float, int]] = []
    x, line = 4.0, 0
    for text, _ in entries:
        length = font.getlength(text) + 30
        if x + length > width and x > 4:
            x, line = 4.0, line + 1
        places.append((x, line))
        x += length
    sheet = Image.new("RGB", (width, picture.shape[0] + _LINE * (line + 1) + 2), PAPER)
    sheet.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(sheet)
    for (text, colour), (x, line) in zip(entries, places, strict=True):
        y = picture.shape[0] + line * _LINE + 4
        draw.rectangle((x, y, x + 14, y + 13), fill=colour)
        draw.text((x + 19, y - 1), text, INK, font)
    return np.asarray(sheet)


def _large_first(shapes: Shapes) -> list[int]:
    """Objects to draw: the best SHOWN_OBJECTS, large ones below small ones."""
    scores = np.ones(len(shapes.labels)) if shapes.scores is None else np.asarray(shapes.scores)
    kept = np.argsort(-scores, kind="stable")[:SHOWN_OBJECTS]
    area = (shapes.boxes[kept, 2:] - shapes.boxes[kept, :2]).prod(1)
    return [int(place) for place in kept[np.argsort(-area, kind="stable")]]


def _caption(shapes: Shapes, place: int, names: Sequence[str]) -> str:
    score = "" if shapes.scores is None else f" {shapes.scores[place]:.0%}"
    crowd = " (crowd)" if shapes.crowds is not None and shapes.crowds[place] else ""
    return f"{names[shapes.labels[place]]}{score}{crowd}"


def _label(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, corner: tuple[int, int], text: str, colour: tuple[int, ...]
) -> None:
    """A filled tag that sits on a frame's upper left corner and stays inside the picture."""
    width, height = round(font.getlength(text)) + 6, 16
    x = max(0, min(corner[0], draw.im.size[0] - width))
    y = corner[1] - height + 1 if corner[1] >= height else corner[1]
    y = max(0, min(y, draw.im.size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    draw.text((x + 3, y), text, DARK if luminance > 110 else "white", font)


def _resized(values: NDArray, size: tuple[int, ...]) -> NDArray:  # type: ignore[type-arg]
    """Nearest neighbours of (h, w) values in a grid of another size."""
    rows, columns = ((np.arange(new) * old // new) for new, old in zip(size, values.shape, strict=True))
    return values[np.ix_(rows, columns)]


def _rim(mask: Mask) -> Mask:
    """The mask's outermost pixels."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return mask & ~inner


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow has FreeType wherever it is installed as a wheel
    return font
