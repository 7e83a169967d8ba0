"""Many processes share one cache, and any of them may be killed at any moment."""

import multiprocessing as mp
import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from shard_server import (
    SHARDS,
    FaultyServer,
    cache_of,
    contents,
    expected,
    files,
    open_train,
    read_in_process,
    shard_bytes,
    write_dataset,
)

from datamodules import remote as remote_module
from datamodules.cache import ShardCache

PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["datamodules.cache", "datamodules.reader"])


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "served")


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(remote_module, "RETRY_PAUSES_S", (0.01, 0.02))
    server = FaultyServer(folder)
    yield server
    server.close()


def start(cache, seconds, queue):
    digest = cache.describe().splits["train"].digest
    process = PROCESSES.Process(target=read_in_process, args=(cache, digest, seconds, queue))
    process.start()
    return process


def test_processes_share_one_small_cache_and_fetch_each_shard_once_when_it_is_large(tmp_path, folder, server):
    queue = PROCESSES.Queue()
    cache = cache_of(server.url, tmp_path)
    processes = [start(cache, 0.3, queue) for _ in range(3)]
    answers = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    right = {tuple(fields["jpg"][:2] for fields in expected(folder))}
    assert answers == [right] * 3
    assert [server.gets.count(f"/train/s{i}.tar") for i in range(SHARDS)] == [1] * SHARDS
    small = ShardCache(cache.remote, tmp_path / "small", 2 * shard_bytes(folder))
    processes = [start(small, 1.0, queue) for _ in range(3)]
    assert [queue.get(timeout=60) for _ in processes] == [right] * 3
    for process in processes:
        process.join()
    assert len(list((tmp_path / "small").glob("*/*/*.tar"))) <= 2
    assert list((tmp_path / "small").glob("*/*/.*.part")) == []


def kill_and_recover(tmp_path, folder, server, delays):
    """Kill a fetching process after each delay; the next one must find everything in order."""
    cache = cache_of(server.url, tmp_path)
    queue = PROCESSES.Queue()
    for delay in delays:
        server.faults["s1.tar"] = ["slow"]
        process = start(cache, 30, queue)
        while "/train/s1.tar" not in server.gets:
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        server.gets.clear()
        server.faults.clear()
        index = open_train(cache)
        began = time.monotonic()
        assert contents(index) == expected(folder)
        assert time.monotonic() - began < 5  # a dead process's locks are gone with it
        assert files(tmp_path, "*/*/.*.part") == []
        for shard in index.folder.glob("*.tar"):
            shard.unlink()
        server.gets.clear()


def test_a_process_killed_while_it_fetches_leaves_nothing_wrong_behind(tmp_path, folder, server):
    kill_and_recover(tmp_path, folder, server, [0.0, 0.1, 0.35])


@pytest.mark.slow
def test_processes_killed_at_60_moments_leave_nothing_wrong_behind(tmp_path, folder, server):
    kill_and_recover(tmp_path, folder, server, [0.01 * number for number in range(60)])
