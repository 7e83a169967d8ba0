"""The order of a weighted mixture of datasets: a pure function, like the order of one, and built from it.

Every global batch holds the same number of samples of each source: its weight's share of the batch, rounded so that
the shares add up (largest remainder). So a batch is found without looking at those before it, the mixture does not
depend on the number of ranks, and what each source has given is a product. The price: weights are rounded to whole
samples of a batch. Every source runs through its own samples in its own order, as often as it is asked to, and its
slots are spread evenly over the batch, so that every rank gets its share of each source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from datamodules.order import OrderSpec, PassOrder, Role, check_at_least, hash_key
from datamodules.types import DataError, Ids


@dataclass(frozen=True)
class MixtureSpec:
    """Everything the order of a mixture depends on.

    Attributes:
        sources: the order of each source; its batch_size is the source's share of a batch, without copies.
        repeats: copies of each sample in a batch.
    """

    sources: tuple[OrderSpec, ...]
    repeats: int = 1

    @property
    def batch_size(self) -> int:
        """Samples in a global batch over all ranks, copies included."""
        return self.repeats * self.distinct

    @property
    def distinct(self) -> int:
        """Different samples in a global batch."""
        return sum(source.batch_size for source in self.sources)

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""
        return sum(source.num_samples for source in self.sources)

    @property
    def batches_per_epoch(self) -> int:
        """Global batches the trainer calls an epoch: as many as one pass over all samples would take."""
        return max(1, self.num_samples // self.batch_size)

    @cached_property
    def first_ids(self) -> Ids:
        """The id of every source's sample 0 in the mixture (S,)."""
        sizes = np.array([source.num_samples for source in self.sources], dtype=np.int64)
        return np.cumsum(sizes) - sizes

    @cached_property
    def layout(self) -> Ids:
        """Which row of the sources' samples, one source after the other, each slot without copies holds (B / R,)."""
        places = [(np.arange(source.batch_size) + 0.5) / source.batch_size for source in self.sources]
        return np.argsort(np.concatenate(places), kind="stable").astype(np.int64, copy=False)

    def samples_given(self, batches: int) -> list[int]:
        """Samples of each source, copies included, in the first `batches` global batches."""
        return [batches * source.batch_size * self.repeats for source in self.sources]


def mixture_spec(
    seed: int,
    counts: Sequence[tuple[int, ...]],
    weights: Sequence[float],
    batch_size: int,
    lanes: int,
    window: int,
    repeats: int = 1,
) -> MixtureSpec:
    """Divide a batch among sources.

    Args:
        seed: of the run; every source gets its own from it.
        counts: samples per shard, source by source.
        weights: of the sources, above 0; only their ratios matter.
        batch_size: samples in a global batch, copies included.
        lanes: at most so many lanes for a source: the largest divisor of its share.
        window: samples that are shuffled together inside a lane.
        repeats: copies of each sample in a batch.

    Raises:
        DataError: a batch that cannot be divided so.
    """
    check_at_least(1, batch_size=batch_size, lanes=lanes, window=window, repeats=repeats)
    if batch_size % repeats:
        raise DataError(f"data.batch_size {batch_size} is not divisible by {repeats} repeats")
    shares = divide(batch_size // repeats, weights)
    for number, (share, own) in enumerate(zip(shares, counts, strict=True)):
        if share > sum(own):
            raise DataError(
                f"data.path[{number}] has {sum(own)} training samples and its share of a batch is {share}; "
                "lower its weight or data.batch_size"
            )
    return MixtureSpec(
        tuple(
            OrderSpec(_source_seed(seed, number), tuple(own), share, _lanes(share, lanes), window)
            for number, (share, own) in enumerate(zip(shares, counts, strict=True))
        ),
        repeats,
    )


def training_order(
    seed: int,
    counts: Sequence[tuple[int, ...]],
    weights: Sequence[float] | None,
    batch_size: int,
    lanes: int,
    window: int,
    repeats: int,
) -> OrderSpec | MixtureSpec:
    """The order of one dataset, whose weights are None, or of a mixture; see OrderSpec and mixture_spec."""
    if weights is None:
        return OrderSpec(seed, counts[0], batch_size, lanes, window, repeats)
    return mixture_spec(seed, counts, weights, batch_size, lanes, window, repeats)


def augmentation_seeds(spec: OrderSpec | MixtureSpec) -> list[int]:
    """A seed for every source, so that samples of two datasets with the same id are augmented differently."""
    return [source.seed for source in spec.sources] if isinstance(spec, MixtureSpec) else [spec.seed]


def divide(slots: int, weights: Sequence[float]) -> list[int]:
    """Divide slots by weight: whole numbers that add up, none of them 0 (largest remainder).

    Raises:
        DataError: a weight that is not above 0, or too small to get a slot.
    """
    if not all(0 < weight < float("inf") for weight in weights):
        raise DataError(f"data.path has the weights {list(weights)}; every weight must be above 0")
    exact = [slots * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda k: (shares[k] - exact[k], k))
    for k in by_remainder[: slots - sum(shares)]:
        shares[k] += 1
    if 0 in shares:
        number = shares.index(0)
        raise DataError(
            f"data.path[{number}] has weight {weights[number]}, less than one of the {slots} samples in a batch; "
            "raise its weight or data.batch_size"
        )
    return shares


def _lanes(share: int, lanes: int) -> int:
    return max(lane for lane in range(1, lanes + 1) if share % lane == 0)


def _source_seed(seed: int, number: int) -> int:
    return hash_key(seed, Role.MIXTURE, number)


class OrderStream:
    """The endless order of one dataset or of a mixture, by position in global batches since step 0.

    Args:
        spec: the order.
    """

    def __init__(self, spec: OrderSpec | MixtureSpec) -> None:
        self.spec = spec
        self._passes: dict[int, PassOrder] = {}

    def batch(self, position: int, start: int, stop: int) -> tuple[Ids, Ids, Ids]:
        """The slots [start, stop) of a global batch.

        Returns:
            Sample ids, copies and passes, all (stop - start,) int64.
        """
        spec = self.spec
        if isinstance(spec, OrderSpec):
            ids, repeats, number = self._source(0, spec, position, start, stop)
            return ids, repeats, np.full_like(ids, number)
        slots = np.arange(start, stop, dtype=np.int64)
        rows = spec.layout[slots % spec.distinct]
        parts = [self._source(k, one, position, 0, one.batch_size) for k, one in enumerate(spec.sources)]
        ids = np.concatenate([first + part[0] for first, part in zip(spec.first_ids, parts, strict=True)])
        passes = np.concatenate([np.full_like(part[0], part[2]) for part in parts])
        return ids[rows], slots // spec.distinct, passes[rows]

    def _source(self, number: int, spec: OrderSpec, position: int, start: int, stop: int) -> tuple[Ids, Ids, int]:
        """Ids, copies and pass of one source's part of a batch."""
        epoch, batch = divmod(position, spec.batches_per_pass)
        order = self._passes.get(number)
        if order is None or order.epoch != epoch:
            order = self._passes[number] = PassOrder(spec, epoch)
        return *order.batch(batch, start, stop), epoch
