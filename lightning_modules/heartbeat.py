"""What every rank is doing, in a small file of its own: RUN/heartbeat/rank_00000.json. Standard library only.

The training thread notes phases in memory, which costs less than a microsecond; a thread writes the last one every
second. Durations are counted in the writer's own ticks: a process that was stopped for an hour and goes on has not been
stuck for an hour, and no two machines' clocks are compared.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from lightning_modules.process import Process

Phase = Literal["setup", "fetch", "forward", "backward", "optimizer", "collective", "checkpoint", "evaluation"]
PHASES: tuple[Phase, ...] = get_args(Phase)

INTERVAL_S = 1.0
_FOLDER = "heartbeat"


@dataclass(frozen=True)
class Note:
    """What the training thread said last.

    Attributes:
        phase: what it is at.
        limit_s: how long that may take; None for any time.
        silence_s: how long its heartbeat may fail to come meanwhile; None for any time.
        place: counted up at every batch, by all ranks alike: the rank with the smallest holds up the others.
        step: optimizer steps done.
        epoch: from 0.
        detail: samples or shard, if known.
    """

    phase: Phase = "setup"
    limit_s: float | None = None
    silence_s: float | None = None
    place: int = 0
    step: int = 0
    epoch: int = 0
    detail: str = ""

    @property
    def order(self) -> tuple[int, int]:
        """Comparable between ranks: where in the training it is."""
        return self.place, PHASES.index(self.phase)


@dataclass(frozen=True)
class Beat:
    """One rank's heartbeat file.

    Attributes:
        rank: global rank.
        world_size: ranks of the group.
        token: the group's fencing token, from 1; a file with another one is of another attempt.
        process: the rank's process.
        count: heartbeats so far.
        note: what it is doing.
        stuck_s: since when, in its own ticks.
        step_s: median duration of a batch; 0 while unknown.
        images_per_s: of all ranks; 0 while unknown.
    """

    rank: int
    world_size: int
    token: int
    process: Process
    count: int
    note: Note
    stuck_s: float
    step_s: float = 0.0
    images_per_s: float = 0.0

    @property
    def is_over_limit(self) -> bool:
        """Whether it has been at one thing for longer than that may take."""
        return self.note.limit_s is not None and self.stuck_s >= self.note.limit_s

    def __str__(self) -> str:
        """Where it is, for a message."""
        detail = f" ({self.note.detail})" if self.note.detail else ""
        return f"phase {self.note.phase} at step {self.note.step}{detail}"


def folder_of(root: Path) -> Path:
    """Where the heartbeats of a run are."""
    return root / _FOLDER


def file_of(folder: Path, rank: int) -> Path:
    """One rank's heartbeat file."""
    return folder / f"rank_{rank:05d}.json"


def encode(beat: Beat) -> str:
    """The content of a heartbeat file."""
    return json.dumps(asdict(beat)) + "\n"


def read_beat(path: Path) -> Beat | None:
    """A heartbeat file; None if it is not there or says nothing."""
    try:
        row = json.loads(path.read_text())
        return Beat(**{**row, "process": Process(**row["process"]), "note": Note(**row["note"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_beats(root: Path) -> list[Beat]:
    """The heartbeats of a run's latest group, by rank."""
    paths = sorted(folder_of(root).glob("rank_*.json"))
    beats = [beat for path in paths if (beat := read_beat(path)) is not None]
    latest = max((beat.token for beat in beats), default=0)
    return [beat for beat in beats if beat.token == latest]


class Pulse:
    """This process's heartbeat: what it is doing, and the thread that writes it down.

    Args:
        folder: of the heartbeat files; made if missing.
        rank: of this process.
        on_beat: called by the thread at every heartbeat, such as the renewal of a lease.
        interval_s: between two heartbeats.

    Attributes:
        loading: tells which shard is being read; called by the thread while the training one waits for a batch.
    """

    def __init__(
        self, folder: Path, rank: int, on_beat: Callable[[], None] = lambda: None, interval_s: float = INTERVAL_S
    ) -> None:
        self.folder = folder
        self.rank = rank
        self.world_size = 1
        self.token = 0
        self.note = Note()
        self.step_s = 0.0
        self.images_per_s = 0.0
        self.interval_s = interval_s
        self.loading: Callable[[], str] = str
        self._loading = ""
        self._on_beat = on_beat
        self._count = 0
        self._stuck_s = 0.0
        self._last = self.note
        self._process = Process.here()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.folder.mkdir(exist_ok=True, mode=0o700)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the file stays and says where this rank ended."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(10 * self.interval_s)

    @property
    def beat(self) -> Beat:
        """What the next heartbeat says."""
        is_stuck = self.note is self._last
        return Beat(
            rank=self.rank,
            world_size=self.world_size,
            token=self.token,
            process=self._process,
            count=self._count,
            note=replace(self._last, detail=self._loading) if is_stuck and self._loading else self.note,
            stuck_s=round(self._stuck_s, 3) if is_stuck else 0.0,
            step_s=self.step_s,
            images_per_s=self.images_per_s,
        )

    def tick(self, elapsed_s: float) -> None:
        """Count the time in which the training thread noted nothing new; a long pause was ours and counts little."""
        moved = self.note is not self._last
        self._stuck_s = 0.0 if moved else self._stuck_s + min(elapsed_s, 2 * self.interval_s)
        self._last = self.note
        self._count += 1
        self._loading = ""
        if not moved and self._last.phase == "fetch":
            with contextlib.suppress(Exception):  # a hint, read while the loader may be closing
                self._loading = self.loading()

    def write(self) -> None:
        """Replace the file in one move; not flushed to the disk, as a dead machine's heartbeat interests nobody."""
        temporary = self.folder / f".rank_{self.rank:05d}"
        temporary.write_text(encode(self.beat))
        temporary.replace(file_of(self.folder, self.rank))

    def _run(self) -> None:
        before_s = time.monotonic()
        while not self._ended.wait(self.interval_s):
            now_s = time.monotonic()
            self.tick(now_s - before_s)
            before_s = now_s
            if self.token:  # only what holds the run directory writes into it
                with contextlib.suppress(OSError):  # a full disk must not end the watch
                    self.write()
            self._on_beat()


def forget(folder: Path) -> None:
    """Remove the heartbeats of an attempt before; by rank 0, while it holds the lease."""
    for path in folder.glob("*"):
        path.unlink(missing_ok=True)
