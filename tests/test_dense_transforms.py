"""Images, boxes, masks and class maps move together, stay inside, and move by their sample's key alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from torchvision.tv_tensors import Mask

from datamodules.annotations import IGNORE, Objects, decode_mask, encode_mask
from datamodules.transforms import seeded
from datamodules.transforms_detection import (
    DetectionEvalTransform,
    DetectionTrainTransform,
    detection_eval_pipeline,
    detection_train_pipeline,
    look,
)
from datamodules.transforms_segmentation import (
    SegmentationEvalTransform,
    SegmentationTrainTransform,
    is_varied,
    segmentation_eval_pipeline,
    segmentation_train_pipeline,
)
from datamodules.types import DataError
from datamodules.views import extents

UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SHAPES = st.tuples(st.integers(8, 60), st.integers(8, 60))
ODD = st.integers(7, 20).map(lambda half: 2 * half + 1)
ODD_SHAPES = st.tuples(ODD, ODD)
"""Resampled to any size, no sample of an odd number of pixels falls between two, where Pillow and torch differ."""
KEYS = st.integers(0, 2**20)

DETECTION = {
    "flip": DetectionTrainTransform((20, 31, 47), 64, **UNIT),
    "3x": DetectionTrainTransform((24, 40), 64, crop=1.0, crop_short_sides=(20, 30), crop_sides=(10, 24), **UNIT),
    "large-scale": DetectionTrainTransform(long_side=40, large_scale=(0.3, 2.0), **UNIT),
}


def scene(shape, number, seed):
    """An image of grey blobs on black, each blob an object with its exact box and mask."""
    rng = np.random.default_rng(seed)
    height, width = shape
    owner = np.zeros(shape, np.uint8)
    for label in range(1, number + 1):
        y, x = int(rng.integers(0, height - 4)), int(rng.integers(0, width - 4))
        owner[y : y + int(rng.integers(3, 20)), x : x + int(rng.integers(3, 20))] = label
    labels = [label for label in range(1, number + 1) if (owner == label).any()]
    masks = [owner == label for label in labels]
    boxes = extents(torch.from_numpy(np.stack(masks))).tolist() if masks else []
    objects = Objects(
        image_id=5,
        width=width,
        height=height,
        boxes=boxes,
        labels=labels,
        iscrowd=[0] * len(labels),
        area=[float(mask.sum()) for mask in masks],
        masks=[encode_mask(mask) for mask in masks],
    )
    return Image.fromarray(owner * 10).convert("RGB"), objects, owner


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def run(pipeline, image, annotation, key):
    with seeded(3, 1, key, 0):
        return pipeline(image, annotation)


@pytest.mark.parametrize("transform", DETECTION.values(), ids=DETECTION)
@given(SHAPES, st.integers(0, 4), KEYS)
def test_a_box_is_its_masks_extent_within_a_pixel_and_nothing_lies_outside(transform, shape, number, key):
    image, objects, owner = scene(shape, number, key)
    tensor, target = run(detection_train_pipeline(transform), image, objects, key)
    height, width = tensor.shape[1:]
    boxes, seen = target["boxes"], extents(target["masks"])
    assert target["masks"].shape == (len(boxes), height, width)
    assert ((boxes[:, :2] <= seen[:, :2] + 1) & (boxes[:, 2:] >= seen[:, 2:] - 1)).all()
    # Of an object that another one hides in part, a crop may leave less than the box it cuts.
    whole = [
        label for label, box in zip(objects.labels, objects.boxes, strict=True) if (owner == label).sum() == area(box)
    ]
    tight = torch.isin(target["labels"], torch.tensor(whole))
    boxes_of_whole, seen_of_whole = boxes[tight], seen[tight]
    assert (boxes_of_whole[:, :2] >= seen_of_whole[:, :2] - 1).all()
    assert (boxes_of_whole[:, 2:] <= seen_of_whole[:, 2:] + 1).all()
    assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor([width, height])).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= transform.min_side).all()
    assert torch.equal(target["area"], target["masks"].sum((1, 2)).float()) and (target["area"] > 0).all()
    assert max(height, width) <= transform.long_side


@pytest.mark.parametrize("transform", DETECTION.values(), ids=DETECTION)
@given(ODD_SHAPES, st.integers(1, 4), KEYS)
def test_labels_stay_with_their_objects_and_masks_with_their_pixels(transform, shape, number, key):
    """The image's grey says which object a pixel belongs to, so the answer can be read off the moved image."""
    image, objects, _ = scene(shape, number, key)
    options = {"interpolation": "nearest", "crop_sides": (15, 15)}
    plain = DetectionTrainTransform(**{**vars(transform), **options})
    tensor, target = run(detection_train_pipeline(plain), image, objects, key)
    owner = (tensor[0] * 255 / 10).round()
    for label, mask in zip(target["labels"].tolist(), target["masks"], strict=True):
        assert torch.equal(mask, owner == label)
    shown = {label for label in objects.labels if (owner == label).any()}
    assert set(target["labels"].tolist()) <= shown
    large = {label for label in shown if _shorter_side(owner == label) >= transform.min_side + 1}
    assert large <= set(target["labels"].tolist())


