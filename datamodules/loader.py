"""Batches out of worker processes: an endless training stream that can be positioned, and a plain evaluation loader."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any, Literal

from torch.utils.data import DataLoader

from datamodules.collate import collate_or_fault
from datamodules.dataset import ClassificationDataset
from datamodules.sampler import EvalBatchSampler, TrainBatchSampler
from datamodules.types import ClassificationBatch, DataError

StartMethod = Literal["forkserver", "spawn", "fork"]


@dataclass(frozen=True)
class WorkerConfig:
    """How batches are made.

    Attributes:
        num_workers: processes beside the training one; 0 loads in the training process.
        prefetch: batches each worker holds ready.
        timeout_s: seconds to wait for a batch before the run stops with an error; 0 waits for ever.
        start: how workers start. "fork" starts at once but copies a process that may hold locks and a GPU context.
        pin_memory: page-locked batches for faster copies to a GPU.
    """

    num_workers: int = 0
    prefetch: int = 2
    timeout_s: float = 600.0
    start: StartMethod = "forkserver"
    pin_memory: bool = False


class _Loader:
    """A DataLoader behind the three names that Lightning asks of a loader of its own kind.

    Not a DataLoader itself, so that Lightning neither replaces its sampler nor advises on its number of workers.
    """

    def __init__(
        self, dataset: ClassificationDataset, sampler: TrainBatchSampler | EvalBatchSampler, config: WorkerConfig
    ) -> None:
        workers = config.num_workers
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]  # a request stands for a list of indices
            collate_fn=collate_or_fault,
            num_workers=workers,
            pin_memory=config.pin_memory,
            timeout=config.timeout_s if workers else 0,
            worker_init_fn=_start_worker if workers else None,
            multiprocessing_context=worker_context(config.start) if workers else None,
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
        """Stop the workers; the next iteration starts new ones."""
        if (iterator := self._iterator) is not None and self._loader.num_workers:
            iterator._shutdown_workers()
        self._iterator = None


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
    """

    def __init__(
        self,
        dataset: ClassificationDataset,
        sampler: TrainBatchSampler,
        config: WorkerConfig,
        position: Callable[[], int | None] = lambda: None,
    ) -> None:
        super().__init__(dataset, sampler, config)
        self.batch_sampler = sampler
        self._position = position
        self._next = sampler.start
        self._stream: Iterator[ClassificationBatch | DataError] | None = None

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[ClassificationBatch]:
        stream = self._seek()  # with the first batch asked for, not with the call: Lightning makes iterators in vain
        for _ in range(len(self)):
            batch = _checked(next(stream))
            self._next += 1
            yield batch

    def _seek(self) -> Iterator[ClassificationBatch | DataError]:
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
    """

    def __init__(self, dataset: ClassificationDataset, sampler: EvalBatchSampler, config: WorkerConfig) -> None:
        super().__init__(dataset, sampler, config)
        self.batch_sampler = sampler

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[ClassificationBatch]:
        for batch in self._loader:
            yield _checked(batch)


def _checked(batch: ClassificationBatch | DataError) -> ClassificationBatch:
    if isinstance(batch, DataError):
        raise batch
    return batch


def available_cores() -> int:
    """Cores this process may use, which a container or a SLURM job can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_context(start: StartMethod) -> BaseContext:
    """The multiprocessing context for workers; a fork server imports torch once for all of them."""
    context = mp.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(["__main__", "datamodules.loader"])
    return context


def _start_worker(worker: int) -> None:
    """Make a worker die with its trainer: a process killed with -9 cannot stop its workers itself.

    The kernel's parent-death signal answers at once, but the parent of a forkserver's worker is the fork server, which
    lives as long as its workers do; so the pipe to the trainer is watched too.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    trainer = mp.parent_process()
    if trainer is not None:
        threading.Thread(target=_exit_after, args=(trainer,), daemon=True).start()


def _exit_after(process: Any) -> None:
    process.join()
    os._exit(1)
