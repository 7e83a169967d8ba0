"""One training step of each task on made-up samples: what a forecast sends through a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from datamodules.transforms import TrainTransform
from datamodules.transforms_detection import DetectionTrainTransform
from datamodules.transforms_segmentation import SegmentationTrainTransform
from lightning_modules.classification import ClassificationModule
from lightning_modules.detection import DetectionModule
from lightning_modules.segmentation import SegmentationModule
from mirrorla.heads.detection import DetectorConfig
from mirrorla.heads.segmentation import pixel_loss


@dataclass(frozen=True)
class Probe:
    """A step that can be taken without data.

    Attributes:
        network: all that learns.
        step: number of samples, (height, width) and device -> the loss.
        size: height and width of the largest training image, in pixels.
        is_linear: what a step keeps grows in proportion to the pixels; small images then stand for large ones.
        num_timed: samples of a timed step: as many as make a device busy, as few as fit.
    """

    network: nn.Module
    step: Callable[[int, tuple[int, int], torch.device], Tensor]
    size: tuple[int, int]
    is_linear: bool
    num_timed: int


def probe_of(model: LightningModule, transform: Any) -> Probe | None:
    """The probe of a task; None for a model or data that is not this project's.

    Args:
        model: as built for training.
        transform: the data module's, for training.
    """
    if isinstance(model, ClassificationModule) and isinstance(transform, TrainTransform):
        side = transform.image_size
        return Probe(model.backbone, lambda *made: _classify(model.backbone, *made), (side, side), False, 16)
    if isinstance(model, SegmentationModule) and isinstance(transform, SegmentationTrainTransform):
        side = transform.crop_size
        return Probe(model.network, lambda *made: _segment(model, *made), (side, side), _is_linear(model), 2)
    if isinstance(model, DetectionModule) and isinstance(transform, DetectionTrainTransform):
        return Probe(model.network, lambda *made: _detect(model, *made), _largest(transform), _is_linear(model), 1)
    return None


def _is_linear(model: DetectionModule | SegmentationModule) -> bool:
    """Attention of another kind may keep a matrix of tokens by tokens."""
    config = model.backbone_config
    return config.name.startswith("mirrorla_") and "softmax" not in config.layout


def _largest(transform: DetectionTrainTransform) -> tuple[int, int]:
    long_side = transform.long_side
    if transform.large_scale is not None:
        return long_side, long_side
    return min(max(transform.short_sides), long_side), long_side


def _classify(network: nn.Module, count: int, size: tuple[int, int], device: torch.device) -> Tensor:
    logits: Tensor = network(torch.randn(count, 3, *size, device=device))
    return logits.float().square().mean()


def _segment(model: SegmentationModule, count: int, size: tuple[int, int], device: torch.device) -> Tensor:
    masks = torch.randint(model.num_classes, (count, *size), device=device)
    logits = model.network.all_logits(torch.randn(count, 3, *size, device=device))
    return torch.stack([pixel_loss(value, masks).mean() for value in logits.values()]).sum()


def _detect(model: DetectionModule, count: int, size: tuple[int, int], device: torch.device) -> Tensor:
    images = [torch.randn(3, *size, device=device) for _ in range(count)]
    targets = [_objects(model.detector_config, model.num_classes, size, device) for _ in images]
    terms: dict[str, Tensor] = model.network(images, targets)
    return torch.stack(list(terms.values())).sum()


def _objects(
    config: DetectorConfig, num_classes: int, size: tuple[int, int], device: torch.device
) -> dict[str, Tensor]:
    """As many objects as fill the quota of the second stage: more cost nothing further."""
    count = max(1, config.regions_per_image // 4) if config.has_masks else 8
    corner = torch.rand(count, 2, device=device) * 0.5
    boxes = torch.cat([corner, corner + 0.1 + torch.rand(count, 2, device=device) * 0.4], 1)
    boxes = boxes * torch.tensor([size[1], size[0], size[1], size[0]], device=device)
    target = {"boxes": boxes, "labels": torch.randint(1, num_classes + 1, (count,), device=device)}
    return (
        {**target, "masks": torch.zeros(count, *size, dtype=torch.bool, device=device)} if config.has_masks else target
    )
