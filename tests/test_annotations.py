"""Boxes, masks and class maps survive the way through a tar, and what is wrong with them is named."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco

from datamodules.annotations import (
    Objects,
    decode_mask,
    encode_class_map,
    encode_mask,
    parse_class_map,
    parse_objects,
)
from datamodules.types import CorruptSampleError

GOOD = {
    "image_id": 7,
    "width": 20,
    "height": 10,
    "boxes": [[0, 0, 20, 10], [1.5, 2, 3.25, 4]],
    "labels": [1, 3],
    "iscrowd": [0, 1],
    "area": [200, 3.5],
}


# pycocotools' own decoder makes an array in a way that NumPy 2 deprecates
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@settings(max_examples=200, deadline=None)
@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)))
def test_a_mask_comes_back_as_pycocotools_has_it(mask):
    rle = encode_mask(mask)
    assert np.array_equal(decode_mask(rle), mask)
    assert np.array_equal(coco.decode({**rle, "counts": rle["counts"].encode()}), mask)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=[chr(code) for code in range(40, 120)], max_size=12))
def test_no_run_length_text_gets_past_the_check_with_another_size(counts):
    document = {**GOOD, "boxes": [[0, 0, 1, 1]], "labels": [1], "iscrowd": [0], "area": [1]}
    document["masks"] = [{"size": [10, 20], "counts": counts}]
    try:
        objects = parse_objects(json.dumps(document).encode(), 3, "x")
    except CorruptSampleError:
        return
    assert decode_mask(objects.masks[0]).shape == (10, 20)


def test_objects_come_back_as_they_were_written():
    masks = [encode_mask(np.eye(10, 20, dtype=bool)), encode_mask(np.zeros((10, 20), dtype=bool))]
    objects = Objects(7, 20, 10, [[0, 0, 20, 10], [1.5, 2, 3.25, 4]], [1, 3], [0, 1], [200, 3.5], masks)
    assert parse_objects(objects.encode(), 3, "x") == objects
    none = Objects(8, 20, 10, [], [], [], [])
    assert parse_objects(none.encode(), 3, "x") == none
    assert b"masks" not in none.encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[0, 0, 20, 10], [3, 3, 3, 5]]}, "x.json: object 1: box [3.0, 3.0, 3.0, 5.0] is empty"),
        ({"boxes": [[0, 0, 20.1, 10], [1, 1, 2, 2]]}, "object 0: box [0.0, 0.0, 20.1, 10.0] leaves the image of 20x10"),
        ({"boxes": [[0, 0, 20, 10], [1, float("nan"), 2, 2]]}, "is not four finite numbers"),
        ({"boxes": [[0, 0, 20, 10], [1, 2, 2]]}, "object 1: box [1.0, 2.0, 2.0] is not four finite numbers"),
        ({"boxes": [[0, 0, 20, 10]]}, "1 boxes but 2 labels"),
        ({"labels": [0, 1]}, "object 0: label 0 is not in 1 … 3"),
        ({"labels": [1, 4]}, "object 1: label 4 is not in 1 … 3"),
        ({"labels": [1, 2.0]}, "ValueError: 2.0 is no integer"),
        ({"iscrowd": [0, 2]}, "object 1: iscrowd 2 is neither 0 nor 1"),
        ({"area": [1, -1]}, "object 1: area -1.0 is not a number from 0"),
        ({"masks": [{"size": [20, 10], "counts": "0"}] * 2}, "mask size [20, 10] instead of [10, 20]"),
        ({"masks": [{"size": [10, 20], "counts": "1"}] * 2}, "the mask's runs cover 1 instead of 200 pixels"),
        ({"masks": [{"size": [10, 20], "counts": "!"}] * 2}, "a run-length code with '!'"),
        ({"masks": [{"size": [10, 20], "counts": "P"}] * 2}, "an empty or unfinished run-length code"),
        ({"masks": [{"size": [10, 20], "counts": ""}] * 2}, "an empty or unfinished run-length code"),
        ({"masks": [{"size": [10, 20], "counts": "O"}] * 2}, "a run of -1 pixels"),
        ({"masks": [{"size": [10, 20], "counts": "ooooooo0"}] * 2}, "a run-length number of 8 characters"),
        ({"width": "wide"}, "x.json: no detection annotation (ValueError: "),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_a_wrong_annotation_is_named(change, message):
    with pytest.raises(CorruptSampleError) as raised:
        parse_objects(json.dumps({**GOOD, **change}).encode(), 3, "x")
    assert message in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"[" * 100_000, b"\xff\xfe", b'{"boxes": 3}'])
def test_bytes_that_are_no_annotation_are_refused(data):
    with pytest.raises(CorruptSampleError, match=r"x\.json: no detection annotation"):
        parse_objects(data, 3, "x")


def test_an_annotation_bomb_is_refused_unread():
    with pytest.raises(CorruptSampleError, match="33554433 bytes; the limit is 33554432"):
        parse_objects(bytes((32 << 20) + 1), 3, "x")


def test_a_class_map_comes_back_and_a_wrong_one_is_named():
    class_map = np.array([[0, 1, 2], [255, 0, 2]], dtype=np.uint8)
    data = encode_class_map(class_map)
    assert np.array_equal(parse_class_map(data, 3, (3, 2), "x"), class_map)
    for arguments, message in (
        ((data, 2, (3, 2), "x"), r"x\.seg\.png: class id 2 is not below the 2 classes"),
        ((data, 3, (2, 3), "x"), r"size \(3, 2\) instead of the image's \(2, 3\)"),
        ((encode_class_map(np.zeros((2, 3, 3), np.uint8)), 3, (3, 2), "x"), "mode RGB; a class map has one"),
        ((data[:45], 3, (3, 2), "x"), "no readable PNG"),
    ):
        with pytest.raises(CorruptSampleError, match=message):
            parse_class_map(*arguments)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_leaves_an_annotation_that_holds(place, byte):
    masks = [encode_mask(np.eye(10, 20, dtype=bool)), encode_mask(np.ones((10, 20), dtype=bool))]
    data = bytearray(json.dumps({**GOOD, "masks": masks}).encode())
    data[place % len(data)] = byte
    try:
        objects = parse_objects(bytes(data), 3, "x")
    except CorruptSampleError:
        return
    assert parse_objects(objects.encode(), 3, "x").labels == objects.labels
    assert all(decode_mask(mask).shape == (objects.height, objects.width) for mask in objects.masks or [])
