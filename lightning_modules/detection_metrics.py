"""Detection scored as COCO does it: average precision of boxes and masks, by faster-coco-eval on rank 0.

State is kept on the CPU in compact arrays, masks as run-length codes, and gathered once. Images are sorted by id before
anything is computed, so scores do not depend on batches or ranks.

Legend: C classes, n objects or detections of an image of H x W pixels.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as run_lengths
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.detection_state import ImageState, Marks, as_xywh, marks_of
from lightning_modules.gather import compute_once

Floats = NDArray[np.float64]

SHOWN_SCORE = 0.5
"""Detections below it are neither drawn nor counted in the confusion matrix."""
MATCHING_IOU = 0.5
"""Overlap at which the confusion matrix and the precision-recall curves take a detection for an object."""


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's numbers for boxes or for masks; NaN where no object of the size or class exists.

    Attributes:
        ap: mean over classes and the IoUs .50, .55 … .95.
        ap50: at IoU .50.
        ap75: at IoU .75.
        ap_small: ap of objects below 32² pixels.
        ap_medium: from 32² to 96².
        ap_large: above.
        class_ap: ap of every class (C,).
        class_ap50: at IoU .50 (C,).
        precision: interpolated precision at IoU .50 and recalls 0, .01 … 1, (C, 101).
        thresholds: the score that reaches each of these recalls (C, 101); 0 where none does.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    class_ap: Floats
    class_ap50: Floats
    precision: Floats
    thresholds: Floats


@dataclass(frozen=True)
class DetectionScores:
    """What one evaluation found.

    Attributes:
        box: average precision of boxes.
        mask: of masks; None without masks.
        num_objects: objects of every class that are no crowds (C,).
        confusion: boxes (C + 1, C + 1), int64; rows are true classes, the last row and column are background, that is
            objects nobody found and detections of nothing.
    """

    box: AveragePrecision
    mask: AveragePrecision | None
    num_objects: NDArray[np.int64]
    confusion: NDArray[np.int64]

    def named(self) -> dict[str, float]:
        """The numbers by name, for logging as `val/<name>`; sizes without objects are left out."""
        numbers: dict[str, float] = {}
        for kind, scores in (("box", self.box), ("mask", self.mask)):
            if scores is not None:
                numbers |= {f"{kind}_{name}": getattr(scores, name) for name in ("ap", "ap50", "ap75")}
                sizes = {f"{kind}_{name}": getattr(scores, name) for name in ("ap_small", "ap_medium", "ap_large")}
                numbers |= {name: value for name, value in sizes.items() if not np.isnan(value)}
        return numbers


class CocoEvaluator:
    """Collects an evaluation pass and scores it.

    Args:
        num_classes: C.
        has_masks: whether masks are scored beside boxes.
        max_detections: per image and class, the best first.
    """

    def __init__(self, num_classes: int, has_masks: bool, max_detections: int = 100) -> None:
        self.num_classes = num_classes
        self.has_masks = has_masks
        self.max_detections = max_detections
        self._images: dict[int, ImageState] = {}

    def update(
        self,
        predictions: Sequence[Mapping[str, Tensor]],
        targets: Sequence[Mapping[str, Tensor]],
        ids: Tensor,
        weights: Tensor,
    ) -> None:
        """Take in one batch; images of weight 0 and images that were seen before are left out.

        Args:
            predictions: b times boxes (n, 4) in original pixels, labels (n,), scores (n,), masks (n, H, W) if scored.
            targets: b times boxes, labels, iscrowd, area, size (2,) = height and width, masks if scored.
            ids: (b,) sample ids.
            weights: (b,).
        """
        rows = zip(ids.tolist(), weights.tolist(), predictions, targets, strict=True)
        for sample, weight, prediction, target in rows:
            if weight > 0 and sample not in self._images:
                height, width = target["size"].tolist()
                truth, found = marks_of(target, self.has_masks), marks_of(prediction, self.has_masks)
                self._images[sample] = ImageState(sample, (height, width), truth, found)

    def compute(self, group: dist.ProcessGroup | None = None) -> DetectionScores:
        """Score the images of all ranks; a collective.

        Args:
            group: from gather.waiting_group(); None for a single process.

        Returns:
            The same on every rank.
        """

        def score(parts: list[list[ImageState]]) -> DetectionScores:
            images = {image.id: image for part in parts for image in part}
            ordered = [images[number] for number in sorted(images)]
            return score_images(ordered, self.num_classes, self.has_masks, self.max_detections)

        return compute_once(list(self._images.values()), score, group)

    def reset(self) -> None:
        """Forget all images."""
        self._images = {}


def score_images(
    images: Sequence[ImageState], num_classes: int, has_masks: bool, max_detections: int
) -> DetectionScores:
    """Score images with ascending ids; see CocoEvaluator for the other arguments."""
    num_objects = np.zeros(num_classes, dtype=np.int64)
    for image in images:
        num_objects += np.bincount(image.truth.labels[~image.truth.iscrowd] - 1, minlength=num_classes)
    return DetectionScores(
        box=_average_precision(images, num_classes, "bbox", max_detections),
        mask=_average_precision(images, num_classes, "segm", max_detections) if has_masks else None,
        num_objects=num_objects,
        confusion=confusion(images, num_classes),
    )


def confusion(images: Iterable[ImageState], num_classes: int) -> NDArray[np.int64]:
    """Which class was taken for which: (C + 1, C + 1), the last row and column are background.

    The best detection first, each detection takes the free object it overlaps most, of any class; one that lies in a
    crowd and finds none is not counted.
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    for image in images:
        truth, found = image.truth, image.found
        order = np.argsort(-found.scores, kind="stable")
        order = order[found.scores[order] >= SHOWN_SCORE]
        overlaps = _overlaps(found.boxes[order], truth)
        is_free = ~truth.iscrowd
        for label, row in zip(found.labels[order].tolist(), overlaps, strict=True):
            reached = row >= MATCHING_IOU
            if (reached & is_free).any():
                match = int(np.argmax(np.where(is_free, row, -1)))
                is_free[match] = False
                counts[truth.labels[match] - 1, label - 1] += 1
            elif not (reached & truth.iscrowd).any():
                counts[num_classes, label - 1] += 1
        counts[:num_classes, num_classes] += np.bincount(truth.labels[is_free] - 1, minlength=num_classes)
    return counts


