"""A split as a map-style dataset: one batch request in, its decoded and transformed samples out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import Dataset

from datamodules.decode import IMAGE_EXTENSIONS, decode_image, parse_label
from datamodules.index import ShardIndex
from datamodules.reader import ShardReader
from datamodules.transforms import EvalTransform, Pipeline, TrainTransform, eval_pipeline, seeded, train_pipeline
from datamodules.types import PADDING_ID, BatchRequest, ClassificationSample, CorruptSampleError, DataError, Fault
from datamodules.worker import memory_message, note, note_idle

_FIELDS = frozenset({*IMAGE_EXTENSIONS, "cls"})


class ClassificationDataset(Dataset[ClassificationSample]):
    """Reads, checks, decodes and transforms samples; holds no position, so any worker can serve any request.

    Args:
        index: the split's index.
        transform: a TrainTransform (randomised per sample) or an EvalTransform.
        num_classes: labels must be below it.
        seed: of the augmentation.
        skips: give a zero image of weight 0 for a bad sample instead of an error.
    """

    def __init__(
        self,
        index: ShardIndex,
        transform: TrainTransform | EvalTransform,
        num_classes: int,
        seed: int = 0,
        skips: bool = False,
    ) -> None:
        self.index = index
        self.transform = transform
        self.num_classes = num_classes
        self.seed = seed
        self.skips = skips
        self._reader = ShardReader(index)
        self._pipeline = _build(transform)

    def __reduce__(self) -> tuple[Any, ...]:
        return ClassificationDataset, (self.index, self.transform, self.num_classes, self.seed, self.skips)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, sample: int) -> ClassificationSample:
        return self.serve(sample)

    def __getitems__(self, request: BatchRequest) -> list[ClassificationSample] | DataError:
        """Serve one request of a sampler, or return what is wrong; DataLoader calls this instead of __getitem__."""
        return serve_all(self, request)

    def where(self, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        location = self.index.locate(sample)
        return f"{self.index.folder / self.index.shard_names[location.shard]}, sample {location.key!r}"

    def serve(self, sample: int, epoch: int = 0, repeat: int = 0, weight: float = 1.0) -> ClassificationSample:
        """One sample as `load` gives it; where bad samples are skipped, a blank one with its fault in their place."""
        try:
            return self.load(sample, epoch, repeat, weight)
        except CorruptSampleError as error:
            if not self.skips:
                raise
            return self._blank(sample, Fault(sample, error.kind, str(error)))

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
            return self._blank(PADDING_ID)
        raw = self._reader.read(sample, _FIELDS)
        label = parse_label(raw.fields["cls"], len(raw.fields["cls"]), raw.where)
        if label >= self.num_classes:
            message = f"{raw.where}: label {label} is not below the {self.num_classes} classes"
            raise CorruptSampleError(message, "label")
        data = next(raw.fields[extension] for extension in IMAGE_EXTENSIONS if extension in raw.fields)
        image = decode_image(data, raw.where)
        if isinstance(self.transform, EvalTransform):
            return ClassificationSample(self._pipeline(image), label, weight, sample)
        with seeded(self.seed, epoch, sample, repeat):
            return ClassificationSample(self._pipeline(image), label, weight, sample)

    def _blank(self, sample: int, fault: Fault | None = None) -> ClassificationSample:
        size = self.transform.image_size
        return ClassificationSample(torch.zeros(3, size, size), 0, 0.0, sample, fault)


def serve_all(
    dataset: ClassificationDataset | JoinedDataset, request: BatchRequest
) -> list[ClassificationSample] | DataError:
    """Serve every slot of a request, or return what is wrong; leaves word of every sample for the trainer."""
    sample = PADDING_ID
    try:
        samples = []
        for sample, epoch, repeat, weight in request.slots():
            note(sample)
            samples.append(dataset.serve(sample, epoch, repeat, weight))
        return samples
    except DataError as error:
        return error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):  # torch has no type for it
            raise
        return DataError(memory_message(dataset.where(sample)))
    finally:
        note_idle()


class JoinedDataset(Dataset[ClassificationSample]):
    """Several splits one after the other; sample ids go on from one to the next.

    Args:
        parts: the splits.
    """

    def __init__(self, parts: Sequence[ClassificationDataset]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, sample: int) -> ClassificationSample:
        return self.serve(sample)

    def __getitems__(self, request: BatchRequest) -> list[ClassificationSample] | DataError:
        """Serve one request of a sampler, or return what is wrong."""
        return serve_all(self, request)

    def where(self, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        part, first = self._part(sample)
        return part.where(sample - first)

    def serve(self, sample: int, epoch: int = 0, repeat: int = 0, weight: float = 1.0) -> ClassificationSample:
        """See ClassificationDataset.serve."""
        if sample == PADDING_ID:
            return self.parts[0].serve(sample)
        part, first = self._part(sample)
        served = part.serve(sample - first, epoch, repeat, weight)
        fault = served.fault and served.fault._replace(sample=sample)
        return replace(served, id=sample, fault=fault)

    def _part(self, sample: int) -> tuple[ClassificationDataset, int]:
        """The split that holds a sample, and the id of its first one."""
        number = bisect_right(self._ends, sample)
        return self.parts[number], self._ends[number] - len(self.parts[number])


def _build(transform: TrainTransform | EvalTransform) -> Pipeline:
    return eval_pipeline(transform) if isinstance(transform, EvalTransform) else train_pipeline(transform)
