"""Brings the shards that the order will soon need into the cache, in the order of their need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from datamodules.grouping import GroupedStream
from datamodules.index import ShardIndex
from datamodules.mixing import OrderStream
from datamodules.sampler import TrainBatchSampler
from datamodules.types import DataError, Ids

INTERVAL_S = 1.0
MAX_BATCHES = 10_000


def upcoming_shards(
    ids_of: Callable[[int], Ids],
    shard_of: Callable[[Ids], Ids],
    sizes: Sequence[int],
    position: int,
    budget: int,
    most: int = MAX_BATCHES,
) -> list[int]:
    """The shards that a rank's next batches need, in the order of their first use.

    Args:
        ids_of: sample ids of the rank's share of a global batch, by the batch's position.
        shard_of: shard numbers of sample ids.
        sizes: bytes of each shard.
        position: the next batch.
        budget: bytes; the list ends before it is exceeded, but the first shard is always on it.
        most: batches to look ahead.
    """
    needed: list[int] = []
    seen: set[int] = set()
    left = budget
    for batch in range(position, position + most):
        shards, firsts = np.unique(shard_of(ids_of(batch)), return_index=True)
        for shard in shards[np.argsort(firsts)].tolist():
            if shard in seen:
                continue
            left -= sizes[shard]
            if left < 0 and needed:
                return needed
            seen.add(shard)
            needed.append(shard)
        if len(seen) == len(sizes):
            break
    return needed


def start_prefetch(
    indexes: Sequence[ShardIndex], sampler: TrainBatchSampler, position: Callable[[], int], ranks: int = 1
) -> list[Prefetcher]:
    """One running prefetcher if a training split has remote shards, else none.

    Args:
        indexes: the training splits of the datasets that are mixed, or of the only one.
        sampler: this rank's requests.
        position: global batches committed so far.
        ranks: processes on this node; each looks ahead for its share of half the cache.
    """
    limits = [index.cache.limit for index in indexes if index.cache is not None]
    if not limits:
        return []
    ids_of = partial(_ids, sampler.stream(), sampler.slots)
    return [Prefetcher(indexes, ids_of, position, min(limits) // (2 * max(ranks, 1)))]


def _ids(stream: OrderStream | GroupedStream, slots: tuple[int, int], position: int) -> Ids:
    return stream.batch(position, *slots)[0]


class Prefetcher:
    """A thread that keeps the next shards in the cache while the trainer works on the ones before.

    Args:
        indexes: the training splits; sample ids count through them.
        ids_of: sample ids of the rank's share of a global batch, by the batch's position.
        position: global batches committed so far.
        budget: bytes of shards to look ahead for.
    """

    def __init__(
        self,
        indexes: Sequence[ShardIndex],
        ids_of: Callable[[int], Ids],
        position: Callable[[], int],
        budget: int,
    ) -> None:
        self._shards = [(index, shard) for index in indexes for shard in range(len(index.shards))]
        counts = np.array([count for index in indexes for count in index.counts], dtype=np.int64)
        self._firsts = np.cumsum(counts) - counts  # first sample id of every shard
        self._sizes = [0 if index.cache is None else int(index.shards[shard]["size"]) for index, shard in self._shards]
        self._ids_of = ids_of
        self._position = position
        self._budget = budget
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="shard-prefetch", daemon=True).start()

    def close(self) -> None:
        """Stop after the shard that is being fetched; nobody need wait for it."""
        self._stopped.set()

    def _run(self) -> None:
        last = -1
        shards: list[int] = []
        while not self._stopped.is_set():
            if (position := self._position()) != last:
                last = position
                shards = upcoming_shards(self._ids_of, self._shards_of, self._sizes, position, self._budget)
            for number in shards:
                if self._stopped.is_set() or not self._keep(*self._shards[number]):
                    break
            self._stopped.wait(INTERVAL_S)

    def _shards_of(self, ids: Ids) -> Ids:
        return np.searchsorted(self._firsts, ids, side="right") - 1  # empty shards begin where the next one does

    @staticmethod
    def _keep(index: ShardIndex, shard: int) -> bool:
        try:
            if index.cache is not None:
                index.cache.keep(index, shard)
        except DataError:  # the reader that needs the shard meets the same fault, and reports it
            return False
        return True
