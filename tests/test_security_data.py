"""Crafted tars, payloads and index files: refused by file and byte, never executed, never inflated into memory."""

import bz2
import gzip
import io
import lzma
import pickle
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.dataset import SampleDataset
from datamodules.index import ShardIndex, encode_index
from datamodules.indexer import index_dataset, index_shard
from datamodules.manifest import open_split, read_dataset
from datamodules.module import ClassificationDataModule
from datamodules.reader import ShardReader
from datamodules.tasks import CLASSIFICATION
from datamodules.transforms import EvalTransform
from datamodules.types import CorruptSampleError, DataError
from datamodules.verify import verify_dataset

END = bytes(1024)


def header(name, size=0, kind=b"0", magic=b"ustar\x0000", prefix=b"", size_field=None):
    """A tar header of any content, with a right checksum."""
    size_field = b"%011o\0" % size if size_field is None else size_field
    head = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size_field + b"00000000000\0"
    tail = kind + bytes(100) + magic + bytes(80) + prefix.ljust(155, b"\0") + bytes(12)
    summed = sum(head) + 8 * ord(" ") + sum(tail)
    return head + b"%06o\0 " % summed + tail


def member(name, data=b"1", **fields):
    return header(name, len(data), **fields) + data + bytes(-len(data) % 512)


def pax(key, value):
    body = f" {key}={value}\n".encode()
    length = next(n for n in range(len(body), len(body) + 9) if len(str(n)) + len(body) == n)
    return member(b"pax", f"{length}".encode() + body, kind=b"x")


GOOD = member(b"a.png") + member(b"a.cls")
LEAVES, CHANGES = "leaves the archive", "changes the member"

