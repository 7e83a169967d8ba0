"""`shards verify` finds what is wrong with annotations, images, duplicates and uneven shards, and says where."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from datamodules import commands
from datamodules.annotations import Objects, encode_class_map, encode_mask
from datamodules.manifest import read_dataset
from datamodules.pack import pack
from datamodules.sources_base import Source, SourceSample
from datamodules.types import DataError
from datamodules.verify import find_duplicates, find_skew, verify_dataset


def png(seed, size=(20, 10)):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, size[::-1], dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def annotation(**changes):
    mask = np.zeros((10, 20), dtype=bool)
    mask[2:5, 3:9] = True
    objects = Objects(1, 20, 10, [[3, 2, 9, 5]], [2], [0], [18], [encode_mask(mask)])
    return json.dumps({**json.loads(objects.encode()), **changes}).encode()


def sample(key, files):
    return SourceSample(key, 1000, "", files.copy)


def write(folder, task, train, val=()):
    splits = {"train": [sample(*entry) for entry in train], "val": [sample(*entry) for entry in val]}
    source = Source("made", task, ["a", "b"], {name: part for name, part in splits.items() if part}, "", "")
    return pack(source, str(folder), shard_size_mib=0.005)


def faults(folder, decode=True, threads=3):
    return list(verify_dataset(folder, read_dataset(folder), decode, lambda samples: None, threads))


@pytest.mark.parametrize(
    ("task", "spoiled", "message"),
    [
        ("classification", {"png": png(9), "cls": b"2"}, "label 2 is not below the 2 classes"),
        ("classification", {"png": png(9)[:60], "cls": b"1"}, "not a readable JPEG, PNG or WEBP image"),
        ("detection", {"png": png(9), "json": annotation(labels=[3])}, "json: object 0: label 3 is not in 1 … 2"),
        ("detection", {"png": png(9), "json": annotation(boxes=[[3, 2, 21, 5]])}, "leaves the image of 20x10"),
        ("detection", {"png": png(9, (20, 9)), "json": annotation()}, "for an image of 20x10, the image has 20x9"),
        ("detection", {"png": png(9), "json": annotation(masks=[])}, "1 boxes but 0 masks"),
        ("segmentation", {"png": png(9), "seg.png": encode_class_map(np.full((10, 20), 2, np.uint8))}, "class id 2"),
        (
            "segmentation",
            {"png": png(9), "seg.png": encode_class_map(np.zeros((9, 20), np.uint8))},
            "size (20, 9)",
        ),
        ("segmentation", {"png": png(9), "seg.png": png(3)[:50]}, "seg.png: no readable PNG"),
    ],
)
def test_the_one_bad_sample_among_good_ones_is_named(tmp_path, task, spoiled, message):
    good = {
        "classification": {"cls": b"1"},
        "detection": {"json": annotation()},
        "segmentation": {"seg.png": encode_class_map(np.full((10, 20), 255, np.uint8))},
    }[task]
    samples = [(f"good{i}", {"png": png(i), **good}) for i in range(8)]
    write(tmp_path / "good", task, samples)
    assert faults(tmp_path / "good") == []
    write(tmp_path / "bad", task, [*samples, ("spoiled", spoiled)])
    (found,) = faults(tmp_path / "bad")
    assert "sample 'spoiled'" in found and message in found
    assert faults(tmp_path / "bad", threads=1) == [found]


def test_without_decoding_annotations_are_still_checked(tmp_path):
    cut = png(9)[:60]  # the header with the size is whole
    write(tmp_path / "x", "detection", [("a", {"png": cut, "json": annotation(labels=[7])})])
    assert "label 7 is not in 1 … 2" in faults(tmp_path / "x", decode=False)[0]
    write(tmp_path / "y", "detection", [("a", {"png": cut, "json": annotation()})])
    assert faults(tmp_path / "y", decode=False) == []
    assert len(faults(tmp_path / "y")) == 1


def test_duplicates_are_found_across_splits_by_content(tmp_path):
    train = [(f"t{i}", {"png": png(i), "cls": b"0"}) for i in range(6)] + [("again", {"png": png(0), "cls": b"1"})]
    val = [("leaked", {"png": png(3), "cls": b"0"}), ("own", {"png": png(50), "cls": b"0"})]
    info = write(tmp_path / "x", "classification", train, val)
    lines = find_duplicates(tmp_path / "x", info)
    assert lines[0] == "images that occur more than once: 2, of them in more than one split: 1"
    assert set(lines[1].removeprefix("the same image: ").split(", ")) == {"train/t3", "val/leaked"}
    assert set(lines[2].removeprefix("the same image: ").split(", ")) == {"train/t0", "train/again"}
    assert find_duplicates(tmp_path / "y", write(tmp_path / "y", "classification", train[:6])) == []


def test_many_duplicates_are_counted_and_a_few_shown(tmp_path):
    train = [(f"t{i}", {"png": png(i // 2), "cls": b"0"}) for i in range(20)]
    lines = find_duplicates(tmp_path / "x", write(tmp_path / "x", "classification", train))
    assert (len(lines), lines[-1]) == (7, "… and 5 more")


def test_shards_that_fall_unevenly_are_noted(tmp_path):
    info = write(tmp_path / "x", "classification", [(f"t{i}", {"png": png(i), "cls": b"0"}) for i in range(9)])
    assert info.splits["train"].shards == 9 or info.splits["train"].shards == 5
    shards = info.splits["train"].shards
    assert find_skew(tmp_path / "x", info, 1, 1) == []
    (idle,) = find_skew(tmp_path / "x", info, 8, 2)
    assert idle.startswith(f"train: {shards} shards for 8 ranks x 2 workers; readers that take whole shards")
    (uneven,) = find_skew(tmp_path / "x", info, 2, 2)
    assert "gets up to 1." in uneven and "times the mean share" in uneven


def test_the_command_reports_notes_and_faults_with_its_exit_code(tmp_path, capsys):
    twice = [("one", {"png": png(0), "cls": b"0"}), ("two", {"png": png(0), "cls": b"0"})]
    write(tmp_path / "x", "classification", twice)
    assert commands.verify(str(tmp_path / "x"), ranks=2, workers=4) == 0
    told = capsys.readouterr().out
    assert "note   images that occur more than once: 1" in told
    assert "note   train: 2 shards for 2 ranks x 4 workers" in told
    assert "0 faults" in told
    write(tmp_path / "y", "classification", [("one", {"png": png(0), "cls": b"5"})])
    assert commands.verify(str(tmp_path / "y")) == 1
    assert "fault  " in capsys.readouterr().out
    with pytest.raises(DataError, match="--ranks is 0; it must be at least 1"):
        commands.verify(str(tmp_path / "x"), ranks=0)


def test_a_dataset_for_an_unknown_task_is_refused(tmp_path):
    write(tmp_path / "x", "classification", [("one", {"png": png(0), "cls": b"0"})])
    path = tmp_path / "x" / "dataset.json"
    path.write_text(path.read_text().replace('"classification"', '"captioning"'))
    message = r"damaged \(unknown task 'captioning'; tasks are classification, detection, segmentation\)"
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path / "x")
