"""How an evaluation looks at an image: once as it is, or also mirrored and at other sizes."""

from collections.abc import Iterator
from dataclasses import dataclass

SMALLEST = 32
"""Pixels of the shorter side below which a backbone's last map would be empty."""


@dataclass(frozen=True)
class ViewConfig:
    """The looks at an image whose results are merged; the default is a single one.

    Attributes:
        flip: also look at the mirrored image.
        scales: sizes to look at, in multiples of the image as it comes.
    """

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Refuse no look and impossible sizes.

        Raises:
            ValueError: naming the scales.
        """
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"views.scales {list(self.scales)} must hold numbers above 0, for example [1.0]")

    def of(self, height: int, width: int) -> Iterator[tuple[int, int, bool]]:
        """Height, width and whether mirrored, of every look at an image of height x width."""
        for scale in self.scales:
            size = [max(SMALLEST, round(side * scale)) if scale != 1 else side for side in (height, width)]
            for is_flipped in (False, True) if self.flip else (False,):
                yield size[0], size[1], is_flipped
