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
    LOSS_TERM = "loss"  # + "/<term>"
    MATCHER = "matcher"  # + "/positives_per_image", "/foreground_accuracy", "/false_negatives"
    GRAD_NORM = "train/grad_norm"
    SKIPPED_STEPS = "train/skipped_steps"
    LEARNING_RATE = "lr"  # + "/<group>"
    VAL_LOSS = "val/loss"
    VAL_TOP1 = "val/top1"
    VAL_TOP5 = "val/top5"
    VAL_BOX_AP = "val/box_ap"  # + "50", "75", "_small", "_medium", "_large"
    VAL_MASK_AP = "val/mask_ap"  # the same
    VAL_MIOU = "val/miou"
    VAL_PIXEL_ACCURACY = "val/pixel_accuracy"
    VAL_MEAN_ACCURACY = "val/mean_accuracy"
    TEST_TOP1 = "test/top1"
    IMAGES_PER_S = "throughput/images_per_s"
    STEP_P50_MS = "time/step_p50_ms"
    STEP_P95_MS = "time/step_p95_ms"
    DATA_WAIT_SHARE = "time/data_wait_share"
    CHECKPOINT_STALL = "time/checkpoint_stall_share"
    PEAK_GIB = "memory/peak_gib"
    SKIPPED = "data/skipped_samples"  # + "/<kind>"
    GIVEN = "data/samples_given"  # + "/<dataset of a mixture>"
    PREDICTIONS = "figures/predictions"  # dense tasks: + "/<id of the image>"
    CONFUSION = "figures/confusion"
    PER_CLASS = "figures/per_class_accuracy"
    PER_CLASS_BOX_AP = "figures/per_class_box_ap"
    PER_CLASS_MASK_AP = "figures/per_class_mask_ap"
    PER_CLASS_IOU = "figures/per_class_iou"
    CURVE = "curves/precision_recall"  # + "/<class>"; dense tasks: "/box/<class>", "/mask/<class>"
    CONFIG = "run/config"
    ENVIRONMENT = "run/environment"
    ATTEMPT = "run/attempt"


SCORES = {
    "top1": "top-1",
    "top5": "top-5",
    "box_ap": "box AP",
    "box_ap50": "box AP50",
    "mask_ap": "mask AP",
    "mask_ap50": "mask AP50",
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
}
"""What a person reads instead of `val/<name>` or `test/<name>`, the headline of each task first."""
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
    notes = [f"{accuracy[i]:.1%} of {counts[i].sum()}" for i in kept]
    title = _selection("accuracy per class, worst first", len(kept), len(names))
    return _bars(accuracy[kept], [names[i] for i in kept], notes, title)


def bars_figure(values: NDArray[np.float64], names: Sequence[str], notes: Sequence[str], title: str) -> Figure:
    """A score in [0, 1] of every class as bars, the worst first.

    Args:
        values: C scores; classes with NaN are left out.
        names: C class names.
        notes: C remarks that stand in the bars after the score.
        title: of the figure.

    Returns:
        A figure of at most MAX_CLASSES bars: the lowest when there are more.
    """
    order = [int(i) for i in np.argsort(values, kind="stable") if not np.isnan(values[i])]
    kept = order[:MAX_CLASSES]
    remarks = [f"{values[i]:.1%}, {notes[i]}" for i in kept]
    shown = f", worst first ({len(kept)} of {len(order)} classes)" if len(kept) < len(order) else ", worst first"
    return _bars(values[kept], [names[i] for i in kept], remarks, title + shown)


def as_markdown(text: str, language: str = "yaml") -> str:
    """A text as a code block for TensorBoard's text page."""
    return f"```{language}\n{text.rstrip()}\n```"


def _bars(values: NDArray[np.float64], names: Sequence[str], notes: Sequence[str], title: str) -> Figure:
    figure = Figure(figsize=(4.8, 0.8 + 0.2 * len(values)), dpi=80, layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(values)), [1.0] * len(values), color=PALE)
    axis.barh(range(len(values)), values, color=GOOD)
    axis.set_yticks(range(len(values)), [_short(name, 18) for name in names], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    for place, (value, note) in enumerate(zip(values, notes, strict=True)):
        is_inside = value > 0.45  # otherwise the note stands beside the bar, on the pale ground
        axis.text(
            0.01 if is_inside else value + 0.01, place, note, va="center", fontsize=6, color="w" if is_inside else INK
        )
    axis.set_title(title, fontsize=8, color=INK)
    return figure


def _worst(counts: NDArray[np.int64], limit: int) -> list[int]:
    """Indices of the classes with the most errors (given or received), in class order."""
    errors = counts.sum(1) + counts.sum(0) - 2 * np.diag(counts)
    return sorted(np.argsort(-errors, kind="stable")[:limit].tolist())


def _selection(title: str, shown: int, total: int) -> str:
    return title if shown == total else f"{title} ({shown} of {total} classes, most errors)"


def _short(name: str, limit: int) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
