"""Faults of a file system that pass are waited for and leave no trace; lasting ones end the run and name the shard."""

import os
import random
import threading
import time

import pytest
from webdataset.writer import TarWriter

from datamodules import reader as reader_module
from datamodules.index import ShardIndex
from datamodules.indexer import index_dataset
from datamodules.reader import PASSING_FAULTS, ShardReader, read_at
from datamodules.types import CorruptSampleError, DataError

EIO_FILE = "/proc/self/mem"  # reading address 0 of any process fails with a real EIO


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train").mkdir()
    for shard in range(2):
        with (tmp_path / "train" / f"s{shard}.tar").open("wb") as stream, TarWriter(stream, encoder=False) as writer:
            for i in range(4):
                writer.write({"__key__": f"k{shard}{i}", "jpg": bytes([i]) * 999, "cls": b"1"})
    index_dataset(tmp_path)
    return tmp_path


def read_all(reader):
    return [reader.read(sample, ("jpg", "cls")).fields for sample in range(len(reader.index))]


def break_shard(folder):
    """Make s0.tar answer with EIO; returns what mends it."""
    shard, kept = folder / "train" / "s0.tar", folder / "kept.tar"
    shard.rename(kept)
    shard.symlink_to(EIO_FILE)
    return lambda: kept.replace(shard)


def test_an_io_error_that_passes_leaves_no_trace(folder, monkeypatch):
    monkeypatch.setattr(reader_module, "RETRY_PAUSES_S", (0.05, 0.5, 5.0))
    index = ShardIndex(folder / "train")
    expected = read_all(ShardReader(index))
    mend = break_shard(folder)
    timer = threading.Timer(0.3, mend)
    timer.start()
    started = time.monotonic()
    assert read_all(ShardReader(index)) == expected
    assert time.monotonic() - started > 0.1
    timer.join()


def test_a_lasting_io_error_ends_after_a_bounded_number_of_tries_and_names_the_shard(folder, monkeypatch):
    monkeypatch.setattr(reader_module, "RETRY_PAUSES_S", (0.01, 0.02))
    break_shard(folder)
    reader = ShardReader(ShardIndex(folder / "train"))
    message = r"shard .*s0.tar cannot be read \(Input/output error\) 3 times; restore it"
    with pytest.raises(DataError, match=message) as error:
        reader.read(0, ("jpg",))
    assert not isinstance(error.value, CorruptSampleError)  # a dead disk is no bad sample to be skipped
    assert reader.read(4, ("cls",)).fields == {"cls": b"1"}  # the other shard still reads


def test_a_replaced_shard_is_opened_anew_when_its_checksum_does_not_fit(folder):
    """The open file is the old one, its name already the good one: what a stale handle looks like."""
    index = ShardIndex(folder / "train")
    shard = folder / "train" / "s0.tar"
    good = shard.read_bytes()
    expected = read_all(ShardReader(index))
    damaged = bytearray(good)
    damaged[600] ^= 1
    shard.write_bytes(damaged)
    reader = ShardReader(index)
    reader.read(3, ("jpg",))  # holds the damaged file open
    (folder / "train" / "new.tar").write_bytes(good)
    (folder / "train" / "new.tar").replace(shard)
    assert read_all(reader) == expected


def test_a_lasting_fault_is_not_repeated(folder):
    (folder / "train" / "s0.tar").unlink()
    started = time.monotonic()
    with pytest.raises(DataError, match=r"s0.tar cannot be read \(No such file or directory\); restore it"):
        ShardReader(ShardIndex(folder / "train")).read(0, ("cls",))
    assert time.monotonic() - started < 0.1


def test_short_reads_are_completed_and_an_end_of_file_is_not_waited_for(tmp_path):
    data = random.Random(0).randbytes(5000)
    (tmp_path / "file").write_bytes(data)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    rng = random.Random(1)

    def short(file, size, offset):
        return os.pread(file, min(size, rng.randrange(1, 99)), offset)

    assert read_at(short, descriptor, 4000, 700) == data[700:4700]
    assert read_at(short, descriptor, 4000, 4900) == data[4900:]
    os.close(descriptor)


def test_the_passing_faults_are_those_of_network_file_systems():
    names = {os.strerror(number) for number in PASSING_FAULTS}
    assert {"Input/output error", "Stale file handle", "Connection timed out"} <= names
    assert not {"No such file or directory", "Permission denied"} & names
