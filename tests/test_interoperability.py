"""Our tars are plain tars to every other reader, and other writers' tars are plain shards to us."""

import hashlib
import io
import os
import subprocess
import sys

import pytest
from webdataset.writer import ShardWriter

from datamodules.index import ShardIndex
from datamodules.indexer import index_dataset
from datamodules.pack import pack
from datamodules.reader import ShardReader
from datamodules.types import DataError

SAMPLES = {f"n0{i % 2}/s{i:02d}": (bytes([i]) * (200 + 321 * i), b"%d" % (i % 3)) for i in range(12)}

WEBDATASET = """
import hashlib, sys, webdataset
samples = webdataset.WebDataset(sys.argv[1:], shardshuffle=False)
for sample in samples:
    image, label = next(sample[e] for e in ("png", "jpg") if e in sample), sample["cls"]
    print(sample["__key__"], hashlib.sha256(image).hexdigest(), label.decode())
"""


def lines(folder):
    """Every sample as our reader sees it: key, digest of the image, label."""
    index = ShardIndex(folder)
    reader = ShardReader(index)
    for sample in range(len(index)):
        raw = reader.read(sample, ("png", "jpg", "cls"))
        image = raw.fields.get("png") or raw.fields.get("jpg")
        yield f"{raw.key} {hashlib.sha256(image).hexdigest()} {raw.fields['cls'].decode()}"


@pytest.fixture
def plain(tmp_path):
    """The samples as files, for GNU tar."""
    for key, (image, label) in SAMPLES.items():
        path = tmp_path / "plain" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".jpg").write_bytes(image)
        path.with_suffix(".cls").write_bytes(label)
    return tmp_path / "plain"


def gnu_tar(folder, out, *options):
    out.parent.mkdir(parents=True)
    subprocess.run(["tar", "--sort=name", *options, "-cf", out, "-C", folder, "."], check=True)
    return out


def contents(folder):
    index = ShardIndex(folder)
    reader = ShardReader(index)
    raws = [reader.read(sample, ("jpg", "cls")) for sample in range(len(index))]
    return {raw.key: (raw.fields["jpg"], raw.fields["cls"]) for raw in raws}


def test_webdatasets_own_reader_sees_our_samples_in_our_order(tmp_path):
    pack("digits", str(tmp_path / "digits"), shard_size_mib=0.5)
    train = tmp_path / "digits" / "train"
    shards = sorted(map(str, train.glob("*.tar")))
    assert len(shards) > 1
    command = [sys.executable, "-W", "ignore", "-c", WEBDATASET, *shards]
    read = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert read == list(lines(train))
    assert len(read) == 1438


def test_gnu_tar_extracts_our_shards_byte_for_byte(tmp_path):
    pack("digits", str(tmp_path / "digits"), shard_size_mib=64)
    split = tmp_path / "digits" / "val"
    (tmp_path / "out").mkdir()
    shard = split / "val-000000.tar"
    done = subprocess.run(["tar", "-xvf", shard, "-C", tmp_path / "out"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    index = ShardIndex(split)
    reader = ShardReader(index)
    raws = [reader.read(sample, index.extensions) for sample in range(len(index))]
    expected = {f"{raw.key}.{extension}": data for raw in raws for extension, data in raw.fields.items()}
    assert list(expected) == done.stdout.split()
    assert {name: (tmp_path / "out" / name).read_bytes() for name in expected} == expected


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "pax"])
def test_every_format_of_gnu_tar_reads_the_same(tmp_path, plain, form):
    gnu_tar(plain, tmp_path / "data" / "train" / "a.tar", f"--format={form}")
    index_dataset(tmp_path / "data")
    assert contents(tmp_path / "data" / "train") == SAMPLES


def test_webdatasets_shards_read_the_same(tmp_path):
    (tmp_path / "train").mkdir()
    with ShardWriter(str(tmp_path / "train" / "x-%03d.tar"), maxcount=5, verbose=0, encoder=False) as writer:
        for key, (image, label) in SAMPLES.items():
            writer.write({"__key__": key, "jpg": image, "cls": label})
    index_dataset(tmp_path)
    assert contents(tmp_path / "train") == SAMPLES
    assert ShardIndex(tmp_path / "train").counts == (5, 5, 2)


@pytest.mark.parametrize("form", ["oldgnu", "gnu", "ustar"])
def test_long_names_are_understood_in_every_format_that_keeps_them_in_headers(tmp_path, form):
    long = "/".join(["folder" * 8] * 3) + "/" + "x" * 60
    path = tmp_path / "plain" / f"{long}.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"image")
    path.with_suffix(".cls").write_bytes(b"4")
    gnu_tar(tmp_path / "plain", tmp_path / "data" / "train" / "a.tar", f"--format={form}")
    index_dataset(tmp_path / "data")
    assert contents(tmp_path / "data" / "train") == {long: (b"image", b"4")}


def test_a_pax_name_override_is_refused_with_the_option_that_mends_it(tmp_path):
    (tmp_path / "plain").mkdir()
    for extension in ("jpg", "cls"):
        (tmp_path / "plain" / f"{'x' * 120}.{extension}").write_bytes(b"1")
    gnu_tar(tmp_path / "plain", tmp_path / "data" / "train" / "a.tar", "--format=pax")
    with pytest.raises(DataError, match=r"a.tar at byte \d+: PAX record 'path' .*; repack with `tar --format=gnu`"):
        index_dataset(tmp_path / "data")


def test_hard_links_and_holes_that_gnu_tar_writes_are_refused(tmp_path, plain):
    os.link(plain / "n00" / "s00.cls", plain / "n00" / "s00.txt")
    with pytest.raises(DataError, match=r"a.tar at byte \d+: member './n00/s00.txt' is a hard link"):
        index_dataset(gnu_tar(plain, tmp_path / "hard" / "train" / "a.tar").parents[1])
    (plain / "n00" / "s00.txt").unlink()
    with (plain / "n00" / "s00.jpg").open("wb") as stream:
        stream.seek(1 << 20, io.SEEK_SET)
        stream.write(b"end")
    for form, message in (("gnu", "is a sparse file"), ("pax", r"PAX record 'GNU.sparse.major' changes the member")):
        archive = gnu_tar(plain, tmp_path / form / "train" / "a.tar", "--sparse", f"--format={form}")
        with pytest.raises(DataError, match=rf"a.tar at byte \d+: .*{message}"):
            index_dataset(archive.parents[1])
