"""Object detection and instance segmentation: torchvision's detectors over any backbone, trained and scored exactly."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.types import DetectionBatch
from lightning_modules import training
from lightning_modules.backbone import BackboneConfig, build_dense
from lightning_modules.detection_metrics import CocoEvaluator, DetectionScores
from lightning_modules.gather import waiting_group
from lightning_modules.model_card import ModelCard
from lightning_modules.optim import OptimConfig
from lightning_modules.task_module import TaskModule
from lightning_modules.tensorboard import Tag
from lightning_modules.views import ViewConfig
from mirrorla.dense import DenseBackbone
from mirrorla.heads.detection import DetectorConfig, build_detector
from mirrorla.heads.detections import Detections, flipped, in_original_pixels, merged
from mirrorla.heads.detector_parts import Target


@dataclass(frozen=True)
class Share:
    """What a rank trains on: its samples without the skipped ones.

    Attributes:
        images: k images (3, h, w).
        targets: k targets with boxes, labels and perhaps masks.
        weight: factor of their mean loss.
    """

    images: list[Tensor]
    targets: list[Target]
    weight: float


def share_of(batch: DetectionBatch, has_masks: bool) -> Share:
    """Leave out skipped samples and weight the rest.

    A rank with b of the B samples of a global batch on N ranks gives every good one the weight N b / B. The mean loss
    over its k good samples times the factor N k / B, averaged over ranks, is the sum over ranks of (k / B) mean losses:
    the gradient of the global batch, skipped samples counting zero, wherever a loss is a mean over images. RetinaNet's
    terms are; of Mask R-CNN's, those of proposals and boxes are as long as every image fills its quota of anchors and
    regions, while the mask term is a mean over the regions of a rank. Images are padded to the largest of their share,
    and BatchNorm sees one share, here as everywhere.

    Args:
        batch: in training form.
        has_masks: whether the detector learns masks.

    Returns:
        At least one sample, so that every parameter gets a gradient: of weight 0 if all were skipped.

    Raises:
        ValueError: masks are needed and the data has none.
    """
    weights = batch["weight"].tolist()
    kept = [place for place, weight in enumerate(weights) if weight > 0] or [0]
    names = ("boxes", "labels", "masks") if has_masks else ("boxes", "labels")
    targets = [cast(Target, batch["target"][place]) for place in kept]
    if has_masks and any("masks" not in target for target in targets):
        raise ValueError(
            "model.detector.kind 'mask_rcnn' learns masks and the data has none; use --model.detector.kind retinanet"
        )
    return Share(
        [batch["image"][place] for place in kept],
        [{name: target[name] for name in names} for target in targets],
        sum(weights) / len(weights),
    )


_BACKBONE, _DETECTOR, _OPTIM, _VIEWS = BackboneConfig(), DetectorConfig(), OptimConfig(), ViewConfig()


class DetectionModule(TaskModule):
    """Train and evaluate a detector.

    Args:
        num_classes: C foreground classes, must equal the data's.
        backbone: the network below.
        detector: pyramid, anchors and heads.
        optim: optimiser and schedule.
        views: looks at an image that an evaluation merges.
        frozen_stages: stages of the backbone, from the stem on, that stay as they start, norms included.
        ema_decay: decay of the averaged weights, which are the ones evaluated; null evaluates the trained ones.
        ema_warmup: grow the decay from 0, for short runs.
        channels_last: NHWC memory layout, faster for convolutions on CPUs and tensor cores.
        compile: torch.compile the backbone; what follows has a different shape for every image.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: BackboneConfig = _BACKBONE,
        detector: DetectorConfig = _DETECTOR,
        optim: OptimConfig = _OPTIM,
        views: ViewConfig = _VIEWS,
        frozen_stages: int = 0,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        training.check_num_classes(num_classes, at_least=1)
        self.num_classes = num_classes
        self.backbone_config, self.detector_config, self.optim_config = backbone, detector, optim
        self.views = views
        self.class_names: list[str] = []
        trunk = build_dense(backbone, detector.strides, frozen_stages)
        self.network = build_detector(trunk, num_classes, detector)
        self.network.to(memory_format=training.memory_format(channels_last))
        self.ema = training.averaged(self.network, ema_decay, ema_warmup)
        self._compile = compile
        self.val_metrics = CocoEvaluator(num_classes, detector.has_masks, detector.max_detections)
        self.test_metrics = CocoEvaluator(num_classes, detector.has_masks, detector.max_detections)
        self.scores: DetectionScores | None = None

    @property
    def trained(self) -> nn.Module:
        """Everything that learns."""
        return self.network

    @property
    def backbone(self) -> DenseBackbone:
        """The trained backbone."""
        trunk: DenseBackbone = self.network.backbone.trunk  # type: ignore[union-attr, assignment]
        return trunk

    @property
    def card(self) -> ModelCard:
        """What a checkpoint of this module says about itself."""
        sizes = ("kind", "channels", "norm", "anchor_scale", "box_width", "mask_width", "mask_convs")
        head = {name: value for name, value in asdict(self.detector_config).items() if name in sizes}
        average = self.ema is not None
        return ModelCard.of("detection", self.backbone_config, self.num_classes, average, self.class_names, head)

    def describe(self) -> str:
        """One line about the model: name, detector, parameters, attention layout, averaging."""
        decay, kind = None if self.ema is None else self.ema.decay, self.detector_config.kind
        return training.describe(self.backbone_config, self.network, kind, self.num_classes, decay)

    def detect(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Find objects with the evaluated network, every image alone: what is found never depends on its neighbours.

        Args:
            images: b images (3, h, w), resized and normalised.
            sizes: b times height and width of the original.

        Returns:
            b times boxes (n, 4) in original pixels, labels (n,) from 1, scores (n,), best first, and masks (n, H, W)
            bool if the detector has them; on the module's device.
        """
        with training.evaluating(self.evaluated) as network:
            return [self._detect(network, image, size) for image, size in zip(images, sizes, strict=True)]

    def setup(self, stage: str) -> None:
        """Check the class count, compile."""
        self.class_names = training.known_classes(self.trainer, self.num_classes, self.class_names)
        if self._compile:
            self._compile = False
            for network in (self.network, self.evaluated):
                network.backbone.trunk.compile()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepping with the optimizer."""
        return training.optimization(self.trainer, self.network, self.optim_config, self.backbone.body)

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> Tensor:
        """The weighted loss of this rank's share; see share_of for what its average over ranks is."""
        share = share_of(batch, self.detector_config.has_masks)
        terms: dict[str, Tensor] = self.network(share.images, share.targets)
        loss = share.weight * torch.stack(list(terms.values())).sum()
        if training.is_log_step(self.trainer):
            training.log_losses(self, loss, terms, len(share.images))
            for name, value in self.network.statistics.items():  # type: ignore[operator, union-attr]
                self.log(f"{Tag.MATCHER}/{name}", value, sync_dist=True, batch_size=len(share.images))
        return training.accumulated(loss, self.trainer, batch_idx)

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Collect one validation batch."""
        self._collect(batch, self.val_metrics)

    def test_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Collect one test batch."""
        self._collect(batch, self.test_metrics)

    def on_validation_epoch_end(self) -> None:
        """Score the validation set."""
        self._score(self.val_metrics, "val")

    def on_test_epoch_end(self) -> None:
        """Score the test set."""
        self._score(self.test_metrics, "test")

    def predict_step(self, batch: DetectionBatch, batch_idx: int) -> dict[str, Any]:
        """What `detect` finds: id (b,), weight (b,) and b predictions."""
        return {"id": batch["id"], "weight": batch["weight"], "predictions": self._found(batch)}

    def _detect(self, network: nn.Module, image: Tensor, size: tuple[int, int]) -> Detections:
        looks = []
        for height, width, is_flipped in self.views.of(image.shape[1], image.shape[2]):
            seen = image
            if (height, width) != tuple(image.shape[1:]):
                seen = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
            found = in_original_pixels(network([seen.flip(2) if is_flipped else seen])[0], (height, width), size)
            looks.append(flipped(found, size[1]) if is_flipped else found)
        return merged(looks, self.detector_config.nms_threshold, self.detector_config.max_detections)

    def _found(self, batch: DetectionBatch) -> list[Detections]:
        sizes = [(int(height), int(width)) for height, width in (target["size"].tolist() for target in batch["target"])]
        return self.detect(batch["image"], sizes)

    def _collect(self, batch: DetectionBatch, metrics: CocoEvaluator) -> None:
        targets = cast(list[Target], batch["target"])
        metrics.update(self._found(batch), targets, batch["id"], batch["weight"])

    def _score(self, metrics: CocoEvaluator, stage: str) -> None:
        self.scores = metrics.compute(waiting_group())
        metrics.reset()
        for name, value in self.scores.named().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "box_ap")
