"""IDX files, the MNIST family's format: one file of images and one of labels a split, plain or gzip-compressed."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.sources_base import Source, SourceSample
from datamodules.types import DataError

MAX_BYTES = 2 << 30
"""Largest array a file may announce; a compressed file is never read further than it announces."""

_SPLITS = {"train": ("train",), "val": ("t10k", "test")}
_UINT8 = 8


def idx(folder: Path) -> Source:
    """Grey images and labels, train* for training and t10k* or test* for validation; pixels are stored as PNG.

    Args:
        folder: holds for example train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz.

    Raises:
        DataError: a file that is missing, truncated, too long or no IDX file of bytes; unequal numbers.
    """
    splits = {split: _split(folder, split) for split in _SPLITS}
    if "train" not in splits or splits["train"] is None:
        raise DataError(f"--data {folder} has no train-images-idx3-ubyte or .gz; idx needs it and the labels")
    found = {split: part for split, part in splits.items() if part is not None}
    highest = max(int(labels.max(initial=0)) for _, labels in found.values())
    samples = {split: _samples(split, images, labels) for split, (images, labels) in found.items()}
    names = [str(label) for label in range(highest + 1)]
    return Source(folder.resolve().name, "classification", names, samples, "IDX files", "not stated")


def _split(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
    """Images (n, H, W) and labels (n,) of a split, None if it has no images."""
    files = [path for path in sorted(folder.iterdir()) if "images" in path.name and "idx3" in path.name]
    files = [path for path in files if any(word in path.name for word in _SPLITS[split])]
    if not files:
        return None
    if len(files) > 1:
        raise DataError(f"{files[0]} and {files[1].name}: which one is {split}? leave one in the folder")
    path = files[0]
    other = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    labels_path = next((place for place in _compressed_or_not(other) if place.is_file()), None)
    if labels_path is None:
        raise DataError(f"{other} is missing; {path.name} needs its labels")
    images, labels = read_idx(path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{path} has {len(images)} images, {labels_path.name} has {len(labels)} labels; restore both")
    return images, labels


def _compressed_or_not(path: Path) -> list[Path]:
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    return [path, plain, plain.with_name(f"{plain.name}.gz")]


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read one file.

    Args:
        path: plain, or compressed if its name ends with .gz.
        dimensions: expected number.

    Raises:
        DataError: naming the file: no IDX file of unsigned bytes, or a length other than its header announces.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            return _read_array(path, stream, dimensions)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it") from None


def _read_array(path: Path, stream: io.BufferedIOBase | gzip.GzipFile, dimensions: int) -> NDArray[np.uint8]:
    magic = stream.read(4)
    if len(magic) < 4 or magic != bytes([0, 0, _UINT8, dimensions]):
        raise DataError(f"{path} begins with {magic!r}; an IDX file of bytes in {dimensions} dimensions was expected")
    shape = struct.unpack(f">{dimensions}I", stream.read(4 * dimensions))
    if (size := math.prod(shape)) > MAX_BYTES:
        raise DataError(f"{path} announces {size} bytes {shape}; the limit is {MAX_BYTES}")
    data = stream.read(size + 1)
    if len(data) != size:
        more = "more" if len(data) > size else f"only {len(data)}"
        raise DataError(f"{path} announces {size} bytes {shape} and holds {more}; restore it")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _samples(split: str, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> list[SourceSample]:
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    size = images[0].size if len(images) else 0
    return [
        SourceSample(f"{split}-{index:06d}", size, f"{digest} {label}", partial(_read, images[index], label))
        for index, label in enumerate(labels.tolist())
    ]


def _read(pixels: NDArray[np.uint8], label: int) -> dict[str, bytes]:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return {"png": stream.getvalue(), "cls": str(label).encode()}