CRAFTED = {
    "prefix-parent": (GOOD + member(b"x.png", prefix=b"a/../.."), 2048, LEAVES),
    "prefix-absolute": (GOOD + member(b"x.png", prefix=b"/etc"), 2048, LEAVES),
    "long-name-parent": (GOOD + member(b"L", b"../../x.png\0", kind=b"L") + member(b"y.png"), 3072, LEAVES),
    "long-name-control": (GOOD + member(b"L", b"a\x1b[2J.png\0", kind=b"L") + member(b"y.png"), 3072, "control char"),
    "long-name-bomb": (GOOD + header(b"L", 1 << 30, kind=b"L"), 2048, "header extension of 1073741824 bytes"),
    "long-link": (GOOD + member(b"K", b"/etc/passwd\0", kind=b"K"), 2048, "long link name"),
    "bidirectional": (GOOD + member("\u202egnp.x.png".encode()), 2048, "control characters"),
    "not-utf8": (GOOD + member(b"\xff\xfe.png"), 2048, "is not UTF-8"),
    "backspace": (GOOD + member(b"a\x08.png"), 2048, "control characters"),
    "dots-only": (GOOD + member(b".."), 2048, LEAVES),
    "folder-with-bytes": (GOOD + member(b"d/", b"x" * 512, kind=b"5"), 2048, "folder 'd/' has 512 bytes"),
    "sparse": (GOOD + member(b"b.png", kind=b"S", magic=b"ustar  \0"), 2048, "sparse file"),
    "contiguous": (GOOD + member(b"b.png", kind=b"7"), 2048, "contiguous file"),
    "multi-volume": (GOOD + member(b"b.png", kind=b"M"), 2048, "unknown type b'M'"),
    "solaris-pax": (GOOD + member(b"b.png", kind=b"X"), 2048, "unknown type b'X'"),
    "pax-path": (GOOD + pax("path", "b.png") + member(b"c.png"), 2048, CHANGES),
    "pax-size": (GOOD + pax("size", "0") + member(b"c.png"), 2048, CHANGES),
    "pax-link": (GOOD + pax("linkpath", "/etc/passwd") + member(b"c.png"), 2048, CHANGES),
    "pax-charset": (GOOD + pax("hdrcharset", "BINARY") + member(b"c.png"), 2048, CHANGES),
    "pax-sparse": (GOOD + pax("GNU.sparse.realsize", "9") + member(b"c.png"), 2048, CHANGES),
    "pax-length": (GOOD + member(b"p", b"99 mtime=1\n", kind=b"x"), 2048, "malformed PAX"),
    "pax-zero": (GOOD + member(b"p", b"0 mtime=1\n", kind=b"x"), 2048, "malformed PAX"),
    "pax-unended": (GOOD + member(b"p", b"10 mtime=12", kind=b"x"), 2048, "malformed PAX"),
    "pax-bomb": (GOOD + header(b"p", 1 << 33 >> 1, kind=b"x"), 2048, "the limit is"),
    "global-path": (member(b"p", b"14 path=b.png\n", kind=b"g") + GOOD, 0, CHANGES),
    "past-the-end": (GOOD + header(b"b.png", 1 << 20), 2560, "ends past the end of the file"),
    "size-8-exbibyte": (
        GOOD + header(b"b.png", size_field=b"\x80" + b"\x7f" * 11),
        2048,
        "the limit is",
    ),
    "size-negative": (GOOD + header(b"b.png", size_field=b"\xff" * 12), 2048, "no octal number"),
    "size-text": (GOOD + header(b"b.png", size_field=b"-0000000001\0"), 2048, "no octal number"),
    "empty-name": (GOOD + member(b""), 2048, LEAVES),
    "cpio": (b"070701" * 200, 0, "damaged, or no tar"),
    "zip": (b"PK\x03\x04" + bytes(600), 0, "checksum field"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_tar_is_refused_by_file_and_byte(tmp_path, name):
    data, offset, message = CRAFTED[name]
    path = tmp_path / "crafted.tar"
    path.write_bytes(data + END)
    with pytest.raises(DataError, match=message) as error:
        index_shard(path)
    assert str(error.value).startswith(f"{path} at byte {offset}: ")
    assert str(error.value).isprintable()


def test_a_record_hidden_in_a_pax_value_stays_a_value(tmp_path):
    """PAX values may hold newlines; only the lengths say where a record ends."""
    (tmp_path / "a.tar").write_bytes(
        GOOD + pax("comment", "x\n14 path=q.png") + member(b"c.png") + member(b"c.cls") + END
    )
    assert index_shard(tmp_path / "a.tar").keys == ["a", "c"]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars_are_refused_before_a_byte_is_inflated(tmp_path, pack):
    (tmp_path / "a.tar").write_bytes(pack(bytes(1 << 24)))
    with pytest.raises(DataError, match=r"a.tar at byte 0: .*-compressed; shards are read by offset"):
        index_shard(tmp_path / "a.tar")


def test_keys_used_twice_or_interleaved_or_in_two_shards_are_refused_with_the_places(tmp_path):
    twice = GOOD + member(b"b.png") + member(b"b.cls") + GOOD
    (tmp_path / "twice.tar").write_bytes(twice + END)
    with pytest.raises(DataError, match=r"twice.tar at byte 4096: key 'a' was already used at byte 0"):
        index_shard(tmp_path / "twice.tar")
    mixed = member(b"a.png") + member(b"b.png") + member(b"a.cls") + member(b"b.cls")
    (tmp_path / "mixed.tar").write_bytes(mixed + END)
    with pytest.raises(DataError, match=r"mixed.tar at byte 0: sample 'a' has png"):
        index_shard(tmp_path / "mixed.tar")
    (tmp_path / "train").mkdir()
    for name in ("x.tar", "y.tar"):
        (tmp_path / "train" / name).write_bytes(GOOD + END)
    with pytest.raises(DataError, match=r"key 'a' is in x.tar and in y.tar"):
        index_dataset(tmp_path)


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def png():
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format="PNG")
    return stream.getvalue()


def write(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_pickles_in_a_tar_are_never_executed(tmp_path):
    canary = tmp_path / "executed"
    payload = pickle.dumps(Canary(canary))
    stream = io.BytesIO()
    np.save(stream, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    kinds = {"pyd": payload, "pkl": payload, "pickle": payload, "pth": payload, "npy": stream.getvalue()}
    members = [("s.png", png()), ("s.cls", b"0"), *((f"s.{kind}", data) for kind, data in kinds.items())]
    write(tmp_path / "train" / "a.tar", members)
    info = index_dataset(tmp_path)
    index = open_split(tmp_path, info, "train")
    assert set(index.locate(0).fields) == {"png", "cls", *kinds}
    assert SampleDataset(ShardReader(index), CLASSIFICATION, EvalTransform(image_size=8, resize=None), 1)[0].target == 0
    assert list(verify_dataset(tmp_path, info, True, lambda samples: None)) == []
    assert not canary.exists()
    pickle.loads(payload)  # the canary is a live one
    assert canary.exists()


@pytest.mark.parametrize("extension", ["png", "jpg", "cls"])
def test_pickles_in_the_place_of_images_and_labels_are_refused(tmp_path, extension):
    canary = tmp_path / "executed"
    members = {"png": png(), "cls": b"0"}
    members.pop("png" if extension == "jpg" else extension)
    write(tmp_path / "train" / "a.tar", [*((f"s.{kind}", data) for kind, data in members.items())])
    members[extension] = pickle.dumps(Canary(canary))
    write(tmp_path / "train" / "a.tar", [(f"s.{kind}", data) for kind, data in members.items()])
    with pytest.raises(DataError, match=r"is no class id|not a readable JPEG, PNG or WEBP image"):
        info = index_dataset(tmp_path)
        index = open_split(tmp_path, info, "train")
        SampleDataset(ShardReader(index), CLASSIFICATION, EvalTransform(image_size=8, resize=None), 1)[0]
    assert not canary.exists()


@pytest.mark.parametrize("name", ["dataset.json", "train/index.bin"])
def test_pickles_in_the_place_of_our_own_files_are_refused(tmp_path, name):
    write(tmp_path / "train" / "a.tar", [("s.png", png()), ("s.cls", b"0")])
    index_dataset(tmp_path)
    canary = tmp_path / "executed"
    (tmp_path / name).write_bytes(pickle.dumps(Canary(canary)) + bytes(200))
    with pytest.raises(DataError, match=r"dataset.json is damaged|index.bin is no index"):
        open_split(tmp_path, read_dataset(tmp_path), "train")
    assert not canary.exists()


@pytest.mark.parametrize(
    "path",
    [
        "pipe:touch {canary}",
        "pipe:touch {canary} |",
        "data/{{000000..999999999999}}",
        "data/{{a,b}}{{a,b}}{{0..99999999}}.tar",
        "$(touch {canary})",
        "`touch {canary}`",
    ],
)
def test_a_path_is_never_a_command_or_a_pattern(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "executed"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"does not exist|is not allowed"):
        ClassificationDataModule(path.format(canary=canary), batch_size=8).setup("fit")
    assert not canary.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def rows(tmp_path):
    path = write(tmp_path / "train" / "a.tar", [("s.png", png()), ("s.cls", b"0"), ("t.png", png()), ("t.cls", b"1")])
    return index_shard(path)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "..", "x/y.tar", "a\nb.tar", "a\x1b[2J.tar", ""])
def test_an_index_never_names_a_file_outside_its_folder(tmp_path, name):
    part = rows(tmp_path)
    escaping = type(part)(name, part.size, part.keys, part.field_counts, part.fields, part.extensions)
    (tmp_path / "train" / "index.bin").write_bytes(encode_index([escaping]))
    with pytest.raises(DataError, match="which is no plain file name") as error:
        ShardIndex(tmp_path / "train")
    assert str(error.value).isprintable()


def test_a_flipped_bit_anywhere_in_the_index_is_refused_at_setup(tmp_path):
    """A changed sample row would pair an image with its neighbour's label, and every checksum would still fit."""
    rows(tmp_path)
    info = index_dataset(tmp_path)
    path = tmp_path / "train" / "index.bin"
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"index.bin"):
            open_split(tmp_path, info, "train")


