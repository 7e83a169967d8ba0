"""The data module of semantic segmentation."""

from __future__ import annotations

from typing import Any

from datamodules.base_module import PackedDataModule
from datamodules.opening import MixtureSource
from datamodules.tasks import SEGMENTATION
from datamodules.transforms_segmentation import SegmentationEvalTransform, SegmentationTrainTransform

ADE20K_TRAIN = SegmentationTrainTransform()
ADE20K_EVAL = SegmentationEvalTransform()


class SegmentationDataModule(PackedDataModule):
    """Class maps from a folder of indexed shards.

    The order of samples depends on seed, lanes, window, batch_size, repeats and the dataset, not on the number of ranks
    or workers. A resumed run goes on with the sample after the last one trained on.

    Args:
        path: folder or URL of dataset.json and train/, val/ and perhaps test/ shards; or a list of {path, weight} to
            mix: every batch then holds each dataset's share by weight, in whole samples. Evaluation takes all. Predict
            also takes a plain folder of images.
        batch_size: samples in one forward pass over all ranks together.
        train_transform: training augmentation.
        eval_transform: evaluation transform.
        options: see PackedDataModule.
    """

    def __init__(
        self,
        path: str | list[MixtureSource],
        batch_size: int = 256,
        *,
        train_transform: SegmentationTrainTransform = ADE20K_TRAIN,
        eval_transform: SegmentationEvalTransform = ADE20K_EVAL,
        **options: Any,
    ) -> None:
        super().__init__(SEGMENTATION, path, train_transform, eval_transform, batch_size=batch_size, **options)
