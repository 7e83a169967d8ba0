"""Checkpoint files of a run: committed through commit.py, named by step, ranked, read without executing anything.

Loading is always `weights_only=True`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO

from lightning_modules.commit import commit_file, commit_text

_STEP_FILE = re.compile(r"step_(\d{8,})\.ckpt")
_SCORES = "best.json"


class CommittedCheckpointIO(CheckpointIO):
    """Lightning's way to the disk, replaced by `commit_file` and a loader that never unpickles objects."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Commit a checkpoint under `path`."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        commit_file(target, lambda stream: torch.save(checkpoint, stream))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint onto the CPU, plain types and tensors only, whatever the caller asked for."""
        return load_plain(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, also when it is gone already."""
        Path(path).unlink(missing_ok=True)


def load_plain(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """Load a checkpoint of tensors and plain types.

    Args:
        path: a local file.
        lazily: map the tensors instead of reading them, to look at the rest only.

    Returns:
        The checkpoint, tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no checkpoint, is damaged, or holds objects that would run code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint {path} cannot be read as tensors and plain values: {reason}") from error
    if not isinstance(content, dict) or "global_step" not in content:
        raise ValueError(f"{path} is no training checkpoint; for plain weights use --model.backbone.pretrained")
    return content


def step_file(folder: Path, step: int) -> Path:
    """Name of the checkpoint taken after `step` optimizer steps."""
    return folder / f"step_{step:08d}.ckpt"


def step_of(path: Path) -> int:
    """Optimizer steps behind a checkpoint, from its name or else from its content."""
    match = _STEP_FILE.fullmatch(path.name)
    return int(match[1]) if match else int(load_plain(path, lazily=True)["global_step"])


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest step first; temporary files are not among them."""
    found = [path for path in folder.glob("step_*.ckpt") if _STEP_FILE.fullmatch(path.name)]
    return sorted(found, key=step_of)


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
