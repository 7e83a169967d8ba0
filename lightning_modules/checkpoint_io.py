"""Lightning's way to the disk for checkpoints of one process and of DDP, through the commit protocol."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO

from lightning_modules.checkpoint import load_plain
from lightning_modules.commit import discard
from lightning_modules.manifest import Manifest
from lightning_modules.persist import Draft, commit_checkpoint
from lightning_modules.plain import snapshot, write_plain


class CommittedCheckpointIO(CheckpointIO):
    """Checkpoint directories that are committed or absent, and a loader that never unpickles objects."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Commit a checkpoint under `path`, which must not exist; returns when it is on the disk."""
        copy = snapshot(checkpoint)
        manifest = describe(int(copy["global_step"]), int(copy.get("epoch", 0)), None)
        commit_checkpoint(Draft(Path(path), manifest), lambda folder: write_plain(folder, copy))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load rank 0's choice of a checkpoint onto the CPU, plain types only, whatever the caller asked for."""
        return load_plain(agreed(Path(path)))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, also when it is gone already."""
        if Path(path).exists():
            discard(Path(path))


def agreed(path: Path) -> Path:
    """Rank 0's path on all ranks: each looked for the newest checkpoint itself, and only rank 0 read all of it."""
    if not torch.distributed.is_initialized():
        return path
    choice = [str(path)]
    torch.distributed.broadcast_object_list(choice, src=0)
    return Path(choice[0])


def describe(step: int, epoch: int, position: Any, strategy: str = "plain") -> Manifest:
    """A manifest without files.

    Args:
        step: optimizer steps done.
        epoch: epochs begun, from 0.
        position: state of the data module.
        strategy: see Manifest.
    """
    is_ours = isinstance(position, Mapping) and position.keys() >= {"committed", "guard"}
    guard = dict(position["guard"]) if is_ours else {}
    return Manifest(
        step=step,
        epoch=epoch,
        world_size=torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        strategy=strategy,
        order={"committed": int(position["committed"]), "guard": guard} if is_ours else None,
        dataset_digest=guard.get("dataset_digest"),
        config_sha256=None,
        git=None,
        attempt=0,
        token=0,
        files={},
    )
