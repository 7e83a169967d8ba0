"""TensorBoard's pictures of detection and segmentation: truth beside prediction on fixed images, numbers per class."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from datamodules.annotations import IGNORE
from datamodules.contact_sheet import class_colour
from lightning_modules.detection_metrics import SHOWN_SCORE, DetectionScores
from lightning_modules.drawing import (
    Pixels,
    Shapes,
    draw_class_map,
    draw_shapes,
    fitted,
    side_by_side,
    with_legend,
)
from lightning_modules.segmentation_metrics import SegmentationScores
from lightning_modules.tensorboard import Tag, bars_figure, confusion_figure

_MAP_SIDE = 336  # three of them stand in a row
_LEGEND = 16  # classes


def truth_shapes(target: Mapping[str, Tensor]) -> Shapes:
    """The objects of an evaluation target."""
    height, width = target["size"].tolist()
    return Shapes(
        boxes=target["boxes"].float().cpu().numpy(),
        labels=(target["labels"] - 1).tolist(),
        size=(height, width),
        crowds=(target["iscrowd"] > 0).tolist(),
        masks=target["masks"].cpu().numpy() if "masks" in target else None,
    )


def found_shapes(prediction: Mapping[str, Tensor], size: tuple[int, int]) -> Shapes:
    """The detections that reach SHOWN_SCORE."""
    kept = (prediction["scores"] >= SHOWN_SCORE).nonzero()[:, 0]
    return Shapes(
        boxes=prediction["boxes"][kept].float().cpu().numpy(),
        labels=(prediction["labels"][kept] - 1).tolist(),
        size=size,
        scores=prediction["scores"][kept].tolist(),
        masks=prediction["masks"][kept].cpu().numpy() if "masks" in prediction else None,
    )


def detection_picture(picture: Pixels, truth: Shapes, found: Shapes, names: Sequence[str]) -> Pixels:
    """Ground truth beside prediction, for one image (H, W, 3) of any size."""
    shown = fitted(picture)
    titles = [_counted(truth, "object"), f"{_counted(found, 'detection')} from score {SHOWN_SCORE} on"]
    return side_by_side(
        [draw_shapes(shown, truth, names), draw_shapes(shown, found, names)],
        [f"truth: {titles[0]}", f"prediction: {titles[1]}"],
    )


def segmentation_picture(
    picture: Pixels, truth: NDArray[np.integer], predicted: NDArray[np.integer], names: Sequence[str]
) -> Pixels:
    """Image, truth and prediction in a row, the classes in them below; class maps (h, w) of the image's shape."""
    shown = fitted(picture, _MAP_SIDE)
    counted = truth != IGNORE
    right = (truth == predicted)[counted].mean() if counted.any() else float("nan")
    row = side_by_side(
        [shown, draw_class_map(shown, truth, names), draw_class_map(shown, predicted, names)],
        ["image", "truth (black: ignored)", f"prediction: {right:.1%} of pixels right"],
    )
    return with_legend(row, legend(np.concatenate([truth.ravel(), predicted.ravel()]), names))


def legend(class_ids: NDArray[np.integer], names: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
    """Names and colours of the most frequent classes among class ids; a class called background has no colour."""
    counts = np.bincount(class_ids.ravel(), minlength=IGNORE + 1)[: len(names)]
    order = [int(number) for number in np.argsort(-counts, kind="stable")[:_LEGEND] if counts[number]]
    return [(names[number], class_colour(number)) for number in order if names[number] != "background"]


def detection_charts(scores: DetectionScores, names: Sequence[str]) -> dict[str, Figure]:
    """Bars of AP per class and the confusion matrix with background, by tag."""
    notes = [f"{number} objects" for number in scores.num_objects]
    charts = {str(Tag.PER_CLASS_BOX_AP): bars_figure(scores.box.class_ap, names, notes, "box AP per class")}
    if scores.mask is not None:
        charts[str(Tag.PER_CLASS_MASK_AP)] = bars_figure(scores.mask.class_ap, names, notes, "mask AP per class")
    return charts | {str(Tag.CONFUSION): confusion_figure(scores.confusion, [*names, "(background)"])}


def segmentation_charts(scores: SegmentationScores, names: Sequence[str]) -> dict[str, Figure]:
    """Bars of IoU per class and the confusion matrix of pixels, by tag."""
    share = scores.confusion.sum(1) / max(scores.confusion.sum(), 1)
    notes = [f"{part:.1%} of pixels" for part in share]
    return {
        str(Tag.PER_CLASS_IOU): bars_figure(scores.class_iou, names, notes, "IoU per class"),
        str(Tag.CONFUSION): confusion_figure(scores.confusion, names),
    }


def _counted(shapes: Shapes, word: str) -> str:
    number = len(shapes.labels)
    return f"{number} {word}{'' if number == 1 else 's'}"
