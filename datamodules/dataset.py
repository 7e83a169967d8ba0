"""A split as a map-style dataset: one batch request in, its decoded and transformed samples out, for every task."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Protocol

from PIL import Image
from torch.utils.data import Dataset

from datamodules.decode import IMAGE_EXTENSIONS, decode_image
from datamodules.reader import RawSample
from datamodules.tasks import Task
from datamodules.transforms import generators_kept, seeded
from datamodules.types import PADDING_ID, BatchRequest, CorruptSampleError, DataError, Fault, LoadedSample
from datamodules.worker import memory_message, note, note_idle


class Reader(Protocol):
    """Where samples come from: a split's shards, or a plain folder, whose images have no annotation beside them."""

    @property
    def is_labelled(self) -> bool:
        """Whether samples have an annotation."""

    def __len__(self) -> int: ...

    def read(self, sample: int, extensions: Collection[str]) -> RawSample:
        """Those of the fields that a sample has."""

    def name(self, sample: int) -> str:
        """Key or file name of a sample."""

    def where(self, sample: int) -> str:
        """The same with its place, for messages."""


class SampleDataset(Dataset[LoadedSample]):
    """Reads, checks, decodes and transforms samples; holds no position, so any worker can serve any request.

    Args:
        reader: of the samples.
        task: how they are understood.
        transform: the task's randomised or its evaluation transform.
        num_classes: that annotations may name.
        seed: of the augmentation.
        skips: give a blank sample of weight 0 for a bad one instead of an error.
    """

    def __init__(
        self, reader: Reader, task: Task, transform: Any, num_classes: int, seed: int = 0, skips: bool = False
    ) -> None:
        self.reader = reader
        self.task = task
        self.transform = transform
        self.num_classes = num_classes
        self.seed = seed
        self.skips = skips
        self._fields = frozenset({*IMAGE_EXTENSIONS, task.annotation})
        self._is_random = isinstance(transform, task.train_transform)
        self._pipeline = (task.train_pipeline if self._is_random else task.eval_pipeline)(transform)

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleDataset, (self.reader, self.task, self.transform, self.num_classes, self.seed, self.skips)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, sample: int) -> LoadedSample:
        return self.serve(sample)

    def __getitems__(self, request: BatchRequest) -> list[LoadedSample] | DataError:
        """Serve one request of a sampler, or return what is wrong; DataLoader calls this instead of __getitem__."""
        return serve_all(self, request)

    def where(self, sample: int) -> str:
        """A sample's place, for messages."""
        return self.reader.where(sample)

    def name(self, sample: int) -> str:
        """A sample's key or file name."""
        return self.reader.name(sample)

    def picture(self, sample: int) -> Image.Image:
        """A sample's image as it is stored, in RGB.

        Raises:
            CorruptSampleError: the bytes are not the indexed ones, or no image.
        """
        return _decoded(self.reader.read(sample, IMAGE_EXTENSIONS))

    def serve(self, sample: int, epoch: int = 0, repeat: int = 0, weight: float = 1.0) -> LoadedSample:
        """One sample as `load` gives it; where bad samples are skipped, a blank one with its fault in their place."""
        try:
            return self.load(sample, epoch, repeat, weight)
        except CorruptSampleError as error:
            if not self.skips:
                raise
            return self._blank(sample, Fault(sample, error.kind, str(error)))

    def load(self, sample: int, epoch: int = 0, repeat: int = 0, weight: float = 1.0) -> LoadedSample:
        """One sample, ready to be collated.

        Args:
            sample: id within the split; -1 gives a blank sample for padding.
            epoch: pass over the data.
            repeat: which copy of the sample.
            weight: handed through.

        Raises:
            CorruptSampleError: the bytes are not the indexed ones, or are no image, or the annotation does not fit.
        """
        if sample == PADDING_ID:
            return self._blank(PADDING_ID)
        raw = self.reader.read(sample, self._fields)
        image = _decoded(raw)
        if self.reader.is_labelled:
            field = raw.fields[self.task.annotation]
            annotation = self.task.parse(field, self.num_classes, image.size, raw.where)
        else:
            annotation = self.task.unlabelled(image.size, sample)
        if not self._is_random:
            return LoadedSample(*self._pipeline(image, annotation), weight, sample)
        with seeded(self.seed, epoch, sample, repeat):
            return LoadedSample(*self._pipeline(image, annotation), weight, sample)

    def _blank(self, sample: int, fault: Fault | None = None) -> LoadedSample:
        return LoadedSample(*self.task.blank(self.transform), 0.0, sample, fault)


def _decoded(raw: RawSample) -> Image.Image:
    data = next(raw.fields[extension] for extension in IMAGE_EXTENSIONS if extension in raw.fields)
    return decode_image(data, raw.where)


def serve_all(dataset: SampleDataset | JoinedDataset, request: BatchRequest) -> list[LoadedSample] | DataError:
    """Serve every slot of a request, or return what is wrong; leaves word of every sample for the trainer."""
    sample = PADDING_ID
    try:
        samples = []
        with generators_kept():
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


class JoinedDataset(Dataset[LoadedSample]):
    """Several splits one after the other; sample ids go on from one to the next.

    Args:
        parts: the splits, of one task.
    """

    def __init__(self, parts: Sequence[SampleDataset]) -> None:
        self.parts = list(parts)
        self.task = self.parts[0].task
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, sample: int) -> LoadedSample:
        return self.serve(sample)

    def __getitems__(self, request: BatchRequest) -> list[LoadedSample] | DataError:
        """Serve one request of a sampler, or return what is wrong."""
        return serve_all(self, request)

    def where(self, sample: int) -> str:
        """A sample's place, for messages."""
        part, first = self._part(sample)
        return part.where(sample - first)

    def name(self, sample: int) -> str:
        """A sample's key."""
        part, first = self._part(sample)
        return part.name(sample - first)

    def picture(self, sample: int) -> Image.Image:
        """See SampleDataset.picture."""
        part, first = self._part(sample)
        return part.picture(sample - first)

    def serve(self, sample: int, epoch: int = 0, repeat: int = 0, weight: float = 1.0) -> LoadedSample:
        """See SampleDataset.serve."""
        if sample == PADDING_ID:
            return self.parts[0].serve(sample)
        part, first = self._part(sample)
        served = part.serve(sample - first, epoch, repeat, weight)
        fault = served.fault and served.fault._replace(sample=sample)
        return replace(served, id=sample, fault=fault)

    def _part(self, sample: int) -> tuple[SampleDataset, int]:
        """The split that holds a sample, and the id of its first one."""
        number = bisect_right(self._ends, sample)
        return self.parts[number], self._ends[number] - len(self.parts[number])