def _overlaps(boxes: NDArray[np.float32], truth: Marks) -> Floats:
    """IoU of n boxes with m objects (n, m); with a crowd the share of the box that lies in it."""
    if len(boxes) == 0 or len(truth.labels) == 0:
        return np.zeros((len(boxes), len(truth.labels)))
    flags = truth.iscrowd.astype(int).tolist()
    overlaps: Floats = np.asarray(run_lengths.iou(as_xywh(boxes), as_xywh(truth.boxes), flags))
    return overlaps


def _average_precision(
    images: Sequence[ImageState], num_classes: int, kind: str, max_detections: int
) -> AveragePrecision:
    heads = [{"id": image.id, "height": image.size[0], "width": image.size[1]} for image in images]
    categories = [{"id": label} for label in range(1, num_classes + 1)]

    def as_coco(marks: Iterable[tuple[ImageState, Marks]]) -> COCO:
        rows = [row for image, part in marks for row in _annotations(image, part, kind)]
        for number, row in enumerate(rows, 1):  # 0 would mean "no match" to COCO's code
            row["id"] = number
        return COCO({"images": heads, "annotations": rows, "categories": categories})

    truth, found = as_coco((image, image.truth) for image in images), as_coco((i, i.found) for i in images)
    evaluation = COCOeval_faster(truth, found, kind, print_function=_silent)
    evaluation.params.maxDets = [max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]  # (IoUs, recalls, C, sizes); -1 where there are no objects
    precision = np.where(precision < 0, np.nan, precision)
    return _summary(precision, evaluation.eval["scores"][0, :, :, 0, 0].T)


def _annotations(image: ImageState, marks: Marks, kind: str) -> Iterable[dict[str, Any]]:
    """COCO's rows for the objects or detections of one image; detections of masks are binned by the masks' areas."""
    boxes = as_xywh(marks.boxes)
    codes = [{"size": list(image.size), "counts": code} for code in marks.masks or []] if kind == "segm" else None
    area = marks.area.astype(np.float64)
    if marks is image.found:
        area = boxes[:, 2] * boxes[:, 3] if codes is None else np.array(run_lengths.area(codes) if codes else [])
    columns = (marks.labels.tolist(), marks.scores.tolist(), marks.iscrowd.astype(int).tolist(), area.tolist())
    for place, (label, score, crowd, size) in enumerate(zip(*columns, strict=True)):
        row = {"image_id": image.id, "category_id": label, "score": score, "iscrowd": crowd, "area": size}
        shape = {"bbox": boxes[place].tolist()} if codes is None else {"segmentation": codes[place]}
        yield row | shape


def _summary(precision: Floats, thresholds: Floats) -> AveragePrecision:
    """COCO's means over precision (IoUs, recalls, C, sizes), leaving out classes without objects."""
    at50, at75 = precision[0], precision[5]
    return AveragePrecision(
        ap=_mean(precision[..., 0]),
        ap50=_mean(at50[..., 0]),
        ap75=_mean(at75[..., 0]),
        ap_small=_mean(precision[..., 1]),
        ap_medium=_mean(precision[..., 2]),
        ap_large=_mean(precision[..., 3]),
        class_ap=precision[..., 0].mean((0, 1)),
        class_ap50=at50[..., 0].mean(0),
        precision=at50[..., 0].T,
        thresholds=np.maximum(thresholds, 0),
    )


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _silent(*_: object) -> None:
    """What faster-coco-eval says while it works is not for a training's log."""
