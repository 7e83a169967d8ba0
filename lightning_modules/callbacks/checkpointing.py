"""When a run is saved, what is kept, which one is best.

A checkpoint is taken only after an optimizer step, under checkpoints/step_<step>. best.json beside it ranks the
evaluated ones; the newest and the best ranked stay, the others are removed.
"""

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_modules.callbacks.throughput import log_interval
from lightning_modules.checkpoint import Score, list_checkpoints, rank_scores
from lightning_modules.exit_codes import ExitCode, GuardStop
from lightning_modules.retention import prune, tidy
from lightning_modules.run_directory import RunDirectory
from lightning_modules.saving import Provenance, Saver
from lightning_modules.strategies import require_same_kind
from lightning_modules.tensorboard import Tag

_log = logging.getLogger("mirrorla")


@dataclass(frozen=True)
class CheckpointConfig:
    """How often to save and how much to keep.

    Attributes:
        every_n_epochs: save at the end of every n-th epoch; 0 = not by epochs.
        every_n_steps: also save after every n-th optimizer step; 0 = not by steps.
        every_n_minutes: also save when this much time has passed since the last one; 0 = not by the clock.
        keep_last: newest checkpoints that stay, at least 2: one to fall back on.
        keep_best: best ranked checkpoints that stay.
        monitor: metric of the ranking.
        mode: whether its maximum or its minimum is best.
        asynchronous: write while the training goes on; it waits for one copy of its state in main memory only. FSDP and
            DeepSpeed always write while all ranks wait.
        max_failures: saves failing in a row (disk full, quota) after which the run ends.
        max_minutes: stop with a checkpoint after this much time, as a stop signal does; 0 = never.
    """

    every_n_epochs: int = 1
    every_n_steps: int = 0
    every_n_minutes: float = 0.0
    keep_last: int = 2
    keep_best: int = 1
    monitor: str = "val/top1"
    mode: Literal["max", "min"] = "max"
    asynchronous: bool = True
    max_failures: int = 5
    max_minutes: float = 0.0

    def __post_init__(self) -> None:
        """Refuse negative intervals and a run that keeps nothing.

        Raises:
            ValueError: naming the field and its value.
        """
        for name in ("every_n_epochs", "every_n_steps", "every_n_minutes", "keep_best", "max_minutes"):
            if getattr(self, name) < 0:
                raise ValueError(f"checkpoint.{name} {getattr(self, name)} must be 0 or above; 0 turns it off")
        for name, least in (("keep_last", 2), ("max_failures", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"checkpoint.{name} {getattr(self, name)} must be {least} or above")


class Moment(Enum):
    """Where between two optimizer steps a checkpoint is taken; Lightning's counters differ."""

    AS_COUNTED = "after a validation or an epoch: the counters say just that"
    NEXT_BATCH_READY = "the next batch of the epoch is fetched but not trained on"
    INSIDE_VALIDATION = "some batches of a validation are done"


class RunCheckpoints(Checkpoint):
    """Save a run's checkpoints; every rank calls every method at the same step.

    A save that is due waits until the step's metrics are logged and its validation, if any, is done: a resumed curve
    then misses nothing.

    Args:
        run: the run directory.
        config: intervals and retention.
        token: gives the fencing token of the run's lease; raises when the lease is lost.
    """

    def __init__(self, run: RunDirectory, config: CheckpointConfig, token: Callable[[], int] = lambda: 0) -> None:
        self._run = run
        self._config = config
        self._saver = Saver(run, config.asynchronous, token)
        self._scores: list[Score] = []
        self._seen_step = -1
        self._saved_step = -1
        self._saved_at_s = time.monotonic()
        self._stalled_s = 0.0
        self._logged_at_s = time.monotonic()
        self._is_due = False
        self._moment = Moment.AS_COUNTED
        self.is_held = False  # while steps are skipped for a loss that is not finite: a rollback needs what came before

    @property
    def has_failed(self) -> bool:
        """Whether so many saves failed in a row that the run must end; known to rank 0."""
        return self._saver.num_failures >= self._config.max_failures

    def save(self, trainer: Trainer, moment: Moment) -> None:
        """Save the state after the last optimizer step, unless this attempt already did."""
        began_s = time.monotonic()
        if self._saved_step != trainer.global_step:
            self._moment = moment
            scores = list(self._scores)
            self._saver.save(trainer, lambda: prune(self._run.checkpoints, scores, self._config))
            self._saved_step = trainer.global_step
            for logger in trainer.loggers:
                logger.save()
        self._saved_at_s = time.monotonic()
        self._stalled_s += self._saved_at_s - began_s
        self._is_due = False

    def save_and_wait(self, trainer: Trainer, moment: Moment) -> None:
        """Save as `save` does, and once more if that has failed already; every rank returns when it is committed.

        Raises:
            GuardStop: it could not be written.
        """
        if self._failed(trainer):
            self._saved_step = -1
        self.save(trainer, moment)
        self.wait(trainer)

    def wait(self, trainer: Trainer) -> None:
        """Until the last save is committed; every rank calls it.

        Raises:
            GuardStop: it could not be written.
        """
        if self._failed(trainer):
            raise _cannot_save(trainer.global_step, self._run)

    def state_dict(self) -> dict[str, Any]:
        """The ranking travels with the checkpoint."""
        return {"scores": [[score.step, score.value] for score in self._scores]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the ranking; what is gone by now is left out as training starts."""
        self._scores = [Score(int(step), float(value)) for step, value in state_dict["scores"]]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another kind of strategy: only its weights would fit."""
        if trainer.state.fn == "fit" and trainer.ckpt_path:
            require_same_kind(trainer.strategy, Path(trainer.ckpt_path))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tidy up after an interrupted attempt; set aside checkpoints beyond the step training starts from."""
        self._seen_step = trainer.global_step
        self._saved_at_s = self._logged_at_s = time.monotonic()
        kept: set[int] = set()
        if trainer.is_global_zero:
            kept = tidy(self._run.checkpoints, trainer.global_step)
            self._saver.provenance = Provenance.of(self._run)
        kept = trainer.strategy.broadcast(kept)
        self._scores = [score for score in self._scores if score.step in kept]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save what became due with the step before."""
        if self._is_due and not self.is_held:
            self.save(trainer, Moment.NEXT_BATCH_READY)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether a checkpoint is due; a training that ends inside an epoch is saved here."""
        self._saver.notice()
        if trainer.global_step % log_interval(trainer) == 0:
            self._log_stall(pl_module)
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        self._is_due |= self._due_now(trainer)
        if trainer.global_step == trainer.max_steps and not trainer.is_last_batch:
            self.save(trainer, Moment.AS_COUNTED)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank the step just evaluated; inside an epoch save what is due."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._rank(trainer)
        if self._is_due and not self.is_held and not trainer.is_last_batch:
            self.save(trainer, Moment.AS_COUNTED)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of the epoch when due, and always at the end of the training."""
        every = self._config.every_n_epochs
        by_epoch = every > 0 and (trainer.current_epoch + 1) % every == 0
        is_end = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        self._is_due |= by_epoch
        if trainer.global_step != self._saved_step and (is_end or (self._is_due and not self.is_held)):
            self.save(trainer, Moment.AS_COUNTED)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Commit before the process goes on to something else."""
        self.wait(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let a save under way end; what it failed with matters less than what ended the run."""
        self._saver.abandon()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the loops' counters as they are between two steps."""
        checkpoint["loops"] = between_steps(checkpoint["loops"], self._moment)

    def _failed(self, trainer: Trainer) -> bool:
        self._saver.settle()
        return bool(trainer.strategy.broadcast(self._saver.num_failures))

    def _rank(self, trainer: Trainer) -> None:
        value = trainer.callback_metrics.get(self._config.monitor)
        if value is None or not math.isfinite(float(value)) or not self._config.keep_best:
            return
        new = Score(trainer.global_step, float(value))
        maximise = self._config.mode == "max"
        self._scores = rank_scores(self._scores, new, keep=self._config.keep_best, maximise=maximise)
        self._is_due |= new in self._scores

    def _due_now(self, trainer: Trainer) -> bool:
        config = self._config
        by_steps = config.every_n_steps > 0 and trainer.global_step % config.every_n_steps == 0
        if not config.every_n_minutes:
            return by_steps
        # Clocks differ between ranks: one late rank decides for all.
        late = time.monotonic() - self._saved_at_s >= 60 * config.every_n_minutes
        return bool(trainer.strategy.reduce_boolean_decision(by_steps or late, all=False))

    def _log_stall(self, pl_module: LightningModule) -> None:
        now_s = time.monotonic()
        share = self._stalled_s / max(now_s - self._logged_at_s, 1e-9)
        pl_module.log(Tag.CHECKPOINT_STALL, share, rank_zero_only=True)
        self._stalled_s, self._logged_at_s = 0.0, now_s


def _cannot_save(step: int, run: RunDirectory) -> GuardStop:
    stands = list_checkpoints(run.checkpoints)
    where = f"{stands[-1].name} stands" if stands else "there is none before it"
    return GuardStop(
        f"the checkpoint of step {step} could not be written to {run.checkpoints}, {where}; "
        "free some space there, then continue with --ckpt_path last",
        ExitCode.NO_SPACE,
    )


def between_steps(loops: dict[str, Any], moment: Moment) -> dict[str, Any]:
    """Correct Lightning's saved counters, which a resume takes literally.

    Args:
        loops: the "loops" part of a checkpoint.
        moment: when it was taken.

    Returns:
        A copy in which a batch that was only fetched is not counted, and a validation that was begun is begun anew.
    """
    corrected = copy.deepcopy(loops)
    fit = corrected["fit_loop"]
    if moment is Moment.NEXT_BATCH_READY:
        progress = fit["epoch_loop.batch_progress"]
        progress["is_last_batch"] = False
        for part in ("total", "current"):
            progress[part]["ready"] -= 1
    if moment is Moment.INSIDE_VALIDATION:
        for part in ("total", "current"):
            fit["epoch_loop.val_loop.batch_progress"][part] = {
                "ready": 1,
                "started": 1,
                "processed": 0,
                "completed": 0,
            }
    return corrected
