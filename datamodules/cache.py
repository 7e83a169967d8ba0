"""Remote shards in a bounded local cache that all processes of a node share.

Layout: <root>/<dataset digest>/dataset.json, <split>/index.bin and <split>/<shard>.tar. A shard is fetched whole into
`.<shard>.<bytes>.part`, checked against the index and renamed, so a *.tar is always complete. File locks, which the
kernel releases when a process dies, make one process fetch while the others wait; parts that nobody holds locked are
leftovers and removed. Shards unused for longest make room; one that a process still has open is then read on from the
open file and gone when that is closed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from datamodules.index import INDEX_NAME, ShardIndex
from datamodules.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, DatasetInfo, read_dataset
from datamodules.remote import RETRY_PAUSES_S, RemoteFolder, is_url
from datamodules.types import DataError

MAX_INDEX_BYTES = 1 << 36
CHECKED_FOR_S = 600.0
"""For so long the processes of a node rely on one of them having asked for the sizes of all remote shards."""


def open_cache(path: str, cache_dir: str | None, cache_gib: float) -> ShardCache | None:
    """The cache for a data path; None for a local folder.

    Args:
        path: a URL or a local folder.
        cache_dir: a folder on a local disk; None takes one of this user's in the system's temporary folder.
        cache_gib: the most that all cached shards may take.

    Raises:
        DataError: a protocol that is not allowed, no room, or a cache folder of another user.
    """
    if not is_url(path):
        return None
    if cache_gib <= 0:
        raise DataError(f"data.cache_gib is {cache_gib:g}; it must be above 0")
    own = Path(tempfile.gettempdir()) / f"mirrorla-cache-{os.getuid()}"
    return ShardCache(RemoteFolder(path), own if cache_dir is None else Path(cache_dir), round(cache_gib * 2**30))


@dataclass
class ShardCache:
    """Local copies of one remote dataset; picklable.

    Attributes:
        remote: the dataset's folder.
        root: the cache's folder, which other datasets may share.
        limit: bytes that all shards below root may take.
        folder: the dataset's part of the cache, known after `describe`.
    """

    remote: RemoteFolder
    root: Path
    limit: int
    folder: Path = field(default=Path())

    def describe(self) -> DatasetInfo:
        """Fetch dataset.json, which also tells the dataset's folder in the cache.

        Raises:
            DataError: it cannot be fetched or is damaged.
        """
        self._make_root()
        fresh = self.root / ".new"
        with self._local_faults(), _locked(self.root / ".new.lock"):
            fresh.mkdir(exist_ok=True)
            self.remote.fetch(MANIFEST_NAME, fresh / MANIFEST_NAME, MAX_MANIFEST_BYTES)
            try:
                info = read_dataset(fresh)
            except DataError:
                shown = self.remote.shown(MANIFEST_NAME)
                raise DataError(f"{shown} is no dataset.json or is damaged; check data.path") from None
            self.folder = self.root / info.digest[:32]
            self.folder.mkdir(mode=0o700, exist_ok=True)
            (fresh / MANIFEST_NAME).replace(self.folder / MANIFEST_NAME)
        return info

    def _make_root(self) -> None:
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.root.stat().st_uid
        except OSError as error:
            raise DataError(f"data.cache_dir {self.root} cannot be used ({error.strerror}); name another") from None
        if owner != os.getuid():  # in a shared temporary folder somebody else could have put wrong data there
            raise DataError(f"data.cache_dir {self.root} belongs to user {owner}; name another with data.cache_dir")

    def open_index(self, split: str, digest: str) -> ShardIndex:
        """A split's index, fetched unless the right one is here.

        Args:
            split: one that dataset.json names.
            digest: the index's, from dataset.json.
        """
        folder = self.folder / split
        folder.mkdir(mode=0o700, exist_ok=True)
        with self._local_faults(), _locked(folder / ".index.lock"):
            if not _holds(folder, digest):
                part = folder / ".index.new"
                self.remote.fetch(f"{split}/{INDEX_NAME}", part, MAX_INDEX_BYTES)
                part.replace(folder / INDEX_NAME)
        return ShardIndex(folder, self)

    def check(self, index: ShardIndex) -> None:
        """Compare the remote shards with the index by size; once for all processes of a node that start together.

        Raises:
            DataError: naming the first shard that is missing, has another size or is larger than the cache.
        """
        sizes: list[int] = index.shards["size"].tolist()
        if (largest := max(sizes, default=0)) > self.limit:
            needed = largest / 2**30
            raise DataError(f"data.cache_gib is {self.limit / 2**30:g}; the largest shard alone takes {needed:.3g} GiB")
        checked = index.folder / ".checked"
        with _locked(index.folder / ".index.lock"):
            if checked.exists() and time.time() - checked.stat().st_mtime < CHECKED_FOR_S:
                return
            names = [f"{index.folder.name}/{name}" for name in index.shard_names]
            for name, size, found in zip(names, sizes, self.remote.sizes(names), strict=True):
                if found is not None and found != size:
                    raise DataError(f"{self.remote.shown(name)} has {found} bytes, its index says {size}; restore it")
            checked.touch()

    def open_shard(self, index: ShardIndex, shard: int) -> int:
        """A descriptor of a shard's local copy, fetched if it is not here.

        Raises:
            DataError: it cannot be fetched, or its content is not the indexed one.
        """
        path = index.folder / index.shard_names[shard]
        try:
            return _open_used(path)
        except FileNotFoundError:
            pass
        with _locked(path.with_name(f".{path.name}.lock")):
            try:
                return _open_used(path)  # another process has fetched it while this one waited
            except FileNotFoundError:
                return self._fetch(index, shard, path)

    def keep(self, index: ShardIndex, shard: int) -> None:
        """Have a shard here soon, and mark it as used, so that it is not the next to make room."""
        os.close(self.open_shard(index, shard))

    def discard(self, index: ShardIndex, shard: int) -> None:
        """Forget a copy that turned out to be damaged; the next use fetches it again."""
        (index.folder / index.shard_names[shard]).unlink(missing_ok=True)

    def _fetch(self, index: ShardIndex, shard: int, path: Path) -> int:
        size = int(index.shards[shard]["size"])
        with self._local_faults():
            part, lock = self._reserve(path, size)
            try:
                self._transfer(index, shard, part, size)
                opened = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
                os.fsync(opened)
                part.rename(path)
                return opened
            finally:
                part.unlink(missing_ok=True)
                os.close(lock)

    @contextmanager
    def _local_faults(self) -> Iterator[None]:
        """Name the cache folder when the disk is full or cannot be written."""
        try:
            yield
        except OSError as error:
            hint = "lower data.cache_gib or name another data.cache_dir"
            raise DataError(f"data.cache_dir {self.root} cannot be written ({error.strerror}); {hint}") from None

    def _transfer(self, index: ShardIndex, shard: int, part: Path, size: int) -> None:
        """Fetch and check; a transfer that went wrong unnoticed is repeated."""
        name = f"{index.folder.name}/{index.shard_names[shard]}"
        for _ in (*RETRY_PAUSES_S, None):
            self.remote.fetch(name, part, size)
            fault = _fault(part, index, shard)
            if fault is None:
                return
        raise DataError(f"{self.remote.shown(name)} {fault}, fetched {len(RETRY_PAUSES_S) + 1} times; restore it")

    def _reserve(self, path: Path, size: int) -> tuple[Path, int]:
        """Make room and begin a part; returns it and the descriptor that holds it locked."""
        with _locked(self.root / ".lock"):
            self._make_room(size)
            part = path.with_name(f".{path.name}.{size}.part")
            lock = os.open(part, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
        return part, lock

    def _make_room(self, size: int) -> None:
        """Remove leftovers, then the shards unused for longest, until `size` more bytes fit (root is locked)."""
        total = size
        for part in self.root.glob("*/*/.*.part"):
            if _is_leftover(part):
                part.unlink(missing_ok=True)
            elif (reserved := re.search(r"\.(\d+)\.part$", part.name)) is not None:
                total += int(reserved[1])
        shards = sorted(
            (status.st_mtime_ns, status.st_size, path)
            for path in self.root.glob("*/*/*.tar")
            if (status := _status(path)) is not None
        )
        total += sum(bytes_ for _, bytes_, _ in shards)
        for _, bytes_, path in shards:
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= bytes_


def _holds(folder: Path, digest: str) -> bool:
    """Whether the right and undamaged index is in a folder."""
    try:
        index = ShardIndex(folder)
        index.check_digest()
    except DataError:
        return False
    return index.digest == digest


def _open_used(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.utime(descriptor)
    return descriptor


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # removed by another process
        return None


def _is_leftover(part: Path) -> bool:
    """Whether the process that wrote a part is gone."""
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def _fault(path: Path, index: ShardIndex, shard: int) -> str | None:
    """What makes a file differ from the indexed shard, None if nothing does."""
    size, expected = path.stat().st_size, int(index.shards[shard]["size"])
    if size != expected:
        return f"brought {size} bytes, its index says {expected}"
    if size == 0:
        return None
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        content = memoryview(mapped)
        try:
            for offset, length, crc32, *_ in index.shard_fields(shard).tolist():
                if zlib.crc32(content[offset : offset + length]) != crc32:
                    return f"has other bytes at {offset} than its index says"
        finally:
            content.release()
    return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock; the kernel lets go of it when the process dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
