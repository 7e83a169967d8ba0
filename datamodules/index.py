"""The index beside the shards: where every field of every sample lies, its length and its crc32, memory-mapped.

`<split>/index.bin` (little-endian, every section 8-byte aligned): header, shard rows, sample rows, field rows,
extension rows, names (UTF-8). 24 bytes a sample and 24 a field; opening costs one mmap whatever the number of samples.
`index.digest` is the SHA-256 of all sections, so it covers every key, position, length and checksum.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.types import DataError

if TYPE_CHECKING:
    from datamodules.cache import ShardCache

INDEX_NAME = "index.bin"
INDEX_VERSION = 1

SHARD = np.dtype([("size", "<u8"), ("first", "<u8"), ("samples", "<u8"), ("name", "<u8"), ("name_length", "<u8")])
SAMPLE = np.dtype([("first", "<u8"), ("key", "<u8"), ("key_length", "<u4"), ("shard", "<u4")])
FIELD = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("value", "<i4"), ("extension", "<u2"), ("spare", "<u2")]
)
EXTENSION = np.dtype([("name", "<u8"), ("name_length", "<u8")])
NO_VALUE = -1
"""`value` of a field that says nothing by itself; that of a `cls` field is its label, of a `json` field see SQUARE."""
SQUARE = 1024
"""`value` of the `json` field of a square image in a detection split: width / height in units of 1 / SQUARE."""

_MAGIC = b"MLAINDEX"
_HEADER = struct.Struct("<8sIIQQQQQ32s")  # magic, version, crc32 of the rest of the header, five lengths, digest


class FieldLocation(NamedTuple):
    """Where one field lies inside its shard, in bytes."""

    offset: int
    size: int
    crc32: int


class SampleLocation(NamedTuple):
    """Where one sample lies: its key, its shard's number and its fields by extension."""

    key: str
    shard: int
    fields: dict[str, FieldLocation]


@dataclass(frozen=True)
class ShardRows:
    """One shard's part of an index.

    Attributes:
        name: file name.
        size: bytes of the file.
        keys: of its samples, in order.
        field_counts: fields of each sample (samples,), int64.
        fields: FIELD rows in order; their extension numbers count in `extensions`.
        extensions: in any order.
    """

    name: str
    size: int
    keys: list[str]
    field_counts: NDArray[np.int64]
    fields: NDArray[Any]
    extensions: list[str]


def encode_index(parts: Sequence[ShardRows]) -> bytes:
    """The index file of these shards; the same parts always give the same bytes."""
    extensions = sorted({extension for part in parts for extension in part.extensions})
    names = _Names()
    sections = [_shard_section(parts, names), _sample_section(parts, names), _field_section(parts, extensions)]
    sections.append(np.array([names.add(extension) for extension in extensions], dtype=EXTENSION))
    lengths = (*map(len, sections), len(names.text))
    payload = [*(section.tobytes() for section in sections), bytes(names.text)]
    tail = _header_tail(lengths, _digest(lengths, payload))
    return _MAGIC + struct.pack("<II", INDEX_VERSION, zlib.crc32(tail)) + tail + b"".join(payload)


