"""Write what `mirrorla predict` found: one CSV row per image, best class first."""

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.commit import commit_text

_log = logging.getLogger("mirrorla")

Row = tuple[int, list[int], list[float]]
"""Sample id, its best classes and their probabilities."""


def as_csv(rows: Sequence[Row], class_names: Sequence[str]) -> str:
    """Rows as text, in the order of their ids, each id once.

    Args:
        rows: from all ranks, in any order.
        class_names: by class id.

    Returns:
        A header `id,class_1,score_1,…` and one line per image.
    """
    ordered = sorted({row[0]: row for row in rows}.values())
    width = len(ordered[0][1]) if ordered else 0
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", *(f"{column}_{place + 1}" for place in range(width) for column in ("class", "score"))])
    for sample, classes, scores in ordered:
        cells = ((class_names[c], f"{s:.6f}") for c, s in zip(classes, scores, strict=True))
        writer.writerow([sample, *(cell for pair in cells for cell in pair)])
    return text.getvalue()


class WritePredictions(Callback):
    """Collect the predictions of all ranks and commit predictions.csv.

    Args:
        path: the file to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Row] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows of real samples."""
        real = outputs["weight"] > 0
        columns = (outputs[name][real].tolist() for name in ("id", "classes", "scores"))
        self._rows.extend(zip(*columns, strict=True))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather once, write on rank 0."""
        rows = [self._rows]
        if trainer.world_size > 1:
            rows = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(rows, self._rows)
        if trainer.is_global_zero:
            text = as_csv([row for part in rows for row in part], trainer.datamodule.class_names)  # type: ignore[attr-defined]
            commit_text(self._path, text)
            _log.info("predictions    %s (%d images)", self._path, text.count("\n") - 1)
