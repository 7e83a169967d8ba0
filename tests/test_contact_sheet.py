"""`shards info` counts what is there, and its contact sheet shows boxes, masks and maps where they are."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from datamodules import commands
from datamodules.annotations import Objects, encode_class_map, encode_mask
from datamodules.contact_sheet import _GAP, _LINE, _TILE, class_colour, write_sheet
from datamodules.histogram import class_counts
from datamodules.manifest import read_dataset
from datamodules.pack import pack
from datamodules.sources_base import Source, SourceSample
from datamodules.types import DataError

GREY = 120


def png(size):
    stream = io.BytesIO()
    Image.new("RGB", size, (GREY, GREY, GREY)).save(stream, "PNG")
    return stream.getvalue()


def dataset(folder, task, beside, count=3, size=(120, 60), names=("wall", "a very long name of a class " * 3)):
    samples = [SourceSample(f"s{i}", 500, "", {"png": png(size), **beside}.copy) for i in range(count)]
    return pack(Source("made", task, list(names), {"train": samples}, "somewhere", "free"), str(folder))


def drawn(path, tile=0, side=0):
    """The picture of one tile as (H, W, 3)."""
    pixels = np.asarray(Image.open(path)).astype(int)
    left = _GAP + tile * (_TILE + _GAP) + side * _TILE
    return pixels[2 * _GAP + _LINE :][:_TILE, left : left + _TILE]


def boxed():
    mask = np.zeros((60, 120), dtype=bool)
    mask[10:50, 20:60] = True
    objects = Objects(0, 120, 60, [[20, 10, 60, 50], [90, 0, 120, 30]], [1, 2], [0, 1], [1600, 900])
    masks = [encode_mask(mask), encode_mask(np.zeros((60, 120), dtype=bool))]
    return {**json.loads(objects.encode()), "masks": masks}


def test_boxes_and_masks_are_drawn_where_they_are(tmp_path):
    info = dataset(tmp_path / "x", "detection", {"json": json.dumps(boxed()).encode()})
    write_sheet(tmp_path / "sheet.png", tmp_path / "x", info, "train")
    picture = drawn(tmp_path / "sheet.png", tile=2)
    scale, top = _TILE / 120, (_TILE - _TILE // 2) // 2
    at = lambda x, y: picture[top + round(y * scale), round(x * scale)].tolist()  # noqa: E731
    assert at(20, 30) == list(class_colour(0))  # the outline
    assert at(90.5, 20) == list(class_colour(1))
    inside = np.array(at(40, 30))
    assert abs(inside - (0.55 * GREY + 0.45 * np.array(class_colour(0)))).max() <= 2  # the mask's tint
    assert at(75, 30) == [GREY] * 3
    assert at(105, 20) == [GREY] * 3  # an empty mask tints nothing


def test_a_class_map_is_drawn_beside_its_image(tmp_path):
    class_map = np.zeros((60, 120), dtype=np.uint8)
    class_map[:, 60:] = 1
    class_map[:10] = 255
    info = dataset(tmp_path / "x", "segmentation", {"seg.png": encode_class_map(class_map)}, names=("background", "b"))
    write_sheet(tmp_path / "sheet.png", tmp_path / "x", info, "train")
    top = (_TILE - _TILE // 2) // 2
    image, classes = drawn(tmp_path / "sheet.png", side=0), drawn(tmp_path / "sheet.png", side=1)
    assert image[top + 50, 30].tolist() == image[top + 50, 180].tolist() == [GREY] * 3
    assert classes[top + 50, 30].tolist() == [GREY] * 3
    assert abs(classes[top + 50, 180] - (0.3 * GREY + 0.7 * np.array(class_colour(1)))).max() <= 2
    assert classes[top + 5, 100].tolist() == [0, 0, 0]


def test_a_sheet_shows_evenly_spaced_samples_and_faults(tmp_path):
    info = dataset(tmp_path / "x", "classification", {"cls": b"1"}, count=100, size=(8, 8))
    write_sheet(tmp_path / "sheet.png", tmp_path / "x", info, "train", count=12)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (6 * (_TILE + _GAP) + _GAP, 2 * (_TILE + 2 * _LINE + _GAP) + 2 * _GAP + _LINE)
    assert (drawn(tmp_path / "sheet.png") == GREY).all()  # small images fill their tile
    spoiled = dataset(tmp_path / "y", "classification", {"cls": b"1", "png": b"no image"}, count=2)
    write_sheet(tmp_path / "sheet.png", tmp_path / "y", spoiled, "train")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    assert ((pixels[..., 0] - pixels[..., 1]) > 100).sum() > 50  # red letters


def test_neighbouring_classes_have_different_colours():
    colours = np.array([class_colour(number) for number in range(151)])
    assert np.abs(np.diff(colours, axis=0)).max(axis=1).min() > 60
    assert colours.max(axis=1).min() > 170


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("sheet.jpg", "train", r"--sheet .*sheet.jpg must end with .png"),
        ("nowhere/sheet.png", "train", "there is no folder .*nowhere; make it first"),
        ("sheet.png", "test", "has no split 'test'; it has train"),
    ],
)
def test_a_sheet_that_cannot_be_drawn_is_refused(tmp_path, path, split, message):
    info = dataset(tmp_path / "x", "classification", {"cls": b"0"})
    with pytest.raises(DataError, match=message):
        write_sheet(tmp_path / path, tmp_path / "x", info, split)


def test_an_empty_split_is_refused(tmp_path):
    empty = Source("made", "classification", ["a"], {"train": []}, "", "")
    info = pack(empty, str(tmp_path / "x"))
    with pytest.raises(DataError, match=r"--split train of .* has no samples to draw"):
        write_sheet(tmp_path / "sheet.png", tmp_path / "x", info, "train")


def test_classes_are_counted_for_every_task(tmp_path):
    def counts(folder):
        found = class_counts(folder, read_dataset(folder), lambda samples: None)
        return {name: column.tolist() for name, column in found.items()}

    dataset(tmp_path / "c", "classification", {"cls": b"1"})
    assert counts(tmp_path / "c") == {"train": [0, 3]}
    dataset(tmp_path / "d", "detection", {"json": json.dumps(boxed()).encode()})
    assert counts(tmp_path / "d") == {"train": [3, 3]}
    class_map = np.full((60, 120), 255, dtype=np.uint8)
    class_map[0, :7] = 1
    dataset(tmp_path / "s", "segmentation", {"seg.png": encode_class_map(class_map)})
    assert counts(tmp_path / "s") == {"train images": [0, 3], "train pixels": [0, 21]}


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_the_command_prints_counts_and_names_the_sheet(tmp_path, capsys, task):
    commands.pack(source="digits", task=task, scenes=5, out=str(tmp_path / "x"))
    assert commands.info(str(tmp_path / "x"), sheet=str(tmp_path / "sheet.png"), split="val") == 0
    told = capsys.readouterr().out
    assert f"sheet: {tmp_path / 'sheet.png'}" in told
    assert "scenes composed of scikit-learn" in told
    assert (tmp_path / "sheet.png").stat().st_size > 5000
