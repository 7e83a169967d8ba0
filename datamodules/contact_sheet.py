"""One picture of many samples, with what is known about each drawn on it: labels, boxes, masks, class maps."""

from __future__ import annotations

import colorsys
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from datamodules.annotations import IGNORE, Objects, decode_mask, parse_class_map, parse_objects
from datamodules.decode import IMAGE_EXTENSIONS, decode_image, parse_label
from datamodules.manifest import DatasetInfo, open_split, write_atomically
from datamodules.reader import RawSample, ShardReader
from datamodules.types import DataError

Colour = tuple[int, int, int]

_COLUMNS = 6
_WIDE_COLUMNS = 4  # where a tile holds two pictures
_TILE = 216  # pixels a side of a picture
_GAP = 10
_LINE = 18  # a line of text
_PAPER: Colour = (24, 26, 30)
_INK: Colour = (230, 230, 230)
_FAULT: Colour = (255, 96, 80)
_OPACITY = 0.45
_MARKS = 3  # classes named below a class map


def write_sheet(path: Path, folder: Path, info: DatasetInfo, split: str, count: int = 24) -> None:
    """Draw evenly spaced samples of a split into a PNG.

    Args:
        path: of the picture, ending with .png; replaced if it exists.
        folder: the dataset's folder.
        info: its dataset.json.
        split: name of the split.
        count: number of samples.

    Raises:
        DataError: another ending, no such folder or split, an empty split.
    """
    if path.suffix.lower() != ".png":
        raise DataError(f"--sheet {path} must end with .png")
    if not path.parent.is_dir():
        raise DataError(f"--sheet {path}: there is no folder {path.parent}; make it first")
    reader = ShardReader(open_split(folder, info, split))
    total = len(reader.index)
    if total == 0:
        raise DataError(f"--split {split} of {folder} has no samples to draw")
    numbers = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()
    tiles = [_tile(reader, number, info) for number in numbers]
    title = f"{info.name} ({info.task})   {split}: {len(tiles)} of {total} samples"
    stream = io.BytesIO()
    _arrange(tiles, title).save(stream, format="PNG")
    write_atomically(path, stream.getvalue())


def class_colour(number: int) -> Colour:
    """A bright colour for a class id; neighbouring ids differ clearly in hue."""
    red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, 0.58 + 0.12 * (number % 2), 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def _arrange(tiles: list[Image.Image], title: str) -> Image.Image:
    width, height = tiles[0].size
    columns = min(_COLUMNS if width == height - 2 * _LINE else _WIDE_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + 2 * _GAP + _LINE), _PAPER)
    ImageDraw.Draw(sheet).text((_GAP, _GAP), title, _INK, _font(15))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(tile, (_GAP + column * (width + _GAP), 2 * _GAP + _LINE + row * (height + _GAP)))
    return sheet


def _tile(reader: ShardReader, number: int, info: DatasetInfo) -> Image.Image:
    """The picture of one sample with two lines of text below; a class map is shown beside its image."""
    sides = 2 if info.task == "segmentation" else 1
    tile = Image.new("RGB", (_TILE * sides, _TILE + 2 * _LINE), _PAPER)
    key = reader.index.locate(number).key
    _write(tile, 0, [(key, _INK)])
    try:
        _draw(tile, reader.read(number, reader.index.extensions), info)
    except DataError as error:
        _write(tile, 1, [(str(error).rpartition(": ")[2], _FAULT)])
    return tile


