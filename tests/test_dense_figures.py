"""What is drawn is what was found: boxes, masks and maps in their class's colour; curves and bars are their numbers."""

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_score, recall_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

from datamodules.contact_sheet import class_colour
from lightning_modules.board import hyperparameters, scalars_layout
from lightning_modules.callbacks.mirror_metrics import PROBED_SIDE, probed_images
from lightning_modules.curves import MAX_CURVES, NUM_THRESHOLDS, ScoreCounts, detection_curves, shown_classes
from lightning_modules.dense_figures import (
    detection_charts,
    detection_picture,
    found_shapes,
    segmentation_charts,
    segmentation_picture,
    truth_shapes,
)
from lightning_modules.detection_metrics import CocoEvaluator
from lightning_modules.drawing import (
    SHOWN_OBJECTS,
    SHOWN_SIDE,
    Shapes,
    draw_class_map,
    draw_shapes,
    fitted,
    with_legend,
)
from lightning_modules.segmentation_metrics import segmentation_scores
from lightning_modules.tensorboard import MAX_CLASSES, bars_figure

NAMES = ["cat", "dog", "background"]
GREY = np.full((100, 200, 3), 128, np.uint8)


def shapes(*boxes, labels=None, size=(100, 200), **more):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Shapes(boxes, labels or [0] * len(boxes), size, **more)


def has_colour(pixels, label):
    return bool((pixels == np.array(class_colour(label), np.uint8)).all(-1).any())


def changed(pixels, before=GREY):
    rows, columns = np.nonzero((pixels != before).any(-1))
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


def test_frame_lies_on_the_boxs_edge_in_its_classs_colour():
    drawn = draw_shapes(GREY, shapes([20, 40, 60, 80], labels=[1]), NAMES)
    colour = np.array(class_colour(1), np.uint8)
    assert (drawn[79, 20:60] == colour).all() and (drawn[40:80, 59] == colour).all()
    assert (drawn[79 + 1 :] == 128).all() and (drawn[:, 60:] == 128).all()
    assert (drawn[50:70, 30:50] == 128).all()
    assert (GREY == 128).all()


def test_boxes_and_masks_scale_with_the_picture():
    mask = np.zeros((1, 50, 100), np.bool_)
    mask[0, 30:40, 15:25] = True
    drawn = draw_shapes(GREY, shapes([10, 25, 30, 45], size=(50, 100), masks=mask), NAMES)
    assert changed(drawn)[1:] == (90, 20, 60)  # the label stands above
    colour = np.array(class_colour(0))
    inner = drawn[55:85, 25:55]
    assert changed(inner, GREY[55:85, 25:55]) == (5, 25, 5, 25)
    assert (inner[5, 5:25] == colour).all()  # the rim
    np.testing.assert_allclose(inner[15, 15], 128 * 0.6 + colour * 0.4, atol=1)


def test_every_object_and_detection_is_named():
    from PIL import ImageFont

    plain = draw_shapes(GREY, shapes([20, 40, 60, 80]), NAMES)
    scored = draw_shapes(GREY, shapes([20, 40, 60, 80], scores=[0.98]), NAMES)
    crowd = draw_shapes(GREY, shapes([20, 40, 60, 80], crowds=[True]), NAMES)
    widths = [changed(drawn[:40], GREY[:40])[3] - 20 for drawn in (plain, scored, crowd)]
    font = ImageFont.load_default(13)
    expected = [font.getlength(text) for text in ("cat", "cat 98%", "cat (crowd)")]
    np.testing.assert_allclose(widths, np.array(expected) + 7, atol=1)


@pytest.mark.parametrize("box", [[0, 0, 4, 4], [190, 0, 200, 5], [195, 95, 200, 100], [0, 0, 200, 100]])
def test_labels_stay_inside_the_picture(box):
    drawn = draw_shapes(GREY, shapes(box, scores=[1.0]), NAMES)
    assert drawn.shape == GREY.shape
    outside = GREY.copy()
    outside[box[1] : box[3], box[0] : box[2]] = drawn[box[1] : box[3], box[0] : box[2]]
    assert (drawn != outside).any() or box == [0, 0, 200, 100]


def test_small_objects_lie_above_large_ones_and_the_best_are_drawn():
    small, large = [50, 40, 60, 50], [40, 30, 90, 80]
    for order in ([small, large], [large, small]):
        labels = [1 if box is small else 0 for box in order]
        masks = np.zeros((2, 100, 200), np.bool_)
        for place, (x0, y0, x1, y1) in enumerate(order):
            masks[place, y0:y1, x0:x1] = True
        drawn = draw_shapes(GREY, shapes(*order, labels=labels, masks=masks), NAMES)
        assert (drawn[49, 55] == np.array(class_colour(1))).all()
    many = shapes(*[[i, 50, i + 2, 60] for i in range(100)], scores=[1 - i / 200 for i in range(100)])
    assert changed(draw_shapes(GREY, many, [""])[52:60], GREY[52:60])[3] == SHOWN_OBJECTS + 1


