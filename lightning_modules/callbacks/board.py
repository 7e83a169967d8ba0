"""Set TensorBoard's custom-scalars and HParams pages up: charts, settings and which scalars are a run's result."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.tensorboard.summary import hparams

from lightning_modules.board import hyperparameters, result_tags, scalars_layout
from lightning_modules.environment import redact


class RunBoard(Callback):
    """Write both on rank 0.

    Args:
        task: classification, detection or segmentation.
        config: the resolved configuration as YAML.
    """

    def __init__(self, task: str, config: str) -> None:
        self._task = task
        self._settings = {name: value for name, value in hyperparameters(redact(config)).items() if value != ""}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe charts, settings and results; the pages follow a run while it trains."""
        if (writer := _writer(trainer)) is not None:
            writer.add_custom_scalars(scalars_layout(self._task))
            for summary in self._summaries()[:2]:
                writer._get_file_writer().add_summary(summary)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the run as done."""
        if (writer := _writer(trainer)) is not None:
            writer._get_file_writer().add_summary(self._summaries()[2])

    def _summaries(self) -> Any:
        """Columns of the page, this run's settings, and its end."""
        return hparams(self._settings, dict.fromkeys(result_tags(self._task), 0.0))


def _writer(trainer: Trainer) -> Any:
    """The SummaryWriter of a run that is logged, on rank 0; None otherwise."""
    return trainer.logger.experiment if trainer.is_global_zero and trainer.logger is not None else None  # type: ignore[attr-defined]
