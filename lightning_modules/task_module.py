"""What the LightningModules of all tasks do alike."""

from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from lightning_modules import training
from lightning_modules.ema import ExponentialAverage
from lightning_modules.model_card import ModelCard


class TaskModule(LightningModule):
    """Averaged weights that follow every step, a model card in every checkpoint, the logs of a step.

    Attributes:
        num_classes: C.
        class_names: of the data or of the checkpoint; empty while neither has told them.
        ema: the averaged copy, None without one.
    """

    num_classes: int
    class_names: list[str]
    ema: ExponentialAverage | None

    @property
    def trained(self) -> nn.Module:
        """Everything that learns."""
        raise NotImplementedError

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated: the averaged copy where there is one."""
        return self.trained if self.ema is None else self.ema.module

    @property
    def card(self) -> ModelCard:
        """What a checkpoint of this module says about itself."""
        raise NotImplementedError

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient norm before clipping and the learning rate of every group."""
        training.log_gradients(self, self.trained, optimizer)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then let the average follow: before any callback can save a checkpoint."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        training.follow(self.ema, self.trained, self.trainer)

    def on_validation_start(self) -> None:
        """Validate with the same statistics on every rank."""
        training.share_buffers(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the model card into the checkpoint."""
        checkpoint[ModelCard.KEY] = self.card.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model.

        Raises:
            ValueError: naming both models and the mend.
        """
        self.class_names = self.card.matched(checkpoint).class_names