def _shorter_side(mask):
    x0, y0, x1, y1 = extents(mask[None])[0].tolist()
    return min(x1 - x0, y1 - y0)


@given(SHAPES, st.integers(0, 3), KEYS)
def test_flipping_twice_changes_nothing(shape, number, key):
    image, objects, _ = scene(shape, number, key)
    view = look(image, objects)
    twice = view.flipped().flipped()
    assert np.array_equal(twice.image, image)
    assert torch.equal(twice.masks, view.masks)
    assert torch.equal(twice.boxes, view.boxes)


@given(SHAPES, st.integers(1, 4), KEYS)
def test_extents_are_those_of_pycocotools(shape, number, key):
    _, objects, _ = scene(shape, number, key)
    masks = np.stack([decode_mask(mask) for mask in objects.masks])
    xywh = coco.toBbox([coco.encode(np.asfortranarray(mask, np.uint8)) for mask in masks])
    expected = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    np.testing.assert_array_equal(extents(torch.from_numpy(masks)).numpy(), expected)


def test_an_empty_mask_has_an_empty_box():
    assert extents(torch.zeros(1, 5, 7)).tolist() == [[0, 0, 0, 0]]
    assert extents(torch.zeros(0, 5, 7)).shape == (0, 4)


def test_evaluation_keeps_every_object_in_original_pixels():
    image, objects, owner = scene((40, 60), 3, 1)
    crowded = Objects(**{**vars(objects), "iscrowd": [1] * len(objects.labels), "area": [7.0] * len(objects.labels)})
    tensor, target = detection_eval_pipeline(DetectionEvalTransform(20, 25))(image, crowded)
    assert tensor.shape == (3, 17, 25)
    assert target["boxes"].tolist() == objects.boxes
    assert target["area"].tolist() == [7.0] * len(objects.labels)
    assert target["iscrowd"].tolist() == [1] * len(objects.labels)
    assert (target["size"].tolist(), target["image_id"].item()) == ([40, 60], 5)
    for label, mask in zip(target["labels"].tolist(), target["masks"], strict=True):
        assert np.array_equal(mask.numpy(), owner == label)
    whole, _ = detection_eval_pipeline(DetectionEvalTransform(None, **UNIT))(image, objects)
    np.testing.assert_allclose(whole.numpy(), np.asarray(image).transpose(2, 0, 1) / 255, atol=1e-6)


def test_training_leaves_crowds_out():
    image, objects, _ = scene((50, 50), 4, 2)
    flags = [number % 2 for number in range(len(objects.labels))]
    crowded = Objects(**{**vars(objects), "iscrowd": flags})
    _, target = run(detection_train_pipeline(DetectionTrainTransform((50,), 50)), image, crowded, 0)
    expected = [label for label, flag in zip(objects.labels, flags, strict=True) if not flag]
    assert target["labels"].tolist() == expected
    assert target["iscrowd"].tolist() == [0] * len(expected)


