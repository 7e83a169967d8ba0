"""Precision-recall curves per class, as TensorBoard's plug-in wants them: counts at evenly spaced score thresholds.

Legend: C classes, T = NUM_THRESHOLDS thresholds 0, .01 … 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.detection_metrics import AveragePrecision

NUM_THRESHOLDS = 101
MAX_CURVES = 100
"""Classes with a curve; with more, evenly spaced ones, the same at every validation."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """What is right and wrong among the answers that reach each threshold, all (T,).

    Attributes:
        hits: of the class and found.
        false_alarms: of another class, or of nothing.
        misses: of the class and not found.
        rejections: of another class and not taken for this one; 0 in detection, where nothing has no number.
    """

    hits: Floats
    false_alarms: Floats
    misses: Floats
    rejections: Floats

    @property
    def precision(self) -> Floats:
        """Share of the answers that are right; 1 where there is none."""
        answers = self.hits + self.false_alarms
        return np.where(answers > 0, self.hits / np.maximum(answers, 1e-12), 1.0)

    @property
    def recall(self) -> Floats:
        """Share of the class that is found."""
        return self.hits / np.maximum(self.hits + self.misses, 1e-12)

    def write(self, writer: Any, tag: str, step: int) -> None:
        """Hand the curve to a SummaryWriter."""
        counts = (self.hits, self.false_alarms, self.rejections, self.misses)
        writer.add_pr_curve_raw(tag, *counts, self.precision, self.recall, step, NUM_THRESHOLDS)


class ScoreCounts(Metric):
    """How often every class got every score, once where it was right and once where not: (2, C, T) integer counts.

    Args:
        num_classes: C.
    """

    full_state_update = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("counts", torch.zeros(2, num_classes, NUM_THRESHOLDS, dtype=torch.int64), dist_reduce_fx="sum")
        self.counts: Tensor

    def update(self, scores: Tensor, labels: Tensor, weight: Tensor) -> None:
        """Take in one batch.

        Args:
            scores: probabilities (B, C).
            labels: (B,) int64.
            weight: (B,) samples of weight 0 are not counted.
        """
        steps = (scores * (NUM_THRESHOLDS - 1)).floor().long().clamp(0, NUM_THRESHOLDS - 1)
        places = torch.arange(self.num_classes, device=scores.device)
        is_class = labels[:, None] == places
        cells = (is_class * self.num_classes + places) * NUM_THRESHOLDS + steps
        counted = cells[weight > 0].flatten()
        self.counts += torch.bincount(counted, minlength=self.counts.numel()).view_as(self.counts)

    def compute(self) -> Tensor:
        """The counts over all ranks."""
        return self.counts

    def curves(self) -> list[Curve]:
        """One curve per class; a collective."""
        from_top = self.compute().flip(2).cumsum(2).flip(2).double().cpu().numpy()  # answers that reach a threshold
        (others, own), (all_others, all_own) = from_top, from_top[..., :1]
        return [
            Curve(own[c], others[c], all_own[c] - own[c], all_others[c] - others[c]) for c in range(self.num_classes)
        ]


def detection_curves(scores: AveragePrecision, num_objects: Sequence[int]) -> list[Curve | None]:
    """One curve per class at IoU .50 from COCO's interpolated precision; None for classes without objects."""
    pairs = zip(scores.precision, scores.thresholds, num_objects, strict=True)
    return [_detection_curve(*pair) if pair[2] > 0 else None for pair in pairs]


def shown_classes(num_classes: int) -> list[int]:
    """Classes that get a curve."""
    return np.unique(np.linspace(0, num_classes - 1, min(num_classes, MAX_CURVES)).astype(int)).tolist()


def _detection_curve(precision: Floats, thresholds: Floats, num_objects: int) -> Curve:
    # place r holds recall r / 100; a threshold gets the largest recall whose score reaches it
    is_reached = (thresholds[None] >= np.linspace(0, 1, NUM_THRESHOLDS)[:, None]) & (precision > 0)
    best = np.where(is_reached.any(1), is_reached.shape[1] - 1 - is_reached[:, ::-1].argmax(1), 0)
    hits = np.where(is_reached.any(1), best / (len(precision) - 1) * num_objects, 0.0)
    false_alarms = hits / np.maximum(precision[best], 1e-12) - hits
    return Curve(hits, np.maximum(false_alarms, 0), num_objects - hits, np.zeros_like(hits))
