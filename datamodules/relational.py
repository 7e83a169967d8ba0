"""Questions about handwritten digits that no single digit answers: pictures for telling attention mechanisms apart.

A picture is a square grid of cells, each with a digit of 8x8 pixels on black, or with a pair of them:

    recall          the top quarter asks for a key, and white stands where its value would; every other cell is a pair,
                    key left and value right, and equal keys have equal values. Which value belongs to the key?
    same-different  do the upper and the lower half show the same digit?
    counting        the top band asks for a digit; how many of the other bands show it?

What is said once is written many times, in many handwritings, so that every cell counts: a picture with few digits on
much black teaches a small network on a CPU nothing in any time worth waiting for. What asks is always written with
other pieces of handwriting than what answers: an answer needs what a digit means, and a comparison across the picture.
Labels are balanced exactly. Every number is drawn by hashing (seed, split, picture), as for scenes.

Legend: m pieces of handwriting to choose from, n cells a side, k digits in play (0 to k - 1).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.order import Role, hash_key
from datamodules.scenes import Draw
from datamodules.sources_base import SourceSample
from datamodules.types import DataError

Question = Literal["recall", "same-different", "counting"]

BANDS = 8
"""Of a counting picture, the one that asks included: n / 8 rows each."""
MOST_COUNTED = 5

CLASSES: dict[Question, list[str]] = {
    "recall": [str(digit) for digit in range(10)],
    "same-different": ["different", "same"],
    "counting": [str(count) for count in range(MOST_COUNTED + 1)],
}
"""Class names by question; position is the label."""

_SIDE = 8  # pixels of a digit: as it is, nothing is resampled
_WHITE = 255
_BYTES_A_CELL = 40  # of a picture, about

Grey = NDArray[np.uint8]
Cell = tuple[int, ...]
"""The digits in a cell; a pair, or a key alone where the value is asked for, in recall."""


@dataclass(frozen=True)
class Layout:
    """What a picture says.

    Attributes:
        cells: n·n cells, row by row.
        num_asking: how many of the first ones ask; in same-different, are the upper half.
    """

    cells: Sequence[Cell]
    num_asking: int


@dataclass(frozen=True)
class Grid:
    """What pictures are made of.

    Attributes:
        cells: a side of the grid, n.
        classes: digits in play, k.

    Raises:
        DataError: naming the number and what it may be.
    """

    cells: int = 16
    classes: int = 4

    def __post_init__(self) -> None:
        if self.cells % BANDS or not BANDS <= self.cells <= 64:
            raise DataError(f"--cells is {self.cells}; it must be {BANDS}, 16, 24, … or 64")
        if not 2 <= self.classes <= 10:
            raise DataError(f"--classes is {self.classes}; it must be from 2 to 10")


def lay_out(question: Question, grid: Grid, label: int, draw: Draw) -> Layout:
    """Decide what a picture says, so that `label` is the answer."""
    return _LAYOUTS[question](grid, label, draw)


def render(layout: Layout, cells: int, digits: Grey, by_class: Sequence[Sequence[int]], draw: Draw) -> Grey:
    """Write it.

    Args:
        layout: what it says.
        cells: a side of the grid, n.
        digits: pieces of handwriting (m, 8, 8), 0 = background.
        by_class: which of the m show 0, which 1, … 9; at least two of each.
        draw: chooses among them; those at even places ask and those at odd ones answer, or the other way round.

    Returns:
        Pixels (8n, 8n), or (16n, 16n) for pairs.
    """
    half = draw.integer(0, 1)
    is_paired = any(len(cell) > 1 for cell in layout.cells)
    side = _SIDE * (2 if is_paired else 1)
    image = np.zeros((cells * side, cells * side), dtype=np.uint8)
    for number, wanted in enumerate(layout.cells):
        row, column = divmod(number, cells)
        hands = half if number < layout.num_asking else 1 - half
        top = row * side + (side - _SIDE) // 2
        for place, digit in enumerate(wanted):
            left = column * side + place * _SIDE
            image[top : top + _SIDE, left : left + _SIDE] = digits[_one(draw, by_class[digit][hands::2])]
        if is_paired and len(wanted) == 1:
            image[top : top + _SIDE, column * side + _SIDE : (column + 1) * side] = _WHITE
    return image


def samples(
    question: Question, digits: Grey, labels: Sequence[int], grid: Grid, seed: int, split: int, count: int
) -> list[SourceSample]:
    """The pictures of one split.

    Args:
        question: what they ask.
        digits: pieces of handwriting (m, 8, 8).
        labels: their m classes, 0 to 9.
        grid: what the pictures are made of.
        seed: any integer.
        split: number that keeps the splits' pictures apart.
        count: number of pictures.
    """
    by_class = [[n for n, found in enumerate(labels) if found == digit] for digit in range(10)]

    def read(number: int) -> dict[str, bytes]:
        label = number % len(CLASSES[question])
        draw = Draw(hash_key(seed, Role.SCENE, split, number, grid.cells, grid.classes))
        image = render(lay_out(question, grid, label, draw), grid.cells, digits, by_class, draw)
        return {"png": _png(image), "cls": str(label).encode()}

    size, stamp = _BYTES_A_CELL * grid.cells**2, f"{seed} {split} {grid.cells} {grid.classes}"
    return [SourceSample(f"{question}-{number:06d}", size, stamp, partial(read, number)) for number in range(count)]


def _recall(grid: Grid, label: int, draw: Draw) -> Layout:
    """One key to all in play, each with a value of its own and as many cells as the others, one more or less, anywhere.

    Pictures of one key teach to read values, those of two to look for the key: with many in all, neither is learnt.
    """
    keys = _some(draw, range(grid.classes), draw.integer(1, grid.classes))
    values = [label, *_some(draw, [digit for digit in range(10) if digit != label], len(keys) - 1)]
    pairs = list(zip(keys, values, strict=True))
    asking = grid.cells**2 // 4
    answers = grid.cells**2 - asking
    first = draw.integer(0, len(keys) - 1)  # who has one cell more must not tell
    scattered = _some(draw, [(first + number) % len(keys) for number in range(answers)], answers)
    return Layout([(keys[0],)] * asking + [pairs[number] for number in scattered], asking)


def _same_different(grid: Grid, label: int, draw: Draw) -> Layout:
    upper, other = _some(draw, range(grid.classes), 2)
    half = grid.cells**2 // 2
    return Layout([(upper,)] * half + [(upper if label else other,)] * half, half)


def _counting(grid: Grid, label: int, draw: Draw) -> Layout:
    wanted = draw.integer(0, grid.classes - 1)
    others = [digit for digit in range(grid.classes) if digit != wanted]
    bands = [wanted] * label + [_one(draw, others) for _ in range(BANDS - 1 - label)]
    band = grid.cells**2 // BANDS
    shown = [wanted, *_some(draw, bands, len(bands))]
    return Layout([(digit,) for digit in shown for _ in range(band)], band)


_LAYOUTS: dict[Question, Callable[[Grid, int, Draw], Layout]] = {
    "recall": _recall,
    "same-different": _same_different,
    "counting": _counting,
}


def _one(draw: Draw, items: Sequence[int]) -> int:
    return items[draw.integer(0, len(items) - 1)]


def _some(draw: Draw, items: Sequence[int], count: int) -> list[int]:
    """Items in random order, each place of the sequence at most once."""
    left = list(items)
    return [left.pop(draw.integer(0, len(left) - 1)) for _ in range(count)]


def _png(pixels: Grey) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
