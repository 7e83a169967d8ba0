"""Runs the cells of an ablation, each through `mirrorla fit` in a process and a run directory of its own.

A cell that is finished is not started; one that was interrupted goes on from its newest checkpoint; one that fails is
told and the others go on. A stop signal is handed on: trainings commit their state, nothing new is started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_modules import stop_signals
from lightning_modules.health import Condition, examine

LOG_NAME = "fit.log"
"""What a cell's trainings wrote to the terminal, in its run directory."""

_POLL_S = 0.1


@dataclass(frozen=True)
class Job:
    """One cell to run.

    Attributes:
        run: its run directory.
        words: the options of `mirrorla fit`.
    """

    run: Path
    words: tuple[str, ...]


@dataclass
class _Running:
    job: Job
    slot: int
    process: subprocess.Popen[bytes]
    began_s: float


class Stopped(Exception):  # noqa: N818 - it reports a request, not an error
    """A stop signal ended the ablation; the trainings under way have committed their state.

    Args:
        number: the signal.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}; give the same command again to go on")
        self.exit_code = 128 + number


def condition(run: Path) -> Condition:
    """How far a cell is; "new" where nothing was ever started."""
    return examine(run).condition if run.is_dir() else "new"


def environments(jobs: int, cores: int, devices: Sequence[str], given: Mapping[str, str]) -> list[dict[str, str]]:
    """What each of the trainings that run at a time gets for itself: a share of the cores, and a GPU.

    Args:
        jobs: trainings at a time, at least 1.
        cores: of this machine.
        devices: numbers of its GPUs; a lone training sees them all.
        given: the environment; threads that it sets stay as they are.
    """
    threads = {} if "OMP_NUM_THREADS" in given else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    if jobs == 1 or not devices:
        return [dict(threads) for _ in range(jobs)]
    return [threads | {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} for slot in range(jobs)]


def run_all(
    jobs: Sequence[Job], slots: Sequence[Mapping[str, str]], tell: Callable[[Job, int, float], None]
) -> dict[Job, int]:
    """Run jobs until all have ended.

    Args:
        jobs: in the order of their start.
        slots: the environment of each training that runs at the same time as others.
        tell: called when one has ended, with its exit code and seconds.

    Returns:
        Every job's exit code.

    Raises:
        Stopped: by a stop signal, once all trainings have ended.
    """
    waiting, free = list(jobs), list(range(len(slots)))
    running: list[_Running] = []
    codes: dict[Job, int] = {}
    stop: signal.Signals | None = None
    while running or (waiting and stop is None):
        if stop is None and (stop := stop_signals.received()) is not None:
            for one in running:
                one.process.send_signal(signal.SIGTERM)
        while waiting and free and stop is None:
            running.append(_start(waiting.pop(0), free.pop(0), slots))
        time.sleep(_POLL_S)
        for one in [one for one in running if one.process.poll() is not None]:
            running.remove(one)
            free.append(one.slot)
            codes[one.job] = one.process.returncode
            if stop is None:
                tell(one.job, one.process.returncode, time.monotonic() - one.began_s)
    if stop is not None:
        raise Stopped(stop)
    return codes


def last_words(run: Path) -> str:
    """The last line a cell's training wrote; what went wrong, if it failed."""
    path = run / LOG_NAME
    lines = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
    return lines[-1] if lines else "it wrote nothing"


def command(job: Job) -> list[str]:
    """The command line of a cell's training."""
    words = ["fit", *job.words, "--run_dir", str(job.run), "--ckpt_path", "last"]
    return [sys.executable, "-m", "lightning_modules.cli", *words]


def _start(job: Job, slot: int, slots: Sequence[Mapping[str, str]]) -> _Running:
    job.run.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (job.run / LOG_NAME).open("ab") as log:
        # A session of its own: Ctrl-C reaches this process alone, which hands it on once.
        process = subprocess.Popen(
            command(job),
            env={**os.environ, **slots[slot]},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Running(job, slot, process, time.monotonic())