class _Names:
    """The text section as it grows."""

    def __init__(self) -> None:
        self.text = bytearray()

    def add(self, name: str) -> tuple[int, int]:
        start = len(self.text)
        self.text += name.encode()
        return start, len(self.text) - start

    def add_all(self, names: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        encoded = [name.encode() for name in names]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        starts = len(self.text) + np.cumsum(lengths) - lengths
        self.text += b"".join(encoded)
        return starts, lengths


def _shard_section(parts: Sequence[ShardRows], names: _Names) -> NDArray[Any]:
    counts = [len(part.keys) for part in parts]
    firsts = (np.cumsum(counts) - counts).tolist()
    rows = [
        (part.size, first, count, *names.add(part.name))
        for part, first, count in zip(parts, firsts, counts, strict=True)
    ]
    return np.array(rows, dtype=SHARD)


def _sample_section(parts: Sequence[ShardRows], names: _Names) -> NDArray[Any]:
    counts = np.concatenate([np.empty(0, np.int64), *(part.field_counts for part in parts)])
    rows = np.zeros(len(counts), dtype=SAMPLE)
    rows["first"] = np.cumsum(counts) - counts
    rows["shard"] = np.repeat(np.arange(len(parts)), [len(part.keys) for part in parts])
    rows["key"], rows["key_length"] = names.add_all([key for part in parts for key in part.keys])
    return rows


def _field_section(parts: Sequence[ShardRows], extensions: Sequence[str]) -> NDArray[Any]:
    sections = [np.empty(0, dtype=FIELD)]
    for part in parts:
        numbers = np.array([extensions.index(extension) for extension in part.extensions], dtype=np.uint16)
        rows = part.fields.copy()
        rows["extension"] = numbers[part.fields["extension"]] if len(rows) else 0
        sections.append(rows)
    return np.concatenate(sections)


def _header_tail(lengths: Sequence[int], digest: bytes) -> bytes:
    return struct.pack("<QQQQQ32s", *lengths, digest)


def _digest(lengths: Sequence[int], sections: Sequence[bytes | memoryview]) -> bytes:
    digest = hashlib.sha256(struct.pack("<IQQQQQ", INDEX_VERSION, *lengths))
    for section in sections:
        digest.update(section)
    return digest.digest()


class ShardIndex:
    """A split's index, opened from its file; picklable, a worker maps the file again.

    Args:
        folder: the split's folder, which holds the shards and index.bin.
        cache: fetches shards into the folder when they are needed; None: they are there.

    Raises:
        DataError: the index is missing, truncated, of another version or no index.
    """

    def __init__(self, folder: Path, cache: ShardCache | None = None) -> None:
        self.folder = folder
        self.cache = cache
        self.path = folder / INDEX_NAME
        if not self.path.is_file():
            raise DataError(f"{self.path} is missing; make it with `mirrorla shards index {folder.parent}`")
        with self.path.open("rb") as stream:
            size = self.path.stat().st_size
            if size < _HEADER.size:
                raise DataError(f"{self.path} has {size} bytes, less than its header; {self._mend()}")
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._open_sections(size)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex, (self.folder, self.cache)

    def _mend(self) -> str:
        return f"make it again with `mirrorla shards index {self.folder.parent}`"

    def _open_sections(self, size: int) -> None:
        magic, version, crc, *lengths, digest = _HEADER.unpack_from(self._map)
        if magic != _MAGIC or (version == INDEX_VERSION and crc != zlib.crc32(_header_tail(lengths, digest))):
            raise DataError(f"{self.path} is no index, or its header is damaged; {self._mend()}")
        if version != INDEX_VERSION:
            raise DataError(f"{self.path} has version {version}, this program reads {INDEX_VERSION}; {self._mend()}")
        itemsizes = [SHARD.itemsize, SAMPLE.itemsize, FIELD.itemsize, EXTENSION.itemsize, 1]
        ends = _HEADER.size + np.cumsum([n * item for n, item in zip(lengths, itemsizes, strict=True)])
        if size != ends[-1]:
            raise DataError(f"{self.path} has {size} bytes instead of {ends[-1]}; {self._mend()}")
        starts = [_HEADER.size, *ends[:-1].tolist()]
        self.shards: NDArray[Any] = np.frombuffer(self._map, SHARD, lengths[0], starts[0])
        self.samples: NDArray[Any] = np.frombuffer(self._map, SAMPLE, lengths[1], starts[1])
        self.fields: NDArray[Any] = np.frombuffer(self._map, FIELD, lengths[2], starts[2])
        extensions: NDArray[Any] = np.frombuffer(self._map, EXTENSION, lengths[3], starts[3])
        self._names = starts[4]
        self.digest: str = digest.hex()
        self.extensions = [self._name(*row) for row in extensions.tolist()]
        self.shard_names = [self._name(row[3], row[4]) for row in self.shards.tolist()]
        for name in self.shard_names:
            if Path(name).name != name or not name.endswith(".tar") or not name.isprintable():
                raise DataError(f"{self.path} names shard {name!r}, which is no plain file name; {self._mend()}")

    def _name(self, start: int, length: int) -> str:
        return self._map[self._names + start : self._names + start + length].decode(errors="backslashreplace")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples per shard."""
        return tuple(self.shards["samples"].tolist())

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return int(self.shards["size"].sum())

    def locate(self, sample: int) -> SampleLocation:
        """Where sample number `sample` of the split lies.

        Raises:
            IndexError: no such sample.
        """
        if not 0 <= sample < len(self.samples):
            raise IndexError(f"sample {sample} of a split of {len(self.samples)} samples")
        first, key, key_length, shard = self.samples[sample].item()
        stop = int(self.samples[sample + 1]["first"]) if sample + 1 < len(self.samples) else len(self.fields)
        rows = self.fields[first:stop].tolist()
        fields = {self.extensions[row[4]]: FieldLocation(row[0], row[1], row[2]) for row in rows}
        return SampleLocation(self._name(key, key_length), shard, fields)

    def shard_fields(self, shard: int) -> NDArray[Any]:
        """The FIELD rows of one shard."""
        begin = int(self.shards[shard]["first"])
        samples = (begin, begin + int(self.shards[shard]["samples"]))
        first, stop = (int(self.samples[i]["first"]) if i < len(self) else len(self.fields) for i in samples)
        return self.fields[first:stop]

    def open_shard(self, shard: int) -> int:
        """A file descriptor of a shard for reading; the caller closes it."""
        if self.cache is not None:
            return self.cache.open_shard(self, shard)
        return os.open(self.folder / self.shard_names[shard], os.O_RDONLY | os.O_CLOEXEC)

    def labels(self) -> NDArray[np.int64]:
        """Class ids (n,) of all samples with a `cls` field, from the index alone."""
        return self._values("cls")

    def aspects(self) -> NDArray[np.int64]:
        """Width / height (n,) of all samples with a `json` field, in units of 1 / SQUARE; NO_VALUE if not known."""
        return self._values("json")

    def _values(self, extension: str) -> NDArray[np.int64]:
        if extension not in self.extensions:
            return np.empty(0, dtype=np.int64)
        rows = self.fields["extension"] == self.extensions.index(extension)
        return self.fields["value"][rows].astype(np.int64)

    def recompute_digest(self) -> str:
        """The digest of the sections as they are now; differs from `digest` if the file was damaged."""
        sections = memoryview(self._map)[_HEADER.size :]
        lengths = (len(self.shards), len(self.samples), len(self.fields), len(self.extensions))
        try:
            return _digest((*lengths, len(self._map) - self._names), [sections]).hex()
        finally:
            sections.release()

    def check_digest(self) -> None:
        """Read the whole index once, 0.1 s at a million samples: a flipped bit could pair fields wrongly.

        Raises:
            DataError: the sections are not those that were written.
        """
        if self.recompute_digest() != self.digest:
            raise DataError(f"{self.path}: damaged, its digest does not fit; {self._mend()}")

    def check_shards(self) -> None:
        """Compare the shards beside the index, or the remote ones, with it by name and size.

        Raises:
            DataError: naming the first shard that is missing, has another size or is not in the index.
        """
        if self.cache is not None:
            self.cache.check(self)
            return
        present = {path.name: path.stat().st_size for path in self.folder.glob("*.tar")}
        sizes: list[int] = self.shards["size"].tolist()
        for name, size in zip(self.shard_names, sizes, strict=True):
            if name not in present:
                raise DataError(f"{self.folder / name} is in the index but missing; restore it or {self._mend()}")
            if present[name] != size:
                fault = f"has {present[name]} bytes, its index says {size}"
                raise DataError(f"{self.folder / name} {fault}; restore it or {self._mend()}")
        if extra := sorted(present.keys() - set(self.shard_names)):
            raise DataError(f"{self.folder / extra[0]} is not in the index beside it; remove it or {self._mend()}")
