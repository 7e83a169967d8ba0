"""Detection scores equal pycocotools', whatever the batches and ranks; every boundary case has its number."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lightning_modules.detection_metrics import CocoEvaluator
from lightning_modules.detection_state import encode_masks

SIDE = 120
SCRIPT = Path(__file__).with_name("metric_ranks.py")


def random_image(rng, classes, num_truth, num_found, side=SIDE, has_masks=True, crowds=0.2):
    """Objects, and detections that are often shifted objects, in contract form; scores have ties."""

    def boxes(num):
        corner, size = rng.uniform(0, side - 4, (num, 2)), rng.uniform(2, side, (num, 2))
        return np.concatenate([corner, np.minimum(corner + size, side)], 1).astype(np.float32)

    truth, found = boxes(num_truth), boxes(num_found)
    labels, guesses = rng.integers(1, classes + 1, num_truth), rng.integers(1, classes + 1, num_found)
    for place in range(num_found):
        if num_truth and rng.random() < 0.7:
            origin = rng.integers(num_truth)
            found[place] = np.clip(truth[origin] + rng.normal(0, 3, 4), 0, side)
            found[place, 2:] = np.maximum(found[place, 2:], found[place, :2] + 1)
            guesses[place] = labels[origin]

    def masks(of):
        y, x = np.mgrid[:side, :side] + 0.5
        centre, radius = (of[:, :2] + of[:, 2:]) / 2, (of[:, 2:] - of[:, :2]) / 2
        dx, dy = ((axis - centre[:, i, None, None]) / radius[:, i, None, None] for i, axis in enumerate((x, y)))
        return torch.from_numpy(dx**2 + dy**2 <= 1)

    target = {
        "boxes": torch.from_numpy(truth),
        "labels": torch.from_numpy(labels),
        "iscrowd": torch.from_numpy((rng.random(num_truth) < crowds).astype(np.int64)),
        "area": torch.from_numpy(rng.uniform(1, 12000, num_truth).astype(np.float32)),
        "size": torch.tensor([side, side]),
    }
    prediction = {
        "boxes": torch.from_numpy(found),
        "labels": torch.from_numpy(guesses),
        "scores": torch.from_numpy(rng.integers(1, 12, num_found).astype(np.float32) / 12),
    }
    if has_masks:
        target["masks"], prediction["masks"] = masks(truth), masks(found)
    return prediction, target


def by_pycocotools(images, classes, kind, max_detections=100):
    """AP, AP50, AP75, small, medium, large (-1 = none) and AP per class, from COCO json as files would hold it."""

    def box(row):
        x0, y0, x1, y1 = (float(value) for value in row)
        return [x0, y0, x1 - x0, y1 - y0]

    def code(mask):
        rle = coco_mask.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8))
        return {"size": list(rle["size"]), "counts": rle["counts"].decode()}

    truth, found = [], []
    for number, (prediction, target) in enumerate(images):
        for i in range(len(target["labels"])):
            row = {"id": len(truth) + 1, "image_id": number, "category_id": int(target["labels"][i])}
            row |= {"iscrowd": int(target["iscrowd"][i]), "area": float(target["area"][i])}
            row |= {"bbox": box(target["boxes"][i])}
            truth.append(row | ({"segmentation": code(target["masks"][i])} if "masks" in target else {}))
        for i in range(len(prediction["labels"])):
            row = {"image_id": number, "category_id": int(prediction["labels"][i])}
            row |= {"score": float(prediction["scores"][i])}
            shape = {"bbox": box(prediction["boxes"][i])}
            found.append(row | (shape if kind == "bbox" else {"segmentation": code(prediction["masks"][i])}))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "height": SIDE, "width": SIDE} for i in range(len(images))],
            "annotations": truth,
            "categories": [{"id": label} for label in range(1, classes + 1)],
        }
        coco.createIndex()
        results = COCO()
        results.dataset = {**coco.dataset, "annotations": []}
        results.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found) if found else results, kind)
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]

    def mean(values):
        return float(values[values > -1].mean()) if (values > -1).any() else -1.0

    overall = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *(precision[..., i] for i in (1, 2, 3))]
    return [mean(part) for part in overall], [mean(precision[:, :, k, 0]) for k in range(classes)]


def evaluated(images, classes, has_masks=True, max_detections=100, batch=3):
    evaluator = CocoEvaluator(classes, has_masks, max_detections)
    for first in range(0, len(images), batch):
        part = images[first : first + batch]
        ids = torch.arange(first, first + len(part))
        evaluator.update([p for p, _ in part], [t for _, t in part], ids, torch.ones(len(part)))
    return evaluator.compute()


def numbers(scores):
    parts = (scores.ap, scores.ap50, scores.ap75, scores.ap_small, scores.ap_medium, scores.ap_large)
    return [[-1.0 if math.isnan(v) else v for v in values] for values in (parts, scores.class_ap.tolist())]


def assert_equal_to_pycocotools(images, classes, has_masks=True, max_detections=100):
    scores = evaluated(images, classes, has_masks, max_detections)
    kinds = [("bbox", scores.box)] + ([("segm", scores.mask)] if has_masks else [])
    for kind, ours in kinds:
        theirs = by_pycocotools(images, classes, kind, max_detections)
        for found, expected in zip(numbers(ours), theirs, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=kind)
    return scores


@settings(max_examples=25)
@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=6),
)
def test_scores_equal_pycocotools(seed, classes, counts):
    rng = np.random.default_rng(seed)
    assert_equal_to_pycocotools([random_image(rng, classes, *count) for count in counts], classes)


@pytest.mark.parametrize("limit", [1, 5, 100])
def test_detections_beyond_the_limit_are_left_out_as_in_pycocotools(limit):
    rng = np.random.default_rng(3)
    images = [random_image(rng, 2, 6, 270, has_masks=False) for _ in range(3)]
    assert_equal_to_pycocotools(images, 2, has_masks=False, max_detections=limit)


def test_sets_without_objects_or_detections_have_no_or_no_good_score():
    rng = np.random.default_rng(0)
    empty = assert_equal_to_pycocotools([random_image(rng, 2, 0, 0)], 2)
    assert math.isnan(empty.box.ap) and empty.confusion.sum() == 0
    unfounded = assert_equal_to_pycocotools([random_image(rng, 2, 0, 5)], 2)
    assert math.isnan(unfounded.box.ap) and np.isnan(unfounded.box.class_ap).all()
    missed = assert_equal_to_pycocotools([random_image(rng, 2, 5, 0, crowds=0)], 2)
    assert missed.box.ap == missed.mask.ap == 0
    nothing = CocoEvaluator(2, True).compute()
    assert math.isnan(nothing.box.ap) and nothing.num_objects.tolist() == [0, 0]


def test_class_without_objects_is_left_out_of_the_mean():
    boxes = torch.tensor([[0.0, 0, 50, 50], [60, 60, 110, 110]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.8])}
    target = {"boxes": boxes[:1], "labels": torch.tensor([1]), "iscrowd": torch.tensor([0])}
    target |= {"area": torch.tensor([2500.0]), "size": torch.tensor([SIDE, SIDE])}
    scores = evaluated([(found, target)], 3, has_masks=False)
    assert scores.box.ap == pytest.approx(1)
    assert scores.mask is None
    assert np.isnan(scores.box.class_ap).tolist() == [False, True, True]
    assert scores.named().keys() == {"box_ap", "box_ap50", "box_ap75", "box_ap_medium"}
    assert scores.num_objects.tolist() == [1, 0, 0]


def test_detection_in_a_crowd_is_neither_right_nor_wrong():
    crowd = torch.tensor([[0.0, 0, 100, 100]])
    target = {"boxes": torch.cat([crowd, crowd + 10]), "labels": torch.tensor([1, 1])}
    target |= {"iscrowd": torch.tensor([1, 0]), "area": torch.tensor([1e4, 1e4]), "size": torch.tensor([SIDE, SIDE])}
    inside = torch.tensor([[5.0, 5, 20, 20]])
    found = {"boxes": torch.cat([inside, crowd + 10]), "labels": torch.tensor([1, 1])}
    scores = evaluated([({**found, "scores": torch.tensor([0.99, 0.6])}, target)], 1, has_masks=False)
    assert scores.box.ap == pytest.approx(1)
    assert scores.confusion.tolist() == [[1, 0], [0, 0]]


def test_confusion_has_a_row_and_a_column_for_background():
    boxes = torch.tensor([[0.0, 0, 20, 20], [40, 40, 60, 60], [80, 80, 100, 100]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2, 2]), "iscrowd": torch.zeros(3, dtype=torch.long)}
    target |= {"area": torch.full((3,), 400.0), "size": torch.tensor([SIDE, SIDE])}
    elsewhere, faint = torch.tensor([[0.0, 80, 20, 100]]), boxes[2:]
    found = {"boxes": torch.cat([boxes[:2], elsewhere, faint]), "labels": torch.tensor([1, 1, 2, 2])}
    scores = evaluated([({**found, "scores": torch.tensor([0.9, 0.9, 0.9, 0.4])}, target)], 2, has_masks=False)
    assert scores.confusion.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_padding_and_repeated_images_change_nothing():
    rng = np.random.default_rng(1)
    images = [random_image(rng, 2, 3, 5) for _ in range(3)]
    evaluator = CocoEvaluator(2, True)
    predictions, targets = [p for p, _ in images], [t for _, t in images]
    evaluator.update(predictions, targets, torch.tensor([0, 1, -1]), torch.tensor([1.0, 1, 0]))
    evaluator.update(predictions[1:2], targets[2:], torch.tensor([1]), torch.ones(1))
    expected = evaluated(images[:2], 2)
    assert evaluator.compute().named() == expected.named()
    evaluator.reset()
    assert math.isnan(evaluator.compute().box.ap)


def test_precision_curve_belongs_to_iou_one_half():
    rng = np.random.default_rng(5)
    scores = evaluated([random_image(rng, 2, 4, 8) for _ in range(5)], 2)
    assert scores.box.precision.shape == scores.box.thresholds.shape == (2, 101)
    np.testing.assert_allclose(scores.box.precision.mean(1), scores.box.class_ap50)
    assert (np.diff(scores.box.thresholds, axis=1) <= 0).all()


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
def test_run_length_codes_are_pycocotools(seed, height, width, density):
    masks = np.random.default_rng(seed).random((4, height, width)) < density
    masks[0], masks[1] = False, True
    codes = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    assert encode_masks(masks) == [code["counts"] for code in codes]
    assert encode_masks(masks[:0]) == []


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Scores of the same 13 images on 1, 2, 3 and 4 processes over gloo, as each rank sees them."""
    out = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}
    command = [sys.executable, str(SCRIPT), str(out)]
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def test_scores_are_the_same_on_every_rank_of_any_number(ranks):
    alone = ranks["1-0"]["record"]
    assert 0.05 < alone["detection"]["box_ap"] < 1 and 0.05 < alone["segmentation"]["miou"] < 1
    assert sum(map(sum, alone["confusion"])) > 13
    for world in (2, 3, 4):
        for rank in range(world):
            assert ranks[f"{world}-{rank}"]["record"] == alone


def test_a_failure_on_the_first_rank_reaches_the_others(ranks):
    for name, found in ranks.items():
        told = "RuntimeError: rank 0 failed to evaluate: " if not name.endswith("-0") else ""
        assert found["failure"] == f"{told}ValueError: no score"
