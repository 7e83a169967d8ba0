"""Semantic segmentation: SemanticFPN or UPerNet over any backbone, one loss per image, exact counts."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.types import SegmentationBatch
from lightning_modules import training
from lightning_modules.backbone import BackboneConfig, build_dense
from lightning_modules.model_card import ModelCard
from lightning_modules.optim import OptimConfig
from lightning_modules.segmentation_metrics import SegmentationMetrics, SegmentationScores
from lightning_modules.task_module import TaskModule
from lightning_modules.views import ViewConfig
from mirrorla.dense import DenseBackbone
from mirrorla.heads.segmentation import Segmenter, SegmenterConfig, class_map, pixel_loss, sliding_logits
from mirrorla.pyramid import STRIDES


@dataclass(frozen=True)
class WindowConfig:
    """Whether an evaluation sees an image whole or through windows.

    Attributes:
        size: side of a square window in pixels; 0 sees the image whole.
        stride: pixels from one window to the next; 0 is two thirds of the size.
    """

    size: int = 0
    stride: int = 0

    def __post_init__(self) -> None:
        """Refuse windows that leave gaps.

        Raises:
            ValueError: naming both values.
        """
        if self.size < 0 or not 0 <= self.stride <= self.size:
            raise ValueError(f"window.stride {self.stride} must lie in 0 … window.size {self.size}, and both from 0")


_BACKBONE, _HEAD, _OPTIM, _VIEWS, _WINDOW = (
    BackboneConfig(),
    SegmenterConfig(),
    OptimConfig(),
    ViewConfig(),
    WindowConfig(),
)


class SegmentationModule(TaskModule):
    """Train and evaluate a segmenter.

    Args:
        num_classes: C, must equal the data's.
        backbone: the network below.
        head: kind and sizes of the head.
        optim: optimiser and schedule.
        views: looks at an image that an evaluation averages.
        window: windows of an evaluation.
        frozen_stages: stages of the backbone, from the stem on, that stay as they start, norms included.
        ema_decay: decay of the averaged weights, which are the ones evaluated; null evaluates the trained ones.
        ema_warmup: grow the decay from 0, for short runs.
        channels_last: NHWC memory layout, faster for convolutions on CPUs and tensor cores.
        compile: torch.compile the backbone.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: BackboneConfig = _BACKBONE,
        head: SegmenterConfig = _HEAD,
        optim: OptimConfig = _OPTIM,
        views: ViewConfig = _VIEWS,
        window: WindowConfig = _WINDOW,
        frozen_stages: int = 0,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        training.check_num_classes(num_classes, at_least=2)
        self.num_classes = num_classes
        self.backbone_config, self.head_config, self.optim_config = backbone, head, optim
        self.views, self.window = views, window
        self.class_names: list[str] = []
        self.network = Segmenter(build_dense(backbone, STRIDES, frozen_stages), num_classes, head)
        self._format = training.memory_format(channels_last)
        self.network.to(memory_format=self._format)
        self.ema = training.averaged(self.network, ema_decay, ema_warmup)
        self._compile = compile
        self.val_metrics = SegmentationMetrics(num_classes)
        self.test_metrics = SegmentationMetrics(num_classes)
        self.scores: SegmentationScores | None = None

    @property
    def trained(self) -> nn.Module:
        """Everything that learns."""
        return self.network

    @property
    def backbone(self) -> DenseBackbone:
        """The trained backbone."""
        return self.network.backbone

    @property
    def card(self) -> ModelCard:
        """What a checkpoint of this module says about itself."""
        config = self.head_config
        head = {"kind": config.kind, "channels": config.width, "auxiliary": config.auxiliary > 0}
        if config.auxiliary:
            head["auxiliary_channels"] = config.auxiliary_channels
        average = self.ema is not None
        return ModelCard.of("segmentation", self.backbone_config, self.num_classes, average, self.class_names, head)

    def describe(self) -> str:
        """One line about the model: name, head, parameters, attention layout, averaging."""
        decay, kind = None if self.ema is None else self.ema.decay, self.head_config.kind
        return training.describe(self.backbone_config, self.network, kind, self.num_classes, decay)

    def segment(self, images: Tensor, sizes: Tensor, mask_sizes: Tensor) -> list[Tensor]:
        """Classify every pixel with the evaluated network, every image alone and without its padding.

        Args:
            images: (b, 3, h, w), padded on the right and at the bottom.
            sizes: (b, 2) height and width of each image without padding.
            mask_sizes: (b, 2) height and width of each wanted map.

        Returns:
            b class maps (H, W), int64, on the module's device.
        """
        with training.evaluating(self.evaluated) as network:
            maps = []
            for image, size, mask_size in zip(images, sizes.tolist(), mask_sizes.tolist(), strict=True):
                maps.append(class_map(self._looks(network, image[None, :, : size[0], : size[1]]), tuple(mask_size)))
            return maps

    def setup(self, stage: str) -> None:
        """Check the class count, compile."""
        self.class_names = training.known_classes(self.trainer, self.num_classes, self.class_names)
        if self._compile:
            self._compile = False
            for network in (self.network, self.evaluated):
                network.backbone.compile()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepping with the optimizer."""
        return training.optimization(self.trainer, self.network, self.optim_config, self.backbone.body)

    def training_step(self, batch: SegmentationBatch, batch_idx: int) -> Tensor:
        """The weighted loss of this rank's share; averaged over ranks it is the loss of the global batch."""
        images, masks, weights = _without_skipped(batch)
        logits = self.network.all_logits(images.contiguous(memory_format=self._format))
        terms = {name: (weights * pixel_loss(value, masks)).mean() for name, value in logits.items()}
        loss = terms["head"]
        if "auxiliary" in terms:
            loss = loss + self.head_config.auxiliary * terms["auxiliary"]
        if training.is_log_step(self.trainer):
            training.log_losses(self, loss, terms, len(images))
        return training.accumulated(loss, self.trainer, batch_idx)

    def validation_step(self, batch: SegmentationBatch, batch_idx: int) -> None:
        """Count one validation batch."""
        self.val_metrics.update(self._segmented(batch), batch["mask"], batch["weight"])

    def test_step(self, batch: SegmentationBatch, batch_idx: int) -> None:
        """Count one test batch."""
        self.test_metrics.update(self._segmented(batch), batch["mask"], batch["weight"])

    def on_validation_epoch_end(self) -> None:
        """Score the validation set."""
        self._score(self.val_metrics, "val")

    def on_test_epoch_end(self) -> None:
        """Score the test set."""
        self._score(self.test_metrics, "test")

    def predict_step(self, batch: SegmentationBatch, batch_idx: int) -> dict[str, Any]:
        """What `segment` finds: id (b,), weight (b,) and b class maps."""
        return {"id": batch["id"], "weight": batch["weight"], "predictions": self._segmented(batch)}

    def _looks(self, network: nn.Module, image: Tensor) -> list[Tensor]:
        """Logits (1, C, h, w) of every look at an image (1, 3, H, W), turned back where it was mirrored."""
        looks = []
        for height, width, is_flipped in self.views.of(image.shape[2], image.shape[3]):
            seen = image
            if (height, width) != tuple(image.shape[2:]):
                seen = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
            seen = seen.flip(3) if is_flipped else seen
            size, stride = self.window.size, self.window.stride or max(1, self.window.size * 2 // 3)
            logits = sliding_logits(network, seen, size, stride) if size else network(seen)
            looks.append(logits.flip(3) if is_flipped else logits)
        return looks

    def _segmented(self, batch: SegmentationBatch) -> list[Tensor]:
        return self.segment(batch["image"], batch["size"], batch["mask_size"])

    def _score(self, metrics: SegmentationMetrics, stage: str) -> None:
        self.scores = metrics.scores()
        metrics.reset()
        for name, value in self.scores.named().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "miou")


def _without_skipped(batch: SegmentationBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Images, masks and weights without skipped samples, whose blanks would enter BatchNorm's statistics.

    The weights are scaled so that their mean over the samples that are left is what it was over all. At least one
    stays, so that every parameter gets a gradient.
    """
    kept = batch["weight"] > 0
    if bool(kept.all()):  # the one wait for the device in a step
        return batch["image"], batch["mask"], batch["weight"]
    kept[0] |= ~kept.any()
    weights = batch["weight"][kept] * (kept.sum() / len(kept))
    return batch["image"][kept], batch["mask"][kept], weights
