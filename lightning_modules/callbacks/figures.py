"""Pictures and curves for TensorBoard after a validation: fixed images, confusion matrix, scores per class."""

from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.classification import ClassificationModule
from lightning_modules.curves import Curve
from lightning_modules.painting import Painter, class_curves


@dataclass(frozen=True)
class MonitoringConfig:
    """How often the costly looks are taken; scalars follow trainer.log_every_n_steps.

    Attributes:
        figures_every_n_validations: draw figures at every n-th validation and at the last one; 0 = at the last only.
        mirrors_every_n_validations: measure the mirrors at every n-th validation and at the last one; 0 = never.
        num_pictures: fixed images whose predictions are shown.
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
    """Whether no further validation follows: the last of a fit, or the one after a fit that ended amid an epoch."""
    if trainer.state.fn == "validate":
        return True
    by_steps = trainer.max_steps >= 0 and trainer.global_step >= trainer.max_steps
    by_epochs = trainer.max_epochs is not None and trainer.max_epochs >= 0
    return by_steps or (by_epochs and trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs)


def curve_step(trainer: Trainer) -> int:
    """Where a validation's pictures stand on the curve: at the step whose weights they show, as its scalars do."""
    return max(0, trainer.global_step - 1)


class ValidationFigures(Callback):
    """Draw the figures of a run; rank 0 writes them.

    Args:
        config: how often, how many.
        paint: what the task shows.
    """

    def __init__(self, config: MonitoringConfig, paint: Painter) -> None:
        self._config = config
        self._paint = paint
        self._num_validations = 0
        self._class_curves: list[Curve] = []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up a classifier's score counts; a collective, so every rank does."""
        if isinstance(pl_module, ClassificationModule):
            self._class_curves = pl_module.val_metrics.score_counts.curves()
            pl_module.val_metrics.score_counts.reset()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw when it is time; the module has its scores by now."""
        if trainer.sanity_checking:
            return
        every = self._config.figures_every_n_validations
        is_time = every > 0 and self._num_validations % every == 0
        self._num_validations += 1
        if not (is_time or is_last_validation(trainer)) or trainer.logger is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        # every rank predicts: they would only wait for rank 0, and where weights are sharded it needs them all
        drawn = self._paint(pl_module, data, self._config.num_pictures)
        if not trainer.is_global_zero:
            return
        writer, step = trainer.logger.experiment, curve_step(trainer)  # type: ignore[attr-defined]
        for tag, pixels in drawn.pictures.items():
            writer.add_image(tag, pixels, step, dataformats="HWC")
        for tag, curve in (drawn.curves | class_curves(self._class_curves, data)).items():
            curve.write(writer, tag, step)
