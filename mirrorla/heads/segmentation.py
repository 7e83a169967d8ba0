"""Segmenters: a dense backbone with SemanticFPN or UPerNet, and how class maps are read off their logits.

Legend: B images of H x W pixels, C classes, h = H/4, w = W/4 rounded up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirrorla.dense import DenseBackbone
from mirrorla.heads.layers import FCNHead
from mirrorla.heads.semantic_fpn import SemanticFPN
from mirrorla.heads.upernet import UPerNet

IGNORE = 255
"""Class id of pixels that count for nothing, as the data has it."""
_CLASSES_AT_ONCE = 16


@dataclass(frozen=True)
class SegmenterConfig:
    """A segmentation head's kind and sizes.

    Attributes:
        kind: "semantic_fpn" or "upernet".
        channels: inside the head; null is 256 for semantic_fpn, 512 for upernet.
        dropout: share of the channels before the classifier that is dropped in training.
        auxiliary_weight: of the loss of a small head on the map of stride 16; 0 = no such head; null is .4 for upernet.
        auxiliary_channels: of that head.
    """

    kind: Literal["semantic_fpn", "upernet"] = "semantic_fpn"
    channels: int | None = None
    dropout: float = 0.1
    auxiliary_weight: float | None = None
    auxiliary_channels: int = 256

    def __post_init__(self) -> None:
        """Refuse sizes that build nothing.

        Raises:
            ValueError: naming the field and its value.
        """
        if self.width < 2 or self.auxiliary_channels < 1:
            raise ValueError(
                f"head.channels {self.width} must be 2 or above, head.auxiliary_channels {self.auxiliary_channels} 1"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"head.dropout {self.dropout} must lie in [0, 1)")
        if self.auxiliary < 0:
            raise ValueError(f"head.auxiliary_weight {self.auxiliary} must be 0 or above; 0 leaves the head out")

    @property
    def width(self) -> int:
        """Channels inside the head."""
        return self.channels if self.channels is not None else {"semantic_fpn": 256, "upernet": 512}[self.kind]

    @property
    def auxiliary(self) -> float:
        """Weight of the auxiliary loss."""
        if self.auxiliary_weight is not None:
            return self.auxiliary_weight
        return {"semantic_fpn": 0.0, "upernet": 0.4}[self.kind]


class Segmenter(nn.Module):
    """A backbone with a segmentation head and, if it has a weight, an auxiliary one on stride 16.

    Args:
        backbone: gives maps at strides 4, 8, 16 and 32.
        num_classes: C.
        config: kind and sizes.
    """

    def __init__(self, backbone: DenseBackbone, num_classes: int, config: SegmenterConfig) -> None:
        super().__init__()
        self.backbone = backbone
        kind = {"semantic_fpn": SemanticFPN, "upernet": UPerNet}[config.kind]
        self.head = kind(backbone.channels, num_classes, config.width, config.dropout)
        self.auxiliary = None
        if config.auxiliary:
            self.auxiliary = FCNHead(backbone.channels[2], num_classes, config.auxiliary_channels, config.dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C, h, w)."""
        return self.head(self.backbone(images))

    def all_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of every head by name, for training: "head" at stride 4 and perhaps "auxiliary" at stride 16."""
        maps = self.backbone(images)
        logits = {"head": self.head(maps)}
        if self.auxiliary is not None:
            logits["auxiliary"] = self.auxiliary(maps[2])
        return logits


def pixel_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of every image: the sum over its labelled pixels divided by all its pixels.

    Every labelled pixel of a batch of equal sizes weighs the same, and an image's loss does not depend on the others.

    Args:
        logits: (B, C, h, w) of any size; resized to the mask's, as float32.
        mask: class ids (B, H, W), IGNORE = not labelled.

    Returns:
        (B,) float32; 0 without a labelled pixel.
    """
    logits = F.interpolate(logits.float(), size=mask.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="none").mean((1, 2))


def sliding_logits(network: nn.Module, image: Tensor, window: int, stride: int) -> Tensor:
    """Logits of one image from overlapping square windows, averaged where they overlap.

    Args:
        network: images (1, 3, H, W) -> logits (1, C, h, w).
        image: (1, 3, H, W).
        window: side in pixels; an image that is smaller is seen whole.
        stride: pixels from one window to the next.

    Returns:
        (1, C, H, W) float32.
    """
    height, width = image.shape[2:]
    total = counts = None
    for top, left in windows((height, width), window, stride):
        part = image[:, :, top : top + window, left : left + window]
        seen = F.interpolate(network(part).float(), size=part.shape[2:], mode="bilinear", align_corners=False)
        if total is None or counts is None:
            total, counts = seen.new_zeros(1, seen.shape[1], height, width), seen.new_zeros(height, width)
        total[:, :, top : top + window, left : left + window] += seen
        counts[top : top + window, left : left + window] += 1
    assert total is not None and counts is not None, "an image has at least one window"
    return total / counts


def windows(size: tuple[int, int], window: int, stride: int) -> Iterator[tuple[int, int]]:
    """Top left corners of windows that cover a size; the last ones are moved back to end at the border."""
    ends = [max(0, side - window) for side in size]
    tops, lefts = (dict.fromkeys(min(place, end) for place in range(0, end + stride, stride)) for end in ends)
    yield from itertools.product(tops, lefts)


def class_map(views: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The best class of every pixel.

    Args:
        views: logits (1, C, h, w) of one image; the probabilities of several are averaged.
        size: height and width of the map; logits are resized to it, a few classes at a time, for all classes of a large
            photograph at once would take gigabytes.

    Returns:
        (H, W) int64.
    """
    values = [view.float() if len(views) == 1 else view.float().softmax(1) for view in views]
    best = classes = None
    for start in range(0, values[0].shape[1], _CLASSES_AT_ONCE):
        parts = (view[:, start : start + _CLASSES_AT_ONCE] for view in values)
        resized = sum(F.interpolate(part, size=size, mode="bilinear", align_corners=False) for part in parts)
        assert isinstance(resized, Tensor)
        highest, place = resized[0].max(0)
        if best is None or classes is None:
            best, classes = highest, place
        else:
            is_better = highest > best
            best, classes = torch.where(is_better, highest, best), torch.where(is_better, place + start, classes)
    assert classes is not None, "there is at least one class"
    return classes
