"""Which sample comes when: a pure function of seed, epoch, shard sizes, lanes, window and batch size; nothing else.

Randomness is integer hashing (splitmix64), never a library's random stream, so the order is the same on every machine
and with every version of NumPy. A change of this file that changes any id must raise ORDER_VERSION.

Legend: n samples, B samples in a global batch, R copies of each sample in it, C lanes, K samples in a window, N ranks.

1. The shards are permuted and concatenated; the sequence is rotated by a hashed offset, so that the n mod B samples an
   epoch leaves out are spread evenly over epochs.
2. It is cut into C equal lanes. Each lane is permuted inside windows of K samples; the windows of different lanes end
   at different times, so a run never opens all its shards at once.
3. Global batch b takes B / R / C samples from every lane, lane after lane, and repeats them R times.
4. Rank r of N takes the slots [floor(B r / N), floor(B (r + 1) / N)): neighbouring slots come from neighbouring shards.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from datamodules.types import DataError, Ids

ORDER_VERSION = 1

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment, odd: j -> key + j * _GOLDEN never repeats


class Role(IntEnum):
    """What a hash is drawn for; keeps the streams of one seed apart."""

    SHARDS = 1
    ROTATION = 2
    WINDOW = 3
    AUGMENTATION = 4
    SPLIT = 5
    PACKING = 6
    MIXTURE = 7
    SCENE = 8
    GROUPING = 9


def mix64(value: int) -> int:
    """splitmix64's output function, a bijection of 64-bit integers (Steele, Lea and Flood, 2014)."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def hash_key(seed: int, *parts: int) -> int:
    """Hash a seed and any number of integers to 64 bits; swapping two of them gives another hash."""
    key = mix64(seed)
    for part in parts:
        key = mix64(mix64(key + _GOLDEN) + part)  # a plain number onto a scrambled one, so seed and epoch do not mix up
    return key


def permutation(size: int, key: int) -> Ids:
    """The permutation of range(size) that belongs to a 64-bit key.

    The sort keys are splitmix64's stream from `key`. They are distinct (a bijection of distinct numbers), so every
    correct sorting algorithm gives the same answer and the fastest may be taken.
    """
    with np.errstate(over="ignore"):  # uint64 arithmetic is meant to wrap
        keys = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys ^= keys >> np.uint64(31)
    return np.argsort(keys).astype(np.int64, copy=False)


