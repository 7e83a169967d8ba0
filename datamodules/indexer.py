"""Builds indexes from tars in one streaming pass each, and refuses what could pair an image with another's label."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from datamodules import tar
from datamodules.decode import IMAGE_EXTENSIONS, parse_label
from datamodules.index import FIELD, INDEX_NAME, NO_VALUE, SQUARE, ShardIndex, ShardRows, encode_index
from datamodules.manifest import SPLITS, DatasetInfo, SplitInfo, read_dataset, write_atomically
from datamodules.types import DataError

ANNOTATIONS = {"classification": "cls", "detection": "json", "segmentation": "seg.png"}
"""The field that a sample of each task has beside its image."""

Advance = Callable[[int], None]
"""Called with the bytes of each shard when it is done; a progress bar's update."""


@dataclass(frozen=True, slots=True)
class _Field:
    key: str
    extension: str
    member: tar.Member


def index_shard(path: Path, task: str = "classification") -> ShardRows:
    """Scan one tar.

    Args:
        path: the tar.
        task: what its samples are for, which says what they must hold beside one image, see ANNOTATIONS.

    Returns:
        The shard's part of an index.

    Raises:
        DataError: naming file and byte for a damaged or unacceptable tar, see tar.scan; for a key that comes twice or
            is mixed with others; for a sample without image or label.
    """
    keys: list[str] = []
    counts: list[int] = []
    rows: list[tuple[int, int, int, int, int, int]] = []
    extensions: dict[str, int] = {}
    places: dict[str, int] = {}
    for key, group in groupby(_fields(path), key=lambda one: one.key):
        fields = list(group)
        first = fields[0].member.header
        if key in places:
            raise DataError(
                f"{path} at byte {first}: key {key!r} was already used at byte {places[key]}; "
                "a sample's files must follow each other and keys be unique"
            )
        places[key] = first
        _check_fields(path, key, fields, task)
        keys.append(key)
        counts.append(len(fields))
        rows += [_row(path, one, extensions.setdefault(one.extension, len(extensions)), task) for one in fields]
    arrays = np.array(counts, dtype=np.int64), np.array(rows, dtype=FIELD)
    return ShardRows(path.name, path.stat().st_size, keys, *arrays, list(extensions))


def _row(path: Path, one: _Field, extension: int, task: str) -> tuple[int, int, int, int, int, int]:
    """A FIELD row; it keeps a label or an image's shape, so that statistics and grouping need not read the tars."""
    member, value = one.member, NO_VALUE
    if one.extension == "cls":
        value = parse_label(member.head, member.size, _where(path, one))
    elif one.extension == "json" and task == "detection":
        value = _aspect(member.head)
    return member.offset, member.size, member.crc32, value, extension, 0


def _aspect(head: bytes) -> int:
    """Width / height by the beginning of a detection sample's json, see SQUARE; NO_VALUE if it does not say."""
    found = [re.search(rb'"%s":\s*([0-9]{1,9})[,}\s]' % name, head) for name in (b"width", b"height")]
    width, height = (int(match[1]) if match else 0 for match in found)
    return round(SQUARE * width / height) if 0 < width < height * 2**20 else NO_VALUE


def _where(path: Path, one: _Field) -> str:
    return f"{path} at byte {one.member.offset}, sample {one.key!r}"


def _fields(path: Path) -> Iterator[_Field]:
    """Split every member's name at the first dot of its last part, as webdataset does."""
    for member in tar.scan(path):
        folder, _, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem or not dot or not extension:
            raise DataError(
                f"{path} at byte {member.header}: member {member.name!r} is not named <key>.<extension>; "
                "remove it from the tar"
            )
        yield _Field(f"{folder}/{stem}" if folder else stem, extension.lower(), member)


def _check_fields(path: Path, key: str, fields: Sequence[_Field], task: str) -> None:
    extensions = [one.extension for one in fields]
    for one in fields:
        if extensions.count(one.extension) > 1:
            raise DataError(f"{_where(path, one)}: two files with extension {one.extension!r}; keys must be unique")
    images = [extension for extension in extensions if extension in IMAGE_EXTENSIONS]
    if len(images) != 1 or ANNOTATIONS[task] not in extensions:
        raise DataError(
            f"{path} at byte {fields[0].member.header}: sample {key!r} has {', '.join(extensions)}; "
            f"{task} needs one image ({', '.join(IMAGE_EXTENSIONS)}) and one {ANNOTATIONS[task]}"
        )


