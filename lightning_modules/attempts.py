"""The ledger of attempts: one line per start of a run and one per end, so that a restart can say why it happened."""

import json
import os
import socket
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


def begin_attempt(root: Path, step: int) -> Attempt:
    """Append the start of an attempt to the run's ledger.

    Args:
        root: run directory.
        step: optimizer step the attempt starts from.

    Returns:
        The attempt, with the reason read from how the last one ended; without an end it was killed.
    """
    rows = _read(root / _NAME)
    starts = [row for row in rows if row["event"] == "start"]
    if not starts:
        reason = "first start"
    elif rows[-1]["event"] == "start":
        reason = "killed or crashed"
    else:
        reason = rows[-1]["reason"]
    attempt = Attempt(len(starts) + 1, step, reason)
    _append(root / _NAME, {"event": "start", "attempt": attempt.number, "step": step})
    return attempt


def end_attempt(root: Path, step: int, reason: str) -> None:
    """Append the end of the current attempt: "completed", a signal's name, or an error's type."""
    _append(root / _NAME, {"event": "end", "step": step, "reason": reason})


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
    row = {**row, "time": datetime.now(UTC).isoformat(timespec="seconds"), "host": socket.gethostname()}
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
