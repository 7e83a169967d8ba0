"""The classification task: one backbone, one loss, an averaged copy, exact metrics."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from datamodules.types import ClassificationBatch
from lightning_modules.callbacks.throughput import log_interval
from lightning_modules.ema import ExponentialAverage
from lightning_modules.evaluation import ClassificationMetrics
from lightning_modules.mixing import MixConfig, Mixer
from lightning_modules.model_card import ModelCard
from lightning_modules.optim import OptimConfig, Plan, build_optimizer, plan_steps
from lightning_modules.tensorboard import Tag
from mirrorla import MirrorConfig, align_mirrors, create_backbone

AttentionKind = Literal["mirror", "softmax"]


@dataclass(frozen=True)
class BackboneConfig:
    """What `mirrorla.create_backbone` builds.

    Attributes:
        name: "mirrorla_tiny" and the like, or any timm model name.
        mirror: the mirrors of a MirrorLA variant.
        attention: kind of attention in each of the four stages.
        drop_path_rate: stochastic depth; null takes the variant's.
        pretrained: a .safetensors or .pt file to start from.
    """

    name: str = "mirrorla_tiny"
    mirror: MirrorConfig = field(default_factory=MirrorConfig)
    attention: tuple[AttentionKind, AttentionKind, AttentionKind, AttentionKind] = ("mirror",) * 4
    drop_path_rate: float | None = None
    pretrained: str | None = None


def accumulation_scale(batch_idx: int, num_batches: int, accumulate: int) -> float:
    """Factor that makes a partial last accumulation window a mean over its own batches.

    Lightning divides every loss by `accumulate`, also where the epoch ends inside a window.

    Args:
        batch_idx: index of the batch within the epoch, from 0.
        num_batches: batches in the epoch.
        accumulate: batches per optimizer step.

    Returns:
        1 in full windows, accumulate / length in the last partial one.
    """
    start = batch_idx // accumulate * accumulate
    return accumulate / min(accumulate, num_batches - start)


_BACKBONE, _OPTIM, _MIX = BackboneConfig(), OptimConfig(), MixConfig()


class ClassificationModule(LightningModule):
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
        if num_classes < 2:
            raise ValueError(f"model.num_classes {num_classes} must be 2 or above")
        self.num_classes = num_classes
        self.backbone_config = backbone
        self.optim_config = optim
        self.backbone = create_backbone(
            backbone.name,
            num_classes=num_classes,
            drop_path_rate=backbone.drop_path_rate,
            mirror=backbone.mirror,
            attention=backbone.attention,
            pretrained=backbone.pretrained,
        )
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone.to(memory_format=self._format)
        self.ema = ExponentialAverage(self.backbone, ema_decay, ema_warmup) if ema_decay is not None else None
        self._compile = compile
        self._mixer = Mixer(mix, num_classes, label_smoothing)
        self.val_metrics = ClassificationMetrics(num_classes)
        self.test_metrics = ClassificationMetrics(num_classes)
        self.confusion: Tensor | None = None
        self.plan: Plan | None = None

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: the averaged copy where there is one."""
        return self.backbone if self.ema is None else self.ema.module

    @property
    def card(self) -> ModelCard:
        """What a checkpoint of this module says about itself."""
        config = self.backbone_config
        return ModelCard(
            task="classification",
            backbone=config.name,
            num_classes=self.num_classes,
            has_ema=self.ema is not None,
            attention=list(config.attention),
            mirror=asdict(config.mirror),
        )

    def describe(self) -> str:
        """One line about the model: name, parameters, attention layout, averaging."""
        config = self.backbone_config
        parameters = sum(p.numel() for p in self.backbone.parameters()) / 1e6
        attention = f", attention {' '.join(config.attention)}" if config.name.startswith("mirrorla_") else ""
        average = f", EMA {self.ema.decay}" if self.ema is not None else ""
        return f"{config.name}, {parameters:.2f} M parameters, {self.num_classes} classes{attention}{average}"

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the evaluated network for images (B, 3, H, W)."""
        logits: Tensor = self.evaluated(images.contiguous(memory_format=self._format))
        return logits

    def setup(self, stage: str) -> None:
        """Check the class count, place the mirrors on data if asked, compile."""
        datamodule = getattr(self.trainer, "datamodule", None)
        found = getattr(datamodule, "num_classes", self.num_classes)
        if found != self.num_classes:
            raise ValueError(
                f"model.num_classes {self.num_classes} differs from the data's {found} classes; "
                f"use --model.num_classes {found} or other data"
            )
        if stage == "fit" and self.backbone_config.mirror.init == "aligned" and not self.trainer.ckpt_path:
            self._align_mirrors()
        if self._compile:
            self._compile = False
            self.backbone.compile()
            if self.ema is not None:
                self.ema.module.compile()

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepping with the optimizer."""
        self.plan = self._make_plan()
        optimizer, scheduler = build_optimizer(self.backbone, self.optim_config, self.plan)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: ClassificationBatch, batch_idx: int) -> Tensor:
        """The weighted loss of this rank's share; averaged over ranks it is the loss of the global batch."""
        images, targets = self._mixer(batch["image"], batch["label"], batch["weight"])
        logits = self.backbone(images.contiguous(memory_format=self._format))
        loss = (batch["weight"] * cross_entropy(logits.float(), targets, reduction="none")).mean()
        if self.is_log_step:
            self.log(Tag.TRAIN_LOSS, loss.detach(), prog_bar=True, sync_dist=True)
        return loss * accumulation_scale(
            batch_idx, int(self.trainer.num_training_batches), self.trainer.accumulate_grad_batches
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient norm before clipping and the learning rate of every group."""
        if not self.is_log_step:
            return
        gradients = [p.grad for p in self.backbone.parameters() if p.grad is not None]
        self.log(Tag.GRAD_NORM, nn.utils.get_total_norm(gradients))
        for group in optimizer.param_groups:
            self.log(f"{Tag.LEARNING_RATE}/{group['name']}", group["lr"])

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then let the average follow: before any callback can save a checkpoint."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self.ema.update(self.backbone, step=self.trainer.global_step + 1)

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the model card into the checkpoint."""
        checkpoint[ModelCard.KEY] = self.card.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model.

        Raises:
            ValueError: naming both models and the mend.
        """
        self.card.require_match(ModelCard.from_checkpoint(checkpoint))

    @property
    def is_log_step(self) -> bool:
        """Whether the metrics of the current batch reach TensorBoard."""
        return (self.trainer.global_step + 1) % log_interval(self.trainer) == 0

    def _evaluate(self, batch: ClassificationBatch, metrics: ClassificationMetrics, stage: str) -> None:
        metrics.update(self(batch["image"]), batch["label"], batch["weight"])
        size = len(batch["label"])
        for name, metric in (("loss", metrics.loss), ("top1", metrics.top1), ("top5", metrics.top5)):
            self.log(f"{stage}/{name}", metric, prog_bar=name == "top1", batch_size=size)

    def _make_plan(self) -> Plan:
        trainer, data = self.trainer, getattr(self.trainer, "datamodule", None)
        if data is None:
            raise ValueError("the schedule needs a datamodule with batches_per_epoch and batch_size; give --data")
        batches = data.batches_per_epoch
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return plan_steps(
            batches, data.batch_size, trainer.accumulate_grad_batches, trainer.max_epochs, trainer.max_steps
        )

    def _align_mirrors(self) -> None:
        # Every rank looks at its own share; the distributed wrapper then broadcasts rank 0's parameters.
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        images = next(iter(loader))["image"][:64].to(self.device)
        align_mirrors(self.backbone, images)
        if self.ema is not None:
            self.ema.module.load_state_dict(self.backbone.state_dict())
