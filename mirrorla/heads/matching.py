"""How a detector's anchors or regions met the objects of a training batch, in three numbers.

positives_per_image: anchors or regions matched to an object. foreground_accuracy: share of them whose best foreground
class is right. false_negatives: share of them that the network takes for background.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def anchor_statistics(logits: Tensor, labels: Sequence[Tensor], matched: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of a one-stage detector; an anchor is taken for background when no class reaches a probability of one half.

    Args:
        logits: of all anchors (b, A, C).
        labels: b times (n,), from 0.
        matched: b times the object of each anchor (A,), negative for none.

    Returns:
        Three scalars by name, float32; the shares are 0 without positives.
    """
    positive = torch.stack(list(matched)) >= 0
    true = torch.cat([label[match[match >= 0]] for label, match in zip(labels, matched, strict=True)])
    best, classes = logits[positive].max(1)
    return _summary(classes == true, best < 0, len(matched))


def region_statistics(logits: Tensor, labels: Tensor, num_images: int) -> dict[str, Tensor]:
    """Of a two-stage detector.

    Args:
        logits: of the sampled regions (R, C + 1), the first column is background.
        labels: (R,), 0 for background.
        num_images: b.

    Returns:
        Three scalars by name, float32; the shares are 0 without positives.
    """
    positive = labels > 0
    logits, true = logits[positive], labels[positive]
    return _summary(logits[:, 1:].argmax(1) + 1 == true, logits.argmax(1) == 0, num_images)


def _summary(is_right: Tensor, is_missed: Tensor, num_images: int) -> dict[str, Tensor]:
    count = max(1, len(is_right))
    return {
        "positives_per_image": torch.tensor(len(is_right) / num_images, device=is_right.device),
        "foreground_accuracy": is_right.sum() / count,
        "false_negatives": is_missed.sum() / count,
    }
