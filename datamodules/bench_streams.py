"""The streams that bench.py measures: one dataset through our reader, webdataset's and plain files, to any stage."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from datamodules.collate import collate_classification
from datamodules.dataset import SampleDataset
from datamodules.decode import IMAGE_EXTENSIONS, decode_image
from datamodules.index import ShardIndex
from datamodules.loader import TrainLoader, WorkerConfig
from datamodules.order import OrderSpec
from datamodules.reader import ShardReader, read_at
from datamodules.sampler import TrainBatchSampler
from datamodules.tasks import CLASSIFICATION
from datamodules.transforms import TrainTransform, generators_kept, seeded, train_pipeline
from datamodules.types import BatchRequest, LoadedSample
from datamodules.worker import worker_context

Stage = Literal["read", "crc", "decode", "augment", "collate"]
STAGES: tuple[Stage, ...] = ("read", "crc", "decode", "augment", "collate")
"""Each includes the ones before it; only our reader has checksums to check."""
_FIELDS = frozenset({*IMAGE_EXTENSIONS, "cls"})


class TrainPipeline:
    """The default training augmentation, in a form that travels to workers of any start method."""

    def __init__(self) -> None:
        self._pipeline = train_pipeline(TrainTransform())

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainPipeline, ()

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image to a normalised tensor (3, 224, 224), float32."""
        return self._pipeline(image)


def unpack(index: ShardIndex, folder: Path, samples: int) -> float:
    """Write the first images of a split as <folder>/<label>/<id>.<extension>; returns their mean size in bytes."""
    reader, total, count = ShardReader(index), 0, min(samples, len(index))
    for sample in range(count):
        fields = reader.read(sample, _FIELDS).fields
        target = folder / fields.pop("cls").decode().strip()
        target.mkdir(exist_ok=True)
        extension, data = fields.popitem()
        (target / f"{sample:08d}.{extension}").write_bytes(data)
        total += len(data)
    return total / max(count, 1)


def our_batches(index: ShardIndex, stage: Stage, workers: int, batch_size: int) -> Iterator[int]:
    """In the training order, as a run reads it."""
    lanes = next(lanes for lanes in (8, 4, 2, 1) if batch_size % lanes == 0)
    sampler = TrainBatchSampler(OrderSpec(0, index.counts, batch_size, lanes))
    if stage != "collate":
        return _endless(StageDataset(index, stage), workers, collate_fn=len, batch_sampler=sampler)
    num_classes = int(index.labels().max(initial=0)) + 1
    dataset = SampleDataset(ShardReader(index), CLASSIFICATION, TrainTransform(), num_classes)
    loader = TrainLoader(dataset, sampler, WorkerConfig(workers))
    return (len(batch["id"]) for _ in itertools.count() for batch in loader)


class StageDataset(Dataset[Any]):
    """Takes the samples of a request as far as a stage below "collate", and drops them.

    Args:
        index: the split's index.
        stage: the last one to do.
    """

    def __init__(self, index: ShardIndex, stage: Stage) -> None:
        self._index = index
        self._stage: Stage = stage
        self._reader = ShardReader(index)
        self._pipeline = TrainPipeline()

    def __reduce__(self) -> tuple[Any, ...]:
        return StageDataset, (self._index, self._stage)

    def __getitems__(self, request: BatchRequest) -> list[int]:
        """Serve one request; returns the ids."""
        with generators_kept():
            for sample in request.ids.tolist():
                self._take(sample)
        return list(request.ids.tolist())

    def _take(self, sample: int) -> None:
        if self._stage == "read":
            location = self._index.locate(sample)
            descriptor = self._reader.descriptor(location.shard)
            for field in location.fields.values():
                read_at(os.pread, descriptor, field.size, field.offset)
            return
        raw = self._reader.read(sample, _FIELDS)
        if self._stage == "crc":
            return
        image = decode_image(next(data for name, data in raw.fields.items() if name != "cls"), raw.where)
        if self._stage == "augment":
            with seeded(0, 0, sample, 0):
                self._pipeline(image)


def webdataset_batches(index: ShardIndex, stage: Stage, workers: int, batch_size: int) -> Iterator[int]:
    """Shards one after the other, as webdataset reads them at its fastest: no shuffling."""
    urls = [str(index.folder / name) for name in index.shard_names]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).repeat()
    dataset = dataset.map(partial(_webdataset_sample, stage, TrainPipeline()))
    dataset = dataset.batched(batch_size, collation_fn=collate_classification if stage == "collate" else len)
    return _endless(dataset, workers, batch_size=None)


def _webdataset_sample(stage: Stage, pipeline: TrainPipeline, fields: dict[str, Any]) -> LoadedSample | int:
    extension = next(name for name in fields if name in IMAGE_EXTENSIONS)
    if stage == "read":
        return 0  # None would drop the sample
    image = decode_image(fields[extension], fields["__key__"])
    if stage == "decode":
        return 0
    return LoadedSample(pipeline(image), int(fields["cls"]), 1.0, 0)


def file_batches(folder: Path, stage: Stage, workers: int, batch_size: int) -> Iterator[int]:
    """torchvision's ImageFolder in a random order."""
    transform = TrainPipeline() if stage in ("augment", "collate") else None
    dataset = ImageFolder(str(folder), transform, loader=_read_file if stage == "read" else default_loader)
    sampler = _RandomBatches(len(dataset), batch_size)
    options: dict[str, Any] = {} if stage == "collate" else {"collate_fn": len}
    return _endless(dataset, workers, batch_sampler=sampler, **options)


def _read_file(path: str) -> bytes:
    return Path(path).read_bytes()


class _RandomBatches(Sampler[list[int]]):
    """Random batches without end."""

    def __init__(self, size: int, batch_size: int) -> None:
        self._size = size
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            order = torch.randperm(self._size).tolist()
            yield from (order[start : start + self._batch_size] for start in range(0, self._size, self._batch_size))


def _endless(dataset: Any, workers: int, **options: Any) -> Iterator[int]:
    """Batch sizes of a DataLoader over an endless sampler or stream."""
    context = worker_context("forkserver", workers) if workers else None
    loader: DataLoader[Any] = DataLoader(dataset, num_workers=workers, multiprocessing_context=context, **options)
    return (_batch_length(batch) for batch in loader)


def _batch_length(batch: Any) -> int:
    if isinstance(batch, int):
        return batch
    return len(batch["id"]) if isinstance(batch, dict) else len(batch[0])
