"""What TensorBoard says about the data, and the check that all ranks went through it in equal steps."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.resume import trained_batches
from lightning_modules.callbacks.throughput import log_interval
from lightning_modules.tensorboard import Tag


class DataMonitor(Callback):
    """Log skipped samples and what each dataset of a mixture has given; compare steps at the end of every epoch.

    Counts are those of the whole run, over all ranks and attempts.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at Lightning's interval."""
        if trainer.is_global_zero and trainer.global_step % log_interval(trainer) == 0:
            pl_module.log_dict(data_counts(trainer.datamodule), rank_zero_only=True)  # type: ignore[attr-defined]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ranks with different numbers of steps would wait for each other for ever in the next collective.

        Raises:
            RuntimeError: this program divided the data wrongly.
        """
        steps = trained_batches(trainer.fit_loop)
        total = trainer.strategy.reduce(torch.tensor(steps, device=trainer.strategy.root_device), reduce_op="sum")
        if int(total) != steps * trainer.world_size:
            raise RuntimeError(
                f"rank {trainer.global_rank} has taken {steps} steps since step 0, the {trainer.world_size} ranks "
                f"together {int(total)}: they must take equally many"
            )


def data_counts(datamodule: Any) -> dict[str, float]:
    """Counts by tag; empty for a data module that counts nothing.

    Args:
        datamodule: with skipped_counts() and source_counts(), or any other.
    """
    if not hasattr(datamodule, "skipped_counts"):
        return {}
    skipped, given = datamodule.skipped_counts(), datamodule.source_counts()
    counts: dict[str, float] = {str(Tag.SKIPPED): float(sum(skipped.values()))} if skipped else {}
    counts.update({f"{Tag.SKIPPED}/{kind}": float(number) for kind, number in skipped.items()})
    counts.update({f"{Tag.GIVEN}/{name}": float(number) for name, number in given.items()})
    return counts
