"""Ranks, workers and start methods only divide the work: they never change what is trained on."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.dataset import SampleDataset
from datamodules.loader import EvalLoader, TrainLoader, WorkerConfig
from datamodules.manifest import open_split, read_dataset
from datamodules.order import OrderSpec
from datamodules.pack import pack
from datamodules.reader import ShardReader
from datamodules.sampler import EvalBatchSampler, TrainBatchSampler
from datamodules.tasks import CLASSIFICATION
from datamodules.transforms import EvalTransform, TrainTransform
from datamodules.types import CorruptSampleError, DataError

TRAIN = TrainTransform(16, crop=False, degrees=10, auto_augment=None, color_jitter=0.3, random_erasing=0.5)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("digits", str(folder), shard_size_mib=0.5)
    return folder


def split(folder, name="train"):
    return open_split(folder, read_dataset(folder), name)


def take(sampler, count):
    stream = iter(sampler)
    return [next(stream) for _ in range(count)]


relaxed = settings(deadline=None)  # shared machines stall
worlds = st.integers(1, 24)


@relaxed
@given(st.lists(st.tuples(worlds, st.integers(1, 9)), min_size=1, max_size=5), st.integers(1, 3))
def test_any_sequence_of_world_sizes_gives_the_batches_of_one_rank(attempts, repeats):
    """The resume contract, elastic: restart anywhere with any number of ranks, also in the middle of a pass."""
    spec = OrderSpec(3, (20, 0, 31, 7), 24, 4, 9, repeats)
    start = 0
    expected = take(TrainBatchSampler(spec), sum(batches for _, batches in attempts))
    for world, batches in attempts:
        ranks = [take(TrainBatchSampler(spec, rank, world, start), batches) for rank in range(world)]
        for step in range(batches):
            parts = [rank[step] for rank in ranks]
            assert np.concatenate([part.ids for part in parts]).tolist() == expected[start + step].ids.tolist()
            assert np.concatenate([part.repeats for part in parts]).tolist() == expected[start + step].repeats.tolist()
            assert {epoch for part in parts for epoch in part.epochs.tolist()} == set(
                expected[start + step].epochs.tolist()
            )
        start += batches


@relaxed
@given(worlds)
def test_averaging_over_ranks_gives_the_mean_over_the_batch(world):
    spec = OrderSpec(0, (100,), 24, 4, 9)
    requests = [take(TrainBatchSampler(spec, rank, world), 1)[0] for rank in range(world)]
    losses = np.random.default_rng(0).random(100)
    of_ranks = [float((request.weights * losses[request.ids]).mean()) for request in requests]
    whole = losses[take(TrainBatchSampler(spec), 1)[0].ids].mean()
    assert abs(np.mean(of_ranks) - whole) < 1e-6
    if 24 % world == 0:
        assert all((request.weights == 1).all() for request in requests)


@relaxed
@given(st.integers(0, 100), st.integers(1, 40), worlds)
def test_evaluation_covers_the_split_with_weight_one(samples, batch_size, world):
    samplers = [EvalBatchSampler(samples, batch_size, rank, world) for rank in range(world)]
    assert len({len(sampler) for sampler in samplers}) == 1
    requests = [request for sampler in samplers for request in sampler]
    ids = np.concatenate([np.empty(0, np.int64), *(request.ids[request.weights > 0] for request in requests)])
    assert sorted(ids.tolist()) == list(range(samples))
    assert all(set(request.ids[request.weights == 0].tolist()) <= {-1} for request in requests)


def test_more_ranks_than_slots_are_refused():
    with pytest.raises(DataError, match="batch_size 8 is smaller than the 9 ranks"):
        TrainBatchSampler(OrderSpec(0, (10,), 8), 0, 9)


def test_padding_is_a_black_image_of_weight_zero(digits):
    dataset = SampleDataset(ShardReader(split(digits, "val")), CLASSIFICATION, EvalTransform(16, None), 10)
    sampler = EvalBatchSampler(len(dataset), 100)
    batches = list(EvalLoader(dataset, sampler, WorkerConfig()))
    assert [batch["image"].shape for batch in batches] == [(90, 3, 16, 16)] * 4
    padding = batches[-1]["weight"] == 0
    assert int(padding.sum()) == 1
    assert batches[-1]["image"][padding].abs().sum() == 0
    assert batches[-1]["id"][padding].tolist() == [-1]


def test_a_batch_holds_what_the_tars_hold(digits):
    from sklearn.datasets import load_digits

    dataset = SampleDataset(
        ShardReader(split(digits)), CLASSIFICATION, EvalTransform(8, None, mean=(0, 0, 0), std=(1, 1, 1)), 10
    )
    bunch = load_digits()
    batch = next(
        iter(TrainLoader(dataset, TrainBatchSampler(OrderSpec(0, dataset.reader.index.counts, 64)), WorkerConfig()))
    )
    for i, sample in enumerate(batch["id"].tolist()):
        original = int(dataset.reader.index.locate(sample).key.removeprefix("digit-"))
        assert batch["label"][i] == bunch.target[original]
        expected = np.rint(bunch.images[original] * 255 / 16) / 255
        np.testing.assert_allclose(batch["image"][i], np.broadcast_to(expected, (3, 8, 8)), atol=1e-6)
    assert {key: value.dtype for key, value in batch.items()} == {
        "image": torch.float32,
        "label": torch.int64,
        "weight": torch.float32,
        "id": torch.int64,
    }


def test_a_label_beyond_the_classes_names_its_sample(digits):
    dataset = SampleDataset(ShardReader(split(digits)), CLASSIFICATION, EvalTransform(8, None), 1)
    with pytest.raises(
        CorruptSampleError, match=r"train-0.*tar, sample 'digit-.*': label \d is not below the 1 classes"
    ):
        list(EvalLoader(dataset, EvalBatchSampler(len(dataset), 32), WorkerConfig()))


def test_datasets_travel_to_workers_without_their_data(digits):
    dataset = SampleDataset(ShardReader(split(digits)), CLASSIFICATION, TRAIN, 10, seed=3)
    data = pickle.dumps(dataset)
    assert len(data) < 2000
    assert torch.equal(pickle.loads(data).load(5, 2, 1).image, dataset.load(5, 2, 1).image)


def digest(batches):
    total = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            total.update(batch[key].numpy().tobytes())
    return total.hexdigest()


def first_batches(folder, config, count=6):
    dataset = SampleDataset(ShardReader(split(folder)), CLASSIFICATION, TRAIN, 10, seed=1)
    loader = TrainLoader(dataset, TrainBatchSampler(OrderSpec(1, dataset.reader.index.counts, 48)), config)
    stream = iter(loader)
    batches = [next(stream) for _ in range(count)]
    loader.close()
    return digest(batches)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(digits, workers):
    assert first_batches(digits, WorkerConfig(workers)) == first_batches(digits, WorkerConfig())


def test_the_stream_goes_on_through_epochs_and_can_be_moved(digits):
    dataset = SampleDataset(ShardReader(split(digits)), CLASSIFICATION, EvalTransform(8, None), 10)
    spec = OrderSpec(1, dataset.reader.index.counts, 480)  # 2 batches an epoch
    expected = [request.ids.tolist() for request in take(TrainBatchSampler(spec), 8)]
    place = {"position": None}
    loader = TrainLoader(dataset, TrainBatchSampler(spec), WorkerConfig(2), lambda: place["position"])
    seen = [batch["id"].tolist() for _ in range(3) for batch in loader]
    assert seen == expected[:6]
    workers = [worker.pid for worker in loader._iterator._workers]
    place["position"] = 5  # pretend that the last batch was fetched, but not trained on
    assert [batch["id"].tolist() for batch in loader] == expected[5:7]
    assert [worker.pid for worker in loader._iterator._workers] == workers
    loader.close()
    place["position"] = 7
    assert next(iter(loader))["id"].tolist() == expected[7]
    loader.close()


def test_start_methods_agree_and_workers_die_with_a_killed_trainer(digits):
    """A separate process, so that it may be killed with -9: its workers must not stay behind and hold a GPU."""
    script = Path(__file__).with_name("worker_methods.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parent.parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(script), str(digits)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        report = json.loads(process.stdout.readline())
        assert all(alive(pid) for pid in report["workers"])
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert set(report["digests"]) == {first_batches(digits, WorkerConfig())}
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in report["workers"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in report["workers"])


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