def test_an_index_that_points_past_its_shard_is_refused_before_memory_is_taken(tmp_path):
    part = rows(tmp_path)
    part.fields["size"][0] = 2**32 - 1
    (tmp_path / "train" / "index.bin").write_bytes(encode_index([part]))
    with pytest.raises(CorruptSampleError, match=r"a.tar, sample 's'.png at byte 512: ends after its shard"):
        ShardReader(ShardIndex(tmp_path / "train")).read(0, ("png",))


def test_a_key_of_control_bytes_in_an_index_cannot_reach_a_terminal(tmp_path):
    part = rows(tmp_path)
    part.keys[0] = "\x1b[2J\n"
    part.fields["crc32"][0] ^= 1
    (tmp_path / "train" / "index.bin").write_bytes(encode_index([part]))
    with pytest.raises(CorruptSampleError) as error:
        ShardReader(ShardIndex(tmp_path / "train")).read(0, ("png",))
    assert str(error.value).isprintable()


def test_labels_are_digits_only(tmp_path):
    for text in (b"1e3", b"0x10", b"1_000", "٣".encode(), b"1\x00", b"True", b"nan", b"[1]", b"2147483648"):
        write(tmp_path / "a.tar", [("s.png", png()), ("s.cls", text)])
        with pytest.raises(DataError, match=r"a.tar at byte \d+, sample 's': label .* is no class id"):
            index_shard(tmp_path / "a.tar")
