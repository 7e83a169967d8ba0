"""One save of a run: behind the training's back by rank 0 alone, or under FSDP and DeepSpeed by all ranks together."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.distributed.checkpoint.api import CheckpointException

from lightning_modules.attempts import read_attempts
from lightning_modules.checkpoint import list_checkpoints, next_path
from lightning_modules.checkpoint_io import describe
from lightning_modules.commit import hash_file, remove, sync_file, temporary
from lightning_modules.environment import uncommitted_changes
from lightning_modules.fault_points import reach
from lightning_modules.manifest import FileRecord
from lightning_modules.persist import Background, Draft, commit_checkpoint, seal, text_hash
from lightning_modules.plain import WRITE_ERRORS, Snapshots, write_plain
from lightning_modules.run_directory import RunDirectory
from lightning_modules.shards import SHARDS
from lightning_modules.strategies import kind_of

_log = logging.getLogger("mirrorla")


@dataclass(frozen=True)
class Provenance:
    """What stands beside every checkpoint of an attempt.

    Attributes:
        attempt: its number.
        git: commit of the code, if known.
        texts: config.yaml, environment.json and changes.diff, secrets hidden; name -> text.
    """

    attempt: int = 0
    git: str | None = None
    texts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunDirectory) -> "Provenance":
        """Read what this attempt has recorded in its run directory."""
        texts = {path.name: path.read_text() for path in (run.config, run.environment) if path.is_file()}
        if changes := uncommitted_changes():
            texts["changes.diff"] = changes
        environment = json.loads(texts.get(run.environment.name, "{}"))
        attempts = read_attempts(run.root)
        return cls(attempts[-1].number if attempts else 0, environment.get("git", {}).get("commit"), texts)


class Saver:
    """Writes checkpoints and remembers how it went.

    Args:
        run: the run directory.
        asynchronous: write behind the training's back where one process holds the whole state.
        token: gives the fencing token of the run's lease; raises when the lease is lost.
    """

    def __init__(self, run: RunDirectory, asynchronous: bool, token: Callable[[], int]) -> None:
        self._run = run
        self._asynchronous = asynchronous
        self._token = token
        self._background = Background()
        self._snapshots = Snapshots()
        self.provenance = Provenance()
        self.num_failures = 0
        """Saves that failed since the last one that did not."""

    def save(self, trainer: Trainer, after: Callable[[], None]) -> None:
        """Save the state as it is now; every rank calls it at the same step.

        A save that comes due while the one before is still being written waits for it: which steps have a checkpoint
        does then not depend on the speed of a disk.

        Args:
            trainer: between two steps.
            after: called on rank 0, perhaps on another thread, once the checkpoint is committed.
        """
        reach("checkpoint.due")
        kind = kind_of(trainer.strategy)
        if kind != "plain":
            self._save_sharded(trainer, kind, after)
            return
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if trainer.is_global_zero:
            self.settle()  # also keeps at most one snapshot in memory
            copy = self._snapshots.take(state)
            reach("checkpoint.after_snapshot")
            draft = self._draft(trainer, kind)

            def write() -> None:
                commit_checkpoint(draft, lambda folder: write_plain(folder, copy))
                after()

            self._background.start(write)
            if not self._asynchronous:
                self.settle()

    def settle(self) -> None:
        """Wait for what is under way and take note of how it went."""
        waited_s = self._background.wait()
        if self._asynchronous and waited_s > 1:
            _log.info("checkpoint     waited %.1f s until the one before was written", waited_s)
        self.notice()

    def notice(self) -> None:
        """Take note of how the last save went, if it has ended; costs nothing.

        Raises:
            Exception: it failed for another reason than the disk, for example a lost lease.
        """
        for error in self._background.take_outcomes():
            self._count(error)

    def abandon(self) -> None:
        """Wait for what is under way, whatever comes of it."""
        self._background.wait()
        self._background.take_outcomes()

    def _save_sharded(self, trainer: Trainer, kind: str, after: Callable[[], None]) -> None:
        draft = self._draft(trainer, kind)
        folder = Path(trainer.strategy.broadcast(str(temporary(draft.path))))
        first, files = trainer.is_global_zero, dict[str, FileRecord]()

        def share() -> None:
            files.update(_record_share(folder, trainer))

        def collect() -> None:
            for part in _gather(files):
                files.update(part)

        def finish() -> None:
            seal(folder, draft, files)
            after()

        error = _agree(_try(lambda: _make_room(folder), first))
        error = error or _agree(_try(lambda: trainer.save_checkpoint(folder / SHARDS)))
        error = error or _agree(_try(share))
        error = error or _agree(_try(collect))
        error = error or _agree(_try(finish, first))
        if error is not None and trainer.is_global_zero:
            remove(folder)
        self._count(error)

    def _count(self, error: BaseException | None) -> None:
        if error is None:
            self.num_failures = 0
        elif isinstance(error, WRITE_ERRORS):
            self.num_failures += 1
            stands = list_checkpoints(self._run.checkpoints)
            _log.warning(
                "checkpoint     could not be written (%s), failure %d in a row; %s; trying again at the next one",
                " ".join(str(error).split()) or type(error).__name__,
                self.num_failures,
                f"{stands[-1].name} stands" if stands else "there is none yet",
            )
        else:
            raise error

    def _draft(self, trainer: Trainer, kind: str) -> Draft:
        data = trainer.datamodule  # type: ignore[attr-defined]
        texts = self.provenance.texts
        config = texts.get(self._run.config.name)
        manifest = replace(
            describe(trainer.global_step, trainer.current_epoch, data and data.state_dict(), kind),
            config_sha256=None if config is None else text_hash(config),
            git=self.provenance.git,
            attempt=self.provenance.attempt,
        )
        self._run.checkpoints.mkdir(parents=True, exist_ok=True)
        path = next_path(self._run.checkpoints, trainer.global_step)
        return Draft(path, manifest, self._token, texts)


def _make_room(folder: Path) -> None:
    """Refuse before all ranks write what will not fit: one that fails alone leaves the others waiting."""
    folder.mkdir(mode=0o700)
    reach("checkpoint.begin")
    before = list_checkpoints(folder.parent)
    needed = sum(path.stat().st_size for path in before[-1].rglob("*") if path.is_file()) if before else 0
    if (free := shutil.disk_usage(folder).free) < needed:
        text = f"{os.strerror(errno.ENOSPC)}: {free >> 20} MiB free, the one before took {needed >> 20} MiB"
        raise OSError(errno.ENOSPC, text)


def _try(step: Callable[[], None], is_mine: bool = True) -> Exception | None:
    try:
        if is_mine:
            step()
    except WRITE_ERRORS as error:
        return error
    except CheckpointException as failed:  # FSDP's: what ranks could not write, told to all of them
        first = next(iter(failed.failures.values()))[0]
        if not isinstance(first, WRITE_ERRORS):
            raise
        return first
    return None


def _record_share(folder: Path, trainer: Trainer) -> dict[str, FileRecord]:
    """Flush what this node wrote and hash this rank's share of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if trainer.local_rank == 0:
        for path in files:
            sync_file(path)
    reach("checkpoint.after_shards")
    share = files[trainer.global_rank :: trainer.world_size]
    return {path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, hash_file(path)) for path in share}


def _agree(error: Exception | None) -> Exception | None:
    """The first rank's error on all ranks; also a barrier."""
    return next((found for found in _gather(error) if found is not None), None)


def _gather(value: Any) -> list[Any]:
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
