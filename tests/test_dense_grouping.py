"""Batches grouped by shape: the order inside its windows, and what crosses from a worker."""

import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.collate import TargetList, TensorList, collate_detection, collate_segmentation
from datamodules.grouping import GroupedStream, Grouping
from datamodules.mixing import OrderStream, mixture_spec
from datamodules.order import OrderSpec
from datamodules.sampler import TrainBatchSampler
from datamodules.types import LoadedSample
from tests.dense_batches import flat


def streams(data):
    """A random order, of one dataset or a mixture, beside its grouped form."""
    seed, groups = data.draw(st.integers(0, 2**40)), data.draw(st.integers(1, 3))
    repeats, window = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 6))
    if data.draw(st.booleans()):
        spec = OrderSpec(seed, (13, 0, 40), 8 * repeats, 4, 9, repeats)
    else:
        spec = mixture_spec(seed, [(20,), (9, 12)], [2, 1], 8 * repeats, 4, 9, repeats)
    numbers = np.random.default_rng(seed % 2**32).integers(0, groups, spec.num_samples)
    return spec, Grouping(numbers, window)


@given(st.data())
def test_grouping_permutes_the_order_inside_its_windows(data):
    spec, grouping = streams(data)
    plain, grouped = OrderStream(spec), GroupedStream(OrderStream(spec), grouping)
    length = spec.batches_per_pass if isinstance(spec, OrderSpec) else spec.batches_per_epoch
    for epoch in range(2):
        for first in range(0, length, grouping.batches):
            window = range(epoch * length + first, epoch * length + min(first + grouping.batches, length))
            rows = [[], []]
            mixed = 0
            for position in window:
                for column, stream in zip(rows, (plain, grouped), strict=True):
                    column += list(
                        zip(*(part.tolist() for part in stream.batch(position, 0, spec.batch_size)), strict=True)
                    )
                found = grouping.groups[grouped.batch(position, 0, spec.batch_size)[0]]
                mixed += len(set(found.tolist())) > 1
            assert sorted(rows[0]) == sorted(rows[1])
            assert mixed <= max(grouping.groups)  # a border between each two groups


@given(st.data(), st.integers(1, 8), st.integers(0, 40))
def test_grouped_batches_do_not_depend_on_ranks_or_on_where_a_run_begins(data, world, start):
    spec, grouping = streams(data)
    stream = GroupedStream(OrderStream(spec), grouping)
    for position in range(start):
        stream.batch(position, 0, spec.batch_size)
    expected = stream.batch(start, 0, spec.batch_size)
    parts = [next(iter(TrainBatchSampler(spec, rank, world, start, grouping))) for rank in range(world)]
    for column, name in zip(expected, ("ids", "repeats", "epochs"), strict=True):
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == column.tolist()


def test_a_window_of_one_batch_keeps_the_order_of_batches():
    spec = OrderSpec(3, (40,), 8, 4, 10)
    grouped = GroupedStream(OrderStream(spec), Grouping(np.arange(40) % 2, 1))
    for position in range(5):
        ids = [set(one.batch(position, 0, 8)[0].tolist()) for one in (OrderStream(spec), grouped)]
        assert ids[0] == ids[1]


SHARED = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6)


@given(SHARED)
def test_a_list_of_tensors_crosses_as_one(shapes):
    tensors = TensorList(torch.rand(shape) for shape in shapes)
    rebuild, arguments = tensors.__reduce__()
    assert sum(isinstance(part, torch.Tensor) for part in arguments) <= 1
    restored = rebuild(*arguments)
    assert isinstance(restored, TensorList)
    assert len(restored) == len(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, restored, strict=True))


def test_targets_cross_with_one_tensor_for_each_field_and_keep_what_only_some_have():
    targets = TargetList(
        {"boxes": torch.rand(n, 4), "image_id": torch.tensor(n), **({"masks": torch.ones(n, 3, n) > 0} if n else {})}
        for n in range(4)
    )
    restored = pickle.loads(ForkingPickler.dumps(targets))
    assert [sorted(target) for target in restored] == [sorted(target) for target in targets]
    assert flat(restored) == flat(targets)
    assert len(targets.__reduce__()[1][1]) == 3


def test_collating_pads_images_and_maps_apart():
    samples = [
        LoadedSample(torch.ones(3, h, w), torch.zeros(2 * h, w, dtype=torch.int64), 1.0, n)
        for n, (h, w) in enumerate([(4, 6), (5, 2)])
    ]
    batch = collate_segmentation(samples)
    assert (batch["image"].shape, batch["mask"].shape) == ((2, 3, 5, 6), (2, 10, 6))
    assert (batch["size"].tolist(), batch["mask_size"].tolist()) == ([[4, 6], [5, 2]], [[8, 6], [10, 2]])
    assert batch["image"].sum() == 3 * (24 + 10)
    assert (batch["mask"] == 255).sum() == 120 - 48 - 20
    assert [image.shape for image in collate_detection(samples)["image"]] == [(3, 4, 6), (3, 5, 2)]
