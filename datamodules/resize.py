"""Makes a classification source smaller before it is packed: shorter side at most N pixels, never enlarged."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from PIL import Image

from datamodules.decode import IMAGE_EXTENSIONS, decode_image
from datamodules.sources_base import Source, SourceSample, image_size
from datamodules.types import DataError

_JPEG_QUALITY = 95


def resized(source: Source, shorter_side: int) -> Source:
    """The source with images of at most `shorter_side` pixels on their shorter side.

    Larger images are scaled (bicubic, antialiased) and stored again in their own format, JPEG with quality 95 and full
    colour resolution; smaller ones keep their bytes.

    Raises:
        DataError: a side below 1, or a task whose boxes and maps would have to follow.
    """
    if shorter_side < 1:
        raise DataError(f"--resize is {shorter_side}; it must be at least 1")
    if source.task != "classification":
        raise DataError(f"--resize is for classification; {source.task} scales images, boxes and masks in training")
    splits = {split: [_smaller(sample, shorter_side) for sample in part] for split, part in source.splits.items()}
    return replace(source, splits=splits)


def _smaller(sample: SourceSample, side: int) -> SourceSample:
    return SourceSample(
        sample.key,
        min(sample.size, side * side),  # about one byte a pixel of the square, which cuts shards near their size
        f"{sample.stamp} resize {side}",
        partial(_read, sample.read, sample.key, side),
    )


def _read(read: Callable[[], dict[str, bytes]], key: str, side: int) -> dict[str, bytes]:
    files = read()
    extension = next(name for name in IMAGE_EXTENSIONS if name in files)
    return {**files, extension: _shrink(files[extension], extension, side, f"sample {key!r}")}


def _shrink(data: bytes, extension: str, side: int, where: str) -> bytes:
    width, height = image_size(data, where)
    if min(width, height) <= side:
        return data
    factor = side / min(width, height)
    size = (max(side, round(width * factor)), max(side, round(height * factor)))
    image = decode_image(data, where).resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    if extension in ("jpg", "jpeg"):
        image.save(stream, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    else:
        image.save(stream, format="PNG" if extension == "png" else "WEBP", lossless=True)
    return stream.getvalue()
