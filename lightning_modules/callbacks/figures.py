"""Pictures for TensorBoard after a validation: fixed predictions, confusion matrix, accuracy per class."""

from dataclasses import dataclass

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from lightning_modules.classification import ClassificationModule
from lightning_modules.tensorboard import (
    Tag,
    confusion_figure,
    per_class_figure,
    prediction_grid,
    to_pixels,
)


@dataclass(frozen=True)
class MonitoringConfig:
    """How often the costly looks are taken; scalars follow trainer.log_every_n_steps.

    Attributes:
        figures_every_n_validations: draw figures at every n-th validation and at the last one; 0 = at the last only.
        mirrors_every_n_validations: measure the mirrors at every n-th validation and at the last one; 0 = never.
        num_pictures: images in the fixed grid of predictions.
        num_probes: images of the fixed batch the mirrors are measured on.
    """

    figures_every_n_validations: int = 5
    mirrors_every_n_validations: int = 1
    num_pictures: int = 16
    num_probes: int = 32

    def __post_init__(self) -> None:
        """Refuse values that cannot be drawn.

        Raises:
            ValueError: naming the field and its value.
        """
        for name in ("figures_every_n_validations", "mirrors_every_n_validations"):
            if getattr(self, name) < 0:
                raise ValueError(f"monitoring.{name} {getattr(self, name)} must be 0 or above")
        for name in ("num_pictures", "num_probes"):
            if getattr(self, name) < 1:
                raise ValueError(f"monitoring.{name} {getattr(self, name)} must be 1 or above")


def is_last_validation(trainer: Trainer) -> bool:
    """Whether no further validation follows in this fit."""
    by_steps = trainer.max_steps >= 0 and trainer.global_step >= trainer.max_steps
    by_epochs = trainer.max_epochs is not None and trainer.max_epochs >= 0
    return by_steps or (by_epochs and trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs)


def curve_step(trainer: Trainer) -> int:
    """Where a validation's pictures stand on the curve: at the step whose weights they show, as its scalars do."""
    return max(0, trainer.global_step - 1)


class ClassificationFigures(Callback):
    """Draw the figures of a classification run on rank 0.

    Args:
        config: how often, how many.
    """

    def __init__(self, config: MonitoringConfig) -> None:
        self._config = config
        self._num_validations = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw when it is time; the module has its confusion counts by now."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        every = self._config.figures_every_n_validations
        is_time = every > 0 and self._num_validations % every == 0
        self._num_validations += 1
        if not (is_time or is_last_validation(trainer)) or not trainer.is_global_zero or trainer.logger is None:
            return
        assert isinstance(pl_module, ClassificationModule)
        for tag, pixels in self._draw(trainer, pl_module).items():
            trainer.logger.experiment.add_image(tag, pixels, curve_step(trainer), dataformats="HWC")  # type: ignore[attr-defined]

    def _draw(self, trainer: Trainer, module: ClassificationModule) -> dict[str, NDArray[np.uint8]]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        names = [str(name) for name in data.class_names]
        batch = data.probe_batch(self._config.num_pictures)
        with torch.inference_mode():
            scores, classes = module(batch["image"].to(module.device)).float().softmax(1).max(1)
        pictures = data.denormalise(batch["image"]).permute(0, 2, 3, 1).cpu().numpy()
        grid = prediction_grid(
            pictures,
            [names[label] for label in batch["label"].tolist()],
            [names[label] for label in classes.tolist()],
            scores.tolist(),
        )
        assert module.confusion is not None
        counts = module.confusion.numpy()
        figures = {
            Tag.PREDICTIONS: grid,
            Tag.CONFUSION: confusion_figure(counts, names),
            Tag.PER_CLASS: per_class_figure(counts, names),
        }
        return {str(tag): to_pixels(figure) for tag, figure in figures.items()}
