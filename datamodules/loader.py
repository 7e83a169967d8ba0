"""Batches out of worker processes: an endless training stream that can be positioned, and a plain evaluation loader."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from datamodules.collate import collate_or_fault
from datamodules.dataset import JoinedDataset, SampleDataset
from datamodules.order import check_at_least
from datamodules.sampler import EvalBatchSampler, TrainBatchSampler
from datamodules.types import PADDING_ID, Batch, DataError, Fault, LoadedBatch
from datamodules.worker import Board, StartMethod, dump_stacks, start_worker, worker_context

OnFaults = Callable[[Sequence[Fault]], None]

_POLL_S = 5.0
_log = logging.getLogger("mirrorla")


@dataclass(frozen=True)
class WorkerConfig:
    """How batches are made.

    Attributes:
        num_workers: processes beside the training one; 0 loads in the training process.
        prefetch: batches each worker holds ready.
        timeout_s: seconds to wait for a batch before the run stops with an error; 0 waits for ever.
        start: how workers start. "fork" starts at once but copies a process that may hold locks and a GPU context.
        pin_memory: page-locked batches for faster copies to a GPU.
        memory_gib: memory a worker may take beyond what it starts with; None for no limit.
        rank: of this process, for messages.
    """

    num_workers: int = 0
    prefetch: int = 2
    timeout_s: float = 600.0
    start: StartMethod = "forkserver"
    pin_memory: bool = False
    memory_gib: float | None = None
    rank: int = 0

    def check(self) -> None:
        """Raise DataError for a value that cannot work."""
        check_at_least(0, num_workers=self.num_workers, timeout_s=self.timeout_s)
        check_at_least(0, worker_memory_gib=self.memory_gib or 0)


class _Loader:
    """A DataLoader behind the three names that Lightning asks of a loader of its own kind.

    Not a DataLoader itself, so that Lightning neither replaces its sampler nor advises on its number of workers.
    """

    def __init__(
        self,
        dataset: SampleDataset | JoinedDataset,
        sampler: TrainBatchSampler | EvalBatchSampler,
        config: WorkerConfig,
        on_faults: OnFaults,
    ) -> None:
        workers = config.num_workers
        context = worker_context(config.start, workers)
        self._dataset = dataset
        self._config = config
        self._on_faults = on_faults
        self._board = Board(context, workers)
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]  # a request stands for a list of indices
            collate_fn=partial(collate_or_fault, dataset.task.collate),
            num_workers=workers,
            pin_memory=config.pin_memory,
            timeout=_poll_s(config) if workers else 0,
            worker_init_fn=partial(start_worker, board=self._board, memory_gib=config.memory_gib) if workers else None,
            multiprocessing_context=context if workers else None,
            prefetch_factor=config.prefetch if workers else None,
            persistent_workers=workers > 0,
        )

    @property
    def _iterator(self) -> Any:
        """Lightning stops the workers behind this name and then sets it to None."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self._loader._iterator = value

    def close(self) -> None:
        """Stop the workers, and say which of them had died; the next iteration starts new ones."""
        if (iterator := self._iterator) is not None and self._loader.num_workers:
            for line in self._deaths():
                _log.error("%s", line)
            iterator._shutdown_workers()
        self._iterator = None

    def _take(self, stream: Iterator[LoadedBatch | DataError]) -> Batch:
        """The next batch, once its faults are reported.

        Raises:
            DataError: a bad sample or shard; or a worker that hangs or has died, with the sample it was at.
            StopIteration: at the end.
        """
        loaded = self._wait(stream)
        if isinstance(loaded, DataError):
            raise loaded
        if loaded.faults:
            self._on_faults(loaded.faults)
        return loaded.batch

    def _wait(self, stream: Iterator[LoadedBatch | DataError]) -> LoadedBatch | DataError:
        """The next item; torch is asked to wait for a few seconds at a time, as it looks after workers only then."""
        began_s = time.monotonic()
        while True:
            try:
                return next(stream)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader "):
                    raise
                if deaths := self._deaths():
                    raise DataError("; ".join(deaths)) from None
                if "timed out" not in str(error):
                    raise
                if 0 < self._config.timeout_s <= time.monotonic() - began_s:
                    raise DataError(self._hang()) from None

    def loading(self) -> str:
        """Shard and sample that a data worker has been at for longest; empty while none is busy."""
        tasks = self._board.tasks()
        return f"data worker {tasks[0].worker} at {self._where(tasks[0].sample)}" if tasks else ""

    def _hang(self) -> str:
        """What the worker that has been at one sample for longest is doing; its stacks go to stderr."""
        limit = f"data.timeout_s {self._config.timeout_s:g}"
        tasks = self._board.tasks()
        if not tasks:
            return f"rank {self._config.rank}: no batch came within {limit} and no data worker is busy"
        worker, sample, seconds = tasks[0]
        dump_stacks(self._iterator._workers[worker].pid)
        return (
            f"rank {self._config.rank}: data worker {worker} hangs since {seconds:.0f} s at {self._where(sample)} "
            f"({limit}); its stacks are above; repair the shard or its file system, or raise the limit"
        )

    def _deaths(self) -> list[str]:
        """A line for every worker that was killed, with the sample it was at."""
        tasks = {task.worker: task for task in self._board.tasks()}
        lines = []
        for worker, process in enumerate(self._iterator._workers):
            if process.exitcode in (None, 0):
                continue
            code = process.exitcode
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            place = f" while loading {self._where(tasks[worker].sample)}" if worker in tasks else ""
            mend = "; if memory ran out, use fewer data.num_workers or set data.worker_memory_gib"
            lines.append(f"rank {self._config.rank}: data worker {worker} {how}{place}{mend}")
        return lines

    def _where(self, sample: int) -> str:
        return "padding" if sample == PADDING_ID else self._dataset.where(sample)


