"""Stop on a signal: all ranks agree at a step boundary, one checkpoint is committed, the process leaves.

The handler (stop_signals.py) only sets a flag. The flag is looked at between two optimizer steps, and between the
batches of a validation, so that Ctrl-C never waits for a long one: it is then repeated in full after the resume.
The clock (checkpoint.max_minutes) and a disk that stays full end a training at the same places.
"""

import signal
import time
from enum import IntEnum
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules import stop_signals
from lightning_modules.callbacks.checkpointing import Moment, RunCheckpoints
from lightning_modules.stop_signals import StopRequested


class Stop(IntEnum):
    """Why a training ends early; of several reasons on several ranks the highest counts."""

    NO = 0
    CLOCK = 1
    SIGNAL = 2
    NO_SPACE = 3


class StopOnSignal(Callback):
    """Turn a remembered stop signal into an agreed, saved stop.

    Args:
        checkpoints: what commits the state of a training; None while only evaluating.
        max_minutes: also stop after this much time; 0 = never.
    """

    def __init__(self, checkpoints: RunCheckpoints | None, max_minutes: float = 0.0) -> None:
        self.has_started = False
        self._checkpoints = checkpoints
        self._ends_at_s = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
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
        if (stop := self._agreed(trainer)) is not Stop.NO:
            _leave(trainer, stop)

    def _stop_if_asked(self, trainer: Trainer, moment: Moment) -> None:
        stop = self._agreed(trainer)
        if stop is Stop.NO:
            return
        if self._checkpoints is not None and trainer.state.fn == "fit":
            self._checkpoints.save_and_wait(trainer, moment)
            if stop is Stop.NO_SPACE:  # the last try of all succeeded
                return
        _leave(trainer, stop)

    def _agreed(self, trainer: Trainer) -> Stop:
        """This rank's reason to stop, or another's."""
        stop = Stop.SIGNAL if stop_signals.received() else Stop.CLOCK if time.monotonic() > self._ends_at_s else Stop.NO
        if self._checkpoints is not None and self._checkpoints.has_failed:
            stop = Stop.NO_SPACE
        if trainer.world_size == 1:
            return stop
        device = trainer.strategy.root_device
        return Stop(int(trainer.strategy.reduce(torch.tensor(int(stop), device=device), reduce_op="max")))


def has_started(trainer: Trainer) -> bool:
    """Whether a run got beyond its set-up: what goes wrong from then on is a failure, not a refusal."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, StopOnSignal) and callback.has_started for callback in callbacks)


def is_validated(trainer: Trainer) -> bool:
    """Whether the weights as they are now have been validated."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(c, StopOnSignal) and c.validated_step == trainer.global_step for c in callbacks)


def _leave(trainer: Trainer, stop: Stop) -> NoReturn:
    """A rank that was only told by others reports SIGTERM."""
    if stop is Stop.CLOCK:
        raise StopRequested(signal.SIGUSR1, trainer.global_step, "max_minutes")
    raise StopRequested(stop_signals.received() or signal.SIGTERM, trainer.global_step)
