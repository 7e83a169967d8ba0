"""mIoU equals a plain confusion matrix, whatever the batches; ignored pixels and absent classes count for nothing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.segmentation_metrics import SegmentationMetrics, segmentation_scores

IGNORE = 255


def by_numpy(predictions, masks, classes):
    """Ten lines of numpy."""
    counts = np.zeros((classes, classes), np.int64)
    for predicted, mask in zip(predictions, masks, strict=True):
        for true, guess in zip(mask.ravel(), predicted.ravel(), strict=True):
            if true != IGNORE:
                counts[true, guess] += 1
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    iou = [counts[c, c] / union[c] for c in range(classes) if union[c]]
    recall = [counts[c, c] / counts[c].sum() for c in range(classes) if counts[c].sum()]
    return counts, np.mean(iou), np.trace(counts) / counts.sum(), np.mean(recall)


def random_maps(rng, classes, count):
    sizes = rng.integers(1, 9, (count, 2))
    masks = [rng.choice([*range(classes), IGNORE], size) for size in sizes]
    masks[0].flat[0] = 0  # something counts
    return [rng.integers(0, classes, size) for size in sizes], masks


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(1, 5))
def test_scores_equal_a_plain_confusion_matrix(seed, classes, count):
    predictions, masks = random_maps(np.random.default_rng(seed), classes, count)
    metrics = SegmentationMetrics(classes)
    for predicted, mask in zip(predictions, masks, strict=True):
        metrics.update([torch.from_numpy(predicted)], [torch.from_numpy(mask)], torch.ones(1))
    scores = metrics.scores()
    counts, miou, accuracy, mean_accuracy = by_numpy(predictions, masks, classes)
    assert np.array_equal(scores.confusion, counts)
    found = (scores.miou, scores.pixel_accuracy, scores.mean_accuracy)
    np.testing.assert_allclose(found, (miou, accuracy, mean_accuracy), rtol=1e-12)


def test_padded_masks_count_where_the_prediction_lies():
    predicted, mask = torch.tensor([[0, 1], [1, 1]]), torch.full((4, 5), IGNORE)
    mask[:2, :2] = torch.tensor([[0, 1], [0, 1]])
    metrics = SegmentationMetrics(2)
    metrics.update([predicted], mask[None], torch.ones(1))
    assert metrics.compute().tolist() == [[1, 1], [0, 2]]


def test_images_of_weight_0_count_for_nothing():
    metrics = SegmentationMetrics(2)
    maps = [torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2, dtype=torch.long)]
    metrics.update(maps, [maps[0], maps[0]], torch.tensor([1.0, 0.0]))
    assert metrics.compute().tolist() == [[4, 0], [0, 0]]


def test_absent_class_is_left_out_and_an_invented_one_is_not():
    scores = segmentation_scores(np.array([[6, 0, 2], [0, 0, 0], [0, 0, 0]]))
    assert np.isnan(scores.class_iou).tolist() == [False, True, False]
    assert scores.miou == pytest.approx((6 / 8 + 0) / 2)
    assert scores.mean_accuracy == scores.pixel_accuracy == pytest.approx(6 / 8)
    assert scores.named()["iou_worst"] == 0 and scores.named()["iou_best"] == pytest.approx(0.75)


def test_nothing_counted_has_no_score():
    metrics = SegmentationMetrics(3)
    metrics.update([torch.zeros(2, 2, dtype=torch.long)], [torch.full((2, 2), IGNORE)], torch.ones(1))
    scores = metrics.scores()
    assert math.isnan(scores.miou) and math.isnan(scores.pixel_accuracy) and math.isnan(scores.mean_accuracy)
    assert scores.named().keys() == {"miou", "pixel_accuracy", "mean_accuracy"}


def test_counts_start_anew_after_a_reset():
    metrics = SegmentationMetrics(2)
    same = torch.zeros(3, 3, dtype=torch.long)
    metrics.update([same], [same], torch.ones(1))
    assert metrics.scores().miou == 1
    metrics.reset()
    metrics.update([same], [same + 1], torch.ones(1))
    assert metrics.scores().miou == 0