@dataclass(frozen=True)
class OrderSpec:
    """Everything the training order depends on, apart from the seed's epoch.

    Attributes:
        seed: any integer.
        counts: samples per shard, in index order; zeros are legal.
        batch_size: B, samples in a global batch over all ranks, copies included.
        lanes: C, must divide B / R.
        window: K, samples that are shuffled together inside a lane.
        repeats: R, copies of a sample in a batch (repeated augmentation), must divide B.
    """

    seed: int
    counts: tuple[int, ...]
    batch_size: int
    lanes: int = 8
    window: int = 8000
    repeats: int = 1

    def __post_init__(self) -> None:
        check_at_least(1, batch_size=self.batch_size, lanes=self.lanes, window=self.window, repeats=self.repeats)
        _check_divides(self)
        if self.num_samples < self.distinct:
            raise DataError(
                f"data.batch_size {self.batch_size} needs {self.distinct} different samples, the training split has "
                f"{self.num_samples}; use a batch_size of at most {self._largest_batch()}"
            )

    @cached_property
    def num_samples(self) -> int:
        """Samples in the split, n."""
        return sum(self.counts)

    @property
    def distinct(self) -> int:
        """Different samples in a global batch, B / R."""
        return self.batch_size // self.repeats

    @property
    def batches_per_epoch(self) -> int:
        """Global batches the trainer calls an epoch: n // B, whatever the number of repeats, but at least 1."""
        return max(1, self.num_samples // self.batch_size)

    @property
    def batches_per_pass(self) -> int:
        """Global batches in which the order visits every sample once (R times with repeats): n // (B / R)."""
        return self.num_samples // self.distinct

    def _largest_batch(self) -> int:
        step = self.lanes * self.repeats
        return max(self.num_samples // self.lanes * step, 1)


def check_at_least(least: int, **values: float) -> None:
    """Raise DataError for the first setting, given by its name, that is below `least`."""
    for name, value in values.items():
        if value < least:
            raise DataError(f"data.{name} is {value}; it must be at least {least}")


def _check_divides(spec: OrderSpec) -> None:
    step = spec.lanes * spec.repeats
    if spec.batch_size % step == 0:
        return
    below, above = spec.batch_size // step * step, -(-spec.batch_size // step) * step
    valid = f"{below} or {above}" if below else f"{above}"
    repeats = f" x {spec.repeats} repeats" if spec.repeats > 1 else ""
    fitting = [lanes for lanes in range(1, spec.lanes) if spec.batch_size % (lanes * spec.repeats) == 0]
    mend = f", or data.lanes {fitting[-1]}" if fitting else ""
    raise DataError(
        f"data.batch_size {spec.batch_size} is not divisible by {spec.lanes} lanes{repeats}; "
        f"nearest valid: {valid}{mend}"
    )


class PassOrder:
    """The order of one pass over the data; windows are permuted when first needed and the last one of a lane is kept.

    Costs: the shard permutation once, then 8 K bytes for each of the C lanes.
    """

    def __init__(self, spec: OrderSpec, epoch: int) -> None:
        counts = np.asarray(spec.counts, dtype=np.int64)
        self.spec = spec
        self.epoch = epoch
        self._size = spec.num_samples
        self._lane_length = self._size // spec.lanes
        self._shards = permutation(len(counts), hash_key(spec.seed, epoch, Role.SHARDS))
        self._ends = np.cumsum(counts[self._shards])  # of the permuted shards in the concatenated sequence
        self._shift = (np.cumsum(counts) - counts)[self._shards] - (self._ends - counts[self._shards])
        self._rotation = hash_key(spec.seed, epoch, Role.ROTATION) % self._size
        self._windows: dict[int, tuple[int, Ids]] = {}

    def batch(self, batch: int, start: int = 0, stop: int | None = None) -> tuple[Ids, Ids]:
        """The slots [start, stop) of one global batch of this pass.

        Args:
            batch: batch within the pass, in [0, spec.batches_per_pass).
            start: first slot.
            stop: slot after the last, B if None.

        Returns:
            Sample ids and which copy of the sample each slot is, both (stop - start,) int64.
        """
        spec = self.spec
        slots = np.arange(start, spec.batch_size if stop is None else stop, dtype=np.int64)
        base, repeats = slots % spec.distinct, slots // spec.distinct
        share = spec.distinct // spec.lanes
        ids = np.empty(spec.distinct, dtype=np.int64)
        for lane in np.unique(base // share).tolist():
            ids[lane * share : (lane + 1) * share] = self._lane(lane, batch * share, (batch + 1) * share)
        return ids[base], repeats

    def _lane(self, lane: int, start: int, stop: int) -> Ids:
        """Ids at the positions [start, stop) of a lane."""
        stagger = lane * self.spec.window // self.spec.lanes
        parts = []
        while start < stop:
            number = (start + stagger) // self.spec.window
            first = max(number * self.spec.window - stagger, 0)
            window = self._window(lane, number)
            parts.append(window[start - first : stop - first])
            start = first + len(window)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _window(self, lane: int, number: int) -> Ids:
        """The permuted sample ids of one window of a lane."""
        cached = self._windows.get(lane)
        if cached is not None and cached[0] == number:
            return cached[1]
        spec = self.spec
        stagger = lane * spec.window // spec.lanes
        first = max(number * spec.window - stagger, 0)
        last = min((number + 1) * spec.window - stagger, self._lane_length)
        ids = self._ids(lane * self._lane_length + first, lane * self._lane_length + last)
        ids = ids[permutation(len(ids), hash_key(spec.seed, self.epoch, Role.WINDOW, lane, number))]
        self._windows[lane] = (number, ids)
        return ids

    def _ids(self, start: int, stop: int) -> Ids:
        """Sample ids at the positions [start, stop) of the rotated concatenation of the permuted shards."""
        positions = (np.arange(start, stop, dtype=np.int64) + self._rotation) % self._size
        return positions + self._shift[np.searchsorted(self._ends, positions, side="right")]


def rank_slots(size: int, rank: int, world: int) -> tuple[int, int]:
    """The slots [start, stop) of a batch of `size` that rank `rank` of `world` takes; shares differ by at most 1."""
    return size * rank // world, size * (rank + 1) // world


def check_world(batch_size: int, world: int) -> None:
    """Raise DataError if some of `world` ranks would get no sample of a global batch."""
    if world > batch_size:
        raise DataError(
            f"data.batch_size {batch_size} is smaller than the {world} ranks that share it; "
            f"use a batch_size of at least {world} or fewer devices"
        )


def order_digest(spec: OrderSpec, epoch: int, batches: int) -> str:
    """SHA-256 over ids and copies of the first `batches` global batches of a pass; the tests' golden values."""
    order = PassOrder(spec, epoch)
    digest = hashlib.sha256()
    for batch in range(batches):
        for column in order.batch(batch):
            digest.update(np.ascontiguousarray(column, dtype="<i8").tobytes())
    return digest.hexdigest()


def evaluation_steps(num_samples: int, batch_size: int, world: int) -> tuple[int, int]:
    """How evaluation is cut: the same number of equal batches on every rank, with as little padding as possible.

    Args:
        num_samples: samples to visit, each exactly once.
        batch_size: the most samples in a global batch; with fewer than `world`, every rank still takes one.
        world: number of ranks.

    Returns:
        Steps, and the slots of one rank in each of them.
    """
    share = max(1, batch_size // world)
    steps = -(-num_samples // (share * world))
    return steps, -(-num_samples // (max(steps, 1) * world))


def evaluation_ids(num_samples: int, step: int, share: int, rank: int, world: int) -> Ids:
    """Sample ids (share,) of one rank's evaluation step, in index order; -1 where the samples have run out."""
    start = (step * world + rank) * share
    ids = np.arange(start, start + share, dtype=np.int64)
    ids[ids >= num_samples] = -1
    return ids


def probe_ids(num_samples: int, count: int) -> NDArray[np.int64]:
    """At most `count` different ids spread evenly over a split, always the same."""
    count = min(count, num_samples)
    return np.arange(count, dtype=np.int64) * num_samples // max(count, 1)
