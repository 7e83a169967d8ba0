"""The ledger: what every rank trained on, line by line, in files that survive a kill; a debugging aid.

With MIRRORLA_LEDGER_DIR set, every rank appends one line for each batch it has trained on:

    STEP EPOCH ID,ID,... LOSS

STEP counts the global batches since the beginning of the run (from 0), EPOCH is the trainer's, the ids are this rank's
samples in batch order and LOSS is its loss as float.hex, so that two runs can be compared bit for bit. Every attempt
has its own file per rank, attempt_0001.rank_00000.ledger. The lines up to a checkpoint, followed by those of the
attempt that resumed it, must be the lines of the uninterrupted run. The loss is fetched from the device at every step,
which costs a synchronisation: not for production runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

LEDGER_VARIABLE = "MIRRORLA_LEDGER_DIR"

_FILE = re.compile(r"attempt_(\d{4,})\.rank_(\d{5,})\.ledger")


class Entry(NamedTuple):
    """One rank's share of one global batch: batches before it, epoch, sample ids and loss."""

    step: int
    epoch: int
    ids: tuple[int, ...]
    loss: float


def format_entry(entry: Entry) -> str:
    """The line of an entry, line feed included."""
    return f"{entry.step} {entry.epoch} {','.join(map(str, entry.ids))} {float(entry.loss).hex()}\n"


def parse_entries(text: str) -> list[Entry]:
    """The entries of a file; a last line without its line feed was cut short by a kill and is left out."""
    rows = [line.split(" ") for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [
        Entry(int(step), int(epoch), tuple(map(int, ids.split(","))), float.fromhex(loss))
        for step, epoch, ids, loss in rows
    ]


def ledger_folder() -> Path | None:
    """The folder named by MIRRORLA_LEDGER_DIR; None if there shall be no ledger."""
    folder = os.environ.get(LEDGER_VARIABLE)
    return Path(folder) if folder else None


def next_attempt(names: Iterable[str]) -> int:
    """The number of the attempt after those whose files have these names; the first is 1."""
    return 1 + max((int(match[1]) for name in names if (match := _FILE.fullmatch(name))), default=0)


def ledger_file(folder: Path, attempt: int, rank: int) -> Path:
    """Where one rank writes in one attempt."""
    return folder / f"attempt_{attempt:04d}.rank_{rank:05d}.ledger"


def read_attempt(folder: Path, attempt: int) -> list[list[Entry]]:
    """The entries of an attempt, rank by rank."""
    paths = sorted(path for path in folder.iterdir() if (m := _FILE.fullmatch(path.name)) and int(m[1]) == attempt)
    return [parse_entries(path.read_text()) for path in paths]


class Ledger:
    """One rank's file of one attempt; every entry is one write, so a killed process leaves whole lines.

    Args:
        path: a new file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def append(self, step: int, epoch: int, ids: Sequence[int], loss: float) -> None:
        """Write one entry."""
        os.write(self._descriptor, format_entry(Entry(step, epoch, tuple(ids), loss)).encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
