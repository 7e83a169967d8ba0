"""Bytes that are not the indexed ones are never handed on."""

import os
import pickle
import random
from pathlib import Path

import pytest
from webdataset.writer import TarWriter

from datamodules import reader as reader_module
from datamodules.index import ShardIndex
from datamodules.indexer import index_dataset
from datamodules.reader import ShardReader
from datamodules.types import CorruptSampleError, DataError
from datamodules.verify import verify_dataset


@pytest.fixture
def folder(tmp_path):
    """Five shards of four samples with random payloads; the images need not decode here."""
    (tmp_path / "train").mkdir()
    rng = random.Random(0)
    for shard in range(5):
        with (tmp_path / "train" / f"s{shard}.tar").open("wb") as stream, TarWriter(stream, encoder=False) as writer:
            for sample in range(4):
                image = rng.randbytes(rng.randrange(1500))
                writer.write({"__key__": f"k{shard}{sample}", "jpg": image, "cls": b"1", "txt": b"note"})
    index_dataset(tmp_path)
    return tmp_path


def read_all(reader):
    return [reader.read(sample, ("jpg", "cls")) for sample in range(len(reader.index))]


def test_only_the_wanted_fields_are_read(folder):
    raw = ShardReader(ShardIndex(folder / "train")).read(6, ("cls", "png"))
    assert raw.fields == {"cls": b"1"}
    assert raw.key == "k12"
    assert raw.where == f"{folder}/train/s1.tar, sample 'k12'"


def test_a_pickled_reader_opens_its_own_files(folder):
    reader = ShardReader(ShardIndex(folder / "train"))
    before = read_all(reader)
    assert read_all(pickle.loads(pickle.dumps(reader))) == before


def test_few_files_stay_open_and_all_are_closed(folder, monkeypatch):
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 2)
    descriptors = Path("/proc/self/fd")
    index = ShardIndex(folder / "train")
    before = len(list(descriptors.iterdir()))
    reader = ShardReader(index)
    expected = read_all(reader)
    assert len(list(descriptors.iterdir())) <= before + 2
    assert [reader.read(i, ("jpg", "cls")) for i in reversed(range(20))] == expected[::-1]
    reader.close()
    assert len(list(descriptors.iterdir())) == before
    assert read_all(reader) == expected
    del reader
    assert len(list(descriptors.iterdir())) == before


def test_every_flipped_payload_bit_is_found_and_costs_one_sample(folder):
    index = ShardIndex(folder / "train")
    intact = read_all(ShardReader(index))
    rng = random.Random(1)
    for _ in range(400):
        sample, extension = rng.randrange(len(index)), rng.choice(("jpg", "cls"))
        location = index.locate(sample)
        field = location.fields[extension]
        if field.size == 0:
            continue
        path = folder / "train" / index.shard_names[location.shard]
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[field.offset + rng.randrange(field.size)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        reader = ShardReader(index)
        message = rf"{path.name}, sample '{location.key}'.{extension} at byte {field.offset}: a checksum"
        with pytest.raises(CorruptSampleError, match=message):
            reader.read(sample, ("jpg", "cls"))
        others = [other for other in range(len(index)) if other != sample]
        assert [reader.read(other, ("jpg", "cls")) for other in others] == [intact[other] for other in others]
        path.write_bytes(original)


def test_a_flipped_header_bit_does_no_harm(folder):
    index = ShardIndex(folder / "train")
    intact = read_all(ShardReader(index))
    path = folder / "train" / "s2.tar"
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 255
    path.write_bytes(damaged)
    assert read_all(ShardReader(index)) == intact


def test_a_shard_cut_while_the_run_reads_it_is_named(folder):
    index = ShardIndex(folder / "train")
    location = index.locate(19)
    field = location.fields["jpg"]
    os.truncate(folder / "train" / "s4.tar", field.offset + 5)
    with pytest.raises(CorruptSampleError, match=rf"s4.tar, sample 'k43'.jpg at byte .*: only 5 of {field.size} bytes"):
        ShardReader(index).read(19, ("jpg",))


def test_a_vanished_shard_is_named(folder):
    index = ShardIndex(folder / "train")
    (folder / "train" / "s0.tar").unlink()
    with pytest.raises(DataError, match=r"shard .*s0.tar cannot be read \(No such file or directory\); restore it"):
        ShardReader(index).read(0, ("cls",))


def test_verify_lists_every_fault_and_counts_every_sample(folder):
    info = index_dataset(folder, ["a", "b"])
    index = ShardIndex(folder / "train")
    for sample in (1, 14):
        location = index.locate(sample)
        path = folder / "train" / index.shard_names[location.shard]
        data = bytearray(path.read_bytes())
        data[location.fields["cls"].offset] ^= 1
        path.write_bytes(data)
    done = []
    faults = list(verify_dataset(folder, info, False, done.append))
    assert len(faults) == 2
    assert "sample 'k01'" in faults[0]
    assert "sample 'k32'" in faults[1]
    assert sum(done) == 20
    decoded = list(verify_dataset(folder, info, True, done.append))
    assert len(decoded) == 20
    assert sum("not a readable JPEG" in fault for fault in decoded) == 18


def test_verify_reports_a_damaged_tar_header_although_the_samples_are_whole(folder):
    info = index_dataset(folder)
    path = folder / "train" / "s2.tar"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    assert len(faults := list(verify_dataset(folder, info, False, lambda samples: None))) == 1
    assert "s2.tar at byte 0: header checksum" in faults[0]


def test_verify_reports_a_damaged_index(folder):
    info = index_dataset(folder)
    path = folder / "train" / "index.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert list(verify_dataset(folder, info, False, lambda samples: None)) == [
        f"{path}: damaged, its digest does not fit; make it again with `mirrorla shards index {folder}`"
    ]
