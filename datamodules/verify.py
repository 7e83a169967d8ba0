"""Reads a whole dataset and lists everything that is wrong with it, and what is only worth knowing."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from datamodules import tar
from datamodules.decode import IMAGE_EXTENSIONS, decode_image
from datamodules.index import ShardIndex
from datamodules.indexer import ANNOTATIONS
from datamodules.manifest import DatasetInfo, open_split
from datamodules.reader import RawSample, ShardReader
from datamodules.sources_base import image_size
from datamodules.tasks import CLASSIFICATION, SEGMENTATION, Task, detection
from datamodules.types import CorruptSampleError, DataError

_SKEW = 1.1  # a share this much above the mean is worth a note
_EXAMPLES = 5
_TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFICATION, detection(), SEGMENTATION)}


def verify_dataset(
    folder: Path, info: DatasetInfo, decode: bool, advance: Callable[[int], None], threads: int = 1
) -> Iterator[str]:
    """Check every split: index against dataset.json, shards against index, every checksum, annotation and image.

    Args:
        folder: the dataset's folder.
        info: its dataset.json.
        decode: decode every image too; most of the time goes there.
        advance: called with the number of samples done.
        threads: shards checked at the same time.

    Yields:
        One line for each fault, in the shards' order.
    """
    for split in info.splits:
        try:
            index = open_split(folder, info, split)
        except DataError as error:
            yield str(error)
            continue
        with ThreadPoolExecutor(threads) as pool:
            check = partial(_verify_shard, index, info, decode, advance)
            for faults in pool.map(check, range(len(index.shards))):
                yield from faults


def _verify_shard(
    index: ShardIndex, info: DatasetInfo, decode: bool, advance: Callable[[int], None], shard: int
) -> list[str]:
    faults: list[str] = []
    try:
        for _ in tar.scan(index.folder / index.shard_names[shard]):
            pass
    except DataError as error:  # a damaged header; the samples may still be whole
        faults.append(str(error))
    reader = ShardReader(index)
    first, samples = int(index.shards[shard]["first"]), int(index.shards[shard]["samples"])
    for sample in range(first, first + samples):
        try:
            _verify_sample(reader.read(sample, index.extensions), info, decode)
        except DataError as error:
            faults.append(str(error))
        advance(1)
    reader.close()
    return faults


def _verify_sample(raw: RawSample, info: DatasetInfo, decode: bool) -> None:
    """Raise DataError for an annotation that does not fit image or classes, or an image that does not decode."""
    extension = next((name for name in IMAGE_EXTENSIONS if name in raw.fields), None)
    beside = ANNOTATIONS[info.task]
    if extension is None or beside not in raw.fields:
        raise CorruptSampleError(f"{raw.where}: {', '.join(raw.fields)}; {info.task} needs an image and {beside}")
    data = raw.fields[extension]
    if decode:
        size = decode_image(data, raw.where).size
    else:  # a label fits any image, so its image need not even have a header
        size = (0, 0) if info.task == "classification" else image_size(data, raw.where)
    _TASKS[info.task].parse(raw.fields[beside], len(info.class_names), size, raw.where)


def find_duplicates(folder: Path, info: DatasetInfo) -> list[str]:
    """Images that are in the dataset more than once, byte for byte, across all splits.

    Only images that share length and crc32 in the indexes are read and compared by SHA-256.

    Args:
        folder: the dataset's folder; its splits open without fault.
        info: its dataset.json.

    Returns:
        Lines for a reader; empty if every image is there once.
    """
    readers = {split: ShardReader(open_split(folder, info, split)) for split in info.splits}
    places: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    for split, sample in _candidates({split: reader.index for split, reader in readers.items()}):
        raw = readers[split].read(sample, IMAGE_EXTENSIONS)
        digest = hashlib.sha256(next(iter(raw.fields.values()))).digest()
        places[digest].append((split, f"{split}/{raw.key}"))
    groups = [group for group in places.values() if len(group) > 1]
    if not groups:
        return []
    leaked = sum(len({split for split, _ in group}) > 1 for group in groups)
    lines = [f"images that occur more than once: {len(groups)}, of them in more than one split: {leaked}"]
    groups.sort(key=lambda group: -len({split for split, _ in group}))
    lines += [f"the same image: {', '.join(key for _, key in group)}" for group in groups[:_EXAMPLES]]
    return [*lines, f"… and {len(groups) - _EXAMPLES} more"] if len(groups) > _EXAMPLES else lines


def _candidates(indexes: dict[str, ShardIndex]) -> Iterator[tuple[str, int]]:
    """Split and number of every sample whose image shares length and crc32 with another one's."""
    splits = list(indexes)
    rows = []
    for number, index in enumerate(indexes.values()):
        images = [index.extensions.index(name) for name in IMAGE_EXTENSIONS if name in index.extensions]
        fields = np.flatnonzero(np.isin(index.fields["extension"], images))
        samples = np.searchsorted(index.samples["first"], fields, side="right") - 1
        marks = index.fields["size"][fields].astype(np.uint64) << np.uint64(32) | index.fields["crc32"][fields]
        rows.append(np.stack([marks, np.full(len(fields), number, np.uint64), samples.astype(np.uint64)]))
    marks, numbers, samples = np.concatenate(rows, axis=1)
    _, inverse, counts = np.unique(marks, return_inverse=True, return_counts=True)
    for position in np.flatnonzero(counts[inverse] > 1).tolist():
        yield splits[int(numbers[position])], int(samples[position])


def find_skew(folder: Path, info: DatasetInfo, ranks: int, workers: int) -> list[str]:
    """How unevenly the shards would fall on readers that take whole shards in turn (this program does not).

    Args:
        folder: the dataset's folder; its splits open without fault.
        info: its dataset.json.
        ranks: processes of a run.
        workers: loading processes of each.

    Returns:
        One line for each split with fewer shards than readers, or with a reader's share 10 % above the mean.
    """
    readers = ranks * workers
    lines = []
    for split in info.splits:
        counts = np.array(open_split(folder, info, split).counts, dtype=np.int64)
        shares = np.bincount(np.arange(len(counts)) % readers, weights=counts, minlength=readers)
        text = f"{split}: {len(counts)} shards for {ranks} ranks x {workers} workers"
        largest = shares.max() / max(shares.mean(), 1e-9)
        if len(counts) < readers:
            lines.append(f"{text}; readers that take whole shards, such as webdataset's, leave some idle or fail")
        elif largest > _SKEW:
            lines.append(f"{text}; a reader that takes whole shards gets up to {largest:.2f} times the mean share")
    return lines
