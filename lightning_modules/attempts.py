"""The ledger of attempts: a line per start of a run, per end, and per skipped step, so that a restart can say why.

Standard library only. Of several ends of one attempt the first counts: it is nearest to the cause.
"""

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_NAME = "attempts.jsonl"


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        number: from 1.
        step: optimizer step it starts from.
        reason: how the attempt before it ended; "first start" for the first.
    """

    number: int
    step: int
    reason: str

    def __str__(self) -> str:
        """The sentence shown in the log and in TensorBoard."""
        job = os.environ.get("SLURM_JOB_ID")
        place = f"job {job}" if job else f"process {os.getpid()}"
        how = f"resumed at step {self.step}, reason: {self.reason}" if self.number > 1 or self.step else "started"
        return f"attempt {self.number}, {place}, {how}"


@dataclass(frozen=True)
class Record:
    """What the ledger says of one attempt.

    Attributes:
        number: from 1.
        step: optimizer step it started from.
        time: of its start, for people.
        host: rank 0's.
        pid: rank 0's.
        job: the batch system's number, if any.
        config: digest of its configuration.
        end_step: optimizer step at its end; None while it runs or if it was killed.
        outcome: how it ended; None while it runs or if it was killed.
        code: its exit code, likewise.
        rolled_back_to: step of the checkpoint that a restart goes on from, if it ended for that.
        skipped: steps skipped because of a loss or gradient that was not finite.
    """

    number: int
    step: int
    time: str = ""
    host: str = ""
    pid: int = 0
    job: str | None = None
    config: str = ""
    end_step: int | None = None
    outcome: str | None = None
    code: int | None = None
    rolled_back_to: int | None = None
    skipped: int = 0

    @property
    def reason(self) -> str:
        """How it ended, as the next attempt's reason."""
        return "killed or crashed" if self.outcome is None else self.outcome


def begin_attempt(root: Path, step: int, config: str = "") -> Attempt:
    """Append the start of an attempt to the run's ledger.

    Args:
        root: run directory.
        step: optimizer step the attempt starts from.
        config: digest of its configuration.

    Returns:
        The attempt, with the reason read from how the last one ended; without an end it was killed.
    """
    before = read_attempts(root)
    attempt = Attempt(before[-1].number + 1 if before else 1, step, before[-1].reason if before else "first start")
    row = {"event": "start", "attempt": attempt.number, "step": step, "pid": os.getpid(), "config": config}
    _append(root / _NAME, {**row, "job": os.environ.get("SLURM_JOB_ID")})
    return attempt


def end_attempt(
    root: Path,
    step: int,
    reason: str,
    code: int | None = None,
    *,
    attempt: int | None = None,
    rolled_back_to: int | None = None,
) -> None:
    """Append the end of an attempt.

    Args:
        root: run directory.
        step: optimizer steps done.
        reason: "completed", a signal's name, or what went wrong, in one line.
        code: exit code of the process.
        attempt: its number; None takes the latest.
        rolled_back_to: step of the checkpoint to go on from, if it ended for that.
    """
    row = {"event": "end", "attempt": attempt, "step": step, "reason": reason, "code": code}
    _append(root / _NAME, {**row, "rolled_back_to": rolled_back_to})


def note_skip(root: Path, step: int, what: str) -> None:
    """Append that the latest attempt skipped a step, and what was not finite."""
    _append(root / _NAME, {"event": "skip", "step": step, "what": what})


def read_attempts(root: Path) -> list[Record]:
    """Every attempt of a run, in order."""
    return _summarise(_read(root / _NAME))


def _summarise(rows: Iterable[dict[str, Any]]) -> list[Record]:
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        number = row.get("attempt") or max(found, default=0)
        if row["event"] == "start":
            keys = ("step", "time", "host", "pid", "job", "config")
            found[number] = {"number": number, "skipped": 0, **{key: row[key] for key in keys if key in row}}
        elif number in found and row["event"] == "skip":
            found[number]["skipped"] += 1
        elif number in found and "outcome" not in found[number]:
            ending = {"end_step": row["step"], "outcome": row["reason"], "code": row.get("code")}
            found[number] |= {**ending, "rolled_back_to": row.get("rolled_back_to")}
    return [Record(**found[number]) for number in sorted(found)]


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # a kill may cut the last line short; it says nothing we need
            continue
    return rows


def _append(path: Path, row: dict[str, Any]) -> None:
    """Append in one write, on a line of its own even after one that a kill cut short."""
    row = {**row, "time": datetime.now(UTC).isoformat(timespec="seconds"), "host": socket.gethostname()}
    with path.open("a+b") as stream:
        is_cut = stream.tell() > 0 and _last_byte(stream) != b"\n"
        stream.write((b"\n" if is_cut else b"") + json.dumps(row).encode() + b"\n")


def _last_byte(stream: Any) -> bytes:
    stream.seek(-1, os.SEEK_END)
    last: bytes = stream.read(1)
    return last