@pytest.mark.parametrize("transform", DETECTION.values(), ids=DETECTION)
def test_images_without_objects_or_masks_are_legal(transform):
    image, objects, _ = scene((30, 40), 2, 3)
    empty = Objects(1, 40, 30, [], [], [], [], [])
    _, target = run(detection_train_pipeline(transform), image, empty, 0)
    assert [len(target[name]) for name in ("boxes", "labels", "masks", "area")] == [0, 0, 0, 0]
    boxes_only = Objects(**{**vars(objects), "masks": None})
    _, target = run(detection_train_pipeline(DETECTION["flip"]), image, boxes_only, 0)
    assert "masks" not in target
    widths = target["boxes"][:, 2:] - target["boxes"][:, :2]
    assert torch.equal(target["area"], widths.prod(1))


@given(ODD_SHAPES, KEYS, st.sampled_from([None, 24]))
def test_a_class_map_moves_with_its_image(shape, key, short_side):
    """Red is the class: after scale, crop, flip and padding every pixel's red still says its class."""
    rng = np.random.default_rng(key)
    class_map = rng.integers(0, 25, shape, dtype=np.uint8)
    image = Image.fromarray(np.stack([class_map * 10] * 3, axis=2))
    transform = SegmentationTrainTransform(32, short_side, 48, photometric=0.0, interpolation="nearest", **UNIT)
    tensor, target = run(segmentation_train_pipeline(transform), image, class_map, key)
    assert (tensor.shape, target.shape, target.dtype) == ((3, 32, 32), (32, 32), torch.int64)
    real = target != IGNORE
    assert torch.equal((tensor[0] * 25.5).round().long()[real], target[real])
    assert (tensor[:, ~real] == 0).all()
    rows, columns = real.any(1), real.any(0)
    assert torch.equal(real, rows[:, None] & columns[None])  # padding is on the right and at the bottom
    assert (rows.int().diff() <= 0).all() and (columns.int().diff() <= 0).all()


def test_photometric_distortion_leaves_the_classes_alone_and_changes_the_image():
    image, _, owner = scene((40, 40), 3, 4)
    options = {"crop_size": 40, "short_side": None, "scale": (1.0, 1.0), "hflip": 0.0}
    still = SegmentationTrainTransform(photometric=0.0, **options)
    distorted = SegmentationTrainTransform(photometric=1.0, **options)
    plain, plain_map = run(segmentation_train_pipeline(still), image, owner, 1)
    other, other_map = run(segmentation_train_pipeline(distorted), image, owner, 1)
    assert torch.equal(plain_map, other_map)
    assert not torch.equal(plain, other)


@given(st.lists(st.sampled_from([0, 1, 2, IGNORE]), min_size=1, max_size=60), st.floats(0, 1))
def test_a_crop_is_varied_if_no_class_takes_more_than_its_share(values, max_share):
    counted = [value for value in values if value != IGNORE]
    shares = [counted.count(value) / len(counted) for value in set(counted)]
    expected = len(shares) > 1 and max(shares) <= max_share
    if not any(abs(share - max_share) < 1e-9 for share in shares):
        assert is_varied(torch.tensor(values, dtype=torch.uint8), max_share) == expected


def test_crops_full_of_one_class_are_drawn_again():
    """A quarter of all places is varied: 10 tries miss it with .75 ^ 10 = 6 %, one try with 75 %."""
    class_map = np.zeros((64, 64), np.uint8)
    class_map[:, 26:38] = 1
    image = Image.fromarray(np.stack([class_map] * 3, axis=2))
    dull = {}
    for max_share in (0.75, 1.0):
        transform = SegmentationTrainTransform(16, None, scale=(1.0, 1.0), max_share=max_share)
        pipeline = segmentation_train_pipeline(transform)
        maps = [run(pipeline, image, class_map, key)[1] for key in range(200)]
        dull[max_share] = sum(not is_varied(target, 0.75) for target in maps)
    assert dull[0.75] < 40 < 100 < dull[1.0]


