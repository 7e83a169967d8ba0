"""Random schedules of steps, kills, checkpoints, resizes, epoch ends and corrupt samples lose and repeat nothing."""

import random
from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.mixing import MixtureSpec, OrderStream, mixture_spec
from datamodules.order import OrderSpec, PassOrder
from datamodules.sampler import TrainBatchSampler
from datamodules.types import DataError

ACTIONS = ("step", "step", "step", "steps", "kill", "checkpoint", "resize", "workers", "epoch_end", "corrupt")


class Ranks:
    """All ranks of one attempt; each one's workers fetch batches ahead, which a kill throws away."""

    def __init__(self, spec, world, workers, start):
        self.streams = [iter(TrainBatchSampler(spec, rank, world, start)) for rank in range(world)]
        self.ahead = [deque() for _ in range(world)]
        self.depth = 1 + 2 * workers
        self.steps = [0] * world

    def step(self):
        parts = []
        for rank, (stream, queue) in enumerate(zip(self.streams, self.ahead, strict=True)):
            while len(queue) < self.depth:
                queue.append(next(stream))
            parts.append(queue.popleft())
            self.steps[rank] += 1
        return parts


class Schedule:
    """One run under random faults; `trained` is what a ledger would hold after every fault."""

    def __init__(self, spec, seed):
        self.spec, self.rng = spec, random.Random(seed)
        self.trained, self.saved, self.bad = [], 0, set()
        self.losses = np.random.default_rng(seed).random(spec.num_samples)
        self.restart()

    def restart(self, world=None, workers=None):
        del self.trained[self.saved :]  # what was trained since the checkpoint is trained again
        self.world = world or self.rng.randint(1, min(self.spec.batch_size, 6))
        self.workers = self.rng.randint(0, 3) if workers is None else workers
        self.ranks = Ranks(self.spec, self.world, self.workers, self.saved)

    def step(self):
        parts = self.ranks.step()
        ids = np.concatenate([part.ids for part in parts])
        self.trained.append((ids, *(np.concatenate([getattr(p, x) for p in parts]) for x in ("repeats", "epochs"))))
        good = [np.where(np.isin(part.ids, list(self.bad)), 0, part.weights) for part in parts]
        of_ranks = [(w * self.losses[part.ids]).mean() for w, part in zip(good, parts, strict=True)]
        exact = self.losses[ids[~np.isin(ids, list(self.bad))]].sum() / self.spec.batch_size
        assert abs(np.mean(of_ranks) - exact) < 1e-6

    def act(self, action):
        if action == "step":
            self.step()
        elif action == "steps":
            for _ in range(self.rng.randint(2, 5)):
                self.step()
        elif action == "epoch_end":
            while True:
                self.step()
                if len(self.trained) % self.spec.batches_per_epoch == 0:
                    break
            assert len(set(self.ranks.steps)) == 1
            self.saved = len(self.trained)
        elif action == "checkpoint":
            self.saved = len(self.trained)
        elif action == "kill":
            self.restart(self.world, self.workers)
        elif action == "resize":
            self.restart(None, self.workers)
        elif action == "workers":
            self.restart(self.world, None)
        else:
            self.bad.add(self.rng.randrange(self.spec.num_samples))


def spec_of(rng):
    """A small order, of one dataset or of a mixture, with empty shards and shards of one sample."""
    while True:
        counts = [
            tuple(rng.choice([0, 0, 1, 1, 2, 5, rng.randint(0, 12)]) for _ in range(rng.randint(1, 5)))
            for _ in range(rng.choice([1, 1, 1, 2, 3]))
        ]
        lanes, repeats = rng.randint(1, 3), rng.choice([1, 1, 1, 2])
        batch, window = lanes * repeats * rng.randint(1, 4), rng.randint(1, 12)
        try:
            if len(counts) == 1:
                return OrderSpec(rng.getrandbits(64), counts[0], batch, lanes, window, repeats)
            weights = [rng.uniform(0.2, 1) for _ in counts]
            return mixture_spec(rng.getrandbits(64), counts, weights, batch, lanes, window, repeats)
        except DataError:
            continue  # too few samples for a batch