def _draw(tile: Image.Image, raw: RawSample, info: DatasetInfo) -> None:
    data = next((raw.fields[name] for name in IMAGE_EXTENSIONS if name in raw.fields), b"")
    image = decode_image(data, raw.where)
    size = _fitting(*image.size)
    corner = ((_TILE - size[0]) // 2, (_TILE - size[1]) // 2)
    enlarged = size[0] >= 4 * image.width  # pixels that small are worth seeing
    shown = image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.BICUBIC)
    if info.task == "classification":
        label = parse_label(raw.fields["cls"], len(raw.fields["cls"]), raw.where)
        name = info.class_names[label] if label < len(info.class_names) else "no such class"
        _write(tile, 1, [(name if name == str(label) else f"{label}  {name}", class_colour(label))])
    elif info.task == "detection":
        objects = parse_objects(raw.fields["json"], len(info.class_names), raw.where)
        shown = _with_objects(shown, objects, info.class_names)
        crowds = sum(objects.iscrowd)
        _write(tile, 1, [(f"{len(objects.labels)} objects" + (f", {crowds} crowds" if crowds else ""), _INK)])
    else:
        class_map = parse_class_map(raw.fields["seg.png"], len(info.class_names), image.size, raw.where)
        tile.paste(_with_classes(shown, class_map, info.class_names), (_TILE + corner[0], corner[1]))
        _write(tile, 1, _largest_classes(class_map, info.class_names))
    tile.paste(shown, corner)


def _fitting(width: int, height: int) -> tuple[int, int]:
    factor = _TILE / max(width, height)
    return max(1, round(width * factor)), max(1, round(height * factor))


def _with_objects(shown: Image.Image, objects: Objects, class_names: list[str]) -> Image.Image:
    """Masks tinted, boxes outlined and named on top; each object has its class's colour."""
    for mask, label in zip(objects.masks or [], objects.labels, strict=False):
        shown = _tinted(shown, decode_mask(mask), class_colour(label - 1))
    draw, font = ImageDraw.Draw(shown), _font(12)
    factor = shown.width / objects.width, shown.height / objects.height
    for box, label, is_crowd in zip(objects.boxes, objects.labels, objects.iscrowd, strict=True):
        left, top, right, bottom = (round(value * factor[side % 2]) for side, value in enumerate(box))
        colour = class_colour(label - 1)
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=colour, width=2)
        text = class_names[label - 1] + (" (crowd)" if is_crowd else "")
        x, y = min(left, shown.width - 14), max(top - 14, 0)
        draw.rectangle((x, y, x + round(font.getlength(text)) + 5, y + 14), fill=colour)
        draw.text((x + 3, y), text, (0, 0, 0), font)
    return shown


def _with_classes(shown: Image.Image, class_map: NDArray[np.uint8], class_names: list[str]) -> Image.Image:
    """Every class tinted with its colour, ignored pixels black, a class named background as it is."""
    for number in np.unique(class_map).tolist():
        if number != IGNORE and class_names[number] == "background":
            continue
        colour = (0, 0, 0) if number == IGNORE else class_colour(number)
        shown = _tinted(shown, class_map == number, colour, 1.0 if number == IGNORE else 0.7)
    return shown


def _tinted(shown: Image.Image, mask: NDArray[np.bool_], colour: Colour, opacity: float = _OPACITY) -> Image.Image:
    alpha = Image.fromarray(np.where(mask, round(255 * opacity), 0).astype(np.uint8))
    return Image.composite(Image.new("RGB", shown.size, colour), shown, alpha.resize(shown.size, 0))


def _largest_classes(class_map: NDArray[np.uint8], class_names: list[str]) -> list[tuple[str, Colour]]:
    counts = np.bincount(class_map.ravel(), minlength=256)[:IGNORE]
    order = np.argsort(-counts, kind="stable")[:_MARKS].tolist()
    share = counts / max(class_map.size, 1)
    return [(f"{class_names[i]}: {share[i]:.0%}", class_colour(i)) for i in order if counts[i]]


def _write(tile: Image.Image, line: int, words: list[tuple[str, Colour]]) -> None:
    """Words one after the other on a line below the picture, cut where the tile ends."""
    draw, font, x = ImageDraw.Draw(tile), _font(12), 0.0
    for text, colour in words:
        draw.text((x, _TILE + 2 + line * _LINE), text, colour, font)
        x += font.getlength(text) + 12


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
