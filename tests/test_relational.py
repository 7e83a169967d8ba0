"""Questions about digits: the label is the answer that the pixels give, to a reader who knows every handwriting."""

import hashlib
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from datamodules import sources
from datamodules.manifest import open_split
from datamodules.module import ClassificationDataModule
from datamodules.pack import pack
from datamodules.reader import ShardReader
from datamodules.relational import BANDS, CLASSES, Grid
from datamodules.sources import SourceOptions, _digits_splits, open_source, source_classes
from datamodules.transforms import EvalTransform, TrainTransform
from datamodules.types import DataError

NAMES = [f"digits-{question}" for question in CLASSES]
WHITE = np.full((8, 8), 255, dtype=np.uint8).tobytes()


@pytest.fixture(scope="module")
def hands():
    """By split: the class of every piece of handwriting, looked up by its pixels."""
    splits = _digits_splits()
    return {
        split: {image.tobytes(): label for image, label in zip(part.images, part.labels, strict=True)}
        for split, part in splits.items()
    }


def pictures(name, split="train", **options):
    """Pixels and label of every picture."""
    source = open_source(name, SourceOptions(**options))
    files = [sample.read() for sample in source.splits[split]]
    return [(np.asarray(Image.open(io.BytesIO(one["png"]))), int(one["cls"])) for one in files]


def blocks(image):
    """The 8x8 blocks of an image, as bytes: rows of columns."""
    rows, columns = image.shape[0] // 8, image.shape[1] // 8
    cut = image.reshape(rows, 8, columns, 8).swapaxes(1, 2)
    return [[cut[row, column].tobytes() for column in range(columns)] for row in range(rows)]


