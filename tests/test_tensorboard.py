"""Figures are pictures of their numbers; tags are one table."""

import numpy as np
import pytest

from lightning_modules.tensorboard import (
    MAX_CLASSES,
    Tag,
    as_markdown,
    confusion_figure,
    per_class_figure,
    prediction_grid,
    to_pixels,
)


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in [*axis.texts, axis.title] if text.get_text()]


def labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_grid_names_right_and_wrong():
    images = np.zeros((3, 8, 8, 3), np.float32)
    figure = prediction_grid(images, ["3", "7", "cat"], ["3", "1", "cat"], [0.99, 0.5, 1.0])
    assert texts(figure) == ["3\n99%", "1 ≠ 7\n50%", "cat\n100%"]
    right, wrong = figure.axes[0].title.get_color(), figure.axes[1].title.get_color()
    assert right != wrong


@pytest.mark.parametrize("count", [1, 8, 16])
def test_grid_is_small_and_repeatable(count):
    images = np.random.default_rng(0).random((count, 32, 32, 3), np.float32)
    drawn = [to_pixels(prediction_grid(images, ["a"] * count, ["a"] * count, [1.0] * count)) for _ in range(2)]
    assert drawn[0].dtype == np.uint8
    assert drawn[0].shape[2] == 3
    assert max(drawn[0].shape) <= 512
    assert np.array_equal(*drawn)
    assert drawn[0].std() > 10  # something is on it


def test_confusion_is_row_normalised():
    figure = confusion_figure(np.array([[3, 1], [0, 0]]), ["a", "b"])
    assert figure.axes[0].images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 0.0]]
    assert texts(figure)[:2] == ["75", "25"]
    assert labels(figure) == ["a", "b"]


def test_many_classes_show_the_worst():
    counts = np.diag(np.full(100, 50))
    counts[41, 7] = 5
    names = [f"class {i}" for i in range(100)]
    figure = confusion_figure(counts, names)
    assert len(labels(figure)) == MAX_CLASSES
    assert {"class 41", "class 7"} <= set(labels(figure))
    assert f"({MAX_CLASSES} of 100 classes, most errors)" in texts(figure)[-1]


def test_bars_are_accuracies_worst_first():
    figure = per_class_figure(np.array([[3, 1], [3, 1]]), ["a", "b"])
    assert labels(figure) == ["b", "a"]
    assert texts(figure)[:2] == ["25.0% of 4", "75.0% of 4"]


def test_classes_without_samples_are_drawn():
    to_pixels(per_class_figure(np.zeros((3, 3), np.int64), ["a", "b", "c"]))
    to_pixels(confusion_figure(np.zeros((3, 3), np.int64), ["a", "b", "c"]))


def test_tags_are_grouped_and_unique():
    assert len(set(Tag)) == len(Tag)
    prefixes = {Tag.LEARNING_RATE, Tag.LOSS_TERM, Tag.MATCHER}
    assert all("/" in tag or tag in prefixes for tag in Tag)


def test_text_is_a_code_block():
    assert as_markdown("a: 1\n") == "```yaml\na: 1\n```"
