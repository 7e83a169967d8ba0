"""How fast samples load, stage by stage, beside webdataset's own reader and plain files in the same run."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from datamodules.bench_streams import STAGES, Stage, file_batches, our_batches, unpack, webdataset_batches
from datamodules.index import ShardIndex
from datamodules.manifest import open_split, read_dataset
from datamodules.types import DataError

Reader = Literal["mirrorla", "webdataset", "files"]
READERS: tuple[Reader, ...] = ("mirrorla", "webdataset", "files")
WINDOWS = 7


@dataclass(frozen=True)
class Rate:
    """One measurement.

    Attributes:
        reader: whose.
        stage: how far samples were taken.
        workers: loading processes; 0 loads in this one.
        samples_per_s: median over WINDOWS windows of time.
        lowest: of the windows.
        highest: of the windows.
        mb_per_s: image bytes.
    """

    reader: Reader
    stage: Stage
    workers: int
    samples_per_s: float
    lowest: float
    highest: float
    mb_per_s: float


def bench(path: str, *, workers: str = "0,1,2", seconds: float = 3.0, batch_size: int = 32, samples: int = 5000) -> int:
    """Measure how fast a packed classification dataset loads, beside webdataset's reader and plain files.

    Args:
        path: the dataset's folder.
        workers: numbers of loading processes, by commas.
        seconds: of each measurement.
        batch_size: samples in a batch.
        samples: images that are unpacked into a temporary folder for the comparison with plain files.

    Examples:
      mirrorla shards bench data/digits --workers 0,2 --seconds 1
    """
    try:
        counts = [int(number) for number in workers.split(",")]
    except ValueError:
        raise DataError(f"--workers is {workers!r}; it must be numbers by commas, such as 0,1,2") from None
    rates = measure(Path(path), counts, seconds=seconds, batch_size=batch_size, samples=samples)
    Console().print(rate_table(rates))
    return 0


def measure(path: Path, workers: Sequence[int], *, seconds: float, batch_size: int, samples: int) -> list[Rate]:
    """Measure every reader, stage and number of workers, with one torch thread per process.

    Args:
        path: a packed classification dataset.
        workers: numbers of loading processes.
        seconds: of each measurement.
        batch_size: samples in a batch.
        samples: images to unpack as plain files.

    Raises:
        DataError: no such dataset, or one of another task.
    """
    info = read_dataset(path)
    if info.task != "classification":
        raise DataError(f"{path} is a {info.task} dataset; bench measures classification datasets")
    index = open_split(path, info, "train")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = list(itertools.product(workers, STAGES))
    try:
        with tempfile.TemporaryDirectory(prefix="mirrorla-bench-") as folder:
            image_bytes = unpack(index, Path(folder), samples)
            bench_one = partial(_measure_readers, index, Path(folder), batch_size, seconds, image_bytes)
            rates = [rate for case in track(cases, "measuring", transient=True) for rate in bench_one(*case)]
    finally:
        torch.set_num_threads(threads)
    return rates


def rate_table(rates: Sequence[Rate]) -> Table:
    """The rates as a table: a row for each reader and stage, a column for each number of workers."""
    workers = sorted({rate.workers for rate in rates})
    table = Table("reader", "stage", *(f"{count} workers" for count in workers), title="samples/s (MB/s)")
    found = {(rate.reader, rate.stage, rate.workers): rate for rate in rates}
    for reader, stage in itertools.product(READERS, STAGES):
        row = [found.get((reader, stage, count)) for count in workers]
        if any(row):
            cells = (f"{one.samples_per_s:.0f} ({one.mb_per_s:.0f})" if one else "" for one in row)
            table.add_row(reader, stage, *cells, end_section=stage == STAGES[-1])
    return table


def _is_possible(index: ShardIndex, workers: int, stage: Stage, reader: Reader) -> bool:
    if reader == "webdataset" and workers > len(index.shards):
        return False  # webdataset gives every worker whole shards
    return stage != "crc" or reader == "mirrorla"


def _measure_readers(
    index: ShardIndex, folder: Path, batch_size: int, seconds: float, image_bytes: float, workers: int, stage: Stage
) -> list[Rate]:
    streams: dict[Reader, Iterator[int]] = {}
    for reader in READERS:
        if not _is_possible(index, workers, stage, reader):
            continue
        if reader == "mirrorla":
            streams[reader] = our_batches(index, stage, workers, batch_size)
        elif reader == "webdataset":
            streams[reader] = webdataset_batches(index, stage, workers, batch_size)
        else:
            streams[reader] = file_batches(folder, stage, workers, batch_size)
    found = window_rates(list(streams.values()), seconds, warm_up=2 * workers + 2)
    rates = []
    for reader, windows in zip(streams, found, strict=True):
        median = statistics.median(windows)
        rates.append(Rate(reader, stage, workers, median, min(windows), max(windows), median * image_bytes / 1e6))
    return rates


def window_rates(streams: Sequence[Iterator[int]], seconds: float, warm_up: int) -> list[list[float]]:
    """Samples a second of several streams, in WINDOWS windows of time each.

    The windows take turns, so that a machine that is slower for a while is so for all of them.

    Args:
        streams: sizes of batches as they come, without end.
        seconds: of all windows of a stream together; each ends with the batch that exceeds it.
        warm_up: batches to take before each window: as many as stand ready in the workers' queues.
    """
    rates: list[list[float]] = [[] for _ in streams]
    for _, (place, stream) in itertools.product(range(WINDOWS), enumerate(streams)):
        for _ in range(warm_up):
            next(stream)
        samples, started, elapsed = 0, time.perf_counter(), 0.0
        while elapsed < seconds / WINDOWS:
            samples += next(stream)
            elapsed = time.perf_counter() - started
        rates[place].append(samples / elapsed)
    return rates
