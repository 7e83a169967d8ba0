"""The index finds every byte that the tars hold, and is refused when it does not fit them."""

import io
import json
import pickle
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from datamodules.index import ShardIndex, ShardRows, encode_index
from datamodules.indexer import index_dataset, index_shard, write_index
from datamodules.manifest import open_split, planned_batches, read_dataset
from datamodules.reader import ShardReader
from datamodules.types import DataError


def png(shade):
    stream = io.BytesIO()
    Image.new("L", (4, 4), shade).save(stream, format="PNG")
    return stream.getvalue()


def samples(count, start=0):
    return [
        (f"s{i:03d}.{extension}", data)
        for i in range(start, start + count)
        for extension, data in (("png", png(i)), ("cls", str(i % 3).encode()))
    ]


def write_tar(path, members, form=tarfile.USTAR_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def dataset(folder, train=(5, 4), val=3):
    start = 0
    for number, count in enumerate(train):
        write_tar(folder / "train" / f"a-{number}.tar", samples(count, start))
        start += count
    if val:
        write_tar(folder / "val" / "b.tar", samples(val, 100))
    index_dataset(folder)
    return folder


def contents(index):
    reader = ShardReader(index)
    return [(raw.key, raw.fields) for raw in (reader.read(i, index.extensions) for i in range(len(index)))]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_byte_is_found_again(tmp_path, form):
    write_tar(tmp_path / "train" / "a.tar", samples(7), form)
    index_dataset(tmp_path)
    index = ShardIndex(tmp_path / "train")
    expected = dict(samples(7))
    read = {f"{key}.{extension}": data for key, fields in contents(index) for extension, data in fields.items()}
    assert read == expected
    assert index.labels().tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert index.counts == (7,)
    assert index.recompute_digest() == index.digest


def test_empty_shards_count_nothing(tmp_path):
    write_tar(tmp_path / "train" / "a.tar", [])
    write_tar(tmp_path / "train" / "b.tar", samples(2))
    info = index_dataset(tmp_path)
    assert ShardIndex(tmp_path / "train").counts == (0, 2)
    assert info.splits["train"].samples == 2


def test_a_file_without_any_byte_is_an_empty_shard(tmp_path):
    write_tar(tmp_path / "train" / "b.tar", samples(2))
    (tmp_path / "train" / "a.tar").touch()
    info = index_dataset(tmp_path)
    assert open_split(tmp_path, info, "train").counts == (0, 2)


def test_a_dataset_of_only_empty_shards_opens(tmp_path):
    write_tar(tmp_path / "train" / "a.tar", [])
    info = index_dataset(tmp_path)
    assert len(open_split(tmp_path, info, "train")) == 0


def test_a_key_in_two_shards_is_refused_with_both(tmp_path):
    write_tar(tmp_path / "train" / "a.tar", samples(2))
    write_tar(tmp_path / "train" / "b.tar", samples(2, 1))
    with pytest.raises(DataError, match=r"key 's001' is in a.tar and in b.tar"):
        index_dataset(tmp_path)


def test_labels_beyond_the_classes_are_refused(tmp_path):
    write_tar(tmp_path / "train" / "a.tar", samples(3))
    with pytest.raises(DataError, match=r"a.tar at byte \d+, sample 's002': label 2 is not below the 2 classes"):
        index_dataset(tmp_path, ["x", "y"])


def test_class_names_survive_indexing_again(tmp_path):
    dataset(tmp_path)
    index_dataset(tmp_path, ["x", "y", "z"])
    before = read_dataset(tmp_path)
    index_dataset(tmp_path)
    assert read_dataset(tmp_path) == before
    assert before.class_names == ["x", "y", "z"]
    assert planned_batches(str(tmp_path), 4) == 2


def test_the_digest_changes_with_a_pixel_a_label_and_a_class_name(tmp_path):
    digests = {dataset(tmp_path / "0") and read_dataset(tmp_path / "0").digest}
    for number, members in enumerate([[*samples(5)[:-1], ("s004.cls", b"2")], [("s000.png", png(9)), *samples(5)[1:]]]):
        folder = tmp_path / str(number + 1)
        write_tar(folder / "train" / "a-0.tar", members)
        write_tar(folder / "train" / "a-1.tar", samples(4, 5))
        write_tar(folder / "val" / "b.tar", samples(3, 100))
        digests.add(index_dataset(folder).digest)
    digests.add(index_dataset(tmp_path / "0", ["x", "y", "z"]).digest)
    assert len(digests) == 4


def test_an_index_pickles_as_its_path(tmp_path):
    index = ShardIndex(dataset(tmp_path) / "train")
    data = pickle.dumps(index)
    assert len(data) < 500
    assert pickle.loads(data).locate(3) == index.locate(3)
    with pytest.raises(IndexError, match="sample 9 of a split of 9"):
        index.locate(9)


def test_opening_costs_no_more_for_many_samples(tmp_path):
    count = 200_000
    fields = np.zeros(2 * count, dtype=index_shard(write_tar(tmp_path / "a.tar", samples(1))).fields.dtype)
    fields["extension"] = np.arange(2 * count) % 2
    part = ShardRows("x.tar", 0, [f"k{i:07d}" for i in range(count)], np.full(count, 2), fields, ["jpg", "cls"])
    (tmp_path / "index.bin").write_bytes(encode_index([part]))
    assert (tmp_path / "index.bin").stat().st_size / count < 100
    index = ShardIndex(tmp_path)
    assert index.locate(123_456).key == "k0123456"
    assert len(index.labels()) == count


def damage_missing_folder(folder):
    return folder / "nowhere"


def damage_no_manifest(folder):
    (folder / "dataset.json").unlink()
    return folder


def damage_no_tars(folder):
    (folder / "x").mkdir()
    return folder / "x"


def damage_manifest_text(folder):
    (folder / "dataset.json").write_text("{")
    return folder


def damage_manifest_classes(folder):
    document = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**document, "class_names": ["a", "b", "d"]}))
    return folder