def check_unique(folder: Path, parts: Sequence[ShardRows]) -> None:
    """Raise DataError naming both shards if a key is in two of them (within one, index_shard has looked)."""
    keys = [key for part in parts for key in part.keys]
    shards = np.repeat(np.arange(len(parts)), [len(part.keys) for part in parts])
    hashes = np.fromiter(map(hash, keys), dtype=np.int64, count=len(keys))
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    for first, second in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
        if keys[first] == keys[second]:
            raise DataError(
                f"{folder}: key {keys[first]!r} is in {parts[shards[first]].name} and in {parts[shards[second]].name}; "
                "keys must be unique within a split"
            )


def write_index(folder: Path, parts: Sequence[ShardRows]) -> ShardIndex:
    """Write a split's index beside its shards and open it."""
    check_unique(folder, parts)
    write_atomically(folder / INDEX_NAME, encode_index(parts))
    return ShardIndex(folder)


def split_info(index: ShardIndex) -> SplitInfo:
    """A split's entry for dataset.json."""
    return SplitInfo(len(index), len(index.shards), index.num_bytes, index.digest)


def check_labels(index: ShardIndex, num_classes: int) -> None:
    """Raise DataError naming the first sample whose class id is not below `num_classes`."""
    wrong = np.flatnonzero(index.labels() >= num_classes)
    if len(wrong):
        sample = int(wrong[0])
        location = index.locate(sample)
        raise DataError(
            f"{index.folder / index.shard_names[location.shard]} at byte {location.fields['cls'].offset}, sample "
            f"{location.key!r}: label {index.labels()[sample]} is not below the {num_classes} classes of the dataset; "
            "correct it, or name all classes with --classes"
        )


def index_dataset(
    folder: Path,
    class_names: Sequence[str] | None = None,
    advance: Advance | None = None,
    task: str | None = None,
) -> DatasetInfo:
    """Index the tars in <folder>/train, val and test, wherever they were made, and write dataset.json.

    Args:
        folder: the dataset's folder.
        class_names: names by class id; None keeps those of an existing dataset.json, else the ids become the names.
        advance: called with the bytes of each finished shard.
        task: see ANNOTATIONS; None keeps that of an existing dataset.json, else "classification".

    Returns:
        The dataset as dataset.json now describes it.

    Raises:
        DataError: no tars, a tar that is refused, a label outside the given classes, or no class names where labels
            do not tell their number.
    """
    found = {split: sorted((folder / split).glob("*.tar")) for split in SPLITS}
    found = {split: paths for split, paths in found.items() if paths}
    if not found:
        raise DataError(f"{folder} has no tars in {', '.join(f'{split}/' for split in SPLITS)}; move the shards there")
    old = _readable_dataset(folder)
    task = task or (old.task if old else "classification")
    if old is None and class_names is None and task != "classification":
        raise DataError(f"{folder}: {task} labels do not say how many classes there are; name them with --classes")
    indexes = {split: _index_split(folder / split, paths, task, advance) for split, paths in found.items()}
    info = _describe(folder, task, old, class_names, indexes)
    for index in indexes.values():
        check_labels(index, len(info.class_names))
    info.write(folder)
    return info


def _readable_dataset(folder: Path) -> DatasetInfo | None:
    try:
        return read_dataset(folder)
    except DataError:
        return None


def _index_split(folder: Path, paths: Sequence[Path], task: str, advance: Advance | None) -> ShardIndex:
    parts = []
    for path in paths:
        parts.append(index_shard(path, task))
        if advance is not None:
            advance(path.stat().st_size)
    return write_index(folder, parts)


def _describe(
    folder: Path,
    task: str,
    old: DatasetInfo | None,
    class_names: Sequence[str] | None,
    indexes: dict[str, ShardIndex],
) -> DatasetInfo:
    """dataset.json for these indexes, keeping what an earlier one says about names and origin."""
    splits = {split: split_info(index) for split, index in indexes.items()}
    if old is None:
        highest = max(int(index.labels().max(initial=-1)) for index in indexes.values())
        old = DatasetInfo(folder.resolve().name, task, [str(i) for i in range(highest + 1)], {})
    names = list(class_names) if class_names is not None else old.class_names
    info = replace(old, task=task, class_names=names, splits=splits)
    return info if info.digest == old.digest else replace(info, plan="")
