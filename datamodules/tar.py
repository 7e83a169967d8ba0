"""A strict reader of tar headers: says where every member's bytes lie, or refuses and names file and offset.

It accepts what webdataset, GNU tar and Python's tarfile write for plain files and folders: ustar, old GNU (with long
names) and PAX whose records do not change a name or a size. Everything else is refused, because a reader that guesses
pairs an image with its neighbour's label.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from datamodules.types import DataError

BLOCK = 512
MAX_NAME = 4096
MAX_MEMBER = (1 << 32) - 1
_CHUNK = 1 << 20
_HARMLESS_PAX = frozenset({"mtime", "atime", "ctime", "comment", "uid", "gid", "uname", "gname", "charset"})
_REFUSED_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"7": "a contiguous file",
    b"S": "a sparse file",
    b"K": "a long link name",
}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar.

    Attributes:
        name: as stored, without a leading "./".
        header: offset of its header in bytes.
        offset: offset of its first byte.
        size: its bytes.
        crc32: of its bytes.
        head: its first bytes, at most 64: enough for a label, and for the size with which a json begins.
    """

    name: str
    header: int
    offset: int
    size: int
    crc32: int
    head: bytes


@dataclass(slots=True)
class _Header:
    name: str
    size: int
    kind: bytes
    offset: int


class _Scanner:
    """One pass over an open tar; `offset` is where the next unread byte lies."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self.path = path
        self.stream = stream
        self.size = size
        self.offset = 0

    def refuse(self, reason: str, offset: int) -> NoReturn:
        raise DataError(f"{self.path} at byte {offset}: {reason}")

    def refuse_compressed(self) -> None:
        start = self.stream.read(max(map(len, _COMPRESSED)))
        for magic, kind in _COMPRESSED.items():
            if start.startswith(magic):
                self.refuse(f"{kind}-compressed; shards are read by offset, decompress it first", 0)
        self.stream.seek(0)

    def take(self, count: int, what: str) -> bytes:
        data = self.stream.read(count)
        if len(data) < count:
            self.refuse(f"the file ends inside {what}; it is truncated, restore it", self.offset)
        self.offset += count
        return data

    def header(self) -> _Header | None:
        """The next header, None at the end marker; a file without any byte is an empty archive, as for GNU tar."""
        start = self.offset
        if self.size == 0:
            return None
        if start == self.size:
            self.refuse("no end-of-archive marker; the file is truncated, restore it", start)
        block = self.take(BLOCK, "a header")
        if not any(block):
            self._check_end(start)
            return None
        return self._parse(block, start)

    def _check_end(self, start: int) -> None:
        rest = self.size - self.offset
        if rest < BLOCK:
            self.refuse("only half of the end-of-archive marker; the file is truncated, restore it", start)
        while chunk := self.stream.read(_CHUNK):
            if any(chunk):
                self.refuse("data after the end-of-archive marker (joined tars?); repack it", start)
        self.offset = self.size

    def _parse(self, block: bytes, start: int) -> _Header:
        stored = self._number(block[148:156], "checksum", start)
        summed = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        if stored != summed:
            self.refuse(f"header checksum {stored} instead of {summed}; damaged, or no tar", start)
        if block[257:262] != b"ustar" and any(block[257:265]):
            self.refuse(f"unknown tar format {block[257:265]!r}; repack it with GNU tar", start)
        name = _text(block[0:100])
        if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):
            name = prefix + b"/" + name
        size = self._number(block[124:136], "size", start)
        if size > MAX_MEMBER:
            self.refuse(f"a member of {size} bytes; the limit is {MAX_MEMBER}", start)
        return _Header(self._decode(name, start), size, block[156:157], start)

    def _number(self, field: bytes, what: str, start: int) -> int:
        """An octal field, or GNU's base-256 one."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.strip(b" \0")
        if not re.fullmatch(rb"[0-7]+", digits):
            self.refuse(f"{what} field {field!r} is no octal number; damaged, or no tar", start)
        return int(digits, 8)

    def _decode(self, name: bytes, start: int) -> str:
        try:
            return name.decode()
        except UnicodeDecodeError:
            self.refuse(f"member name {name!r} is not UTF-8; repack it with other names", start)

    def body(self, header: _Header, limit: int) -> bytes:
        """The small body of a header extension, padding consumed."""
        if header.size > limit:
            self.refuse(f"a header extension of {header.size} bytes; the limit is {limit}", header.offset)
        data = self.take(header.size, "a header extension")
        self.take(-header.size % BLOCK, "padding")
        return data

    def member(self, header: _Header) -> Member:
        """Checksum a regular member's bytes and step over them."""
        start, left, crc, head = self.offset, header.size, 0, b""
        if start + left > self.size:
            self.refuse(f"member {header.name!r} ends past the end of the file; it is truncated, restore it", start)
        while left:
            chunk = self.take(min(left, _CHUNK), f"member {header.name!r}")
            head = head or chunk[:64]
            crc = zlib.crc32(chunk, crc)
            left -= len(chunk)
        self.take(-header.size % BLOCK, f"the padding of member {header.name!r}")
        return Member(header.name, header.offset, start, header.size, crc, head)


