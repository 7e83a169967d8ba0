"""Remote shards arrive whole and checked or not at all, within the cache's bounds, whatever server or process does."""

import os
import pickle
import re
import resource
import sys
import time
from pathlib import Path

import fsspec
import pytest
from webdataset.writer import TarWriter

sys.path.insert(0, str(Path(__file__).parent))
from shard_server import (
    SAMPLES,
    SHARDS,
    FaultyServer,
    cache_of,
    contents,
    expected,
    files,
    open_train,
    shard_bytes,
    write_dataset,
)

from datamodules import remote as remote_module
from datamodules.cache import ShardCache, open_cache
from datamodules.indexer import index_dataset
from datamodules.reader import ShardReader
from datamodules.remote import RemoteFolder, is_url
from datamodules.types import CorruptSampleError, DataError


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "served")


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(remote_module, "RETRY_PAUSES_S", (0.01, 0.02))
    server = FaultyServer(folder)
    yield server
    server.close()


def test_http_shards_are_fetched_once_and_read_like_local_ones(tmp_path, folder, server):
    index = open_train(cache_of(server.url, tmp_path))
    assert contents(index) == expected(folder)
    assert contents(pickle.loads(pickle.dumps(index))) == expected(folder)
    again = open_train(cache_of(server.url, tmp_path))
    assert contents(again) == expected(folder)
    assert sorted(server.gets).count("/train/s0.tar") == 1
    assert server.gets.count("/train/index.bin") == 1
    assert files(tmp_path) == [f"s{i}.tar" for i in range(SHARDS)]
    assert files(tmp_path, "*/*/.*.part") == []


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_other_file_systems_read_the_same(tmp_path, folder, protocol):
    url = f"file://{folder}"
    if protocol == "memory":
        url = "memory://bucket/data"
        fsspec.filesystem("memory").put(str(folder), "/bucket/data", recursive=True)
    assert contents(open_train(cache_of(url, tmp_path))) == expected(folder)


@pytest.mark.parametrize("fault", ["break", "status 503", "status 429", "flip", "page", "slow"])
def test_a_fault_that_passes_is_repeated_and_leaves_no_trace(tmp_path, folder, server, fault):
    index = open_train(cache_of(server.url, tmp_path))
    server.faults["s2.tar"] = [fault]
    assert contents(index) == expected(folder)
    assert server.gets.count("/train/s2.tar") == (1 if fault == "slow" else 2)
    assert files(tmp_path, "*/*/.*.part") == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("break", r"/train/s2.tar could not be fetched \(ClientPayloadError\)"),
        ("status 503", r"/train/s2.tar was answered with HTTP status 503"),
        ("status 404", r"/train/s2.tar was not found; check data.path"),
        ("status 403", r"/train/s2.tar may not be read; check the credentials"),
        ("hang", r"/train/s2.tar gave no answer within 0.2 s"),
        ("flip", r"/train/s2.tar has other bytes at \d+ than its index says, fetched 3 times; restore it"),
        ("page", r"/train/s2.tar brought 25 bytes, its index says \d+, fetched 3 times; restore it"),
        ("endless", r"/train/s2.tar is longer than the expected \d+ bytes"),
    ],
)
def test_a_lasting_fault_is_one_line_that_names_the_shard(tmp_path, folder, server, fault, message):
    index = open_train(cache_of(server.url, tmp_path, timeout_s=0.2))
    server.faults["s2.tar"] = [fault] * 9
    reader = ShardReader(index)
    with pytest.raises(DataError, match=re.escape(server.url) + message) as error:
        reader.read(2 * SAMPLES, ("jpg",))
    assert not isinstance(error.value, CorruptSampleError)
    assert str(error.value).isprintable()
    assert files(tmp_path, "*/*/.*.part") == []
    assert reader.read(0, ("cls",)).fields == {"cls": b"0"}


def test_no_server_is_one_line(tmp_path, folder, server):
    server.close()
    with pytest.raises(DataError, match=r"/dataset.json could not be fetched \(.*\)"):
        cache_of(server.url, tmp_path).describe()


def test_a_missing_or_replaced_remote_shard_is_named_at_setup(tmp_path, folder, server):
    (folder / "train" / "s3.tar").rename(folder / "s3.tar")
    with pytest.raises(DataError, match=r"/train/s3.tar was not found"):
        open_train(cache_of(server.url, tmp_path))
    (folder / "train" / "s3.tar").write_bytes(b"short")
    with pytest.raises(DataError, match=r"/train/s3.tar has 5 bytes, its index says \d+; restore it"):
        open_train(cache_of(server.url, tmp_path))
    (folder / "s3.tar").replace(folder / "train" / "s3.tar")
    assert contents(open_train(cache_of(server.url, tmp_path))) == expected(folder)


