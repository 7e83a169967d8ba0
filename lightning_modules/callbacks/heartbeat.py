"""Note what the training thread is at, for the heartbeat; costs a few microseconds a step."""

import statistics
import time
from collections import deque
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.guards import GuardConfig, Guards
from lightning_modules.heartbeat import Note, Phase

_FIRST_STEPS = 3
_MEDIAN_OF = 50
_STEPS_IN_LIMIT = 20
_SETUP_SILENCES = 6
_LOADER_GRACE_S = 30.0
_SLOW: tuple[Phase, ...] = ("setup", "checkpoint", "evaluation")


class Heartbeat(Checkpoint):
    """Tell the guards every phase of the training, and how long it may take.

    A Checkpoint only by class: Lightning runs those after all other callbacks, so that a save belongs to the phase
    before the one noted here. Put it behind the callback that saves.

    Args:
        guards: of this process.
    """

    def __init__(self, guards: Guards) -> None:
        self._guards = guards
        self._steps_s: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._num_batches = 0
        self._place = 0
        self._ended_s: float | None = None
        self._loader_s: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Form the group; the launcher and the process group are up."""
        if trainer.state.fn == "fit":
            self._guards.join(trainer.strategy.broadcast(self._guards.identity), trainer.world_size)
            self._note(trainer, "setup")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first batch is next."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._loader_s = getattr(data, "timeout_s", None) if getattr(data, "num_workers", 0) else None
        self._guards.pulse.loading = getattr(trainer.train_dataloader, "loading", str)
        self._guards.has_begun = True
        self._note(trainer, "fetch")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch is here."""
        self._place += 1
        self._note(trainer, "forward", _samples(batch))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The loss is known."""
        self._note(trainer, "backward", self._guards.pulse.note.detail)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The gradients are known."""
        self._note(trainer, "optimizer", self._guards.pulse.note.detail)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The next batch is next."""
        self._num_batches += 1
        now_s = time.monotonic()
        if self._ended_s is not None:
            self._steps_s.append(now_s - self._ended_s)
            self._measure(trainer, batch)
        self._ended_s = now_s
        self._note(trainer, "fetch")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A save begins; the phase after it ends it."""
        self._note(trainer, "checkpoint")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An evaluation begins; its duration is no step's."""
        self._ended_s = None
        self._place += 1
        self._note(trainer, "evaluation")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A sign of life."""
        self._place += 1
        self._note(trainer, "evaluation", f"batch {batch_idx}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training goes on."""
        self._note(trainer, "fetch")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows is written and evaluated at leisure."""
        self._note(trainer, "evaluation")

    def _note(self, trainer: Trainer, phase: Phase, detail: str = "") -> None:
        is_new = self._num_batches < _FIRST_STEPS  # compiling, tuning, filling caches
        self._guards.pulse.note = Note(
            phase=phase,
            limit_s=limit_s(self._guards.config, phase, is_new, self._guards.pulse.step_s, self._loader_s),
            silence_s=self._guards.config.silence_s * (_SETUP_SILENCES if is_new else 1),
            place=self._place,
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            detail=detail,
        )

    def _measure(self, trainer: Trainer, batch: Any) -> None:
        pulse = self._guards.pulse
        pulse.step_s = statistics.median(self._steps_s)
        images = batch.get("image") if isinstance(batch, dict) else None
        if images is not None and pulse.step_s > 0:
            pulse.images_per_s = len(images) * trainer.world_size / pulse.step_s


def limit_s(config: GuardConfig, phase: Phase, is_new: bool, step_s: float, loader_s: float | None) -> float | None:
    """How long a phase may take before the rank counts as hanging.

    Args:
        config: the limits.
        phase: what it is.
        is_new: whether these are the first steps of the process.
        step_s: median duration of a step; 0 while unknown.
        loader_s: seconds after which the data loader itself names a hung worker, which it does better; 0 for never,
            None where the training thread loads.

    Returns:
        Seconds; None for any time.
    """
    if not config.hang_timeout_s:
        return None
    limit = config.slow_timeout_s if is_new or phase in _SLOW else 0.0
    limit = max(limit, config.hang_timeout_s, _STEPS_IN_LIMIT * step_s)
    if phase != "fetch" or loader_s is None:
        return limit
    return max(limit, loader_s + _LOADER_GRACE_S) if loader_s else None


def _samples(batch: Any) -> str:
    """The first samples of a batch, for a message; nothing where reading them would wait for a GPU."""
    ids = batch.get("id") if isinstance(batch, dict) else None
    if ids is None or ids.device.type != "cpu":
        return ""
    shown = ", ".join(str(int(i)) for i in ids[:3])
    return f"samples {shown}{', …' if len(ids) > 3 else ''}"
