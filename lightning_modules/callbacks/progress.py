"""Progress a person can read: a bar on a terminal, one line per epoch in a log file."""

import logging
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

from lightning_modules.tensorboard import SCORES, Tag

_log = logging.getLogger("mirrorla")


def progress_bar() -> Callback:
    """A bar for a terminal; in a log file it would leave thousands of lines, EpochLines fits there."""
    return RichProgressBar(leave=False, theme=RichProgressBarTheme(metrics_format=".4f"))


def epoch_line(epoch: int, max_epochs: int | None, step: int, metrics: dict[str, float], seconds: float) -> str:
    """One line about a finished epoch.

    Args:
        epoch: epochs done.
        max_epochs: epochs planned; None or -1 = open.
        step: optimizer steps done.
        metrics: loss, the task's first score and images/s as far as they are known.
        seconds: wall time of the epoch.
    """
    of = f"/{max_epochs}" if max_epochs is not None and max_epochs >= 0 else ""
    parts = [f"epoch {epoch}{of}", f"step {step}"]
    if Tag.TRAIN_LOSS in metrics:
        parts.append(f"loss {metrics[Tag.TRAIN_LOSS]:.4f}")
    if headline := next((name for name in SCORES if f"val/{name}" in metrics), None):
        parts.append(f"val {SCORES[headline]} {metrics[f'val/{headline}']:.2%}")
    if Tag.IMAGES_PER_S in metrics:
        parts.append(f"{metrics[Tag.IMAGES_PER_S]:.0f} images/s")
    return "  ".join([*parts, f"{seconds:.1f} s"])


class EpochLines(Callback):
    """One line per epoch of training, one per evaluation."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began_s = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        seconds = time.monotonic() - self._began_s
        _log.info(
            "%s", epoch_line(trainer.current_epoch + 1, trainer.max_epochs, trainer.global_step, metrics, seconds)
        )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce an evaluation that stands alone."""
        self._announce(trainer, "validating", trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce a test."""
        self._announce(trainer, "testing", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce a prediction."""
        self._announce(trainer, "predicting", trainer.num_predict_batches)

    def _announce(self, trainer: Trainer, what: str, num_batches: Any) -> None:
        if trainer.state.fn != "fit":
            _log.info("%-14s %s batches", what, sum(num_batches) if isinstance(num_batches, list) else num_batches)
