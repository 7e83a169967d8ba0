"""Write what `mirrorla predict` finds, image by image: memory does not grow, and every rank writes its own images."""

import logging
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.output_names import OutputNames
from lightning_modules.part_files import MergedParts, PartFile
from lightning_modules.prediction_output import RECORDERS, Output
from lightning_modules.run_directory import RunDirectory

_log = logging.getLogger("mirrorla")


class WritePredictions(Callback):
    """Write pictures as they come, and at the end, on rank 0, what is made of all predictions.

    Args:
        run: the run directory, shared by all ranks.
        task: classification, detection or segmentation.
    """

    def __init__(self, run: RunDirectory, task: str) -> None:
        self._run = run
        self._recorder = RECORDERS[task]()
        self._output: Output | None = None
        self._part: PartFile | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the files, open this rank's records."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loader: Any = trainer.predict_dataloaders
        names = OutputNames(map(data.image_name, range(loader.batch_sampler.num_samples)))
        self._output = Output(self._run.root, data, _class_names(pl_module), names)
        self._output.folder.mkdir(exist_ok=True)
        self._part = PartFile(self._output.folder, trainer.global_rank)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the real samples of a batch."""
        assert self._output is not None and self._part is not None
        rows = {**outputs, "image_id": _image_ids(batch, trainer.datamodule)}  # type: ignore[attr-defined]
        for place, (sample, weight) in enumerate(zip(outputs["id"].tolist(), outputs["weight"].tolist(), strict=True)):
            if weight > 0:
                self._part.add(sample, self._recorder.record(self._output, sample, rows, place))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for all ranks, merge their records on rank 0."""
        assert self._output is not None and self._part is not None
        self._part.close()
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        with MergedParts(self._output.folder, trainer.world_size) as records:
            paths = self._recorder.finish(self._output, records)
        _remove_if_empty(self._output)
        for path in paths:
            _log.info("predictions    %s (%d images)", path, records.count)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close this rank's records; the next attempt writes them anew."""
        if self._part is not None:
            self._part.close()


def _class_names(module: LightningModule) -> list[str]:
    """The checkpoint's or the data's names; numbers for a checkpoint that knows none."""
    known: list[str] = getattr(module, "class_names", None) or []
    return known or [str(number) for number in range(int(module.num_classes))]  # type: ignore[arg-type]


def _image_ids(batch: Any, data: Any) -> list[int]:
    """COCO's numbers of a detection batch's images: the dataset's own, which in a mixture could repeat."""
    if "target" not in batch or data.opened.is_mixture:
        return [int(sample) for sample in batch["id"]]
    return [int(target["image_id"]) for target in batch["target"]]


def _remove_if_empty(output: Output) -> None:
    """A classifier leaves no pictures, so it needs no folder."""
    entries: Iterator[Any] = output.folder.iterdir()
    if next(entries, None) is None:
        output.folder.rmdir()
