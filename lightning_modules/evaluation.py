"""Exact evaluation: every real sample counts once, padding (weight 0) never, on any number of ranks.

States are integer counts (top-k, confusion) or weighted sums (loss) that torchmetrics adds up over ranks, so a set size
that no number of ranks divides gives the same value on 1, 2, 3 or 4 of them.
"""

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_modules.curves import ScoreCounts

IGNORED = -1
"""Label given to padding, which the counting metrics skip."""


def mask_padding(labels: Tensor, weight: Tensor) -> Tensor:
    """Replace the label of padding samples.

    Args:
        labels: (B,) int64.
        weight: (B,) 1 for real samples, 0 for padding.

    Returns:
        (B,) int64 with IGNORED where the weight is 0.
    """
    return torch.where(weight > 0, labels, IGNORED)


class WeightedMean(Metric):
    """sum(w x) / sum(w) in float64.

    torchmetrics' MeanMetric drops the weights where its NaN check is off, and the check synchronises the device.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.total: Tensor
        self.weight: Tensor

    def update(self, values: Tensor, weight: Tensor) -> None:
        """Take in values (B,) with their weights (B,)."""
        self.total += (values.double() * weight).sum()
        self.weight += weight.double().sum()

    def compute(self) -> Tensor:
        """The mean so far, float32; NaN when nothing was weighed."""
        return (self.total / self.weight).float()


class ClassificationMetrics(nn.Module):
    """Loss, top-1, top-5, the confusion matrix and the counts behind precision-recall curves of one evaluation pass.

    Args:
        num_classes: C; with fewer than five classes top-5 counts the first C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.loss = WeightedMean()
        self.top1 = _accuracy(num_classes, 1)
        self.top5 = _accuracy(num_classes, min(5, num_classes))
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED, validate_args=False)
        self.score_counts = ScoreCounts(num_classes)

    def update(self, logits: Tensor, labels: Tensor, weight: Tensor) -> None:
        """Take in one batch.

        Args:
            logits: (B, C).
            labels: (B,) int64.
            weight: (B,) 1 for real samples, 0 for padding.
        """
        logits = logits.float()
        counted = mask_padding(labels, weight)
        self.loss.update(nn.functional.cross_entropy(logits, labels, reduction="none"), weight)
        self.top1.update(logits, counted)
        self.top5.update(logits, counted)
        self.confusion.update(logits, counted)
        self.score_counts.update(logits.softmax(1), labels, weight)


def _accuracy(num_classes: int, top_k: int) -> MulticlassAccuracy:
    # validate_args would look at every label, a device synchronisation per batch
    return MulticlassAccuracy(num_classes, top_k, average="micro", ignore_index=IGNORED, validate_args=False)
