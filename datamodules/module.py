"""The data module of image classification."""

from __future__ import annotations

from typing import Any

from datamodules.base_module import PackedDataModule
from datamodules.opening import MixtureSource
from datamodules.tasks import CLASSIFICATION
from datamodules.transforms import EvalTransform, TrainTransform

IMAGENET_TRAIN = TrainTransform()
IMAGENET_EVAL = EvalTransform()


class ClassificationDataModule(PackedDataModule):
    """Image classification from a folder of indexed shards.

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
        train_transform: TrainTransform = IMAGENET_TRAIN,
        eval_transform: EvalTransform = IMAGENET_EVAL,
        **options: Any,
    ) -> None:
        super().__init__(CLASSIFICATION, path, train_transform, eval_transform, batch_size=batch_size, **options)
