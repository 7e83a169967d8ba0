"""Which checkpoints of a run stay. Standard library only."""

import logging
from pathlib import Path
from typing import Protocol

from lightning_modules.checkpoint import (
    LATEST,
    Score,
    list_checkpoints,
    reversed_by_step,
    step_of,
    verify,
    write_scores,
)
from lightning_modules.commit import commit_text, discard, remove, sweep
from lightning_modules.fault_points import reach

_SUPERSEDED = ".superseded"
_log = logging.getLogger("mirrorla")


class Retention(Protocol):
    """The options that decide what stays: see CheckpointConfig."""

    @property
    def keep_last(self) -> int:
        """Newest checkpoints that stay."""

    @property
    def monitor(self) -> str:
        """The metric of the ranking."""


def prune(folder: Path, scores: list[Score], retention: Retention) -> None:
    """Commit the ranking and remove what is neither among the newest nor ranked.

    Args:
        folder: the run's checkpoints.
        scores: the ranking, best first.
        retention: how many stay.
    """
    if scores:
        write_scores(folder, retention.monitor, scores)
    for path in surplus(folder, {score.step for score in scores}, retention.keep_last):
        reach("checkpoint.before_removal")
        discard(path)


def surplus(folder: Path, ranked: set[int], keep_last: int, *, hashes: bool = False) -> list[Path]:
    """Checkpoints that need not stay, oldest first; damaged ones do not count among those that do.

    Args:
        folder: the run's checkpoints.
        ranked: steps that stay whatever their age.
        keep_last: number of newest steps that stay.
        hashes: read all files to find damage; otherwise it is found where a file is missing or of another size.
    """
    kept: set[int] = set()
    ranked_left, unneeded = set(ranked), []
    for path in reversed_by_step(folder):
        step = step_of(path)
        is_whole = _is_whole(path, hashes)
        if is_whole and step not in kept and (len(kept) < keep_last or step in ranked_left):
            ranked_left.discard(step)
            kept.add(step)
        elif is_whole or len(kept) >= keep_last:
            unneeded.append(path)
    return unneeded[::-1]


def tidy(folder: Path, step: int) -> set[int]:
    """Remove leftovers, and set aside checkpoints beyond `step`: a training that starts there replaces them.

    Returns:
        The steps of the checkpoints that remain.
    """
    for path in sweep(folder):
        _log.info("removed        %s, which an interrupted write left behind", path.name)
    remaining = set()
    for path in list_checkpoints(folder):
        if step_of(path) <= step:
            remaining.add(step_of(path))
            continue
        aside = path.with_name(path.name + _SUPERSEDED)
        remove(aside)
        path.rename(aside)
        _log.info("set aside      %s (training starts again from step %d)", path.name, step)
    if remaining:
        commit_text(folder / LATEST, list_checkpoints(folder)[-1].name + "\n")
    return remaining


def _is_whole(path: Path, hashes: bool) -> bool:
    try:
        verify(path, hashes=hashes)
    except (ValueError, OSError):
        return False
    return True