def test_no_object_leaves_the_picture_as_it_is():
    assert np.array_equal(draw_shapes(GREY, shapes(), NAMES), GREY)


def test_class_map_has_a_colour_per_class_black_for_ignored_and_none_for_background():
    class_map = np.array([[0, 1], [2, 255]]).repeat(50, 0).repeat(100, 1)
    drawn = draw_class_map(GREY, class_map, NAMES)
    expected = [128 * 0.35 + np.array(class_colour(label)) * 0.65 for label in (0, 1)]
    np.testing.assert_allclose(drawn[10, 10], expected[0], atol=1)
    np.testing.assert_allclose(drawn[10, 150], expected[1], atol=1)
    assert (drawn[60, 10] == 128).all() and (drawn[60, 150] == 0).all()


@pytest.mark.parametrize("size", [(30, 20), (448, 100), (900, 1600)])
def test_pictures_are_scaled_to_one_side(size):
    shown = fitted(np.zeros((*size, 3), np.uint8))
    assert max(shown.shape) == SHOWN_SIDE <= 512
    assert shown.shape[0] / shown.shape[1] == pytest.approx(size[0] / size[1], rel=0.03)


def test_truth_stands_beside_the_detections_that_are_shown():
    target = {"boxes": torch.tensor([[2.0, 30, 60, 90]]), "labels": torch.tensor([1]), "iscrowd": torch.tensor([0])}
    target |= {"size": torch.tensor([100, 200]), "masks": torch.zeros(1, 100, 200, dtype=torch.bool)}
    found = {"boxes": target["boxes"].repeat(2, 1), "labels": torch.tensor([2, 1])}
    found |= {"scores": torch.tensor([0.6, 0.4]), "masks": target["masks"].repeat(2, 1, 1)}
    truth, kept = truth_shapes(target), found_shapes(found, (100, 200))
    assert (truth.labels, kept.labels, kept.scores) == ([0], [1], [pytest.approx(0.6)])
    pair = detection_picture(GREY, truth, kept, NAMES)
    again = detection_picture(GREY, truth, kept, NAMES)
    left, right = pair[:, : pair.shape[1] // 2], pair[:, pair.shape[1] // 2 :]
    assert has_colour(left, 0) and not has_colour(left, 1)
    assert has_colour(right, 1) and not has_colour(right, 0)
    assert np.array_equal(pair, again)


def test_segmentation_picture_shows_image_truth_prediction_and_the_classes():
    truth = np.full((100, 200), 2)
    truth[:50] = 0
    pair = segmentation_picture(GREY, truth, np.where(truth == 0, 1, truth), NAMES)
    third = pair.shape[1] // 3
    image, true, predicted = (pair[20:180, i * third + 4 : (i + 1) * third - 8] for i in range(3))
    assert (image == 128).all()
    for part, label in ((true, 0), (predicted, 1)):
        np.testing.assert_allclose(part[5, 5], 128 * 0.35 + np.array(class_colour(label)) * 0.65, atol=1)
    bottom = pair[180 + 20 :]
    assert has_colour(bottom, 0) and has_colour(bottom, 1) and not has_colour(bottom, 2)


def test_legend_takes_as_many_lines_as_it_needs():
    entries = [(f"a rather long class name {i}", class_colour(i)) for i in range(9)]
    drawn = with_legend(GREY, entries)
    assert all(has_colour(drawn[100:], i) for i in range(9))


def evaluated(count=4):
    evaluator = CocoEvaluator(3, has_masks=False)
    for sample in range(count):
        boxes = torch.tensor([[0.0, 0, 40, 40], [50, 50, 90, 90]])
        target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "iscrowd": torch.zeros(2), "area": torch.ones(2) * 99}
        target["size"] = torch.tensor([100, 100])
        found = {"boxes": torch.cat([boxes, boxes[:1] + 50.5]), "labels": torch.tensor([1, 1 + sample % 2, 1])}
        found["scores"] = torch.tensor([0.9 - sample / 10, 0.55, 0.3])
        evaluator.update([found], [target], torch.tensor([sample]), torch.ones(1))
    return evaluator.compute()


