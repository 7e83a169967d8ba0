"""Keeps the data ledger of a training, see datamodules.ledger; a debugging aid."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.ledger import Ledger, ledger_file, next_attempt
from datamodules.resume import trained_batches


class KeepLedger(Callback):
    """Append every trained batch of this rank to its ledger file, before any checkpoint of that batch is written.

    Args:
        folder: of the ledger, seen by all ranks; made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ledger: Ledger | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this attempt's file; rank 0 numbers the attempt for all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        attempt = next_attempt(path.name for path in self._folder.iterdir())
        attempt = trainer.strategy.broadcast(attempt)
        self._ledger = Ledger(ledger_file(self._folder, attempt, trainer.global_rank))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the batch down."""
        if self._ledger is not None and outputs is not None:
            step = trained_batches(trainer.fit_loop) - 1
            self._ledger.append(step, trainer.current_epoch, batch["id"].tolist(), float(outputs["loss"]))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None
