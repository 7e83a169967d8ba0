"""Reads samples out of shards by offset and refuses bytes that are not the indexed ones."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from datamodules.index import FieldLocation, SampleLocation, ShardIndex
from datamodules.types import CorruptSampleError, DataError

MAX_OPEN_SHARDS = 64


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample's bytes by extension, and a text that names it in errors."""

    key: str
    where: str
    fields: dict[str, bytes]


class ShardReader:
    """Random access to the samples of one split.

    `os.pread` keeps no position, so a reader survives a fork and its order of reads does not matter; a pickled reader
    opens its own files. At most MAX_OPEN_SHARDS files are open at a time. A crc32 costs a third of a nanosecond a byte
    and catches every flipped bit, which tar, Pillow and most decoders do not notice.

    Args:
        index: the split's index.
    """

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._open: OrderedDict[int, int] = OrderedDict()  # shard number -> file descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.index,)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; the reader opens them again when needed."""
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, sample: int, extensions: Collection[str]) -> RawSample:
        """Read those of `extensions` that a sample has.

        Args:
            sample: its id within the split.
            extensions: fields wanted; others are not touched.

        Raises:
            CorruptSampleError: the bytes differ from the indexed ones twice, or the shard ends before them.
            DataError: the shard cannot be opened.
        """
        location = self.index.locate(sample)
        fields = {
            extension: self._field(location, extension, field)
            for extension, field in location.fields.items()
            if extension in extensions
        }
        return RawSample(location.key, self._where(location), fields)

    def _where(self, location: SampleLocation) -> str:
        return f"{self.index.folder / self.index.shard_names[location.shard]}, sample {location.key!r}"

    def _field(self, location: SampleLocation, extension: str, field: FieldLocation) -> bytes:
        descriptor = self._descriptor(location.shard)
        for _ in range(2):  # a network file system can deliver a bad page once
            data = _pread(descriptor, field.size, field.offset)
            if len(data) == field.size and zlib.crc32(data) == field.crc32:
                return data
        fault = f"only {len(data)} of {field.size} bytes" if len(data) < field.size else "a checksum that does not fit"
        raise CorruptSampleError(
            f"{self._where(location)}.{extension} at byte {field.offset}: {fault}; the shard was damaged or replaced, "
            "restore it, or index it again with `mirrorla shards index`"
        )

    def _descriptor(self, shard: int) -> int:
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            path = self.index.folder / self.index.shard_names[shard]
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise DataError(f"shard {path} cannot be opened ({error.strerror}); restore it") from None
            if len(self._open) >= MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        self._open[shard] = descriptor  # last = most recently used
        return descriptor


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset`, fewer only at the end of the file."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data
