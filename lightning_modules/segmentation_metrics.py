"""Semantic segmentation scored exactly: integer confusion counts, added up over images and ranks.

Legend: C classes, H, W pixels of one image's class map.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from datamodules.annotations import IGNORE


@dataclass(frozen=True)
class SegmentationScores:
    """What the counts of one evaluation say.

    Attributes:
        miou: mean of class_iou over the classes that occur in truth or prediction.
        pixel_accuracy: share of the counted pixels that are right.
        mean_accuracy: mean over the classes that occur in the truth of the share of their pixels that is right.
        class_iou: intersection over union of every class (C,); NaN where a class occurs nowhere.
        confusion: pixels (C, C), int64, rows are true classes.
    """

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    class_iou: NDArray[np.float64]
    confusion: NDArray[np.int64]

    def named(self) -> dict[str, float]:
        """The numbers by name, for logging as `val/<name>`, with the IoU of the worst and the best class."""
        numbers = {name: getattr(self, name) for name in ("miou", "pixel_accuracy", "mean_accuracy")}
        known = self.class_iou[~np.isnan(self.class_iou)]
        return numbers | ({"iou_worst": float(known.min()), "iou_best": float(known.max())} if len(known) else {})


def segmentation_scores(confusion: NDArray[np.int64]) -> SegmentationScores:
    """Scores from confusion counts (C, C), rows are true classes; NaN where nothing was counted."""
    right, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    class_iou = _ratio(right, true + predicted - right)
    return SegmentationScores(
        miou=_mean(class_iou),
        pixel_accuracy=float(_ratio(right.sum(), true.sum())),
        mean_accuracy=_mean(_ratio(right, true)),
        class_iou=class_iou,
        confusion=confusion,
    )


class SegmentationMetrics(Metric):
    """Confusion counts of one evaluation pass, added up over ranks.

    Args:
        num_classes: C.
    """

    full_state_update = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.counts: Tensor

    def update(self, predictions: Sequence[Tensor], masks: Sequence[Tensor] | Tensor, weights: Tensor) -> None:
        """Count the pixels of one batch.

        Args:
            predictions: b maps of class ids (H, W), int64, in the truth's resolution.
            masks: b maps of class ids, IGNORE = not counted; padded ones count where the prediction lies, top left.
            weights: (b,) images of weight 0 are not counted.
        """
        for predicted, mask, weight in zip(predictions, masks, weights.tolist(), strict=True):
            if weight > 0:
                true = mask[: predicted.shape[0], : predicted.shape[1]].to(self.counts.device)
                self.counts += self._count(predicted.to(self.counts.device), true)

    def compute(self) -> Tensor:
        """The counts (C, C) over all ranks."""
        return self.counts

    def scores(self) -> SegmentationScores:
        """The scores over all ranks; a collective."""
        return segmentation_scores(self.compute().cpu().numpy())

    def _count(self, predicted: Tensor, true: Tensor) -> Tensor:
        counted = true != IGNORE
        cells = true[counted] * self.num_classes + predicted[counted]
        return torch.bincount(cells, minlength=self.num_classes**2).view(self.num_classes, self.num_classes)


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """part / whole; NaN where the whole is 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of the values that are numbers; NaN without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
