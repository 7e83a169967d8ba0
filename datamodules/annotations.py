"""What stands beside the image of a detection or segmentation sample: written, read back and checked.

detection: `<key>.json` with image_id, width, height, and per object a box (xyxy, pixels), a label (1-based), iscrowd,
area and, if the dataset has masks, a run-length mask in COCO's compressed form.
segmentation: `<key>.seg.png`, one 8-bit channel of class ids, 255 = ignore.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.types import CorruptSampleError

IGNORE = 255
"""Class id of pixels that count for nothing."""
MAX_ANNOTATION_BYTES = 32 << 20
_MAX_CHARACTERS = 6  # of a run length: 30 bits, more than the pixels of any image that is read
_TOLERANCE = 1e-3  # boxes are written with three decimals


class Rle(TypedDict):
    """COCO's compressed mask: size [height, width] and run lengths, column after column, as text."""

    size: list[int]
    counts: str


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        image_id: the dataset's number of the image.
        width: of the image, pixels.
        height: of the image, pixels.
        boxes: n boxes [x0, y0, x1, y1] in pixels, x1 and y1 exclusive.
        labels: n class numbers, from 1; class_names[label - 1] names them.
        iscrowd: n flags, 1 for a group that is only ignored in evaluation.
        area: n areas in pixels, as evaluation bins them by size.
        masks: n masks of the image's size, None if the dataset has only boxes.
    """

    image_id: int
    width: int
    height: int
    boxes: list[list[float]]
    labels: list[int]
    iscrowd: list[int]
    area: list[float]
    masks: list[Rle] | None = None

    def encode(self) -> bytes:
        """The `json` field of a sample."""
        document: dict[str, Any] = {"image_id": self.image_id, "width": self.width, "height": self.height}
        document["boxes"] = [[round(value, 3) for value in box] for box in self.boxes]
        document |= {"labels": self.labels, "iscrowd": self.iscrowd, "area": [round(value, 3) for value in self.area]}
        if self.masks is not None:
            document["masks"] = self.masks
        return json.dumps(document, separators=(",", ":")).encode()


def encode_mask(mask: NDArray[np.bool_]) -> Rle:
    """Run-length code of one mask (H, W)."""
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def decode_mask(rle: Rle) -> NDArray[np.bool_]:
    """The mask (H, W) of a code that `parse_objects` has accepted."""
    height, width = rle["size"]
    runs = _runs(rle["counts"])
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _runs(counts: str) -> NDArray[np.int64]:
    """Run lengths of a compressed code: numbers of 5 bits a character, from the fourth the change by two places.

    Raises:
        ValueError: a character outside the code, an unfinished, an overlong or a negative number.
    """
    codes = np.frombuffer(counts.encode("latin-1", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if codes.min(initial=0) < 0 or codes.max(initial=0) > 63:
        raise ValueError(f"a run-length code with {counts[int(np.flatnonzero((codes < 0) | (codes > 63))[0])]!r}")
    last = np.flatnonzero(codes & 32 == 0)
    if len(codes) == 0 or last[-1:].tolist() != [len(codes) - 1]:
        raise ValueError("an empty or unfinished run-length code")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > _MAX_CHARACTERS:
        raise ValueError(f"a run-length number of {lengths.max()} characters")
    places = np.arange(len(codes)) - np.repeat(first, lengths)
    runs = np.add.reduceat((codes & 31) << 5 * places, first)
    runs -= (codes[last] >> 4 & 1) << 5 * lengths  # the sign
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    if runs.min() < 0:
        raise ValueError(f"a run of {runs.min()} pixels")
    return runs


def parse_objects(data: bytes, num_classes: int, where: str) -> Objects:
    """Read and check a `json` field.

    Args:
        data: the field.
        num_classes: labels must be in 1 … num_classes.
        where: names the sample in errors.

    Raises:
        CorruptSampleError: no such document, lists of unequal length, a box that is empty or outside the image, a
            label that is no class, a mask of another size; naming the object.
    """
    if len(data) > MAX_ANNOTATION_BYTES:
        raise CorruptSampleError(f"{where}.json: {len(data)} bytes; the limit is {MAX_ANNOTATION_BYTES}", "over_limit")
    try:
        objects = _objects(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise CorruptSampleError(
            f"{where}.json: no detection annotation ({type(error).__name__}: {error})", "label"
        ) from None
    try:
        _check_objects(objects, num_classes)
    except ValueError as error:
        raise CorruptSampleError(f"{where}.json: {error}", "label") from None
    return objects


def _objects(document: dict[str, Any]) -> Objects:
    masks = document.get("masks")
    return Objects(
        image_id=int(document["image_id"]),
        width=int(document["width"]),
        height=int(document["height"]),
        boxes=[[float(value) for value in box] for box in document["boxes"]],
        labels=[_integer(label) for label in document["labels"]],
        iscrowd=[_integer(flag) for flag in document["iscrowd"]],
        area=[float(value) for value in document["area"]],
        masks=None if masks is None else [Rle(size=list(mask["size"]), counts=str(mask["counts"])) for mask in masks],
    )


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError(f"{value!r} is no integer")
    return value


def _check_objects(objects: Objects, num_classes: int) -> None:
    num = len(objects.boxes)
    lists: dict[str, Sequence[object] | None] = {"labels": objects.labels, "iscrowd": objects.iscrowd}
    lists |= {"area": objects.area, "masks": objects.masks}
    for name, values in lists.items():
        if values is not None and len(values) != num:
            raise ValueError(f"{num} boxes but {len(values)} {name}")
    for number in range(num):
        try:
            _check_object(objects, number, num_classes)
        except ValueError as error:
            raise ValueError(f"object {number}: {error}") from None


def _check_object(objects: Objects, number: int, num_classes: int) -> None:
    box, label, area = objects.boxes[number], objects.labels[number], objects.area[number]
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError(f"box {box} is not four finite numbers")
    x0, y0, x1, y1 = box
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"box {box} is empty")
    if min(x0, y0) < -_TOLERANCE or x1 > objects.width + _TOLERANCE or y1 > objects.height + _TOLERANCE:
        raise ValueError(f"box {box} leaves the image of {objects.width}x{objects.height}")
    if not 1 <= label <= num_classes:
        raise ValueError(f"label {label} is not in 1 … {num_classes}")
    if objects.iscrowd[number] not in (0, 1):
        raise ValueError(f"iscrowd {objects.iscrowd[number]} is neither 0 nor 1")
    if not (math.isfinite(area) and area >= 0):
        raise ValueError(f"area {area} is not a number from 0")
    if objects.masks is not None:
        _check_mask(objects.masks[number], objects)


def _check_mask(mask: Rle, objects: Objects) -> None:
    if mask["size"] != [objects.height, objects.width]:
        raise ValueError(f"mask size {mask['size']} instead of {[objects.height, objects.width]}")
    if (covered := int(_runs(mask["counts"]).sum())) != objects.height * objects.width:
        raise ValueError(f"the mask's runs cover {covered} instead of {objects.height * objects.width} pixels")


def encode_class_map(class_map: NDArray[np.uint8]) -> bytes:
    """The `seg.png` field of a map of class ids (H, W)."""
    stream = io.BytesIO()
    Image.fromarray(class_map).save(stream, format="PNG")
    return stream.getvalue()


def parse_class_map(data: bytes, num_classes: int, size: tuple[int, int], where: str) -> NDArray[np.uint8]:
    """Read and check a `seg.png` field.

    Args:
        data: the field.
        num_classes: ids must be below it, or 255.
        size: width and height of the sample's image.
        where: names the sample in errors.

    Returns:
        Class ids (H, W).

    Raises:
        CorruptSampleError: no PNG of one 8-bit channel, another size, an id that is no class.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.size != size:
                raise CorruptSampleError(f"{where}.seg.png: size {image.size} instead of the image's {size}", "label")
            if image.mode not in ("L", "P"):
                raise CorruptSampleError(
                    f"{where}.seg.png: mode {image.mode}; a class map has one 8-bit channel", "label"
                )
            class_map = np.array(image)
    except CorruptSampleError:
        raise
    except Exception as error:  # Pillow raises almost anything on damaged bytes
        raise CorruptSampleError(f"{where}.seg.png: no readable PNG ({type(error).__name__})", "undecodable") from None
    present = np.flatnonzero(np.bincount(class_map.ravel(), minlength=256))
    if wrong := [int(value) for value in present if value >= num_classes and value != IGNORE]:
        raise CorruptSampleError(
            f"{where}.seg.png: class id {wrong[0]} is not below the {num_classes} classes", "label"
        )
    return class_map
