"""Detectors assembled from torchvision's parts over any dense backbone: RetinaNet and Mask R-CNN.

Logits and coordinates leave the heads in float32 under autocast too: bfloat16 has 8 bits, so x = 801 and x = 803 would
be the same.

Legend: b images, n objects or detections of one, C foreground classes (labels 1 … C).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from mirrorla.dense import DenseBackbone
from mirrorla.heads.detector_parts import AsGiven, PyramidAnchors, PyramidBackbone, Target
from mirrorla.heads.layers import group_norm
from mirrorla.heads.matching import anchor_statistics, region_statistics


@dataclass(frozen=True)
class DetectorConfig:
    """A detector's kind and sizes; the defaults are the published ones.

    Attributes:
        kind: "retinanet" (one stage, boxes) or "mask_rcnn" (two stages, boxes and masks).
        channels: of the feature pyramid.
        norm: GroupNorm in the convolutions before retinanet's predictions; narrow ones hardly start to learn without.
        anchor_scale: side of a level's smallest anchor in its strides; null is 4 for retinanet, 8 for mask_rcnn.
        anchors_per_image: anchors that train the proposals of mask_rcnn.
        proposals: regions of mask_rcnn an image keeps; twice as many of each level enter non-maximum suppression.
        regions_per_image: regions that train the second stage, a quarter of them objects.
        box_width: width of the two linear layers of the box branch.
        mask_width: channels of the mask branch.
        mask_convs: its convolutions.
        score_threshold: detections below it are dropped.
        nms_threshold: of two detections of a class that overlap more, the better one stays.
        max_detections: of one image.
    """

    kind: Literal["retinanet", "mask_rcnn"] = "mask_rcnn"
    channels: int = 256
    norm: bool = False
    anchor_scale: float | None = None
    anchors_per_image: int = 256
    proposals: int = 1000
    regions_per_image: int = 512
    box_width: int = 1024
    mask_width: int = 256
    mask_convs: int = 4
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100

    def __post_init__(self) -> None:
        """Refuse sizes that build nothing.

        Raises:
            ValueError: naming the field and its value.
        """
        for name in ("channels", "anchors_per_image", "proposals", "regions_per_image", "box_width", "mask_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"detector.{name} {getattr(self, name)} must be 1 or above")
        if self.mask_convs < 1 or self.max_detections < 1:
            raise ValueError(
                f"detector.mask_convs {self.mask_convs} and max_detections {self.max_detections} must be 1 or above"
            )
        if self.anchor_scale is not None and self.anchor_scale <= 0:
            raise ValueError(f"detector.anchor_scale {self.anchor_scale} must be above 0, for example 8")
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"detector.{name} {getattr(self, name)} must lie in [0, 1]")

    @property
    def has_masks(self) -> bool:
        """Whether the detector predicts masks."""
        return self.kind == "mask_rcnn"

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the backbone's maps that the detector reads."""
        return (4, 8, 16, 32) if self.kind == "mask_rcnn" else (8, 16, 32)


def build_detector(backbone: DenseBackbone, num_classes: int, config: DetectorConfig) -> nn.Module:
    """Put a pyramid, anchors and heads on a backbone.

    Args:
        backbone: gives maps at `config.strides`.
        num_classes: C.
        config: kind and sizes.

    Returns:
        A network of torchvision's form. In training it takes b images (3, h, w) and b targets with boxes, labels from 1
        and, for masks, masks (n, h, w), and returns loss terms; `statistics` of it then says how objects and anchors
        met. In evaluation it takes images and returns boxes in their pixels, labels, scores and raw masks (n, 1, m, m);
        see `in_original_pixels`.
    """
    if config.kind == "retinanet":
        return _OneStage(backbone, num_classes, config)
    return _TwoStage(backbone, num_classes, config)


