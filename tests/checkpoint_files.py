"""Shared by the tests of checkpoint files: something to save, and manifests that were changed and sealed again."""

from dataclasses import replace

import torch

from lightning_modules.checkpoint import (
    read_manifest,
    step_path,
)
from lightning_modules.checkpoint_io import describe
from lightning_modules.commit import hash_file
from lightning_modules.manifest import MANIFEST, FileRecord, write_manifest
from lightning_modules.persist import Draft, commit_checkpoint
from lightning_modules.plain import snapshot, write_plain


def state(step=7):
    return {"global_step": step, "epoch": 1, "state_dict": {"w": torch.arange(3.0) + step}, "loops": {"a": [1, (2,)]}}


def save(folder, step=7, **beside):
    path, copy = step_path(folder, step), snapshot(state(step))
    draft = Draft(path, describe(step, 1, {"committed": step, "guard": {"seed": 0}}), lambda: 5, beside)
    commit_checkpoint(draft, lambda temporary: write_plain(temporary, copy))
    return path


def reseal(path, **changes):
    """A manifest that fits the folder's files, as somebody who tampers would write it."""
    manifest = replace(read_manifest(path), **changes)
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            files[file.relative_to(path).as_posix()] = FileRecord(file.stat().st_size, hash_file(file))
    (path / MANIFEST).unlink()
    write_manifest(path, replace(manifest, files=changes.get("files", files)))
