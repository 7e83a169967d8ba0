"""TensorBoard: the one table of tags, and figures as pure functions from arrays to pictures.

Figures use matplotlib's object interface on the Agg canvas: no global state, no display, the same pixels everywhere.
"""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray


class Tag(StrEnum):
    """Every tag this project writes; `mirror/*` and `attn/*` come complete from mirrorla.diagnostics."""

    TRAIN_LOSS = "train/loss"
    GRAD_NORM = "train/grad_norm"
    LEARNING_RATE = "lr"  # + "/<group>"
    VAL_LOSS = "val/loss"
    VAL_TOP1 = "val/top1"
    VAL_TOP5 = "val/top5"
    TEST_TOP1 = "test/top1"
    IMAGES_PER_S = "throughput/images_per_s"
    STEP_P50_MS = "time/step_p50_ms"
    STEP_P95_MS = "time/step_p95_ms"
    DATA_WAIT_SHARE = "time/data_wait_share"
    PEAK_GIB = "memory/peak_gib"
    SKIPPED = "data/skipped_samples"  # + "/<kind>"
    GIVEN = "data/samples_given"  # + "/<dataset of a mixture>"
    PREDICTIONS = "figures/predictions"
    CONFUSION = "figures/confusion"
    PER_CLASS = "figures/per_class_accuracy"
    CONFIG = "run/config"
    ENVIRONMENT = "run/environment"
    ATTEMPT = "run/attempt"


GOOD, BAD, INK, PALE = "#1b7f5c", "#c2410c", "#1f2937", "#e5e7eb"
MAX_CLASSES = 24
"""Classes a confusion matrix or bar chart shows; with more, the worst are shown."""


def to_pixels(figure: Figure) -> NDArray[np.uint8]:
    """Draw a figure into an (H, W, 3) uint8 array."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def prediction_grid(
    images: NDArray[np.float32], true: Sequence[str], predicted: Sequence[str], scores: Sequence[float]
) -> Figure:
    """A fixed set of images with their true and predicted names.

    Args:
        images: (n, H, W, 3) in [0, 1].
        true: n true class names.
        predicted: n predicted class names.
        scores: n probabilities of the predictions.

    Returns:
        A figure at most 8 inches wide; wrong predictions are framed and named in orange.
    """
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(columns * 0.8, rows * 1.15), dpi=80, layout="constrained")
    for index, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axis.set_axis_off()
        if index >= len(images):
            continue
        right = true[index] == predicted[index]
        colour = GOOD if right else BAD
        axis.imshow(images[index].clip(0, 1), interpolation="nearest")
        answer = _short(predicted[index], 12) if right else f"{_short(predicted[index], 6)} ≠ {_short(true[index], 6)}"
        axis.set_title(f"{answer}\n{scores[index]:.0%}", fontsize=8, color=colour, pad=2)
        if not right:
            axis.set_axis_on()
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color=BAD, linewidth=2)
    return figure


def confusion_figure(counts: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """The confusion matrix, each row divided by its sum.

    Args:
        counts: (C, C), rows are true classes.
        names: C class names.

    Returns:
        A figure of at most MAX_CLASSES classes: those with the most errors when there are more.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    kept = _worst(counts, MAX_CLASSES)
    shares, kept_names = shares[np.ix_(kept, kept)], [_short(names[i], 14) for i in kept]
    side = 2.2 + 0.28 * len(kept)
    figure = Figure(figsize=(side, side), dpi=80, layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(kept))
    axis.set_xticks(ticks, kept_names, rotation=90, fontsize=7)
    axis.set_yticks(ticks, kept_names, fontsize=7)
    axis.set_xlabel("predicted", fontsize=8, color=INK)
    axis.set_ylabel("true", fontsize=8, color=INK)
    axis.set_title(_selection("share of each true class", len(kept), len(names)), fontsize=8, color=INK)
    for row, column in zip(*np.nonzero(shares >= 0.01), strict=True):
        share = shares[row, column]
        axis.text(
            column, row, f"{share * 100:.0f}", ha="center", va="center", fontsize=6, color="w" if share > 0.5 else INK
        )
    return figure


def per_class_figure(counts: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Accuracy of every class as bars, the worst first.

    Args:
        counts: (C, C) confusion counts, rows are true classes.
        names: C class names.

    Returns:
        A figure of at most MAX_CLASSES bars.
    """
    accuracy = np.diag(counts) / np.maximum(counts.sum(1), 1)
    kept = sorted(_worst(counts, MAX_CLASSES), key=lambda index: accuracy[index])
    figure = Figure(figsize=(4.8, 0.8 + 0.2 * len(kept)), dpi=80, layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(kept)), [1.0] * len(kept), color=PALE)
    axis.barh(range(len(kept)), accuracy[kept], color=GOOD)
    axis.set_yticks(range(len(kept)), [_short(names[i], 18) for i in kept], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    for place, index in enumerate(kept):
        axis.text(0.01, place, f"{accuracy[index]:.1%} of {counts[index].sum()}", va="center", fontsize=6, color="w")
    axis.set_title(_selection("accuracy per class, worst first", len(kept), len(names)), fontsize=8, color=INK)
    return figure


def as_markdown(text: str, language: str = "yaml") -> str:
    """A text as a code block for TensorBoard's text page."""
    return f"```{language}\n{text.rstrip()}\n```"


def _worst(counts: NDArray[np.int64], limit: int) -> list[int]:
    """Indices of the classes with the most errors (given or received), in class order."""
    errors = counts.sum(1) + counts.sum(0) - 2 * np.diag(counts)
    return sorted(np.argsort(-errors, kind="stable")[:limit].tolist())


def _selection(title: str, shown: int, total: int) -> str:
    return title if shown == total else f"{title} ({shown} of {total} classes, most errors)"


def _short(name: str, limit: int) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
