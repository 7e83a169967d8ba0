"""ADE20K's scene parsing layout: images/ and annotations/ with training/ and validation/; image bytes are kept."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.annotations import encode_class_map
from datamodules.sources_base import (
    Source,
    SourceSample,
    image_extension,
    image_size,
    list_files,
    read_bytes,
    unique_key,
)
from datamodules.types import DataError

NUM_CLASSES = 150
_SPLITS = {"train": "training", "val": "validation"}


def ade20k(folder: Path) -> Source:
    """150 classes; index 0 of the annotations (other objects) becomes 255 = ignore, 1 … 150 become 0 … 149.

    Args:
        folder: holds images/training/*.jpg, annotations/training/*.png and so on, perhaps objectInfo150.txt.

    Raises:
        DataError: a folder or an annotation is missing, has another size than its image or unknown indices.
    """
    splits = {split: _samples(folder, name) for split, name in _SPLITS.items() if (folder / "images" / name).is_dir()}
    if "train" not in splits:
        raise DataError(f"--data {folder} has no images/training; ade20k needs images/ and annotations/ with training/")
    licence = "ADE20K terms of use: annotations BSD 3-clause, images for research and education"
    return Source("ade20k", "segmentation", _names(folder), splits, "ADE20K scene parsing", licence)


def _names(folder: Path) -> list[str]:
    """Class names of objectInfo150.txt: a tab-separated table, index first and name last."""
    path = folder / "objectInfo150.txt"
    if not path.is_file():
        return [f"class {index}" for index in range(1, NUM_CLASSES + 1)]
    rows = [line.split("\t") for line in read_bytes(path).decode().splitlines() if line[:1].isdigit()]
    if [row[0] for row in rows] != [str(index) for index in range(1, NUM_CLASSES + 1)]:
        raise DataError(f"{path} does not list the indices 1 to {NUM_CLASSES}; restore it or remove it")
    return [row[-1].strip() for row in rows]


def _samples(folder: Path, name: str) -> list[SourceSample]:
    images = folder / "images" / name
    samples = []
    taken: set[str] = set()
    for path, size in list_files(images):
        extension = image_extension(path)
        below = path.removeprefix(f"{images}/")[: -len(extension) - 1]
        annotation = folder / "annotations" / name / f"{below}.png"
        if not annotation.is_file():
            raise DataError(f"{annotation} is missing; every image needs its annotation")
        total = size + annotation.stat().st_size
        read = partial(_read, path, extension, annotation)
        samples.append(SourceSample(unique_key(below, taken), total, str(total - size), read))
    if not samples:
        raise DataError(f"{images} has no images; add some or remove the folder")
    return samples


def _read(path: str, extension: str, annotation: Path) -> dict[str, bytes]:
    data = read_bytes(path)
    indices = _indices(annotation)
    size = image_size(data, path)
    if (indices.shape[1], indices.shape[0]) != size:
        found = f"{indices.shape[1]}x{indices.shape[0]}"
        raise DataError(f"{annotation} has {found} pixels, its image {size[0]}x{size[1]}; restore both")
    shifted = indices - np.uint8(1)  # unsigned: 0 wraps round to 255
    return {extension: data, "seg.png": encode_class_map(shifted)}


def _indices(annotation: Path) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(read_bytes(annotation)), formats=("PNG",)) as image:
            mode, indices = image.mode, np.asarray(image)
    except DataError:
        raise
    except Exception as error:  # Pillow raises almost anything on damaged bytes
        raise DataError(f"{annotation} is no readable PNG ({type(error).__name__}); restore it") from None
    if mode not in ("L", "P"):
        raise DataError(f"{annotation} has mode {mode}; a scene parsing annotation has one 8-bit channel")
    if indices.max(initial=0) > NUM_CLASSES:
        raise DataError(f"{annotation} has index {indices.max()}; scene parsing has 0 to {NUM_CLASSES}")
    return indices
