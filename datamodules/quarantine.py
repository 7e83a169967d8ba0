"""What happens to bad samples that are skipped: a list of them that all ranks and attempts share, and a budget.

A skipped sample still takes its place in its batch, as a zero image of weight 0. So every rank takes as many steps as
without the fault, and the gradient is that of the other samples' losses over the whole batch size, on any number of
ranks. quarantine.jsonl has one line for each bad sample, however often it comes up: split, sample, kind and what.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from datamodules.types import FAULT_KINDS, DataError, Fault, FaultKind

QUARANTINE_NAME = "quarantine.jsonl"

_log = logging.getLogger("mirrorla")


def skip_budget(max_skipped: float, num_samples: int) -> int:
    """How many different samples may be skipped.

    Args:
        max_skipped: a number, or below 1 a share of the training samples.
        num_samples: training samples.
    """
    return math.ceil(max_skipped * num_samples) if max_skipped < 1 else int(max_skipped)


def format_fault(split: str, fault: Fault) -> str:
    """The line of quarantine.jsonl, line feed included."""
    row = {"split": split, "sample": fault.sample, "kind": fault.kind, "what": fault.message}
    return json.dumps(row, ensure_ascii=False) + "\n"


def parse_faults(text: str) -> dict[tuple[str, int], FaultKind]:
    """Kind by split and sample; a line that a kill or a full disk has cut short is left out."""
    kinds: dict[tuple[str, int], FaultKind] = {}
    for line in text.splitlines():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            kinds[row["split"], row["sample"]] = row["kind"]
    return kinds


class Quarantine:
    """The bad samples of a run, as one rank knows them.

    Ranks append whole lines to the same file and read it again before they judge, so the budget is that of the run, and
    a resumed run goes on with it. To forget repaired samples, remove the file.

    Args:
        folder: where quarantine.jsonl lies; made when needed.
        budget: different samples that may be skipped.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.path = folder / QUARANTINE_NAME
        self.budget = budget
        self._kinds: dict[tuple[str, int], FaultKind] = {}
        self._size = 0

    def add(self, split: str, faults: Iterable[Fault]) -> None:
        """List faults that are not yet listed.

        Raises:
            DataError: more samples than the budget allows; names the last one.
        """
        self._read()
        for fault in faults:
            if (split, fault.sample) in self._kinds:
                continue
            self._append(format_fault(split, fault))
            self._read()
            _log.warning("skipped a sample  %s", fault.message)
            if len(self._kinds) > self.budget:
                raise DataError(
                    f"{len(self._kinds)} samples were bad and data.max_skipped allows {self.budget}; {self.path} lists "
                    f"them, the last: {fault.message}"
                )

    def counts(self) -> dict[FaultKind, int]:
        """Different samples skipped so far by all ranks and attempts, by kind."""
        self._read()
        found = Counter(self._kinds.values())
        return {kind: found[kind] for kind in FAULT_KINDS}

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, line.encode())  # one write: lines of several ranks do not mix
        finally:
            os.close(descriptor)

    def _read(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._size:
            self._kinds = parse_faults(self.path.read_text()) if size else {}
            self._size = size
