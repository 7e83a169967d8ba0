"""Skip a step whose loss or gradient is not finite, on all ranks; after several in a row go back to a checkpoint."""

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.attempts import note_skip, read_attempts
from lightning_modules.callbacks.checkpointing import RunCheckpoints
from lightning_modules.callbacks.step_seed import step_seed
from lightning_modules.checkpoint import list_checkpoints, step_of
from lightning_modules.ema import ExponentialAverage
from lightning_modules.environment import redact
from lightning_modules.exit_codes import ExitCode, GuardStop
from lightning_modules.guards import GuardConfig, RolledBack
from lightning_modules.numeric_guard import Streak, count_rollbacks, good_step, not_finite, plain, tensor_norms
from lightning_modules.run_directory import RunDirectory
from lightning_modules.tensorboard import Tag

_log = logging.getLogger("mirrorla")


class NumericGuard(Callback):
    """Keep what is not finite out of the weights.

    A skipped step counts as a step: data, schedule and counters go on; weights, the optimizer's moments, the average
    and running statistics such as BatchNorm's stay as they were, bit for bit. All ranks skip together: one flag per
    optimizer step is combined over them, and read, which waits for the backward pass.

    Under a gradient scaler (fp16) gradients overflow as a matter of course; it skips such steps by itself, and they
    are counted only if the loss was not finite. A strategy that keeps the gradients to itself (DeepSpeed) cannot skip:
    there the first such loss goes back to the checkpoint.

    Args:
        run: where checkpoints are and bundles go.
        config: how many steps in a row may be skipped, and how many times the run may go back.
        seed: the run's, for the bundle.
        config_text: the resolved configuration, for the bundle.
        checkpoints: what saves; a save under way may be the one to go back to.
    """

    def __init__(
        self, run: RunDirectory, config: GuardConfig, seed: int, config_text: str, checkpoints: RunCheckpoints
    ) -> None:
        self._run = run
        self._checkpoints = checkpoints
        self._config = config
        self._seed = seed
        self._config_text = redact(config_text)
        self._streak = Streak()
        self._losses: list[Tensor] = []
        self._batches: list[tuple[int, Tensor | None]] = []  # number and sample ids; no images, which are large
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._thaw: list[Callable[[], None]] = []

    def state_dict(self) -> dict[str, Any]:
        """The streak travels with the checkpoint."""
        return {"in_a_row": self._streak.in_a_row, "total": self._streak.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._streak = Streak(int(state_dict["in_a_row"]), int(state_dict["total"]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room for a copy of the running statistics, which are a few kilobytes a layer."""
        self._statistics = [(buffer, buffer.clone()) for buffer in _buffers(pl_module)]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what the optimizer step will be made from."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._losses, self._batches = [], []
            for buffer, copy in self._statistics:
                copy.copy_(buffer)
        self._batches.append((batch_idx, batch.get("id") if isinstance(batch, dict) else None))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss; nothing is computed yet."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the step, and skip it or end the attempt if it must not be taken.

        Raises:
            GuardStop: too many steps in a row were skipped; a bundle tells of the last one.
        """
        bad_loss, bad_gradient = self._combined(trainer, optimizer)
        counts = bad_loss or (bad_gradient and not _has_scaler(trainer))
        self._streak = self._streak.after(not counts)
        self._checkpoints.is_held = self._streak.in_a_row > 0
        if not counts:
            return
        what = "loss" if bad_loss else "gradient"
        if trainer.is_global_zero:
            with contextlib.suppress(OSError):  # a full disk is no reason to leave the other ranks alone
                note_skip(self._run.root, trainer.global_step, what)
        if self._streak.in_a_row > self._config.max_skips or _keeps_gradients(trainer):
            with contextlib.suppress(OSError):
                self._write_bundle(trainer, pl_module)
            self._go_back(trainer, what)
        self._skip(trainer, pl_module, optimizer, what)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the average go on; log how many steps were skipped, once there are any."""
        while self._thaw:
            self._thaw.pop()()
        if self._streak.total:
            pl_module.log(Tag.SKIPPED_STEPS, float(self._streak.total), rank_zero_only=True)

    def _combined(self, trainer: Trainer, optimizer: Optimizer) -> tuple[bool, bool]:
        """Whether the loss, or a gradient, of any rank is not finite: one small message and one read per step."""
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flags = torch.stack([not_finite(self._losses), not_finite(gradients).to(self._losses[0].device)])
        if trainer.world_size > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        bad_loss, bad_gradient = flags.tolist()
        return bool(bad_loss), bool(bad_gradient)

    def _skip(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer, what: str) -> None:
        if not _has_scaler(trainer):
            optimizer.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient
        for buffer, copy in self._statistics:
            buffer.copy_(copy)
        self._thaw = [_freeze(part) for part in module.modules() if isinstance(part, ExponentialAverage)]
        if trainer.is_global_zero:
            _log.warning(
                "skipped step   %d: the %s was not finite (%d in a row, at most %d)",
                trainer.global_step,
                what,
                self._streak.in_a_row,
                self._config.max_skips,
            )

    def _go_back(self, trainer: Trainer, what: str) -> NoReturn:
        with contextlib.suppress(GuardStop):  # a save that failed is none to go back to
            self._checkpoints.wait(trainer)
        taken = [step_of(path) for path in list_checkpoints(self._run.checkpoints)]
        target = good_step(taken, trainer.global_step, self._streak.in_a_row)
        done = count_rollbacks(read_attempts(self._run.root), target)
        target, done = trainer.strategy.broadcast((target, done))  # rank 0's: a file may be written meanwhile
        streak, bundle = self._streak.in_a_row, self._bundle(trainer)
        steps = "1 step" if streak == 1 else f"{streak} steps"
        told = f"the {what} was not finite for {steps} in a row up to step {trainer.global_step}; see {bundle}; "
        if done >= self._config.max_rollbacks:
            raise GuardStop(
                f"{told}going back to step {target} did not help {done} times: "
                "lower model.optim.lr, or look at the data",
                ExitCode.NOT_FINITE,
            )
        raise RolledBack(f"{told}continue from step {target} with --ckpt_path last", target)

    def _write_bundle(self, trainer: Trainer, module: LightningModule) -> None:
        """What is needed to repeat the step, a file per rank; small: no weights, no images."""
        folder = self._bundle(trainer)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        rank, epoch = trainer.global_rank, trainer.current_epoch
        terms = {name: plain(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        record = {
            "step": trainer.global_step,
            "epoch": epoch,
            "rank": rank,
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "batches": [
                {
                    "batch_idx": index,
                    "seed": step_seed(self._seed, epoch, index, rank),
                    "ids": None if ids is None else ids.tolist(),
                }
                for index, ids in self._batches
            ],
            "losses": [plain(loss) for loss in self._losses],
            "last_logged": terms,
            "norms": tensor_norms(module),
        }
        (folder / f"rank_{rank:05d}.json").write_text(json.dumps(record, indent=1) + "\n")
        if trainer.is_global_zero:
            (folder / "config.yaml").write_text(self._config_text)

    def _bundle(self, trainer: Trainer) -> Path:
        return self._run.root / "bundles" / f"step_{trainer.global_step:08d}"


def _buffers(module: LightningModule) -> list[Tensor]:
    """Buffers that a forward pass in training may change: those of the trained network, not of its average."""
    averages = [part for part in module.modules() if isinstance(part, ExponentialAverage)]
    averaged = {id(buffer) for average in averages for buffer in average.buffers()}
    return [buffer for buffer in module.buffers() if id(buffer) not in averaged]


def _freeze(average: ExponentialAverage) -> Callable[[], None]:
    """Let the next update change nothing; returns what ends that."""
    decay, least = average.decay, average.min_decay
    average.decay = average.min_decay = 1.0

    def thaw() -> None:
        average.decay, average.min_decay = decay, least

    return thaw


def _has_scaler(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _keeps_gradients(trainer: Trainer) -> bool:
    return bool(trainer.strategy.handles_gradient_accumulation)
