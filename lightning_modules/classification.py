"""The classification task: one backbone, one loss, an averaged copy, exact metrics."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from datamodules.types import ClassificationBatch
from lightning_modules import training
from lightning_modules.backbone import BackboneConfig, build_classifier
from lightning_modules.evaluation import ClassificationMetrics
from lightning_modules.mixing import MixConfig, Mixer
from lightning_modules.model_card import ModelCard
from lightning_modules.optim import OptimConfig
from lightning_modules.task_module import TaskModule
from mirrorla import align_mirrors

_BACKBONE, _OPTIM, _MIX = BackboneConfig(), OptimConfig(), MixConfig()


class ClassificationModule(TaskModule):
    """Train and evaluate a classifier.

    Args:
        num_classes: C, must equal the data's.
        backbone: the network.
        optim: optimiser and schedule.
        mix: mixup and cutmix.
        label_smoothing: mass spread over all classes, in [0, 1).
        ema_decay: decay of the averaged weights, which are the ones evaluated; null evaluates the trained ones.
        ema_warmup: grow the decay from 0, for short runs.
        channels_last: NHWC memory layout, faster for convolutions on CPUs and tensor cores.
        compile: torch.compile the network (not this module, whose logging would break the graph).
    """

    def __init__(
        self,
        num_classes: int,
        backbone: BackboneConfig = _BACKBONE,
        optim: OptimConfig = _OPTIM,
        mix: MixConfig = _MIX,
        label_smoothing: float = 0.1,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"model.label_smoothing {label_smoothing} must lie in [0, 1)")
        training.check_num_classes(num_classes, at_least=2)
        self.num_classes = num_classes
        self.backbone_config = backbone
        self.optim_config = optim
        self.class_names: list[str] = []
        self._format = training.memory_format(channels_last)
        self.backbone = build_classifier(backbone, num_classes).to(memory_format=self._format)
        self.ema = training.averaged(self.backbone, ema_decay, ema_warmup)
        self._compile = compile
        self._mixer = Mixer(mix, num_classes, label_smoothing)
        self.val_metrics = ClassificationMetrics(num_classes)
        self.test_metrics = ClassificationMetrics(num_classes)
        self.confusion: Tensor | None = None

    @property
    def trained(self) -> nn.Module:
        """Everything that learns."""
        return self.backbone

    @property
    def card(self) -> ModelCard:
        """What a checkpoint of this module says about itself."""
        config, average = self.backbone_config, self.ema is not None
        return ModelCard.of("classification", config, self.num_classes, average, self.class_names)

    def describe(self) -> str:
        """One line about the model: name, parameters, attention layout, averaging."""
        decay = None if self.ema is None else self.ema.decay
        return training.describe(self.backbone_config, self.backbone, "", self.num_classes, decay)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the evaluated network for images (B, 3, H, W)."""
        logits: Tensor = self.evaluated(images.contiguous(memory_format=self._format))
        return logits

    def setup(self, stage: str) -> None:
        """Check the class count, place the mirrors on data if asked, compile."""
        self.class_names = training.known_classes(self.trainer, self.num_classes, self.class_names)
        if stage == "fit" and self.backbone_config.mirror.init == "aligned" and not self.trainer.ckpt_path:
            self._align_mirrors()
        if self._compile:
            self._compile = False
            self.backbone.compile()
            if self.ema is not None:
                self.ema.module.compile()

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepping with the optimizer."""
        return training.optimization(self.trainer, self.backbone, self.optim_config)

    def training_step(self, batch: ClassificationBatch, batch_idx: int) -> Tensor:
        """The weighted loss of this rank's share; averaged over ranks it is the loss of the global batch."""
        images, targets = self._mixer(batch["image"], batch["label"], batch["weight"])
        logits = self.backbone(images.contiguous(memory_format=self._format))
        loss = (batch["weight"] * cross_entropy(logits.float(), targets, reduction="none")).mean()
        if training.is_log_step(self.trainer):
            training.log_losses(self, loss, {}, len(images))
        return training.accumulated(loss, self.trainer, batch_idx)

    def validation_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Count one validation batch with the evaluated network."""
        self._evaluate(batch, self.val_metrics, "val")

    def test_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Count one test batch with the evaluated network."""
        self._evaluate(batch, self.test_metrics, "test")

    def predict_step(self, batch: ClassificationBatch, batch_idx: int) -> dict[str, Tensor]:
        """Five best classes and their probabilities, best first.

        Returns:
            id (B,), weight (B,), classes (B, K) and scores (B, K) with K = min(5, C).
        """
        scores, classes = self(batch["image"]).float().softmax(1).topk(min(5, self.num_classes))
        return {"id": batch["id"], "weight": batch["weight"], "classes": classes, "scores": scores}

    def on_validation_epoch_end(self) -> None:
        """Keep the confusion matrix for the figures; a collective, so every rank computes it."""
        self.confusion = self.val_metrics.confusion.compute().cpu()
        self.val_metrics.confusion.reset()

    def _evaluate(self, batch: ClassificationBatch, metrics: ClassificationMetrics, stage: str) -> None:
        metrics.update(self(batch["image"]), batch["label"], batch["weight"])
        size = len(batch["label"])
        for name, metric in (("loss", metrics.loss), ("top1", metrics.top1), ("top5", metrics.top5)):
            self.log(f"{stage}/{name}", metric, prog_bar=name == "top1", batch_size=size)

    def _align_mirrors(self) -> None:
        # Every rank looks at its own share; the distributed wrapper then broadcasts rank 0's parameters.
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        images = next(iter(loader))["image"][:64].to(self.device)
        align_mirrors(self.backbone, images)
        if self.ema is not None:
            self.ema.module.load_state_dict(self.backbone.state_dict())
