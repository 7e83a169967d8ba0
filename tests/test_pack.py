"""Packing keeps every byte, gives the same tars every time, and publishes all of them or none."""

import hashlib
import io
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image

from datamodules import commands
from datamodules.index import ShardIndex
from datamodules.manifest import open_split, read_dataset
from datamodules.module import ClassificationDataModule
from datamodules.pack import _plan, pack
from datamodules.reader import ShardReader
from datamodules.sources import digits, source_classes
from datamodules.sources_base import Source, SourceSample
from datamodules.types import DataError


@pytest.fixture
def images(tmp_path):
    """Class folders with JPEG, PNG and WEBP files, nested folders and awkward names."""
    rng = np.random.default_rng(0)
    files = [
        "train/cat/one.jpg",
        "train/cat/deep/er/two.png",
        "train/cat/a.b.c.JPEG",
        "train/cat/a_b_c.png",
        "train/dog/ünïcode nàme.webp",
        "train/dog/three.jpeg",
        "val/cat/one.jpg",
        "val/dog/" + "long" * 40 + ".png",
    ]
    for name in files:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        form = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[path.suffix[1:].lower()]
        Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(path, format=form)
    (tmp_path / "images" / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    return tmp_path / "images"


def snapshot(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_digits_are_the_1797_with_a_fixed_stratified_split():
    source = digits()
    train, val = source.splits["train"], source.splits["val"]
    assert (len(train), len(val)) == (1438, 359)
    assert {sample.key for sample in train}.isdisjoint(sample.key for sample in val)
    counts = [np.bincount([int(sample.read()["cls"]) for sample in part]) for part in (train, val)]
    shares = counts[1] / (counts[0] + counts[1])
    assert abs(shares - 0.2).max() < 0.003
    # pinned: a validation score means the same images for everybody, whatever the libraries' versions
    keys = hashlib.sha256(" ".join(sample.key for sample in val).encode()).hexdigest()
    assert keys == "848135c2f2b23fa726a7ac68111b912e0f6a46528dd863505ca1c189fe5853ae"
    brightest = max(Image.open(io.BytesIO(sample.read()["png"])).getextrema()[1] for sample in val)
    assert brightest == 255


def test_packing_twice_and_with_other_threads_gives_the_same_bytes(tmp_path):
    pack("digits", str(tmp_path / "a"), shard_size_mib=0.4, workers=1)
    pack("digits", str(tmp_path / "b"), shard_size_mib=0.4, workers=3)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert len(list((tmp_path / "a" / "train").glob("train-*.tar"))) == 8
    assert max(path.stat().st_size for path in (tmp_path / "a").rglob("*.tar")) <= 0.4 * 2**20 + 10240


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9000), max_size=60), st.integers(1, 20_000), st.integers(-5, 5))
def test_every_sample_is_in_one_shard_and_only_a_giant_exceeds_the_limit(sizes, limit, seed):
    samples = [SourceSample(f"s{i}", size, "", dict) for i, size in enumerate(sizes)]
    shards = _plan(Source("x", "classification", [], {"train": samples, "val": samples[:3]}, "", ""), limit, seed)
    for split, wanted in (("train", samples), ("val", samples[:3])):
        own = [shard for shard in shards if shard.split == split]
        assert sorted(sample.key for shard in own for sample in shard.samples) == sorted(s.key for s in wanted)
        assert [shard.name for shard in own] == [f"{split}-{i:06d}.tar" for i in range(len(own))]
    for shard in shards:
        assert len(shard.samples) == 1 or sum(sample.size + 2048 for sample in shard.samples) <= limit


def test_samples_are_shuffled_across_shards(tmp_path):
    info = pack("digits", str(tmp_path / "a"), shard_size_mib=0.4)
    index = open_split(tmp_path / "a", info, "train")
    labels, start = index.labels(), 0
    for count in index.counts:
        assert len(set(labels[start : start + count].tolist())) == 10
        start += count
    pack("digits", str(tmp_path / "b"), shard_size_mib=0.4, seed=1)
    assert open_split(tmp_path / "b", read_dataset(tmp_path / "b"), "train").locate(0).key != index.locate(0).key


def test_an_image_folder_keeps_every_byte_and_label(images, tmp_path):
    info = pack("imagefolder", str(tmp_path / "out"), data=str(images))
    assert info.class_names == ["cat", "dog"]
    assert {name: split.samples for name, split in info.splits.items()} == {"train": 6, "val": 2}
    for split in ("train", "val"):
        reader = ShardReader(ShardIndex(tmp_path / "out" / split))
        packed = [reader.read(i, reader.index.extensions) for i in range(len(reader.index))]
        read = sorted((data, raw.fields["cls"]) for raw in packed for ext, data in raw.fields.items() if ext != "cls")
        original = sorted(
            (path.read_bytes(), b"0" if "cat" in path.relative_to(images / split).parts else b"1")
            for path in (images / split).rglob("*.*")
            if path.is_file() and not path.name.startswith(".")
        )
        assert read == original
        keys = [raw.key for raw in packed]
        assert len(set(keys)) == len(keys)
        assert all(key.isascii() and "." not in key and len(key) <= 90 for key in keys)


