"""What the figures of each task show: from a module with its scores and a data module to pictures and curves by tag."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_modules.classification import ClassificationModule
from lightning_modules.curves import Curve, detection_curves, shown_classes
from lightning_modules.dense_figures import (
    detection_charts,
    detection_picture,
    found_shapes,
    segmentation_charts,
    segmentation_picture,
    truth_shapes,
)
from lightning_modules.detection import DetectionModule
from lightning_modules.drawing import Pixels
from lightning_modules.segmentation import SegmentationModule
from lightning_modules.task_module import TaskModule
from lightning_modules.tensorboard import Tag, confusion_figure, per_class_figure, prediction_grid, to_pixels


@dataclass(frozen=True)
class Drawn:
    """What one validation adds to TensorBoard: pictures and curves by tag."""

    pictures: dict[str, Pixels]
    curves: dict[str, Curve] = field(default_factory=dict)


Painter = Callable[[Any, Any, int], Drawn]
"""Module, data module and number of images -> pictures and curves."""


def task_of(module: LightningModule) -> str | None:
    """The task a module of this project does; None for another's."""
    return module.card.task if isinstance(module, TaskModule) else None


def paint_classification(module: ClassificationModule, data: Any, count: int) -> Drawn:
    """A grid of predictions, the confusion matrix, accuracy per class."""
    names = _names(data)
    batch = data.probe_batch(count)
    with torch.inference_mode():
        scores, classes = module(batch["image"].to(module.device)).float().softmax(1).max(1)
    grid = prediction_grid(
        data.denormalise(batch["image"]).permute(0, 2, 3, 1).cpu().numpy(),
        [names[label] for label in batch["label"].tolist()],
        [names[label] for label in classes.tolist()],
        scores.tolist(),
    )
    assert module.confusion is not None
    counts = module.confusion.numpy()
    figures = {
        Tag.PREDICTIONS: grid,
        Tag.CONFUSION: confusion_figure(counts, names),
        Tag.PER_CLASS: per_class_figure(counts, names),
    }
    return Drawn({str(tag): to_pixels(figure) for tag, figure in figures.items()})


def paint_detection(module: DetectionModule, data: Any, count: int) -> Drawn:
    """Truth beside prediction on every probe image, AP per class, the confusion matrix, curves of boxes and masks."""
    names, scores = _names(data), module.scores
    assert scores is not None
    batch = data.probe_batch(count)
    sizes = [tuple(target["size"].tolist()) for target in batch["target"]]
    found = module.detect([image.to(module.device) for image in batch["image"]], sizes)
    pictures = {
        _image_tag(sample): detection_picture(
            _pixels(data, image), truth_shapes(target), found_shapes(one, size), names
        )
        for sample, image, target, one, size in zip(
            batch["id"].tolist(), batch["image"], batch["target"], found, sizes, strict=True
        )
    }
    charts = {tag: to_pixels(figure) for tag, figure in detection_charts(scores, names).items()}
    curves: dict[str, Curve] = {}
    for kind, part in (("box", scores.box), ("mask", scores.mask)):
        if part is not None:
            every = detection_curves(part, scores.num_objects.tolist())
            curves |= {
                f"{Tag.CURVE}/{kind}/{names[c]}": one
                for c in shown_classes(len(names))
                if (one := every[c]) is not None
            }
    return Drawn(pictures | charts, curves)


def paint_segmentation(module: SegmentationModule, data: Any, count: int) -> Drawn:
    """Image, truth and prediction of every probe image, IoU per class, the confusion matrix."""
    names = _names(data)
    assert module.scores is not None
    batch = data.probe_batch(count)
    found = module.segment(batch["image"].to(module.device), batch["size"], batch["mask_size"])
    pictures = {}
    for place, (sample, size) in enumerate(zip(batch["id"].tolist(), batch["size"].tolist(), strict=True)):
        height, width = batch["mask_size"][place].tolist()
        truth = batch["mask"][place, :height, :width].numpy()
        picture = _pixels(data, batch["image"][place, :, : size[0], : size[1]])
        pictures[_image_tag(sample)] = segmentation_picture(picture, truth, found[place].cpu().numpy(), names)
    charts = {tag: to_pixels(figure) for tag, figure in segmentation_charts(module.scores, names).items()}
    return Drawn(pictures | charts)


PAINTERS: dict[str, Painter] = {
    "classification": paint_classification,
    "detection": paint_detection,
    "segmentation": paint_segmentation,
}


def class_curves(curves: list[Curve], data: Any) -> dict[str, Curve]:
    """The curves of a classifier by tag; none without curves."""
    return {f"{Tag.CURVE}/{_names(data)[c]}": curves[c] for c in shown_classes(len(curves))}


def _names(data: Any) -> list[str]:
    return [str(name) for name in data.class_names]


def _image_tag(sample: int) -> str:
    return f"{Tag.PREDICTIONS}/{sample:06d}"  # padded, for TensorBoard sorts by letters


def _pixels(data: Any, image: Tensor) -> Pixels:
    """A normalised image (3, h, w) as a picture (h, w, 3)."""
    picture = data.denormalise(image).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return np.asarray((picture * 255).round(), dtype=np.uint8)