def answer_recall(image, known):
    cells = blocks(image[np.arange(len(image)) % 16 // 4 % 3 != 0])  # rows 4 to 11 of every 16: the rest is black
    assert not image[np.arange(len(image)) % 16 // 4 % 3 == 0].any()
    both = [(row[c], row[c + 1]) for row in cells for c in range(0, len(row), 2)]
    asking = len(both) // 4
    keys, pairs = [key for key, _ in both[:asking]], both[asking:]
    assert {value for _, value in both[:asking]} == {WHITE}
    (asked,) = {known[hand] for hand in keys}
    said = {(known[key], known[value]) for key, value in pairs}
    values = dict(said)
    assert len(values) == len(said) == len(set(values.values()))  # one value for each key, another for every other
    counts = Counter(known[key] for key, _ in pairs)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert set(keys).isdisjoint(key for key, _ in pairs)
    return values[asked], set(values)


def answer_same_different(image, known):
    rows = blocks(image)
    halves = [{hand for row in part for hand in row} for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :])]
    (upper,), (lower,) = ({known[hand] for hand in half} for half in halves)
    assert halves[0].isdisjoint(halves[1])
    return int(upper == lower), {upper, lower}


def answer_counting(image, known):
    rows = blocks(image)
    step = len(rows) // BANDS
    bands = [{hand for row in rows[top : top + step] for hand in row} for top in range(0, len(rows), step)]
    shown = []
    for band in bands:
        (digit,) = {known[hand] for hand in band}
        shown.append(digit)
    assert bands[0].isdisjoint(set().union(*bands[1:]))
    return shown[1:].count(shown[0]), set(shown)


READERS = {
    "digits-recall": answer_recall,
    "digits-same-different": answer_same_different,
    "digits-counting": answer_counting,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("cells", "classes"), [(16, 4), (8, 10), (8, 2)], ids=["default", "ten-digits", "two-digits"])
def test_the_label_is_what_the_picture_says(name, cells, classes, hands):
    options = {} if (cells, classes) == (16, 4) else {"cells": cells, "classes": classes}
    for split in ("train", "val"):
        seen = set()
        for image, label in pictures(name, split, scenes=60, **options):
            assert image.shape == (cells * (16 if name == "digits-recall" else 8),) * 2
            answer, digits = READERS[name](image, hands[split])
            assert answer == label
            seen |= digits
        assert seen <= set(range(classes))
        assert split == "val" or seen == set(range(classes))


def test_train_and_validation_share_no_handwriting(hands):
    assert hands["train"].keys().isdisjoint(hands["val"])
    assert sum(map(len, hands.values())) == 1797  # all different, so that looking up is reading


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_balanced_exactly(name):
    source = open_source(name, SourceOptions(scenes=60, cells=8))
    assert source.class_names == source_classes(name)
    counts = Counter(int(sample.read()["cls"]) for sample in source.splits["train"])
    assert set(counts.values()) == {60 // len(source.class_names)}
    assert sorted(counts) == list(range(len(source.class_names)))


def test_what_is_asked_for_and_where_it_is_answered_vary():
    asked = Counter(image[4:12, :8].tobytes() for image, _ in pictures("digits-recall", scenes=40, cells=8))
    assert len(asked) > 30
    upper = {image[:8, :8].tobytes() for image, _ in pictures("digits-same-different", scenes=40, cells=8)}
    assert len(upper) > 30


def test_a_picture_depends_on_seed_split_number_and_grid_alone():
    few, many = (open_source("digits-counting", SourceOptions(scenes=number)) for number in (5, 500))
    assert [a.read() for a in few.splits["train"]] == [b.read() for b in many.splits["train"][:5]]
    other = open_source("digits-counting", SourceOptions(scenes=5, seed=1))
    assert few.splits["train"][0].read()["png"] != other.splits["train"][0].read()["png"]
    assert few.splits["train"][0].read()["png"] != few.splits["val"][0].read()["png"]


def test_pictures_are_the_same_for_everybody():
    digest = hashlib.sha256()
    for name in NAMES:
        for image, label in pictures(name, scenes=6):
            digest.update(image.tobytes() + bytes([label]))
    assert digest.hexdigest() == "ebb98518e9edf955e47eafb1c221e28534f28b8d509f309b4b2466c3e0f9e9a2"


@pytest.mark.parametrize("name", NAMES)
def test_packed_they_are_an_ordinary_classification_dataset(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PANELS", 20)
    monkeypatch.setattr(sources.relational, "Grid", lambda: Grid(cells=8))
    side = 128 if name == "digits-recall" else 64
    transforms = TrainTransform(image_size=side, crop=False, hflip=0.0, auto_augment=None, color_jitter=0.0)
    data = ClassificationDataModule(
        path=str(tmp_path / "packed"),
        train_transform=transforms,
        eval_transform=EvalTransform(side, None),
        batch_size=8,
        num_workers=0,
        sources=name,
    )
    assert data.class_names == source_classes(name)
    data.prepare_data()
    assert data.class_names == source_classes(name) and data.num_classes == len(data.class_names)
    data.setup("fit")
    batch = data.probe_batch(4)
    assert batch["image"].shape == (4, 3, side, side)
    shown = {sample.key: sample.read() for sample in open_source(name).splits["train"]}
    info = pack(open_source(name), str(tmp_path / "packed"))  # the same again: nothing is done
    reader = ShardReader(open_split(tmp_path / "packed", info, "train"))
    read = [reader.read(number, reader.index.extensions) for number in range(len(reader.index))]
    assert {one.key: one.fields for one in read} == shown


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits-recall", {"cells": 12}, r"--cells is 12; it must be 8, 16, 24, … or 64"),
        ("digits-recall", {"cells": 72}, r"--cells is 72; it must be 8, 16, 24, … or 64"),
        ("digits-counting", {"classes": 1}, r"--classes is 1; it must be from 2 to 10"),
        ("digits-counting", {"classes": 11}, r"--classes is 11; it must be from 2 to 10"),
        ("digits-same-different", {"scenes": 4}, r"--scenes is 4; it must be at least 5"),
        ("digits-same-different", {"task": "detection"}, r"--task detection: digits-same-different is packed for cl"),
        ("digits", {"classes": 3}, r"--classes is for digits-recall, digits-same-different, digits-counting, not for"),
        ("coco", {"cells": 8}, r"--cells is for digits-recall, digits-same-different, digits-counting, not for coco"),
    ],
)
def test_what_cannot_be_drawn_is_refused(name, options, message):
    with pytest.raises(DataError, match=message):
        open_source(name, SourceOptions(**options))
