"""Reads a whole dataset and lists everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from datamodules import tar
from datamodules.decode import IMAGE_EXTENSIONS, decode_image, parse_label
from datamodules.index import ShardIndex
from datamodules.manifest import DatasetInfo, open_split
from datamodules.reader import RawSample, ShardReader
from datamodules.types import CorruptSampleError, DataError


def verify_dataset(folder: Path, info: DatasetInfo, decode: bool, advance: Callable[[int], None]) -> Iterator[str]:
    """Check every split: index against dataset.json, shards against index, every checksum, label and image.

    Args:
        folder: the dataset's folder.
        info: its dataset.json.
        decode: decode every image too; most of the time goes there.
        advance: called with the number of samples done.

    Yields:
        One line for each fault.
    """
    for split in info.splits:
        try:
            index = open_split(folder, info, split)
        except DataError as error:
            yield str(error)
            continue
        if index.recompute_digest() != index.digest:
            yield f"{index.path}: damaged, its digest does not fit; run `mirrorla shards index {folder}`"
            continue
        for shard in range(len(index.shards)):
            yield from _verify_shard(index, shard, len(info.class_names), decode, advance)


def _verify_shard(
    index: ShardIndex, shard: int, num_classes: int, decode: bool, advance: Callable[[int], None]
) -> Iterator[str]:
    try:
        for _ in tar.scan(index.folder / index.shard_names[shard]):
            pass
    except DataError as error:  # a damaged header; the samples may still be whole
        yield str(error)
    reader = ShardReader(index)
    first, samples = int(index.shards[shard]["first"]), int(index.shards[shard]["samples"])
    for sample in range(first, first + samples):
        try:
            _verify_sample(reader.read(sample, index.extensions), num_classes, decode)
        except DataError as error:
            yield str(error)
        advance(1)
    reader.close()


def _verify_sample(raw: RawSample, num_classes: int, decode: bool) -> None:
    """Raise CorruptSampleError for a label out of range or an image that does not decode."""
    for extension, data in raw.fields.items():
        if extension == "cls" and (label := parse_label(data, len(data), raw.where)) >= num_classes:
            raise CorruptSampleError(f"{raw.where}: label {label} is not below the {num_classes} classes")
        if extension in IMAGE_EXTENSIONS and decode:
            decode_image(data, raw.where)