def damage_manifest_version(folder):
    document = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**document, "schema": 9}))
    return folder


def damage_shard_missing(folder):
    (folder / "train" / "a-1.tar").unlink()
    return folder


def damage_shard_longer(folder):
    with (folder / "train" / "a-1.tar").open("ab") as stream:
        stream.write(bytes(512))
    return folder


def damage_shard_extra(folder):
    write_tar(folder / "train" / "a-2.tar", samples(2, 50))
    return folder


def damage_index_missing(folder):
    (folder / "train" / "index.bin").unlink()
    return folder


def damage_index_short(folder):
    path = folder / "train" / "index.bin"
    path.write_bytes(path.read_bytes()[:-1])
    return folder


def damage_index_tiny(folder):
    (folder / "train" / "index.bin").write_bytes(b"MLAINDEX")
    return folder


def damage_index_header(folder):
    path = folder / "train" / "index.bin"
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(data)
    return folder


def damage_index_version(folder):
    path = folder / "train" / "index.bin"
    data = bytearray(path.read_bytes())
    data[8] = 9
    path.write_bytes(data)
    return folder


def damage_index_of_other_data(folder):
    write_index(folder / "train", [index_shard(write_tar(folder / "train" / "a-0.tar", samples(1)))])
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing_folder, r"nowhere does not exist; pack one, .* `mirrorla shards pack --source digits --out .*"),
        (damage_no_manifest, r"has shards \(train/a-0.tar, …\) but no index; run `mirrorla shards index"),
        (damage_no_tars, r"has neither dataset.json nor <split>/\*.tar"),
        (damage_manifest_text, r"dataset.json is damaged \(.*\); run `mirrorla shards index"),
        (damage_manifest_classes, r"dataset.json was changed by hand: its digest does not fit; run"),
        (damage_manifest_version, r"damaged \(schema 9, this program reads 1\)"),
        (damage_shard_missing, r"a-1.tar is in the index but missing; restore it or make it again with"),
        (damage_shard_longer, r"a-1.tar has 10752 bytes, its index says 10240; restore it or make it again with"),
        (damage_shard_extra, r"a-2.tar is not in the index beside it; remove it or"),
        (damage_index_missing, r"index.bin is missing; make it with `mirrorla shards index"),
        (damage_index_short, r"index.bin has \d+ bytes instead of \d+; make it again"),
        (damage_index_tiny, r"has 8 bytes, less than its header"),
        (damage_index_header, r"index.bin is no index, or its header is damaged"),
        (damage_index_version, r"index.bin has version 9, this program reads 1"),
        (damage_index_of_other_data, r"index.bin does not belong to .*dataset.json; run `mirrorla shards index"),
    ],
)
def test_a_dataset_that_does_not_fit_together_is_refused_with_the_mend(tmp_path, damage, message):
    folder = damage(dataset(tmp_path))
    with pytest.raises(DataError, match=message) as error:
        open_split(folder, read_dataset(folder), "train")
    assert "\n" not in str(error.value)


def test_an_unknown_split_is_named(tmp_path):
    folder = dataset(tmp_path, val=0)
    with pytest.raises(DataError, match="has no split 'val'; it has train"):
        open_split(folder, read_dataset(folder), "val")


def test_indexing_a_folder_without_tars_says_where_they_belong(tmp_path):
    with pytest.raises(DataError, match="has no tars in train/, val/, test/; move the shards there"):
        index_dataset(tmp_path)


def test_the_stored_checksum_is_zlibs(tmp_path):
    index = ShardIndex(dataset(tmp_path) / "train")
    assert index.locate(0).fields["png"].crc32 == zlib.crc32(png(0))
