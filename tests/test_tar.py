"""Tars that could pair an image with another's label are refused by file and byte; nothing is guessed."""

import gzip
import io
import random
import tarfile

import pytest

from datamodules.indexer import index_shard
from datamodules.types import DataError


def samples(count, start=0):
    """Two members a sample, of less than a block each: sample i begins at byte 2048 i."""
    return [
        (f"s{i:03d}.{extension}", data)
        for i in range(start, start + count)
        for extension, data in (("png", bytes([i]) * 99), ("cls", str(i % 3).encode()))
    ]


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    """Members are (name, bytes) or ready TarInfo objects."""
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def test_folders_upper_case_and_long_names_are_understood(tmp_path):
    long = "n0/" + "x" * 120
    members = [("n0/a.JPEG", b"1"), ("n0/a.cls", b" 7\n"), (f"{long}.jpg", b"2"), (f"{long}.cls", b"1")]
    rows = index_shard(write_tar(tmp_path / "a.tar", members, tarfile.GNU_FORMAT))
    assert rows.keys == ["n0/a", long]
    assert rows.extensions == ["jpeg", "cls", "jpg"]
    assert rows.fields["value"].tolist() == [-1, 7, -1, 1]


def link(name, kind):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "/etc/passwd"
    return info


REFUSED = {
    "hard-link": ([link("a.png", tarfile.LNKTYPE)], "at byte 0: member 'a.png' is a hard link"),
    "symlink": ([link("a.png", tarfile.SYMTYPE)], "at byte 0: member 'a.png' is a symbolic link"),
    "device": ([link("a.png", tarfile.CHRTYPE)], "is a character device"),
    "fifo": ([link("a.png", tarfile.FIFOTYPE)], "is a FIFO"),
    "absolute": ([("/a.png", b"")], "'/a.png' leaves the archive"),
    "parent": ([("x/../../a.png", b"")], "leaves the archive"),
    "control": ([("a\nb.png", b"")], r"control characters"),
    "no-extension": ([("README", b"")], "'README' is not named <key>.<extension>"),
    "hidden": ([(".a.png", b"")], r"'.a.png' is not named"),
    "duplicate": ([*samples(2), *samples(1)], r"at byte 4096: key 's000' was already used at byte 0"),
    "interleaved": ([("a.png", b"1"), ("b.cls", b"1"), ("a.cls", b"1")], "sample 'a' has png; classification needs"),
    "same-field": ([("a.png", b"1"), ("a.PNG", b"2"), ("a.cls", b"1")], "two files with extension 'png'"),
    "two-images": ([("a.png", b"1"), ("a.jpg", b"2"), ("a.cls", b"1")], "has png, jpg, cls; classification needs one"),
    "no-label": ([("a.png", b"1")], "sample 'a' has png; classification needs one image"),
    "text-label": ([("a.png", b""), ("a.cls", b"cat")], r"sample 'a': label b'cat' is no class id"),
    "minus-label": ([("a.png", b""), ("a.cls", b"-1")], r"label b'-1' is no class id"),
    "float-label": ([("a.png", b""), ("a.cls", b"1.5")], r"label b'1.5' is no class id"),
    "empty-label": ([("a.png", b""), ("a.cls", b"")], r"label b'' is no class id"),
    "huge-label": ([("a.png", b""), ("a.cls", b"9" * 16)], "is no class id"),
}


@pytest.mark.parametrize(("members", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_dangerous_tar_is_refused_by_file_and_byte(tmp_path, members, message):
    path = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(DataError, match=message) as error:
        index_shard(path)
    assert str(error.value).startswith(f"{path} at byte ")
    assert "\n" not in str(error.value)


def pax_member(**headers):
    info = tarfile.TarInfo("a.png")
    info.pax_headers = headers
    return info


@pytest.mark.parametrize("headers", [{"path": "b.png"}, {"size": "0"}, {"GNU.sparse.major": "1"}, {"linkpath": "x"}])
def test_pax_records_that_change_a_member_are_refused(tmp_path, headers):
    path = write_tar(tmp_path / "a.tar", [pax_member(**headers)], tarfile.PAX_FORMAT)
    with pytest.raises(DataError, match=r"at byte 0: PAX record '.*' changes the member; repack"):
        index_shard(path)


def test_harmless_pax_records_are_read_over(tmp_path):
    members = [pax_member(mtime="1.5", comment="x"), ("a.cls", b"1")]
    assert index_shard(write_tar(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)).keys == ["a"]


def test_compressed_tars_are_refused(tmp_path):
    plain = write_tar(tmp_path / "a.tar", samples(2)).read_bytes()
    (tmp_path / "b.tar").write_bytes(gzip.compress(plain))
    with pytest.raises(DataError, match=r"b.tar at byte 0: gzip-compressed; .* decompress it first"):
        index_shard(tmp_path / "b.tar")


def test_joined_tars_are_refused_since_readers_would_stop_at_the_first(tmp_path):
    plain = write_tar(tmp_path / "a.tar", samples(2)).read_bytes()
    (tmp_path / "b.tar").write_bytes(plain + write_tar(tmp_path / "c.tar", samples(2, 5)).read_bytes())
    with pytest.raises(DataError, match=r"at byte 4096: data after the end-of-archive marker"):
        index_shard(tmp_path / "b.tar")


def test_every_truncation_is_noticed(tmp_path):
    whole = write_tar(tmp_path / "a.tar", samples(2)).read_bytes()
    marker = 2 * 2048  # four members of one block each, with their headers
    for size in [*range(97, marker + 1023, 97), *range(512, marker + 1, 512)]:
        (tmp_path / "b.tar").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"b.tar at byte \d+: .*truncated"):
            index_shard(tmp_path / "b.tar")


def test_random_header_damage_is_refused_or_changes_nothing(tmp_path):
    whole = write_tar(tmp_path / "a.tar", samples(3)).read_bytes()
    intact, accepted = index_shard(tmp_path / "a.tar"), 0
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        block = rng.randrange(6) * 1024
        damaged[block + rng.randrange(512)] ^= 1 << rng.randrange(8)
        (tmp_path / "b.tar").write_bytes(damaged)
        try:
            rows = index_shard(tmp_path / "b.tar")
        except DataError as error:
            assert "b.tar at byte " in str(error)
        else:  # white space around the checksum itself, which means nothing
            assert rows.keys == intact.keys
            assert (rows.fields == intact.fields).all()
            accepted += 1
    assert accepted < 6
