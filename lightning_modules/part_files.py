"""Records that every rank appends to a file of its own and rank 0 merges by sample id: memory stays constant."""

import heapq
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any


class PartFile:
    """One rank's records, one JSON line each.

    Args:
        folder: shared by all ranks; must exist.
        rank: this process's number.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._stream = part_path(folder, rank).open("w", encoding="ascii")

    def add(self, sample: int, record: Any) -> None:
        """Append a record; samples must come in ascending order, as every evaluation gives them."""
        self._stream.write(json.dumps([sample, record], separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Flush to the disk: another machine's rank 0 reads it next."""
        if not self._stream.closed:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()


class MergedParts:
    """The records of all ranks in the order of their samples, each sample once; may be read several times.

    Leaving the context removes the files, also those that an earlier attempt on more ranks left.

    Args:
        folder: of the parts.
        world: number of ranks.
    """

    def __init__(self, folder: Path, world: int) -> None:
        self._folder = folder
        self._world = world
        self.count = 0
        """Records of the latest complete pass."""

    def __enter__(self) -> "MergedParts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path in self._folder.glob(part_path(self._folder, "*").name):
            path.unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Any]:
        last, count = None, 0
        for sample, record in heapq.merge(*map(self._lines, range(self._world)), key=lambda row: row[0]):
            if sample != last:
                count += 1
                yield record
            last = sample
        self.count = count

    def _lines(self, rank: int) -> Iterator[tuple[int, Any]]:
        with part_path(self._folder, rank).open(encoding="ascii") as stream:
            for line in stream:
                sample, record = json.loads(line)
                yield sample, record


def part_path(folder: Path, rank: int | str) -> Path:
    """Where a rank's records lie until they are merged."""
    return folder / f"rank_{rank}.part"
