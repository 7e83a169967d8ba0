"""Random damage of tars in every form: what was indexed is found damaged or intact, never lost or mixed up.

The default run damages tars 10 000 times, `pytest -m slow tests/test_fuzz.py` 100 000 times.
"""

import io
import random
import subprocess
import tarfile

import pytest
from webdataset.writer import TarWriter

from datamodules.index import ShardIndex
from datamodules.indexer import index_dataset, index_shard
from datamodules.reader import ShardReader
from datamodules.types import CorruptSampleError, DataError

SAMPLES = 8
FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "webdataset": None}


def members(long_names):
    """Payloads of every length around a block; long names make GNU's name extension appear."""
    rng = random.Random(0)
    folder = "f" * 120 + "/" if long_names else "n/"
    for i in range(SAMPLES):
        size = (0, 1, 511, 512, 513, 777, 1024, 1500)[i]
        yield f"{folder}s{i}.jpg", rng.randbytes(size)
        yield f"{folder}s{i}.cls", b"%d" % i


def write(path, form):
    if form == "webdataset":
        with path.open("wb") as stream, TarWriter(stream, encoder=False) as writer:
            fields = list(members(False))
            for (name, image), (_, label) in zip(fields[::2], fields[1::2], strict=True):
                writer.write({"__key__": name.removesuffix(".jpg"), "jpg": image, "cls": label})
        return
    with tarfile.open(path, "w", format=FORMS[form]) as tar:
        for name, data in members(form == "gnu"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5 if form == "pax" else 1  # a fraction makes a PAX record
            tar.addfile(info, io.BytesIO(data))


class Shard:
    """An indexed tar, its intact samples, and where each sample's payload lies."""

    def __init__(self, folder, form):
        self.path = folder / "train" / "a.tar"
        self.path.parent.mkdir()
        write(self.path, form)
        self.whole = self.path.read_bytes()
        index_dataset(folder)
        self.index = ShardIndex(folder / "train")
        self.rows = index_shard(self.path)
        self.intact = [raw.fields for raw in map(self.read, range(SAMPLES))]
        self.owner = {
            byte: sample
            for sample in range(SAMPLES)
            for field in self.index.locate(sample).fields.values()
            for byte in range(field.offset, field.offset + field.size)
        }

    def read(self, sample):
        reader = ShardReader(self.index)
        try:
            return reader.read(sample, self.index.extensions)
        finally:
            reader.close()

    def damage(self, data):
        """Write a damaged tar; returns the samples found damaged. Every other one is checked to be intact."""
        self.path.write_bytes(data)
        found = set()
        for sample in range(SAMPLES):
            try:
                assert self.read(sample).fields == self.intact[sample]
            except CorruptSampleError as error:
                assert f"{self.path}, sample '" in str(error) and " at byte " in str(error)
                found.add(sample)
        return found

    def index_again(self):
        """The damaged tar as one made elsewhere: refused by file and byte, or every field lies where it did."""
        try:
            rows = index_shard(self.path)
        except DataError as error:
            assert str(error).startswith(f"{self.path} at byte ")
            assert str(error).isprintable()
            return
        assert len(rows.keys) == SAMPLES
        for column in ("offset", "size", "extension"):
            assert rows.fields[column].tolist() == self.rows.fields[column].tolist()


def flip(shard, rng, payload):
    """Flip one random bit, in a payload or anywhere; returns 1 if a payload was hit and therefore had to be noticed."""
    position = rng.choice(list(shard.owner)) if payload else rng.randrange(len(shard.whole))
    data = bytearray(shard.whole)
    data[position] ^= 1 << rng.randrange(8)
    hit = {shard.owner[position]} if position in shard.owner else set()
    assert shard.damage(data) == hit
    shard.index_again()
    return len(hit)


def cut(shard, rng):
    size = rng.randrange(len(shard.whole))
    lost = {sample for byte, sample in shard.owner.items() if byte >= size}
    assert shard.damage(shard.whole[:size]) == lost
    with pytest.raises(DataError, match=rf"a.tar has {size} bytes, its index says {len(shard.whole)}"):
        shard.index.check_shards()
    try:
        index_shard(shard.path)
    except DataError as error:
        assert str(error).startswith(f"{shard.path} at byte ")
    else:  # only the padding after the end marker is gone, or everything is: an empty archive
        end = max(shard.owner) // 512 * 512 + 512 + 1024
        assert size >= end or size == 0


def fuzz(folder, form, rounds, seed):
    shard, rng, hits = Shard(folder, form), random.Random(seed), 0
    for number in range(rounds):
        kind = number % 5
        if kind == 4:
            cut(shard, rng)
        else:
            hits += flip(shard, rng, payload=kind < 2)
    assert hits >= rounds * 2 // 5


@pytest.mark.parametrize("form", FORMS)
def test_no_random_damage_is_missed_mixed_up_or_fatal(tmp_path, form):
    fuzz(tmp_path, form, 2500, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_no_random_damage_is_missed_mixed_up_or_fatal_100000_times(tmp_path, form):
    fuzz(tmp_path, form, 25_000, seed=2)


@pytest.mark.parametrize("form", FORMS)
def test_the_tars_are_of_the_form_they_claim(tmp_path, form):
    write(tmp_path / "a.tar", form)
    listed = subprocess.run(["tar", "-tf", tmp_path / "a.tar"], capture_output=True, text=True, check=True).stdout
    assert len(listed.split()) == 2 * SAMPLES
    kinds = {(tmp_path / "a.tar").read_bytes()[at + 156 : at + 157] for at in range(0, 4096, 512)}
    assert (b"x" in kinds, b"L" in kinds) == (form in ("pax", "webdataset"), form == "gnu")


def test_random_bytes_are_no_tar(tmp_path):
    rng = random.Random(3)
    path = tmp_path / "a.tar"
    for _ in range(300):
        path.write_bytes(rng.randbytes(rng.randrange(1, 3000)))
        with pytest.raises(DataError, match="at byte 0"):
            index_shard(path)
