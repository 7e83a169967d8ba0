"""Inside a loading process: it dies with its trainer, keeps to its memory, and leaves word of what it is loading.

A worker notes every sample, before it touches it, in memory that it shares with its trainer. So when a worker hangs, or
is killed for its memory, the trainer can name the sample.
"""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import resource
import signal
import threading
import time
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datamodules.parent import die_with_parent

StartMethod = Literal["forkserver", "spawn", "fork"]

_IDLE = -2
_STACKS_PAUSE_S = 0.5


class Task(NamedTuple):
    """What a worker is busy with: a sample id, and for how long."""

    worker: int
    sample: int
    seconds: float


class Board:
    """What the workers of one loader are loading, in memory they share with their trainer.

    Args:
        context: the workers'.
        workers: how many.
    """

    def __init__(self, context: BaseContext, workers: int) -> None:
        self._rows = context.RawArray("q", [_IDLE, 0] * workers)  # per worker: sample id, monotonic nanoseconds

    def note(self, worker: int, sample: int) -> None:
        """Called by a worker before it touches a sample."""
        self._rows[2 * worker + 1] = time.monotonic_ns()
        self._rows[2 * worker] = sample

    def tasks(self) -> list[Task]:
        """What every busy worker is doing, the longest at it first."""
        now = time.monotonic_ns()
        rows = [(worker, *self._rows[2 * worker : 2 * worker + 2]) for worker in range(len(self._rows) // 2)]
        tasks = [Task(worker, sample, (now - since) / 1e9) for worker, sample, since in rows if sample != _IDLE]
        return sorted(tasks, key=lambda task: -task.seconds)


class _Here:
    """This process's place on its board, if it is a worker, and its memory limit."""

    board: Board | None = None
    worker = 0
    memory_gib: float | None = None


def note(sample: int) -> None:
    """Leave word that this process now loads a sample; nothing in a process that is no worker."""
    if _Here.board is not None:
        _Here.board.note(_Here.worker, sample)


def note_idle() -> None:
    """Leave word that this process waits for work."""
    note(_IDLE)


def memory_message(where: str) -> str:
    """The line for a sample for which this process had too little memory; lifts the limit, so that it can be sent."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    if _Here.memory_gib is None:
        return f"{where}: memory ran out while it was loaded; use fewer data.num_workers or repack it smaller"
    return (
        f"{where}: loading it takes more than data.worker_memory_gib {_Here.memory_gib:g}; "
        "raise the limit, or repack it smaller"
    )


def available_cores() -> int:
    """Cores this process may use, which a container or a SLURM job can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_context(start: StartMethod, workers: int) -> BaseContext:
    """The multiprocessing context for workers; a fork server, if there are any, imports torch once for all of them."""
    context = mp.get_context(start)
    if start == "forkserver" and workers:  # seconds of CPU
        context.set_forkserver_preload(["datamodules.fork_server", "__main__", "datamodules.loader"])
        # SLURM's early warning reaches every process of a job; the server and its workers leave it to the trainer.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def start_worker(worker: int, board: Board, memory_gib: float | None) -> None:
    """Prepare a new loading process.

    It must die with its trainer, which a kill -9 leaves no time to stop its workers. The kernel's parent-death signal
    answers at once, but the parent of a forkserver's worker is the fork server, which lives as long as its workers do;
    so the pipe to the trainer is watched too.

    Args:
        worker: its number.
        board: where it leaves word.
        memory_gib: memory it may take beyond what it has now; None for no limit.
    """
    die_with_parent()
    trainer = mp.parent_process()
    if trainer is not None:
        threading.Thread(target=_exit_after, args=(trainer,), daemon=True).start()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    _Here.board, _Here.worker, _Here.memory_gib = board, worker, memory_gib
    if memory_gib is not None:
        _limit_memory(int(memory_gib * 2**30))


def _exit_after(process: Any) -> None:
    process.join()
    os._exit(1)


def _limit_memory(extra: int) -> None:
    """Let this process take `extra` bytes of private memory beyond what it has; then allocations fail."""
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()  # data and stacks
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = held + extra if hard == resource.RLIM_INFINITY else min(held + extra, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def dump_stacks(pid: int) -> None:
    """Let a worker write the stacks of its threads to stderr; works while it hangs inside a decoder, too."""
    try:
        os.kill(pid, signal.SIGUSR2)
    except ProcessLookupError:
        return
    time.sleep(_STACKS_PAUSE_S)