def test_detection_charts_show_every_class_with_objects():
    charts = detection_charts(evaluated(), ["a", "b", "c"])
    assert set(charts) == {"figures/per_class_box_ap", "figures/confusion"}
    bars = charts["figures/per_class_box_ap"].axes[0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["b", "a"]
    assert bars.texts[0].get_text().endswith(", 4 objects")
    rows = [label.get_text() for label in charts["figures/confusion"].axes[0].get_yticklabels()]
    assert rows == ["a", "b", "c", "(background)"]


def test_segmentation_charts_leave_absent_classes_out():
    charts = segmentation_charts(segmentation_scores(np.array([[9, 1, 0], [2, 8, 0], [0, 0, 0]])), ["a", "b", "c"])
    bars = charts["figures/per_class_iou"].axes[0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["b", "a"]
    assert [text.get_text() for text in bars.texts] == ["72.7%, 50.0% of pixels", "75.0%, 50.0% of pixels"]


def test_bars_of_many_classes_show_the_lowest():
    values = np.linspace(1, 0, 50)
    figure = bars_figure(values, [str(i) for i in range(50)], [""] * 50, "AP")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [str(i) for i in range(49, 49 - MAX_CLASSES, -1)]
    assert "24 of 50" in figure.axes[0].get_title()


def test_classification_curves_equal_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randint(0, 101, (80, 3), generator=generator) + 0.5) / 101.5
    labels = torch.randint(3, (80,), generator=generator)
    counts = ScoreCounts(3)
    for part in torch.split(torch.arange(80), 9):
        counts.update(scores[part], labels[part], torch.ones(len(part)))
    counts.update(scores[:5], labels[:5], torch.zeros(5))
    for label, curve in enumerate(counts.curves()):
        for place in (0, 30, 62, 95):
            answers = (scores[:, label] >= place / 100).numpy()
            precision = precision_score(labels == label, answers, zero_division=1)
            recall = recall_score(labels == label, answers)
            assert curve.precision[place] == pytest.approx(precision)
            assert curve.recall[place] == pytest.approx(recall)
            assert curve.hits[place] + curve.misses[place] == (labels == label).sum()
            assert curve.false_alarms[place] + curve.rejections[place] == (labels != label).sum()


def test_detection_curves_have_cocos_precision_at_the_recall_a_score_reaches():
    scores = evaluated()
    first, second, none = detection_curves(scores.box, scores.num_objects.tolist())
    assert none is None
    assert first.recall[0] == pytest.approx(1) and first.recall[95] == 0 and first.precision[95] == 1
    assert first.recall[65] == pytest.approx(0.75)  # the true ones have .9, .8, .7 and .6, false ones .55 and .3
    assert first.precision[65] == first.precision[58] == pytest.approx(1) and first.recall[58] == pytest.approx(1)
    assert second.recall[0] == pytest.approx(0.5)  # two of four are called by the other class
    for curve in (first, second):
        assert (np.diff(curve.recall) <= 1e-12).all()
        np.testing.assert_allclose(curve.hits + curve.misses, 4)


def test_curve_arrives_in_tensorboard(tmp_path):
    scores = evaluated()
    curve = detection_curves(scores.box, scores.num_objects.tolist())[0]
    with SummaryWriter(str(tmp_path)) as writer:
        curve.write(writer, "curves/a", 7)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.SummaryMetadata("curves/a").plugin_data.plugin_name == "pr_curves"
    event = events.Tensors("curves/a")[0]
    assert event.step == 7
    values = make_ndarray(event.tensor_proto)
    assert values.shape == (6, NUM_THRESHOLDS)
    np.testing.assert_allclose(values[-2], curve.precision, rtol=1e-6)
    np.testing.assert_allclose(values[-1], curve.recall, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 3, MAX_CURVES, 1000])
def test_shown_curves_are_few_and_always_the_same(count):
    chosen = shown_classes(count)
    assert chosen == shown_classes(count) == sorted(set(chosen))
    assert len(chosen) == min(count, MAX_CURVES) and chosen[-1] == count - 1


def test_hyperparameters_are_what_decides_the_result():
    config = """
seed_everything: 3
model: {class_path: a.B, init_args: {optim: {lr: 1.0e-3, betas: [0.9, 0.99]}, ema: true, pretrained: null}}
data: {class_path: c.D, init_args: {path: /somewhere, num_workers: 4, batch_size: 8}}
trainer: {max_epochs: 2, precision: bf16-mixed, callbacks: null, enable_progress_bar: true}
"""
    assert hyperparameters(config) == {
        "seed": 3,
        "model.optim.lr": 1e-3,
        "model.optim.betas": "0.9 0.99",
        "model.ema": True,
        "data.batch_size": 8,
        "trainer.max_epochs": 2,
        "trainer.precision": "bf16-mixed",
    }
    assert hyperparameters("") == {}


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_layout_has_losses_scores_and_time(task):
    layout = scalars_layout(task)
    assert list(layout) == ["losses", task, "time"]
    assert all(kind == "Multiline" and tags for titles in layout.values() for kind, tags in titles.values())


def test_mirrors_are_measured_on_what_all_images_have():
    sizes = [(300, 400), (280, 500), (90, 640)]
    images = [torch.randn(3, *size) for size in sizes]
    common = probed_images({"image": images})
    assert common.shape == (3, 3, 90, PROBED_SIDE)
    assert torch.equal(common[1], images[1][:, :90, :PROBED_SIDE])
    padded = torch.zeros(2, 3, 50, 60)
    assert probed_images({"image": padded, "size": torch.tensor([[50, 20], [30, 60]])}).shape == (2, 3, 30, 20)
    assert probed_images({"image": padded}) is padded
