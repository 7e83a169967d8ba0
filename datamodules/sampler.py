"""Turns the order into one rank's batch requests; positions are counted in global batches since step 0."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
from torch.utils.data import Sampler

from datamodules.grouping import GroupedStream, Grouping
from datamodules.mixing import MixtureSpec, OrderStream
from datamodules.order import OrderSpec, check_world, evaluation_ids, evaluation_steps, rank_slots
from datamodules.types import PADDING_ID, BatchRequest


class TrainBatchSampler(Sampler[BatchRequest]):
    """One rank's requests, from global batch `start` on, without end: epochs are only numbers on the stream.

    Args:
        spec: the order, of one dataset or of a mixture.
        rank: this process's number.
        world: number of processes, at most spec.batch_size.
        start: global batches already committed since step 0.
        grouping: of samples of alike shape; None leaves the order as it is.

    Attributes:
        batch_size: samples this rank takes of a global batch.
    """

    def __init__(
        self,
        spec: OrderSpec | MixtureSpec,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        grouping: Grouping | None = None,
    ) -> None:
        check_world(spec.batch_size, world)
        self.spec = spec
        self.grouping = grouping
        self.start = start
        self.slots = rank_slots(spec.batch_size, rank, world)
        self.batch_size = self.slots[1] - self.slots[0]
        # the average over ranks of each rank's weighted mean is then the mean over the global batch
        self.weights = np.full(self.batch_size, world * self.batch_size / spec.batch_size, dtype=np.float32)

    def __len__(self) -> int:
        return self.spec.batches_per_epoch

    def stream(self) -> OrderStream | GroupedStream:
        """The order of global batches that this rank takes its slots of."""
        stream = OrderStream(self.spec)
        return stream if self.grouping is None else GroupedStream(stream, self.grouping)

    def __iter__(self) -> Iterator[BatchRequest]:
        stream = self.stream()
        for position in count(self.start):
            ids, repeats, passes = stream.batch(position, *self.slots)
            yield BatchRequest(ids, repeats, self.weights, passes)


class EvalBatchSampler(Sampler[BatchRequest]):
    """One rank's requests for one evaluation: every sample on exactly one rank, equally many batches on all.

    Args:
        num_samples: samples of the split.
        batch_size: the most samples in a global batch.
        rank: this process's number.
        world: number of processes.

    Attributes:
        batch_size: slots this rank has in every batch; the last slots of all may be padding (id -1, weight 0).
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.num_samples = num_samples
        self.rank = rank
        self.world = world
        self.steps, self.batch_size = evaluation_steps(num_samples, batch_size, world)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[BatchRequest]:
        for step in range(self.steps):
            ids = evaluation_ids(self.num_samples, step, self.batch_size, self.rank, self.world)
            yield BatchRequest(ids, np.zeros_like(ids), (ids != PADDING_ID).astype(np.float32), np.zeros_like(ids))