def test_evaluation_resizes_the_image_and_not_the_class_map():
    image, _, owner = scene((30, 50), 3, 5)
    tensor, target = segmentation_eval_pipeline(SegmentationEvalTransform(60, 90))(image, owner)
    assert tensor.shape == (3, 54, 90)
    assert np.array_equal(target.numpy(), owner)
    tensor, _ = segmentation_eval_pipeline(SegmentationEvalTransform(None))(image, owner)
    assert tensor.shape == (3, 30, 50)


def test_augmentation_depends_on_the_key_alone():
    image, objects, owner = scene((50, 60), 3, 6)
    pipelines = [(detection_train_pipeline(one), objects) for one in DETECTION.values()]
    pipelines.append((segmentation_train_pipeline(SegmentationTrainTransform(32, 40, 80)), owner))
    for pipeline, annotation in pipelines:
        first = [run(pipeline, image, annotation, key)[0] for key in range(6)]
        torch.manual_seed(9)
        again = [run(pipeline, image, annotation, key)[0] for key in reversed(range(6))]
        assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))
        assert len({(one.shape, round(one.sum().item(), 3)) for one in first}) > 1


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (DetectionTrainTransform(short_sides=()), "train_transform.short_sides is empty; give at least one length"),
        (DetectionTrainTransform(short_sides=(0,)), "train_transform.short_sides is 0; it must be at least 1"),
        (DetectionTrainTransform(long_side=700), "train_transform.long_side is 700; it must be at least 800"),
        (DetectionTrainTransform(crop=2.0), "train_transform.crop is 2.0; it must be between 0 and 1"),
        (DetectionTrainTransform(crop_sides=(9, 3)), "train_transform.crop_sides is 9 3; it must be 0 < min <= max"),
        (DetectionTrainTransform(large_scale=(0.0, 1.0)), "large_scale is 0.0 1.0; it must be 0 < min <= max"),
        (DetectionTrainTransform(std=(0, 1, 1)), "train_transform.std is"),
        (DetectionEvalTransform(0), "eval_transform.short_side is 0; it must be at least 1"),
        (DetectionEvalTransform(800, 600), "eval_transform.long_side is 600; it must be at least 800"),
        (SegmentationTrainTransform(0), "train_transform.crop_size is 0; it must be at least 1"),
        (SegmentationTrainTransform(max_share=1.5), "train_transform.max_share is 1.5; it must be between 0 and 1"),
        (SegmentationTrainTransform(scale=(2.0, 0.5)), "train_transform.scale is 2.0 0.5; it must be 0 < min <= max"),
        (SegmentationTrainTransform(long_side=9), "train_transform.long_side is 9; it must be at least 512"),
        (SegmentationEvalTransform(-2), "eval_transform.short_side is -2; it must be at least 1"),
    ],
)
def test_impossible_values_are_refused_by_name(transform, message):
    build = {
        DetectionTrainTransform: detection_train_pipeline,
        DetectionEvalTransform: detection_eval_pipeline,
        SegmentationTrainTransform: segmentation_train_pipeline,
        SegmentationEvalTransform: segmentation_eval_pipeline,
    }[type(transform)]
    with pytest.raises(DataError, match=message) as error:
        build(transform)
    assert "\n" not in str(error.value)


def test_masks_scale_by_their_pixels_centres():
    """Against Pillow, whose nearest filter samples the same places."""
    _, objects, owner = scene((37, 53), 3, 8)
    view = look(Image.fromarray(owner).convert("RGB"), objects)._replace(masks=Mask(torch.from_numpy(owner)))
    for size in ((20, 31), (74, 106), (50, 50)):
        expected = np.asarray(Image.fromarray(owner).resize(size[::-1], Image.Resampling.NEAREST))
        np.testing.assert_array_equal(view.resized(size, "bilinear").masks.numpy(), expected)
