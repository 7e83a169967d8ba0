"""What a resumed run may not change, and Lightning's restored counters put into a state that it resumes from exactly.

Written for Lightning 2.6, whose fit loop loses count in three cases: a checkpoint written at the last batch of an epoch
leaves its epoch counter one behind, so that the next resume repeats part of an epoch; with max_steps and no validation
due, a checkpoint of an epoch's end makes that epoch one batch longer; and one written while a batch was being trained
counts that batch as begun for ever. The samples would still be right (the stream follows the number of trained
batches), but epochs, and so validation and epoch-wise schedules, would shift.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

from datamodules.types import DataError

_log = logging.getLogger("mirrorla")

GuardField = Literal["seed", "lanes", "window", "batch_size", "repeats", "group_batches", "dataset_digest"]
"""What a checkpoint's position depends on and a user may change on purpose; the order's version is not among them."""


def changed_fields(
    then: Mapping[str, int | str], now: Mapping[str, int | str], allowed: Collection[GuardField]
) -> list[str]:
    """Compare the guard of a checkpoint with that of this run.

    Where a change is allowed, the position keeps its meaning as a number of global batches: the stream goes on at that
    batch of the new order. Samples of the pass under way then come twice or not at all; later passes are exact.

    Args:
        then: the checkpoint's guard.
        now: this run's.
        allowed: fields that may differ.

    Returns:
        The fields that differ.

    Raises:
        DataError: naming a field that differs and is not allowed to, with the flag that allows it.
    """
    changed = [name for name in now if then.get(name) != now[name]]
    for name in changed:
        if name not in allowed:
            raise DataError(
                f"the checkpoint was written with data.{name} {then.get(name)}, this run has {now[name]}; {_mend(name)}"
            )
    return changed


def _mend(name: str) -> str:
    if name not in get_args(GuardField):
        return "resume with the version of this program that wrote it, or start a new run"
    return (
        f"resume with the same value, or allow the change with --data.allow_changed '[{name}]': "
        "samples of the epoch under way then come twice or not at all"
    )


class Progress:
    """Where the training stream of a data module stands, in global batches since step 0.

    Attributes:
        restored: a checkpoint's {"committed", "guard"}, until the trainer has taken over its count.
    """

    def __init__(self) -> None:
        self.restored: dict[str, Any] | None = None

    def hand_over(
        self, trainer: Any, guard: Mapping[str, int | str], allowed: Collection[GuardField], num_batches: int
    ) -> None:
        """Refuse a checkpoint of another order, whose position would mean other samples; then let the trainer count.

        Args:
            trainer: Lightning's; None leaves the count with the checkpoint.
            guard: what this run's order depends on.
            allowed: see changed_fields.
            num_batches: of an epoch.

        Raises:
            DataError: a checkpoint of another order, or one that was altered.
        """
        if self.restored is None:
            return
        if changed := changed_fields(self.restored["guard"], guard, allowed):
            names = ", ".join(f"data.{name}" for name in changed)
            _log.warning("%s changed, as allowed: samples of the epoch under way come twice or not at all", names)
        if trainer is None:
            return
        if (committed := int(self.restored["committed"])) != self.committed(trainer):
            raise DataError(
                f"the checkpoint's data position is batch {committed}, its training loop's {self.committed(trainer)}; "
                "it was altered, resume from another one"
            )
        align_counters(trainer.fit_loop, epoch_batches(num_batches, trainer.limit_train_batches))
        self.restored = None

    def committed(self, trainer: Any) -> int:
        """Global batches the trainer has finished since step 0; while it has not trained, what was last loaded."""
        trained = 0 if trainer is None else trained_batches(trainer.fit_loop)
        if trained or (trainer is not None and trainer.state.fn == "fit"):
            return trained
        return int(self.restored["committed"]) if self.restored else 0

    def position(self, trainer: Any) -> int | None:
        """Where the training stream must be now; None without a trainer: go on."""
        if trainer is None:
            return None
        overfit = getattr(trainer, "overfit_batches", 0) > 0  # asks for the same batches in every epoch
        return 0 if overfit else self.committed(trainer)


def trained_batches(fit_loop: Any) -> int:
    """Batches that Lightning's fit loop has finished since step 0, over all epochs and attempts."""
    return int(fit_loop.epoch_loop.batch_progress.total.processed)


def epoch_batches(length: int, limit: int | float) -> int:
    """Batches of one of the trainer's epochs, from a loader's length and Trainer(limit_train_batches=…)."""
    return min(length, limit) if isinstance(limit, int) else int(length * limit)


def align_counters(fit_loop: Any, num_batches: int) -> None:
    """Repair the counters of a restored fit loop; call it before the loop starts.

    Args:
        fit_loop: Lightning's, just restored from a checkpoint.
        num_batches: of an epoch, see epoch_batches.
    """
    batches = fit_loop.epoch_loop.batch_progress
    for counts in (batches.total, batches.current):  # a batch begun and not finished was never trained on
        counts.ready = counts.started = counts.processed
    validation = fit_loop.epoch_loop.val_loop.batch_progress.total
    # A validation that a stop interrupted belongs to this epoch still: Lightning repeats it.
    if batches.current.processed >= num_batches and validation.processed == validation.started:
        _begin_next_epoch(fit_loop)


def _begin_next_epoch(fit_loop: Any) -> None:
    """From any state at an epoch's end to the one just before the next epoch's first hook."""
    epochs, epoch_loop = fit_loop.epoch_progress, fit_loop.epoch_loop
    for counts in (epochs.total, epochs.current):
        counts.ready = counts.processed = counts.completed = counts.started
    batches = epoch_loop.batch_progress
    batches.total.completed = batches.total.processed
    epoch_loop._batches_that_stepped = epoch_loop.global_step  # the loggers' step axis
    for loop in (fit_loop, epoch_loop, epoch_loop.val_loop, epoch_loop.automatic_optimization):
        loop._restarting = False  # the property would answer True whenever max_steps is set