def test_no_message_repeats_a_credential(tmp_path, folder, server):
    secret = "hunter2"
    url = server.url.replace("http://", f"http://user:{secret}@") + f"/nothing?X-Amz-Signature={secret}#{secret}"
    with pytest.raises(DataError) as error:
        cache_of(url, tmp_path).describe()
    server.faults["dataset.json"] = ["status 500", "break", "status 401", "page"]
    messages = [str(error.value)]
    url = server.url.replace("http://", f"http://user:{secret}@") + f"?token={secret}"
    for _ in range(3):
        with pytest.raises(DataError) as error:
            cache_of(url, tmp_path).describe()
        messages.append(str(error.value))
        server.faults["dataset.json"] = server.faults["dataset.json"][-1:] * 3
    server.faults.clear()
    assert contents(open_train(cache_of(url, tmp_path))) == expected(folder)  # and the query reaches the server
    assert all(secret not in message and server.url in message for message in messages)
    assert all(secret not in str(path) for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "url",
    [
        "pipe://x",
        "simplecache::http://127.0.0.1/x",
        "zip://a::file:///b",
        "github://a:b@/c",
        "reference://x",
        "local://x",
        "python://os",
    ],
)
def test_other_protocols_are_refused(tmp_path, url):
    assert is_url(url)
    with pytest.raises(DataError, match=r"data.path protocol '.*' is not allowed; use one of http, https, s3"):
        open_cache(url, str(tmp_path), 1.0)


def test_a_missing_protocol_package_is_named(tmp_path):
    with pytest.raises(DataError, match=r"s3://bucket/x.* needs s3fs: pip install s3fs"):
        cache_of("s3://bucket/x", tmp_path).describe()


def test_the_cache_keeps_within_its_limit_and_drops_what_was_unused_for_longest(tmp_path, folder, server):
    limit = 3 * shard_bytes(folder)
    index = open_train(cache_of(server.url, tmp_path, limit))
    reader = ShardReader(index)
    for shard in (0, 1, 2):
        reader.read(shard * SAMPLES, ("cls",))
        time.sleep(0.01)
    reader.read(0, ("cls",))  # shard 0 is used again, through the file that is open
    reader.read(3 * SAMPLES, ("cls",))
    assert files(tmp_path) == ["s0.tar", "s2.tar", "s3.tar"]
    assert [fields["cls"] for fields in contents(index)] == [b"0", b"1", b"2", b"3"] * SHARDS
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*/*.tar")) <= limit
    open_files = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert sum(name.endswith("s1.tar (deleted)") for name in open_files) == 0


def test_a_cache_smaller_than_a_shard_is_refused_at_setup(tmp_path, folder, server):
    with pytest.raises(DataError, match=r"data.cache_gib is .*; the largest shard alone takes .* GiB"):
        open_train(cache_of(server.url, tmp_path, 1000))
    with pytest.raises(DataError, match=r"data.cache_gib is 0; it must be above 0"):
        open_cache(server.url, None, 0)


def test_a_cached_shard_that_rots_is_fetched_again(tmp_path, folder, server):
    index = open_train(cache_of(server.url, tmp_path))
    contents(index)
    path = index.folder / "s1.tar"
    damaged = bytearray(path.read_bytes())
    damaged[2000] ^= 4
    path.write_bytes(damaged)
    assert contents(index) == expected(folder)
    assert server.gets.count("/train/s1.tar") == 2


def test_changed_data_at_the_same_url_is_another_dataset(tmp_path, folder, server):
    old = open_train(cache_of(server.url, tmp_path))
    contents(old)
    with (folder / "train" / "s0.tar").open("wb") as stream, TarWriter(stream, encoder=False, mtime=0) as writer:
        writer.write({"__key__": "new", "jpg": b"new", "cls": b"0"})
    index_dataset(folder)
    new = open_train(cache_of(server.url, tmp_path))
    assert contents(new) == expected(folder)
    assert new.folder != old.folder


def test_a_cache_folder_of_another_user_is_refused(tmp_path, folder, server):
    cache = ShardCache(RemoteFolder(server.url), Path("/proc/1"), 1 << 30)
    if Path("/proc/1").stat().st_uid == os.getuid():  # as root, any other user's process will do
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 12345, 12345)
        cache = ShardCache(RemoteFolder(server.url), tmp_path / "theirs", 1 << 30)
    with pytest.raises(DataError, match=r"data.cache_dir .* belongs to user \d+; name another"):
        cache.describe()


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, folder, server):
    (tmp_path / "file").touch()
    cache = ShardCache(RemoteFolder(server.url), tmp_path / "file" / "x", 1 << 30)
    with pytest.raises(DataError, match=r"data.cache_dir .* cannot be used \(Not a directory\); name another"):
        cache.describe()


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path, folder, server):
    index = open_train(cache_of(server.url, tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the kernel refuses to let any file grow further
    try:
        with pytest.raises(DataError, match=r"cache_dir .* cannot be written \(File too large\); lower data.cache"):
            ShardReader(index).read(0, ("jpg",))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path, "*/*/.*.part") == []
    assert contents(index) == expected(folder)