def lost_and_repeated(spec, trained):
    """Over every whole pass of every source: samples that should have come and did not, and that came too often."""
    lost = repeated = 0
    sources = spec.sources if isinstance(spec, MixtureSpec) else (spec,)
    firsts = spec.first_ids.tolist() if isinstance(spec, MixtureSpec) else [0]
    seen = Counter()
    for ids, repeats, passes in trained:
        seen.update(zip(ids.tolist(), repeats.tolist(), passes.tolist(), strict=True))
    repeated += sum(count - 1 for count in seen.values())
    for source, first in zip(sources, firsts, strict=True):
        left_out = source.num_samples % source.distinct
        for number in range(len(trained) // source.batches_per_pass):
            for repeat in range(spec.repeats):
                came = sum((first + i, repeat, number) in seen for i in range(source.num_samples))
                lost += source.num_samples - left_out - came
    return lost, repeated


def run_schedules(seeds):
    lost = repeated = 0
    for seed in seeds:
        rng = random.Random(seed)
        schedule = Schedule(spec_of(rng), seed)
        for _ in range(12):
            schedule.act(rng.choice(ACTIONS))
        stream = OrderStream(schedule.spec)
        for position, parts in enumerate(schedule.trained):  # equal to the uninterrupted run's
            for part, expected in zip(parts, stream.batch(position, 0, schedule.spec.batch_size), strict=True):
                np.testing.assert_array_equal(part, expected)
        result = lost_and_repeated(schedule.spec, schedule.trained)
        lost, repeated = lost + result[0], repeated + result[1]
    return lost, repeated


def test_a_thousand_random_schedules_lose_and_repeat_nothing():
    assert run_schedules(range(1000)) == (0, 0)


@pytest.mark.slow
def test_ten_thousand_random_schedules_lose_and_repeat_nothing():
    assert run_schedules(range(1000, 11_000)) == (0, 0)


def test_the_count_of_lost_and_repeated_samples_would_show_them():
    spec = OrderSpec(0, (9,), 3, 1)
    stream = OrderStream(spec)
    batches = [stream.batch(position, 0, 3) for position in range(3)]
    assert lost_and_repeated(spec, batches) == (0, 0)
    assert lost_and_repeated(spec, [batches[0], batches[0], batches[2]]) == (3, 3)


relaxed = settings(deadline=None)  # shared machines stall


@relaxed
@given(st.lists(st.integers(0, 3), max_size=5).map(tuple), st.integers(1, 12), st.integers(1, 12), st.integers(1, 3))
def test_adversarial_counts_are_served_exactly_or_refused(counts, batch, lanes, repeats):
    """No samples, one sample, fewer samples than a batch, more lanes than samples."""
    try:
        spec = OrderSpec(0, counts, batch, lanes, 2, repeats)
    except DataError as error:
        assert "\n" not in str(error)
        assert batch % (lanes * repeats) or sum(counts) < batch // repeats
        return
    order = PassOrder(spec, 0)
    ids = np.concatenate([order.batch(number)[0] for number in range(spec.batches_per_pass)])
    assert len(np.unique(ids)) * repeats == len(ids) == spec.batches_per_pass * batch


@relaxed
@given(st.integers(0, 2**32), st.integers(0, 2**32), st.integers(0, 100), st.integers(0, 100))
def test_epochs_and_seeds_give_different_orders(seed, other, epoch, later):
    spec = OrderSpec(seed, (100, 100), 10, 2, 50)
    first = PassOrder(spec, epoch).batch(3)[0].tolist()
    assert (PassOrder(OrderSpec(other, (100, 100), 10, 2, 50), epoch).batch(3)[0].tolist() == first) == (seed == other)
    assert (PassOrder(spec, later).batch(3)[0].tolist() == first) == (epoch == later)


@relaxed
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 6), st.integers(10, 60), st.integers(5, 40))
def test_a_lane_opens_no_more_shards_than_its_windows_span(seed, lanes, share, shards, window):
    """The locality bound, for any order: consecutive batches of a lane stay within the windows they touch."""
    size, batches = 10, 8
    spec = OrderSpec(seed, (size,) * shards, lanes * share, lanes, window)
    order = PassOrder(spec, 0)
    taken = min(batches, spec.batches_per_pass)
    for lane in range(lanes):
        ids = np.concatenate([order.batch(b, lane * share, (lane + 1) * share)[0] for b in range(taken)])
        windows = taken * share // window + 2
        assert len(np.unique(ids // size)) <= windows * (window // size + 3)


@relaxed
@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(1, 8))
def test_the_same_few_samples_are_not_left_out_of_every_epoch(seed, samples, batch):
    spec = OrderSpec(seed, (samples,), min(batch, samples), 1, 5)
    left = samples % spec.batch_size
    out = Counter()
    for epoch in range(20):
        order = PassOrder(spec, epoch)
        ids = [order.batch(number)[0] for number in range(spec.batches_per_pass)]
        missing = set(range(samples)) - set(np.concatenate(ids).tolist())
        assert len(missing) == left
        out.update(missing)
    assert max(out.values(), default=0) < 20 or 2 * left > samples
