"""A split as a map-style dataset: one batch request in, its decoded and transformed samples out."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from datamodules.decode import IMAGE_EXTENSIONS, decode_image, parse_label
from datamodules.index import ShardIndex
from datamodules.reader import ShardReader
from datamodules.transforms import EvalTransform, Pipeline, TrainTransform, eval_pipeline, seeded, train_pipeline
from datamodules.types import PADDING_ID, BatchRequest, ClassificationSample, CorruptSampleError, DataError

_FIELDS = frozenset({*IMAGE_EXTENSIONS, "cls"})


class ClassificationDataset(Dataset[ClassificationSample]):
    """Reads, checks, decodes and transforms samples; holds no position, so any worker can serve any request.

    Args:
        index: the split's index.
        transform: a TrainTransform (randomised per sample) or an EvalTransform.
        num_classes: labels must be below it.
        seed: of the augmentation.
    """

    def __init__(
        self, index: ShardIndex, transform: TrainTransform | EvalTransform, num_classes: int, seed: int = 0
    ) -> None:
        self.index = index
        self.transform = transform
        self.num_classes = num_classes
        self.seed = seed
        self._reader = ShardReader(index)
        self._pipeline = _build(transform)

    def __reduce__(self) -> tuple[Any, ...]:
        return ClassificationDataset, (self.index, self.transform, self.num_classes, self.seed)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, sample: int) -> ClassificationSample:
        return self.load(sample)

    def __getitems__(self, request: BatchRequest) -> list[ClassificationSample] | DataError:
        """Serve one request of a sampler, or return what is wrong; DataLoader calls this instead of __getitem__."""
        slots = zip(request.ids.tolist(), request.repeats.tolist(), request.weights.tolist(), strict=True)
        try:
            return [self.load(sample, request.epoch, repeat, weight) for sample, repeat, weight in slots]
        except DataError as error:
            return error

    def load(self, sample: int, epoch: int = 0, repeat: int = 0, weight: float = 1.0) -> ClassificationSample:
        """One sample, ready to be collated.

        Args:
            sample: id within the split; -1 gives a zero image for padding.
            epoch: pass over the data.
            repeat: which copy of the sample.
            weight: handed through.

        Raises:
            CorruptSampleError: the bytes are not the indexed ones, or are no image, or the label is no class.
        """
        if sample == PADDING_ID:
            size = self.transform.image_size
            return ClassificationSample(torch.zeros(3, size, size), 0, 0.0, PADDING_ID)
        raw = self._reader.read(sample, _FIELDS)
        label = parse_label(raw.fields["cls"], len(raw.fields["cls"]), raw.where)
        if label >= self.num_classes:
            raise CorruptSampleError(f"{raw.where}: label {label} is not below the {self.num_classes} classes")
        data = next(raw.fields[extension] for extension in IMAGE_EXTENSIONS if extension in raw.fields)
        image = decode_image(data, raw.where)
        if isinstance(self.transform, EvalTransform):
            return ClassificationSample(self._pipeline(image), label, weight, sample)
        with seeded(self.seed, epoch, sample, repeat):
            return ClassificationSample(self._pipeline(image), label, weight, sample)


def _build(transform: TrainTransform | EvalTransform) -> Pipeline:
    return eval_pipeline(transform) if isinstance(transform, EvalTransform) else train_pipeline(transform)
