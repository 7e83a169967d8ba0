"""When a run is saved, what is kept, which one is best.

A checkpoint is taken only after an optimizer step, under checkpoints/step_<step>.ckpt. best.json beside it ranks the
evaluated ones; the newest and the best ranked stay, the others are removed.
"""

import copy
import logging
import math
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_modules.checkpoint import (
    Score,
    list_checkpoints,
    rank_scores,
    read_scores,
    step_file,
    step_of,
    write_scores,
)
from lightning_modules.commit import sweep

_log = logging.getLogger("mirrorla")


@dataclass(frozen=True)
class CheckpointConfig:
    """How often to save and how much to keep.

    Attributes:
        every_n_epochs: save at the end of every n-th epoch; 0 = not by epochs.
        every_n_steps: also save after every n-th optimizer step; 0 = not by steps.
        every_n_minutes: also save when this much time has passed since the last one; 0 = not by the clock.
        keep_last: newest checkpoints that stay; 2 leave one to fall back on.
        keep_best: best ranked checkpoints that stay.
        monitor: metric of the ranking.
        mode: whether its maximum or its minimum is best.
    """

    every_n_epochs: int = 1
    every_n_steps: int = 0
    every_n_minutes: float = 0.0
    keep_last: int = 2
    keep_best: int = 1
    monitor: str = "val/top1"
    mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        """Refuse negative intervals and a run that keeps nothing.

        Raises:
            ValueError: naming the field and its value.
        """
        for name in ("every_n_epochs", "every_n_steps", "every_n_minutes", "keep_best"):
            if getattr(self, name) < 0:
                raise ValueError(f"checkpoint.{name} {getattr(self, name)} must be 0 or above; 0 turns it off")
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last {self.keep_last} must be 1 or above")


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
        folder: the run's checkpoint folder.
        config: intervals and retention.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self._folder = folder
        self._config = config
        self._scores: list[Score] = []
        self._seen_step = -1
        self._saved_step = -1
        self._saved_at_s = time.monotonic()
        self._is_due = False
        self._moment = Moment.AS_COUNTED

    def save(self, trainer: Trainer, moment: Moment) -> Path:
        """Commit the state after the last optimizer step, unless this attempt already did."""
        path = step_file(self._folder, trainer.global_step)
        if self._saved_step != trainer.global_step:
            self._moment = moment
            trainer.save_checkpoint(path)
            self._saved_step = trainer.global_step
            for logger in trainer.loggers:
                logger.save()
        self._saved_at_s = time.monotonic()
        self._is_due = False
        self._prune(trainer)
        return path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tidy up after an interrupted attempt; set aside checkpoints beyond the step training starts from."""
        self._seen_step = trainer.global_step
        self._saved_at_s = time.monotonic()
        if trainer.is_global_zero:
            sweep(self._folder)
            _set_aside_later(self._folder, trainer.global_step)
        trainer.strategy.barrier("checkpoints_tidied")
        files = {path.name for path in list_checkpoints(self._folder)}
        self._scores = [s for s in read_scores(self._folder) if step_file(self._folder, s.step).name in files]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save what became due with the step before."""
        if self._is_due:
            self.save(trainer, Moment.NEXT_BATCH_READY)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether a checkpoint is due; a training that ends inside an epoch is saved here."""
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
        if self._is_due and not trainer.is_last_batch:
            self.save(trainer, Moment.AS_COUNTED)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of the epoch when due, and always at the end of the training."""
        every = self._config.every_n_epochs
        by_epoch = every > 0 and (trainer.current_epoch + 1) % every == 0
        is_end = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if trainer.global_step != self._saved_step and (self._is_due or by_epoch or is_end):
            self.save(trainer, Moment.AS_COUNTED)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the loops' counters as they are between two steps."""
        checkpoint["loops"] = between_steps(checkpoint["loops"], self._moment)

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

    def _prune(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        if self._scores:
            write_scores(self._folder, self._config.monitor, self._scores)
        ranked = {score.step for score in self._scores}
        for path in list_checkpoints(self._folder)[: -self._config.keep_last]:
            if step_of(path) not in ranked:
                path.unlink(missing_ok=True)


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


def _set_aside_later(folder: Path, step: int) -> None:
    """Rename checkpoints beyond `step`: they belong to a continuation that this training replaces."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            path.rename(path.with_suffix(".ckpt.superseded"))
            _log.info("set aside      %s (training starts again from step %d)", path.name, step)
