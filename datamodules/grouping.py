"""Puts samples of alike shape into the same batches, by reordering the order inside windows of batches.

Batches of images of different sizes are padded to the largest; where wide and tall ones meet, up to half of the pixels
are padding. So the samples of G consecutive global batches are divided by group, cut into batches again, and the
batches shuffled. It is a permutation of what the order gives for those batches: every guarantee of it holds, and the
result is a pure function of the same inputs, the groups and G. One batch in a window may hold two groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.mixing import OrderStream
from datamodules.order import OrderSpec, Role, hash_key, permutation
from datamodules.types import Ids


@dataclass(frozen=True, eq=False)
class Grouping:
    """Which samples belong together.

    Attributes:
        groups: a number for every sample (n,), int64.
        batches: G, global batches in a window.
    """

    groups: Ids
    batches: int


class GroupedStream:
    """An order whose windows of batches are grouped; windows end with a pass, those of a mixture with an epoch.

    Costs: the ids of a window's batches once for each window.

    Args:
        stream: the order as it is.
        grouping: how to group it.
    """

    def __init__(self, stream: OrderStream, grouping: Grouping) -> None:
        self._stream = stream
        self._grouping = grouping
        spec = stream.spec
        self._distinct = spec.distinct
        self._length = spec.batches_per_pass if isinstance(spec, OrderSpec) else spec.batches_per_epoch
        self._seed = spec.seed if isinstance(spec, OrderSpec) else spec.sources[0].seed
        self._window: tuple[int, Ids, Ids] = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    def batch(self, position: int, start: int, stop: int) -> tuple[Ids, Ids, Ids]:
        """The slots [start, stop) of a global batch, see OrderStream.batch."""
        first = position - position % self._length % self._grouping.batches
        if self._window[0] != first:
            self._window = (first, *self._grouped(first))
        slots = np.arange(start, stop, dtype=np.int64)
        rows = (position - first) * self._distinct + slots % self._distinct
        return self._window[1][rows], slots // self._distinct, self._window[2][rows]

    def _grouped(self, first: int) -> tuple[Ids, Ids]:
        """Ids and passes of the window that begins with a batch, in their new order."""
        epoch, number = divmod(first, self._length)
        count = min(self._grouping.batches, self._length - number)
        parts = [self._stream.batch(position, 0, self._distinct) for position in range(first, first + count)]
        ids, passes = (np.concatenate([part[column] for part in parts]) for column in (0, 2))
        batches = np.argsort(self._grouping.groups[ids], kind="stable").reshape(count, self._distinct)
        order = batches[permutation(count, hash_key(self._seed, epoch, Role.GROUPING, number))].ravel()
        return ids[order], passes[order]