def test_an_identical_dataset_is_left_alone_and_another_is_refused(tmp_path):
    out = tmp_path / "digits"
    first = pack("digits", str(out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert pack("digits", str(out)) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(
        DataError, match=r"holds another dataset \(digits: 1438 train, 359 val\); choose another folder"
    ):
        pack("digits", str(out), seed=1)
    (out / "train" / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000.tar is in the index but missing"):
        pack("digits", str(out))


def test_a_folder_with_other_files_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="exists and is no packed dataset; choose another folder"):
        pack("digits", str(tmp_path))
    (tmp_path / "empty").mkdir()
    pack("digits", str(tmp_path / "empty"))
    assert read_dataset(tmp_path / "empty").name == "digits"


def test_nothing_is_published_and_nothing_left_when_packing_fails(images, tmp_path):
    (images / "train" / "dog" / "broken.png").symlink_to("/proc/self/mem")  # a file that opens, but does not read
    out = tmp_path / "parent" / "out"
    with pytest.raises(DataError, match=r"broken.png cannot be read \(Input/output error\); mend or remove it"):
        pack("imagefolder", str(out), data=str(images))
    assert list((tmp_path / "parent").iterdir()) == []


def test_two_packers_at_once_leave_one_dataset(tmp_path):
    """As when every node of a job packs into one shared folder."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: pack("digits", str(tmp_path / "out")), range(2))
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert commands.verify(str(tmp_path / "out"), decode=False) == 0


def add_bitmap(images):
    (images / "train" / "dog" / "x.bmp").write_bytes(b"BM")


def drop_train(images):
    shutil.rmtree(images / "train")


def add_class_to_val(images):
    shutil.copytree(images / "val" / "dog", images / "val" / "emu")


def empty_class(images):
    (images / "train" / "fox").mkdir()


def no_classes(images):
    for path in (images / "val").iterdir():
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (add_bitmap, r"x.bmp is no jpg, jpeg, png, webp file; convert or remove it"),
        (drop_train, r"has no train folder; imagefolder needs train/<class>"),
        (add_class_to_val, r"val/emu is no class of train; add it there or remove it here"),
        (empty_class, r"train/fox has no images; add some or remove the folder"),
        (no_classes, r"val has no class folders; imagefolder needs .*val/<class>/\*.jpg"),
    ],
)
def test_an_unfit_image_folder_is_refused_with_the_mend(images, tmp_path, spoil, message):
    spoil(images)
    with pytest.raises(DataError, match=message):
        pack("imagefolder", str(tmp_path / "out"), data=str(images))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"source": "mnist"},
            "--source 'mnist' is unknown; known are digits, digits-recall, digits-same-different, digits-counting, "
            "imagefolder, imagenet, coco, ade20k, idx",
        ),
        ({"source": "imagefolder"}, "--source imagefolder needs --data, the folder to pack"),
        ({"source": "imagefolder", "data": "nowhere"}, "--data nowhere is no folder"),
        ({"shard_size_mib": 0.0}, "--shard-size-mib is 0.0; it must be above 0"),
        ({"workers": 0}, "--workers is 0; it must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        pack(**{"source": "digits", "out": str(tmp_path / "out"), **arguments})


def test_the_commands_pack_show_index_and_verify(images, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert commands.pack(source="imagefolder", out=out, data=str(images)) == 0
    assert commands.info(out) == 0
    shown = capsys.readouterr().out
    for text in ("train", "6", "cat", "dog", "digest: ", read_dataset(Path(out)).digest):
        assert text in shown
    (tmp_path / "names.txt").write_text("katze\nhund\n")
    assert commands.index(out, classes=str(tmp_path / "names.txt")) == 0
    assert read_dataset(Path(out)).class_names == ["katze", "hund"]
    (tmp_path / "names.json").write_text('["gato", "perro"]')
    assert commands.index(out, classes=str(tmp_path / "names.json")) == 0
    assert read_dataset(Path(out)).class_names == ["gato", "perro"]
    assert commands.verify(out) == 0
    assert "0 faults" in capsys.readouterr().out
    tar = tmp_path / "out" / "val" / "val-000000.tar"
    content = bytearray(tar.read_bytes())
    content[512] ^= 4
    tar.write_bytes(content)
    assert commands.verify(out) == 1
    reported = capsys.readouterr().out
    assert "1 fault" in reported
    assert "val-000000.tar, sample" in reported


def test_an_unreadable_class_list_is_refused(tmp_path):
    for name, text in (("empty.txt", "\n"), ("broken.json", "["), ("numbers.json", "[1, 2]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=rf"--classes .*{name}"):
            commands.index(str(tmp_path), classes=str(tmp_path / name))
    with pytest.raises(DataError, match=r"--classes .*nowhere cannot be read"):
        commands.index(str(tmp_path), classes=str(tmp_path / "nowhere"))


def test_indexing_again_without_a_change_keeps_the_dataset_packed(tmp_path):
    out = tmp_path / "digits"
    first = pack("digits", str(out))
    commands.index(str(out))
    assert pack("digits", str(out)) == first


def test_known_classes_need_no_packing():
    assert source_classes("digits") == digits().class_names
    assert source_classes("imagefolder") is None


def test_settings_of_the_data_module_can_be_given_on_a_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ClassificationDataModule, "data")
    arguments = [
        "--data.path=x",
        "--data.train_transform.auto_augment=null",
        "--data.train_transform.zoom=[0.9,1.1]",
        "--data.train_transform.crop=false",
        "--data.eval_transform.resize=null",
        "--data.sources=digits",
    ]
    built = parser.instantiate(parser.parse_args(arguments)).data
    assert built.train_transform.zoom == (0.9, 1.1)
    assert built.train_transform.auto_augment is None
    assert built.eval_transform.resize is None
    assert built.num_classes == 10