def scan(path: Path) -> Iterator[Member]:
    """Yield the regular members of a tar in order, reading it once from start to end.

    Args:
        path: an uncompressed tar.

    Raises:
        DataError: naming file and offset, for damage and for everything a shard must not hold: links, devices, sparse
            files, PAX records that change a name or a size, `..`, absolute and control-character names, data after the
            end.
    """
    with path.open("rb", buffering=_CHUNK) as stream:
        scanner = _Scanner(path, stream, path.stat().st_size)
        scanner.refuse_compressed()
        long_name: str | None = None
        while (header := scanner.header()) is not None:
            if header.kind == b"L":
                long_name = scanner._decode(_text(scanner.body(header, MAX_NAME)), header.offset)
                continue
            if header.kind in (b"x", b"g"):
                _check_pax(scanner, header)
                continue
            header.name, long_name = long_name or header.name, None
            if header.kind == b"5" or (header.kind in (b"\0", b"0") and header.name.endswith("/")):
                if header.size:  # some readers would skip as many bytes, others none
                    scanner.refuse(f"folder {header.name!r} has {header.size} bytes; repack it", header.offset)
                continue
            if header.kind not in (b"0", b"\0"):
                kind = _REFUSED_TYPES.get(header.kind, f"of unknown type {header.kind!r}")
                scanner.refuse(f"member {header.name!r} is {kind}; shards hold plain files only", header.offset)
            header.name = _checked_name(scanner, header)
            yield scanner.member(header)


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _check_pax(scanner: _Scanner, header: _Header) -> None:
    """Read over a PAX record set; refuse those that change what or how long a member is."""
    body = scanner.body(header, 1 << 20)
    while body:
        match = re.match(rb"(\d{1,7}) ([^=]+)=", body)
        length = int(match[1]) if match else 0
        if match is None or not match.end() < length <= len(body) or body[length - 1] != ord("\n"):
            scanner.refuse("malformed PAX record", header.offset)
        key = match[2].decode("utf-8", "replace")
        if key not in _HARMLESS_PAX and not key.startswith(("LIBARCHIVE.creationtime", "SCHILY.xattr.")):
            scanner.refuse(f"PAX record {key!r} changes the member; repack with `tar --format=gnu`", header.offset)
        body = body[length:]


def _checked_name(scanner: _Scanner, header: _Header) -> str:
    name = header.name.removeprefix("./")
    if not name or name.startswith("/") or ".." in name.split("/"):
        scanner.refuse(f"member name {header.name!r} leaves the archive; repack with relative names", header.offset)
    if not name.isprintable():
        scanner.refuse(f"member name {header.name!r} has control characters; repack with other names", header.offset)
    return name
