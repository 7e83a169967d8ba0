"""How often every class occurs: samples of a classification, objects of a detection, images and pixels of a map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.annotations import parse_class_map, parse_objects
from datamodules.manifest import DatasetInfo, open_split
from datamodules.reader import ShardReader
from datamodules.sources_base import image_size

Counts = NDArray[np.int64]


def class_counts(folder: Path, info: DatasetInfo, advance: Callable[[int], None]) -> dict[str, Counts]:
    """Count every class.

    Args:
        folder: the dataset's folder.
        info: its dataset.json.
        advance: called with the number of samples done. Only annotations are read, for classification only the index.

    Returns:
        Columns of a table by title, each with one number per class: one column a split, or for segmentation two,
        "images" of a split with the class and its "pixels".

    Raises:
        DataError: an annotation is damaged.
    """
    columns: dict[str, Counts] = {}
    for split in info.splits:
        reader = ShardReader(open_split(folder, info, split))
        if info.task == "classification":
            columns[split] = np.bincount(reader.index.labels(), minlength=len(info.class_names))
            advance(len(reader.index))
        elif info.task == "detection":
            columns[split] = _objects(reader, len(info.class_names), advance)
        else:
            columns |= _pixels(reader, split, len(info.class_names), advance)
    return columns


def _objects(reader: ShardReader, num_classes: int, advance: Callable[[int], None]) -> Counts:
    counts = np.zeros(num_classes, dtype=np.int64)
    for sample in range(len(reader.index)):
        raw = reader.read(sample, ["json"])
        labels = parse_objects(raw.fields["json"], num_classes, raw.where).labels
        counts += np.bincount(np.array(labels, dtype=np.int64) - 1, minlength=num_classes)
        advance(1)
    return counts


def _pixels(reader: ShardReader, split: str, num_classes: int, advance: Callable[[int], None]) -> dict[str, Counts]:
    images, pixels = np.zeros(num_classes, dtype=np.int64), np.zeros(num_classes, dtype=np.int64)
    for sample in range(len(reader.index)):
        raw = reader.read(sample, ["seg.png"])
        data = raw.fields["seg.png"]
        class_map = parse_class_map(data, num_classes, image_size(data, raw.where), raw.where)
        counts = np.bincount(class_map.ravel(), minlength=256)[:num_classes]
        images += counts > 0
        pixels += counts
        advance(1)
    return {f"{split} images": images, f"{split} pixels": pixels}
