"""A data module trains from a URL as from a folder, and the next shards are in the cache before they are needed."""

import sys
import threading
import time
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from shard_server import FaultyServer

from datamodules import prefetch as prefetch_module
from datamodules import remote as remote_module
from datamodules.module import ClassificationDataModule
from datamodules.opening import MixtureSource
from datamodules.pack import pack
from datamodules.prefetch import upcoming_shards
from datamodules.transforms import EvalTransform, TrainTransform
from datamodules.types import DataError

TRAIN = TrainTransform(image_size=8, crop=False, auto_augment=None, color_jitter=0.0)
EVAL = EvalTransform(image_size=8, resize=None)


@pytest.fixture
def folder(tmp_path):
    pack("digits", str(tmp_path / "digits"), shard_size_mib=0.25)
    return tmp_path / "digits"


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(remote_module, "RETRY_PAUSES_S", (0.01, 0.02))
    server = FaultyServer(folder)
    yield server
    server.close()


def data_module(path, tmp_path, **options):
    options = {"batch_size": 64, "num_workers": 0, "window": 100, "cache_dir": str(tmp_path / "cache")} | options
    data = ClassificationDataModule(path, train_transform=TRAIN, eval_transform=EVAL, **options)
    data.setup("fit")
    return data


def batches(data, count=None):
    loader = data.train_dataloader()
    seen = [(batch["id"].tolist(), batch["image"].sum().item()) for batch in islice(loader, count)]
    data.teardown("fit")
    return seen


@pytest.mark.parametrize("workers", [0, 1])
def test_training_from_a_url_is_training_from_the_folder(tmp_path, folder, server, workers):
    remote = data_module(server.url, tmp_path, num_workers=workers)
    local = data_module(str(folder), tmp_path)
    assert remote.dataset_digest == local.dataset_digest
    assert remote.class_names == local.class_names
    assert batches(remote) == batches(local)
    assert remote.probe_batch(8)["id"].tolist() == local.probe_batch(8)["id"].tolist()
    shards = len(list((folder / "train").glob("*.tar")))
    fetched = [path for path in server.gets if path.startswith("/train/") and path.endswith(".tar")]
    assert len(fetched) == len(set(fetched)) == shards


def test_a_cache_of_a_third_of_the_data_gives_the_same_batches(tmp_path, folder, server):
    size = sum(path.stat().st_size for path in (folder / "train").glob("*.tar"))
    remote = data_module(server.url, tmp_path, cache_gib=size / 3 / 2**30, lanes=2)
    assert batches(remote) == batches(data_module(str(folder), tmp_path, lanes=2))
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*/*.tar")) <= size / 3


def test_a_mixture_of_a_url_and_a_folder_trains(tmp_path, folder, server):
    both = [MixtureSource(server.url, 1.0), MixtureSource(str(folder), 1.0)]
    alone = [MixtureSource(str(folder), 1.0), MixtureSource(str(folder), 1.0)]
    assert batches(data_module(both, tmp_path), 5) == batches(data_module(alone, tmp_path), 5)


def test_shards_come_in_the_order_of_their_need_before_any_is_read(tmp_path, folder, server, monkeypatch):
    monkeypatch.setattr(prefetch_module, "INTERVAL_S", 0.01)
    data = data_module(server.url, tmp_path, lanes=1, window=1)
    data.train_dataloader()
    shards = len(list((folder / "train").glob("*.tar")))
    deadline = time.monotonic() + 10
    while len(fetched := [path for path in server.gets if path.startswith("/train/train-")]) < shards:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    data.teardown("fit")
    index = data.opened.split("train")[0]
    order = [int(index.samples[sample]["shard"]) for ids, _ in batches(data) for sample in ids]
    needed = list(dict.fromkeys(order))
    names = [f"/train/{index.shard_names[shard]}" for shard in needed]
    assert fetched[: len(names)] == names


def test_a_fault_while_prefetching_is_reported_by_the_reader_that_needs_the_shard(tmp_path, folder, server):
    data = data_module(server.url, tmp_path)
    server.faults[".tar"] = ["status 500"] * 1000
    with pytest.raises(DataError, match=r"train-\d+.tar was answered with HTTP status 500"):
        batches(data)
    assert not [thread for thread in threading.enumerate() if thread.name == "shard-prefetch" and not thread.daemon]


def test_names_and_messages_of_a_mixture_hold_no_credential(tmp_path, folder, server):
    other = tmp_path / "other"
    image = Image.new("RGB", (8, 8))
    for split, label in product(("train", "val"), ("cat", "dog")):
        (tmp_path / "images" / split / label).mkdir(parents=True)
        image.save(tmp_path / "images" / split / label / "a.png")
    pack("imagefolder", str(other), data=str(tmp_path / "images"))
    url = server.url.replace("http://", "http://user:hunter2@") + "?token=hunter2"
    data = data_module([MixtureSource(url), MixtureSource(str(folder))], tmp_path)
    assert not any("hunter2" in name for name in data.source_counts())
    with pytest.raises(DataError, match="datasets can be mixed only if") as error:
        data_module([MixtureSource(url), MixtureSource(str(other))], tmp_path)
    assert "hunter2" not in str(error.value)


def test_a_url_is_never_packed_into(tmp_path, server):
    data = ClassificationDataModule(server.url, sources="digits", cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    assert data.num_classes == 10
    assert not Path("http:").exists()


def test_a_url_without_a_dataset_is_one_line(tmp_path, server):
    data = ClassificationDataModule(server.url + "/train", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"/train/dataset.json was not found; check data.path"):
        data.setup("fit")


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    ids=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=5), min_size=1, max_size=12),
    budget=st.integers(0, 40),
)
@settings(max_examples=200, deadline=None)
def test_what_is_ahead_is_the_longest_run_of_first_uses_within_the_budget(sizes, ids, budget):
    plan = [np.array(batch, dtype=np.int64) % len(sizes) for batch in ids]
    first_uses = list(dict.fromkeys(int(shard) for batch in plan for shard in batch))
    ahead = upcoming_shards(lambda batch: plan[batch], lambda shards: shards, sizes, 0, budget, len(plan))
    assert ahead == first_uses[: len(ahead)]
    assert len(ahead) == 1 or sum(sizes[shard] for shard in ahead) <= budget
    if len(ahead) < len(first_uses):
        assert sum(sizes[shard] for shard in first_uses[: len(ahead) + 1]) > budget
