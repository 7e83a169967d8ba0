"""The data module of detection and instance segmentation."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import numpy as np

from datamodules.base_module import PackedDataModule
from datamodules.grouping import Grouping
from datamodules.index import NO_VALUE, SQUARE
from datamodules.opening import MixtureSource
from datamodules.order import check_at_least
from datamodules.resume import GuardField
from datamodules.tasks import detection
from datamodules.transforms_detection import DetectionEvalTransform, DetectionTrainTransform

COCO_TRAIN = DetectionTrainTransform()
COCO_EVAL = DetectionEvalTransform()

_log = logging.getLogger("mirrorla")


class DetectionDataModule(PackedDataModule):
    """Boxes, and masks where the dataset has them, from a folder of indexed shards.

    The order of samples depends on seed, lanes, window, batch_size, repeats, group_batches and the dataset, not on the
    number of ranks or workers. A resumed run goes on with the sample after the last one trained on.

    Args:
        path: folder or URL of dataset.json and train/, val/ and perhaps test/ shards; or a list of {path, weight} to
            mix: every batch then holds each dataset's share by weight, in whole samples. Evaluation takes all. Predict
            also takes a plain folder of images.
        batch_size: samples in one forward pass over all ranks together.
        train_transform: training augmentation.
        eval_transform: evaluation transform.
        with_masks: decode the masks of a dataset that has them; false saves the time where a model has no use for them.
        group_batches: wide images are kept apart from tall ones within so many consecutive batches, which saves
            padding; 1 leaves the order as it is. Needs an index that knows the images' shapes, and is without effect
            for tars whose json does not begin with them.
        options: see PackedDataModule.
    """

    guarded: ClassVar[tuple[GuardField, ...]] = (*PackedDataModule.guarded, "group_batches")

    def __init__(
        self,
        path: str | list[MixtureSource],
        batch_size: int = 256,
        *,
        train_transform: DetectionTrainTransform = COCO_TRAIN,
        eval_transform: DetectionEvalTransform = COCO_EVAL,
        with_masks: bool = True,
        group_batches: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(detection(with_masks), path, train_transform, eval_transform, batch_size=batch_size, **options)
        self.group_batches = group_batches

    def setup(self, stage: str) -> None:
        """Check the settings and open the splits of a stage: "fit", "validate", "test" or "predict"."""
        check_at_least(1, group_batches=self.group_batches)
        super().setup(stage)

    def _grouping(self) -> Grouping | None:
        if self.group_batches == 1:
            return None
        aspects = np.concatenate([index.aspects() for index in self.opened.split("train")])
        if unknown := int((aspects == NO_VALUE).sum()):
            _log.warning(
                "data.group_batches: the index does not know the shape of %d of %d images, which count as tall; "
                "`mirrorla shards index` finds them where a json begins with width and height",
                unknown,
                len(aspects),
            )
        return Grouping((aspects >= SQUARE).astype(np.int64), self.group_batches)
