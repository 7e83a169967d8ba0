"""Stop on a signal: all ranks agree at a step boundary, one checkpoint is committed, the process leaves.

The handler (stop_signals.py) only sets a flag. The flag is looked at between two optimizer steps, and between the
batches of a validation, so that Ctrl-C never waits for a long one: it is then repeated in full after the resume.
"""

import signal
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules import stop_signals
from lightning_modules.callbacks.checkpointing import Moment, RunCheckpoints
from lightning_modules.stop_signals import StopRequested


class StopOnSignal(Callback):
    """Turn a remembered stop signal into an agreed, saved stop.

    Args:
        checkpoints: what commits the state of a training; None while only evaluating.
    """

    def __init__(self, checkpoints: RunCheckpoints | None) -> None:
        self.has_started = False
        self._checkpoints = checkpoints
        self.validated_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back from Lightning, whose own handler would save or broadcast inside the handler."""
        self._start(trainer)
        trainer._signal_connector.received_sigterm = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop between two steps of an epoch; right after a validation it is that one's end that stops."""
        is_boundary = batch_idx > 0 and batch_idx % trainer.accumulate_grad_batches == 0
        if is_boundary and trainer.global_step != self.validated_step:
            self._stop_if_asked(trainer, Moment.NEXT_BATCH_READY)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs."""
        self._stop_if_asked(trainer, Moment.AS_COUNTED)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back for an evaluation that stands alone."""
        if trainer.state.fn != "fit":
            self._start(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop between two batches of a validation."""
        if not trainer.sanity_checking:
            self._stop_if_asked(trainer, Moment.INSIDE_VALIDATION)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after a validation inside an epoch; at the end of the epoch its own hook follows."""
        self.validated_step = trainer.global_step
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._stop_if_asked(trainer, Moment.AS_COUNTED)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back."""
        self._start(trainer)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop between two batches of a test."""
        self._stop_if_asked(trainer, Moment.AS_COUNTED)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back."""
        self._start(trainer)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop between two batches of a prediction."""
        self._stop_if_asked(trainer, Moment.AS_COUNTED)

    def _start(self, trainer: Trainer) -> None:
        """A signal during the set-up ends the run here: there is nothing to save yet."""
        self.has_started = True
        stop_signals.install()
        if _any_rank_asked(trainer):
            _leave(trainer)

    def _stop_if_asked(self, trainer: Trainer, moment: Moment) -> None:
        if not _any_rank_asked(trainer):
            return
        if self._checkpoints is not None and trainer.state.fn == "fit":
            self._checkpoints.save(trainer, moment)
        _leave(trainer)


def has_started(trainer: Trainer) -> bool:
    """Whether a run got beyond its set-up: what goes wrong from then on is a failure, not a refusal."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, StopOnSignal) and callback.has_started for callback in callbacks)


def is_validated(trainer: Trainer) -> bool:
    """Whether the weights as they are now have been validated."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(c, StopOnSignal) and c.validated_step == trainer.global_step for c in callbacks)


def _any_rank_asked(trainer: Trainer) -> bool:
    asked = stop_signals.received() is not None
    return bool(trainer.strategy.reduce_boolean_decision(asked, all=False)) if trainer.world_size > 1 else asked


def _leave(trainer: Trainer) -> NoReturn:
    """A rank that was only told by others reports SIGTERM."""
    raise StopRequested(stop_signals.received() or signal.SIGTERM, trainer.global_step)
