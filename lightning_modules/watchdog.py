"""Name the rank that holds up a group, write down what every rank is at, and end the group. Standard library only.

Nothing is read while training moves on. Once this rank's own training thread stands still, the first and the last rank
look at the others' heartbeats: a rank whose heartbeat no longer comes was stopped or its machine has gone; of those
that live, the one furthest behind is what the others wait for, and it hangs when it takes longer than its phase may.
Reading happens on the heartbeat's thread and judging here, so that a dead file system cannot keep a rank from ending.
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_modules.exit_codes import ExitCode
from lightning_modules.heartbeat import Beat, Pulse, file_of, read_beat

_VERDICT = "verdict.json"
_STACKS_PAUSE_S = 2.0
_FOLLOWER_PAUSE_S = 1.0
_EXIT_WITHIN_S = 15.0
_log = logging.getLogger("mirrorla")


@dataclass(frozen=True)
class Seen:
    """What is known of another rank.

    Attributes:
        beat: its last heartbeat; None if it never wrote one in this attempt.
        silent_s: how long it has not changed while we looked.
    """

    beat: Beat | None
    silent_s: float


@dataclass(frozen=True)
class Verdict:
    """Why the group ends.

    Attributes:
        token: of the group.
        rank: the one at fault.
        message: one line naming it.
        is_silent: whether it cannot end by itself, as its heartbeat has stopped, too.
    """

    token: int
    rank: int
    message: str
    is_silent: bool = False


def judge(own: Beat, seen: Mapping[int, Seen]) -> Verdict | None:
    """Decide whether the group hangs, and which rank is at fault.

    Args:
        own: this rank's heartbeat.
        seen: the other ranks, as far as this one looks at them.

    Returns:
        None while there is nothing to say; this rank itself may be the one at fault.
    """
    if own.stuck_s == 0:
        return None
    for rank, other in sorted(seen.items()):
        if _is_silent(own, other):
            return Verdict(own.token, rank, _silence(rank, other), is_silent=True)
    living = [own, *(other.beat for other in seen.values() if other.beat is not None)]
    behind = min(beat.note.order for beat in living)
    slowest = max((beat for beat in living if beat.note.order == behind), key=lambda beat: (beat.stuck_s, -beat.rank))
    if not slowest.is_over_limit:
        return None
    return Verdict(
        own.token,
        slowest.rank,
        f"rank {slowest.rank} on host {slowest.process.host} has been in {slowest} for {slowest.stuck_s:.0f} s "
        f"(limit {slowest.note.limit_s:.0f} s)",
    )


def _is_silent(own: Beat, other: Seen) -> bool:
    """Whether a rank's heartbeat stays away for too long, and this rank has waited for as long."""
    limit_s = own.note.limit_s if other.beat is None else other.beat.note.silence_s
    return limit_s is not None and min(other.silent_s, own.stuck_s) >= limit_s


def _silence(rank: int, other: Seen) -> str:
    if other.beat is None:
        return f"rank {rank} has left no heartbeat for {other.silent_s:.0f} s"
    return f"rank {rank} on host {other.beat.process.host} has been silent for {other.silent_s:.0f} s in {other.beat}"


class Watchdog:
    """The thread that judges, and what it does when it has judged.

    Args:
        pulse: this rank's heartbeat; call `look` from its thread.
        logs: folder of the stacks, hang_rank_00000.txt.
        on_end: called once before the process ends, with the verdict and whether this rank found it.
    """

    def __init__(self, pulse: Pulse, logs: Path, on_end: Callable[[Verdict, bool], None]) -> None:
        self._pulse = pulse
        self._logs = logs
        self._on_end = on_end
        self._seen: dict[int, Seen] = {}
        self._told: Verdict | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(10 * self._pulse.interval_s)

    def look(self, elapsed_s: float) -> None:
        """Read what others say, if this rank stands still.

        Args:
            elapsed_s: since the last look; a pause of this process counts for two heartbeats at most.
        """
        own = self._pulse.beat
        if own.stuck_s == 0:
            self._seen = {}
            return
        self._told = _read_verdict(self._pulse.folder, own.token)
        if own.rank not in (0, own.world_size - 1):
            return
        counted_s = min(elapsed_s, 2 * self._pulse.interval_s)
        others = (rank for rank in range(own.world_size) if rank != own.rank)
        self._seen = {rank: self._see(rank, own.token, counted_s) for rank in others}

    def _see(self, rank: int, token: int, counted_s: float) -> Seen:
        beat = read_beat(file_of(self._pulse.folder, rank))
        if beat is not None and beat.token != token:
            beat = None
        before = self._seen.get(rank)
        is_same = before is not None and before.beat == beat
        return Seen(beat, before.silent_s + counted_s if before is not None and is_same else 0.0)

    def _run(self) -> None:
        while not self._ended.wait(self._pulse.interval_s):
            own = self._pulse.beat
            verdict = self._told or self._own_judgement(own)
            if verdict is not None:
                self._end(verdict, is_author=verdict is not self._told)

    def _own_judgement(self, own: Beat) -> Verdict | None:
        """Only the ranks that see the others may judge: any other may just be waiting."""
        is_complete = len(self._seen) == own.world_size - 1
        return judge(own, dict(self._seen)) if is_complete else None

    def _end(self, verdict: Verdict, is_author: bool) -> None:
        """Write everything down and leave; whatever blocks, the process ends."""
        limit = threading.Timer(_EXIT_WITHIN_S, os._exit, (ExitCode.HUNG,))
        limit.daemon = True
        limit.start()
        if is_author:
            _publish(self._pulse.folder, verdict)
        stacks = self._logs / f"hang_rank_{self._pulse.rank:05d}.txt"
        dump_stacks(stacks, verdict.message)
        line = f"{verdict.message}; stacks in {stacks.parent}/hang_rank_*.txt; exit code {ExitCode.HUNG:d}"
        _log.log(logging.ERROR if is_author else logging.INFO, "%s", line)
        # Others write their stacks meanwhile; rank 0 leaves first, as the launcher kills it when another leaves before.
        self._ended.wait(_STACKS_PAUSE_S + (_FOLLOWER_PAUSE_S if self._pulse.rank else 0.0))
        with contextlib.suppress(Exception):
            self._on_end(verdict, is_author)
        if verdict.is_silent:
            self._kill(verdict.rank)
        logging.shutdown()
        os._exit(ExitCode.HUNG)

    def _kill(self, rank: int) -> None:
        """End a rank that cannot leave by itself, if it is a process of this machine."""
        beat = None if rank == self._pulse.rank else read_beat(file_of(self._pulse.folder, rank))
        if beat is not None and beat.process.state() in ("alive", "stopped"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.process.pid, signal.SIGKILL)


def dump_stacks(path: Path, title: str) -> None:
    """Write the stacks of all threads of this process under a title; works while they hang."""
    with contextlib.suppress(OSError), path.open("w") as stream:
        stream.write(f"{title}\n\n")
        stream.flush()
        faulthandler.dump_traceback(stream, all_threads=True)


def _publish(folder: Path, verdict: Verdict) -> None:
    """Let the other ranks know; the first verdict of an attempt stays."""
    with contextlib.suppress(OSError), (folder / _VERDICT).open("x") as stream:
        stream.write(json.dumps(asdict(verdict)))


def _read_verdict(folder: Path, token: int) -> Verdict | None:
    try:
        verdict = Verdict(**json.loads((folder / _VERDICT).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return verdict if verdict.token == token else None
