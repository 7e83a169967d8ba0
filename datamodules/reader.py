"""Reads samples out of shards by offset and refuses bytes that are not the indexed ones."""

from __future__ import annotations

import errno
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from datamodules.index import FieldLocation, SampleLocation, ShardIndex
from datamodules.types import CorruptSampleError, DataError

MAX_OPEN_SHARDS = 64
PASSING_FAULTS = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN})
"""What a network file system reports while a server restarts or a file moves; a local disk's EIO fails in the end."""
RETRY_PAUSES_S = (0.1, 1.0, 5.0)


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

    is_labelled = True

    def __init__(self, index: ShardIndex) -> None:
        self._open: OrderedDict[int, int] = OrderedDict()  # shard number -> file descriptor
        self.index = index
        self._sizes: list[int] = index.shards["size"].tolist()
        self._paths = [str(index.folder / name) for name in index.shard_names]  # joining paths takes longer than a read

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.index,)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; the reader opens them again when needed."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __len__(self) -> int:
        return len(self.index)

    def name(self, sample: int) -> str:
        """A sample's key."""
        return self.index.locate(sample).key

    def where(self, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        return self._where(self.index.locate(sample))

    def read(self, sample: int, extensions: Collection[str]) -> RawSample:
        """Read those of `extensions` that a sample has.

        Args:
            sample: its id within the split.
            extensions: fields wanted; others are not touched.

        Raises:
            CorruptSampleError: the bytes differ from the indexed ones twice, or the shard ends before them.
            DataError: the shard cannot be opened or read, also after RETRY_PAUSES_S where the fault may pass.
        """
        location = self.index.locate(sample)
        fields = {
            extension: self._field(location, extension, field)
            for extension, field in location.fields.items()
            if extension in extensions
        }
        return RawSample(location.key, self._where(location), fields)

    def _where(self, location: SampleLocation) -> str:
        return f"{self._paths[location.shard]}, sample {location.key!r}"

    def _field(self, location: SampleLocation, extension: str, field: FieldLocation) -> bytes:
        if field.offset + field.size > self._sizes[location.shard]:
            raise self._fault(location, extension, "ends after its shard")
        for _ in range(2):  # a network file system can deliver a bad page once
            data = self._bytes(location.shard, field)
            if len(data) == field.size and zlib.crc32(data) == field.crc32:
                return data
            self._forget(location.shard)
            if self.index.cache is not None:
                self.index.cache.discard(self.index, location.shard)
        short = len(data) < field.size
        fault = f"only {len(data)} of {field.size} bytes" if short else "a checksum that does not fit"
        raise self._fault(location, extension, fault)

    def _fault(self, location: SampleLocation, extension: str, fault: str) -> CorruptSampleError:
        return CorruptSampleError(
            f"{self._where(location)}.{extension} at byte {location.fields[extension].offset}: {fault}; the shard was "
            "damaged or replaced, restore it, or index it again with `mirrorla shards index`"
        )

    def _bytes(self, shard: int, field: FieldLocation) -> bytes:
        """The bytes at a field's place; faults that pass are waited for, with the file opened anew."""
        for pause_s in (*RETRY_PAUSES_S, None):
            try:
                return read_at(os.pread, self.descriptor(shard), field.size, field.offset)
            except OSError as error:
                self._forget(shard)
                if error.errno not in PASSING_FAULTS or pause_s is None:
                    tries = f" {len(RETRY_PAUSES_S) + 1} times" if error.errno in PASSING_FAULTS else ""
                    path = self._paths[shard]
                    raise DataError(f"shard {path} cannot be read ({error.strerror}){tries}; restore it") from None
                time.sleep(pause_s)
        raise AssertionError("unreachable")

    def _drop_evicted(self) -> None:
        """Close the files that a cache has removed meanwhile: their disk space is free only then."""
        if self.index.cache is not None:
            for shard, descriptor in list(self._open.items()):
                if os.fstat(descriptor).st_nlink == 0:
                    self._forget(shard)

    def _forget(self, shard: int) -> None:
        if (descriptor := self._open.pop(shard, None)) is not None:
            os.close(descriptor)

    def descriptor(self, shard: int) -> int:
        """An open file of a shard; the reader closes it."""
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            descriptor = self.index.open_shard(shard)
            self._drop_evicted()  # opening may have made room in the cache
            if len(self._open) >= MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        elif self.index.cache is not None:
            os.utime(descriptor)  # a microsecond; the cache removes what was not used for longest
        self._open[shard] = descriptor  # last = most recently used
        return descriptor


def read_at(pread: Callable[[int, int, int], bytes], descriptor: int, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset` with as many calls as it takes; fewer only at the end of the file.

    Args:
        pread: os.pread, or another with its signature: descriptor, bytes wanted, offset.
        descriptor: of the open file.
        size: bytes wanted.
        offset: of the first one.
    """
    data = pread(descriptor, size, offset)
    while len(data) < size and (more := pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data