def _poll_s(config: WorkerConfig) -> float:
    return min(_POLL_S, config.timeout_s) if config.timeout_s else _POLL_S


def ignore_faults(faults: Sequence[Fault]) -> None:
    """Do nothing with skipped samples."""


class TrainLoader(_Loader):
    """The training stream of one rank as the trainer sees it: `len` is an epoch, every iteration yields one.

    Workers go on prefetching across the end of an epoch, so validation does not drain the pipeline. Each iteration
    starts at the batch that `position` names; if the stream is elsewhere (after a resume, or when batches were fetched
    but never trained on), it is positioned anew. Nothing is repeated or lost, whatever was prefetched.

    Args:
        dataset: the training split.
        sampler: this rank's requests.
        config: how to load.
        position: global batches committed so far; None goes on where the last iteration ended.
        on_faults: told of skipped samples as their batch is handed out.
    """

    def __init__(
        self,
        dataset: SampleDataset | JoinedDataset,
        sampler: TrainBatchSampler,
        config: WorkerConfig,
        position: Callable[[], int | None] = lambda: None,
        on_faults: OnFaults = ignore_faults,
    ) -> None:
        super().__init__(dataset, sampler, config, on_faults)
        self.batch_sampler = sampler
        self._position = position
        self._next = sampler.start
        self._stream: Iterator[LoadedBatch | DataError] | None = None

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        stream = self._seek()  # with the first batch asked for, not with the call: Lightning makes iterators in vain
        for _ in range(len(self)):
            batch = self._take(stream)
            self._next += 1
            yield batch

    def _seek(self) -> Iterator[LoadedBatch | DataError]:
        """The stream of batches, standing at the position."""
        position = self._position()
        if self._stream is None or (position is not None and position != self._next):
            self._next = self._next if position is None else position
            self.batch_sampler.start = self._next
            self._stream = iter(self._loader)
        return self._stream

    @property
    def _iterator(self) -> Any:
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self._loader._iterator = value
        self._stream = None

    def state_dict(self) -> dict[str, int]:
        """Empty: the data module keeps the position. Lightning takes a loader with this method for resumable."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to load, see state_dict."""


class EvalLoader(_Loader):
    """An evaluation loader of one rank; workers stay alive between evaluations.

    Args:
        dataset: the split.
        sampler: this rank's requests.
        config: how to load.
        on_faults: told of skipped samples as their batch is handed out.
    """

    def __init__(
        self,
        dataset: SampleDataset | JoinedDataset,
        sampler: EvalBatchSampler,
        config: WorkerConfig,
        on_faults: OnFaults = ignore_faults,
    ) -> None:
        super().__init__(dataset, sampler, config, on_faults)
        self.batch_sampler = sampler

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        stream = iter(self._loader)
        for _ in range(len(self)):
            yield self._take(stream)
