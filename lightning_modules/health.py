"""What the files of a run say about it; `mirrorla status` shows it and `mirrorla doctor` judges it. No torch.

Only looks: the one file made here, to learn what time the file system believes it is, is gone again at once. Ages are
differences of two times of that one clock, so a machine whose own clock is wrong shows the same.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning_modules.attempts import Record, read_attempts
from lightning_modules.checkpoint import list_checkpoints
from lightning_modules.errors import UsageError
from lightning_modules.exit_codes import ExitCode, describe
from lightning_modules.heartbeat import Beat, file_of, folder_of, read_beats
from lightning_modules.lease import Holder, read_holder
from lightning_modules.process import State

LOST_S = 60.0
"""Age at which the heartbeat of a machine that cannot be asked counts as lost."""

_TRACES = ("attempts.jsonl", "config.yaml", "checkpoints")
Condition = Literal["new", "running", "lost", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Rank:
    """One rank of the latest group.

    Attributes:
        beat: what it said last.
        state: what became of its process, as far as this machine knows.
        age_s: since it said so.
    """

    beat: Beat
    state: State
    age_s: float


@dataclass(frozen=True)
class Health:
    """A run as its files show it.

    Attributes:
        root: the run directory.
        attempts: all starts, in order.
        holder: who holds the lease, or held it last.
        holder_state: what became of that process.
        ranks: the latest group.
        checkpoints: committed ones, oldest step first.
        checkpoint_age_s: since the newest was written; None without one.
        free_bytes: on the run directory's disk.
        holder_age_s: since the holder's last heartbeat.
    """

    root: Path
    attempts: list[Record] = field(default_factory=list)
    holder: Holder | None = None
    holder_state: State = "gone"
    ranks: list[Rank] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)
    checkpoint_age_s: float | None = None
    free_bytes: int = 0
    holder_age_s: float = 0.0

    @property
    def last(self) -> Record | None:
        """The latest attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def condition(self) -> Condition:
        """In one word; "lost" is a holder that died, or was not heard of for LOST_S, without a word from any rank."""
        is_silent = self.holder_state == "elsewhere" and self.holder_age_s > LOST_S
        is_gone = self.holder is None or self.holder.is_released or self.holder_state == "gone" or is_silent
        if not is_gone:
            return "running"
        if self.last is None:
            return "new"
        if self.last.outcome is None:
            return "lost"
        if self.last.code == ExitCode.DONE:
            return "finished"
        asked = (ExitCode.INTERRUPTED, ExitCode.PREEMPTED, ExitCode.TERMINATED)
        return "stopped" if self.last.code in asked else "failed"

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as anything tells."""
        steps = [rank.beat.note.step for rank in self.ranks]
        steps += [record.end_step or record.step for record in self.attempts[-1:]]
        return max(steps, default=0)


def is_run(root: Path) -> bool:
    """Whether a folder looks like a run directory."""
    return any((root / name).exists() for name in _TRACES)


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it is a run, else the runs in it, by name.

    Raises:
        UsageError: there is none.
    """
    if is_run(folder):
        return [folder]
    found = sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path)) if folder.is_dir() else []
    if not found:
        raise UsageError(f"{folder} is no run directory and holds none; give the --run_dir of a mirrorla fit")
    return found


def examine(root: Path) -> Health:
    """Read everything cheap about a run; checkpoints are listed and not verified."""
    now_s = file_clock(root)
    holder = read_holder(root)
    checkpoints = list_checkpoints(root / "checkpoints")
    return Health(
        root=root,
        attempts=read_attempts(root),
        holder=holder,
        holder_state="elsewhere" if holder is None or holder.process is None else holder.process.state(),
        ranks=[_rank(root, beat, now_s) for beat in read_beats(root)],
        checkpoints=checkpoints,
        checkpoint_age_s=_age_s(checkpoints[-1], now_s) if checkpoints else None,
        free_bytes=shutil.disk_usage(root).free,
        holder_age_s=0.0 if holder is None else _age_s(holder.file(root), now_s),
    )


def file_clock(folder: Path) -> float:
    """The time that the folder's file system gives a file written now, in seconds; this machine's where it may not."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as file:
            return Path(file.name).stat().st_mtime
    except OSError:
        return time.time()


def activity(health: Health) -> str:
    """One sentence: what the run is doing, or how it ended."""
    last, condition = health.last, health.condition
    if condition == "running":
        slowest = min(health.ranks, key=lambda rank: rank.beat.note.order, default=None)
        where = f" {slowest.beat}" if slowest else ""
        return f"running as {health.holder}:{where or ' starting'}"
    if last is None:
        return "nothing was trained here yet"
    if condition == "lost":
        return f"lost: attempt {last.number} ended without a word at step {health.step}"
    if condition == "finished":
        return f"finished at step {health.step}"
    how = last.reason if last.code is None else describe(last.code)
    return f"{condition} at step {health.step}: {how}"


def _rank(root: Path, beat: Beat, now_s: float) -> Rank:
    return Rank(beat, beat.process.state(), _age_s(file_of(folder_of(root), beat.rank), now_s))


def _age_s(path: Path, now_s: float) -> float:
    try:
        return max(0.0, now_s - path.stat().st_mtime)
    except OSError:
        return 0.0