class _OneStage(RetinaNet):
    """RetinaNet whose columns are the C foreground classes: labels are shifted by one on the way in and out."""

    def __init__(self, trunk: DenseBackbone, num_classes: int, config: DetectorConfig) -> None:
        backbone = PyramidBackbone(trunk, config.channels, "conv")
        anchors = PyramidAnchors(backbone.strides, config.anchor_scale or 4.0, 3)
        super().__init__(
            backbone,
            num_classes,
            anchor_generator=anchors,
            head=_OneStageHead(config, anchors.num_anchors_per_location()[0], num_classes),
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_threshold,
            detections_per_img=config.max_detections,
        )
        self.transform = AsGiven()

    @property
    def statistics(self) -> dict[str, Tensor]:
        """How anchors and objects of the last training batch met."""
        return self.head.statistics

    def compute_loss(
        self, targets: list[Target], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        shifted = [{**target, "labels": target["labels"] - 1} for target in targets]
        return super().compute_loss(shifted, head_outputs, anchors)

    def postprocess_detections(
        self, head_outputs: dict[str, list[Tensor]], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
    ) -> list[Target]:
        found = super().postprocess_detections(head_outputs, anchors, image_shapes)
        return [{**detections, "labels": detections["labels"] + 1} for detections in found]


class _OneStageHead(RetinaNetHead):
    def __init__(self, config: DetectorConfig, num_anchors: int, num_classes: int) -> None:
        super().__init__(config.channels, num_anchors, num_classes, norm_layer=group_norm if config.norm else None)
        self.statistics: dict[str, Tensor] = {}

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {name: value.float() for name, value in super().forward(x).items()}

    def compute_loss(
        self,
        targets: list[Target],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        labels = [target["labels"] for target in targets]
        self.statistics = anchor_statistics(head_outputs["cls_logits"].detach(), labels, matched_idxs)
        return super().compute_loss(targets, head_outputs, anchors, matched_idxs)


class _TwoStage(GeneralizedRCNN):
    """Mask R-CNN: proposals, then boxes and masks of pooled regions."""

    def __init__(self, trunk: DenseBackbone, num_classes: int, config: DetectorConfig) -> None:
        backbone = PyramidBackbone(trunk, config.channels, "pool")
        regions = _RegionHeads(
            _pooling(7),
            TwoMLPHead(config.channels * 7 * 7, config.box_width),
            _BoxPredictor(config.box_width, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=config.regions_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_threshold,
            detections_per_img=config.max_detections,
            mask_roi_pool=_pooling(14),
            mask_head=MaskRCNNHeads(config.channels, [config.mask_width] * config.mask_convs, 1),
            mask_predictor=MaskRCNNPredictor(config.mask_width, config.mask_width, num_classes + 1),
        )
        super().__init__(backbone, _proposals(backbone, config), regions, AsGiven())

    @property
    def statistics(self) -> dict[str, Tensor]:
        """How regions and objects of the last training batch met."""
        return self.roi_heads.statistics


def _proposals(backbone: PyramidBackbone, config: DetectorConfig) -> RegionProposalNetwork:
    anchors = PyramidAnchors(backbone.strides, config.anchor_scale or 8.0, 1)
    candidates = {"training": 2 * config.proposals, "testing": 2 * config.proposals}
    kept = {"training": config.proposals, "testing": config.proposals}
    head = _ProposalHead(config.channels, anchors.num_anchors_per_location()[0])
    return RegionProposalNetwork(anchors, head, 0.7, 0.3, config.anchors_per_image, 0.5, candidates, kept, 0.7)


def _pooling(size: int) -> MultiScaleRoIAlign:
    """Regions from the four finest levels; their scales are given, torchvision guesses them from the first image."""
    pooling = MultiScaleRoIAlign(["0", "1", "2", "3"], size, sampling_ratio=2)
    pooling.scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    pooling.map_levels = LevelMapper(2, 5)
    return pooling


class _ProposalHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, boxes = super().forward(x)
        return [value.float() for value in logits], [value.float() for value in boxes]


class _BoxPredictor(FastRCNNPredictor):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = super().forward(x)
        self.last_logits = logits.detach()
        return logits.float(), boxes.float()


class _RegionHeads(RoIHeads):
    """torchvision's second stage, which also says how regions and objects met in training."""

    statistics: dict[str, Tensor]

    def select_training_samples(self, proposals: list[Tensor], targets: list[Target] | None) -> Any:
        samples = super().select_training_samples(proposals, targets)
        self._sampled = torch.cat(samples[2])
        return samples

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> Any:
        result = super().forward(features, proposals, image_shapes, targets)
        if self.training:
            self.statistics = region_statistics(self.box_predictor.last_logits, self._sampled, len(image_shapes))
        return result
