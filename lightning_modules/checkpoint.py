"""The checkpoints of a run: listed by step, verified newest first, ranked, read without executing anything.

A checkpoint is a directory step_<step> that appeared by one rename, complete:

    model.safetensors, state.pt        the weights, and all the rest; or
    sharded/                           what FSDP or DeepSpeed wrote, one part per rank
    config.yaml, environment.json, changes.diff
    MANIFEST.json                      size and hash of every file, see manifest.py

LATEST beside them names the newest one, for people: nothing relies on it. Standard library only, except for
`load_plain`.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_modules.commit import commit_text
from lightning_modules.manifest import Manifest as Manifest
from lightning_modules.manifest import folder_name, step_and_version
from lightning_modules.manifest import read_manifest as read_manifest
from lightning_modules.manifest import step_of as step_of
from lightning_modules.manifest import verify as verify

LATEST = "LATEST"
_SCORES = "best.json"
_log = logging.getLogger("mirrorla")


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest step first; of one step written again the newest version comes last."""
    if not folder.is_dir():
        return []
    found = {path: place for path in folder.iterdir() if (place := step_and_version(path.name)) and path.is_dir()}
    return sorted(found, key=found.__getitem__)


def newest_valid(folder: Path, *, hashes: bool = True) -> Path | None:
    """The checkpoint with the highest step that verifies; every newer one that does not is named in a warning.

    Args:
        folder: the run's checkpoint folder.
        hashes: see `verify`.
    """
    return first_valid(reversed_by_step(folder), hashes=hashes)


def reversed_by_step(folder: Path) -> list[Path]:
    """Committed checkpoints of a run, newest first."""
    return list_checkpoints(folder)[::-1]


def first_valid(candidates: list[Path], *, hashes: bool = True) -> Path | None:
    """The first of these checkpoints that verifies; those before it are named in a warning each."""
    for path in candidates:
        try:
            verify(path, hashes=hashes)
        except (ValueError, OSError) as error:
            _log.warning("refused        %s; falling back to the checkpoint before it", error)
        else:
            return path
    return None


def find(folder: Path, step: int) -> Path | None:
    """The newest version of the checkpoint after `step` optimizer steps, if there is one."""
    return next((path for path in reversed_by_step(folder) if step_of(path) == step), None)


def next_path(folder: Path, step: int) -> Path:
    """A name for the checkpoint after `step` optimizer steps that no committed one has."""
    versions = [place[1] for path in folder.iterdir() if (place := step_and_version(path.name)) and place[0] == step]
    return folder / folder_name(step, max(versions, default=0) + 1)


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies, unless it was written again."""
    return folder / folder_name(step)


def read_latest(path: Path) -> Path:
    """The checkpoint that a LATEST file names.

    Raises:
        ValueError: it is a symbolic link, or names anything but a checkpoint beside itself.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link, which is never followed; give the checkpoint's directory")
    name = path.read_bytes()[:100].decode(errors="replace").strip()
    if step_and_version(name) is None:
        raise ValueError(f"{path} names {name!r}, which is no checkpoint beside it; give the checkpoint's directory")
    return path.with_name(name)


def load_plain(path: Path) -> dict[str, Any]:
    """Verify a checkpoint and load it whole, tensors on the CPU.

    Args:
        path: the directory. Of a sharded one the weights are gathered, so that it can be evaluated anywhere; its
            optimizer state stays out.

    Returns:
        Lightning's checkpoint.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: it is no checkpoint, is damaged, or holds objects that would run code.
    """
    manifest = verify(path)
    if manifest.strategy == "plain":
        from lightning_modules.plain import read_plain

        return read_plain(path)
    from lightning_modules.shards import gather

    return gather(path, manifest.strategy)


@dataclass(frozen=True)
class Score:
    """One evaluated checkpoint: its optimizer step and the value of the monitored metric."""

    step: int
    value: float


def read_scores(folder: Path) -> list[Score]:
    """The ranking of a run's checkpoints, best first; empty when nothing was evaluated yet."""
    path = folder / _SCORES
    if not path.is_file():
        return []
    return [Score(int(row["step"]), float(row["value"])) for row in json.loads(path.read_text())["best"]]


def write_scores(folder: Path, metric: str, scores: list[Score]) -> None:
    """Commit the ranking, best first."""
    text = json.dumps({"metric": metric, "best": [{"step": s.step, "value": s.value} for s in scores]}, indent=2)
    commit_text(folder / _SCORES, text + "\n")


def rank_scores(scores: list[Score], new: Score, *, keep: int, maximise: bool) -> list[Score]:
    """Insert a score into a ranking.

    Args:
        scores: the ranking so far, best first.
        new: the latest score; it replaces one of the same step.
        keep: length of the ranking.
        maximise: whether higher is better.

    Returns:
        The new ranking, best first; of equal values the earlier step wins.
    """
    sign = -1 if maximise else 1
    others = [score for score in scores if score.step != new.step]
    return sorted([*others, new], key=lambda score: (sign * score.value, score.step))[:keep]
