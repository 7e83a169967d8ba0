"""Checkpoints of one process and of DDP: the weights as safetensors, everything else as tensors and plain values.

A snapshot is taken on the training thread and costs one copy of the state in main memory; everything after it can
happen on another thread.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.serialization import config

from lightning_modules.commit import flush, hash_file, sync_file
from lightning_modules.fault_points import reach
from lightning_modules.manifest import FileRecord

WEIGHTS = "model.safetensors"
STATE = "state.pt"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full or broken disk raises, through Python, torch or safetensors."""


class HashingStream:
    """Hash what is written through it.

    Args:
        stream: where it goes.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, block: Any) -> int:
        """Write and hash one block of bytes."""
        view = memoryview(block).cast("B")
        self._digest.update(view)
        self._size += len(view)
        return self._stream.write(view)

    def flush(self) -> None:
        """Hand buffered bytes to the system."""
        self._stream.flush()

    @property
    def record(self) -> FileRecord:
        """Size and hash of what was written so far."""
        return FileRecord(self._size, self._digest.hexdigest())


class Snapshots:
    """Copies trees of dictionaries, lists and tuples, time and again into the same memory.

    Fresh memory costs eight times the copy itself (0.8 s against 0.1 s for 1.2 GB), as the system has to find and clear
    it; so what one snapshot took is kept for the next. For tensors of a GPU it is pinned: the transfer is faster.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def take(self, tree: Any) -> Any:
        """Copy a tree; its tensors become copies on the CPU, whatever they shared.

        Args:
            tree: its tensors may change as soon as this returns.

        Returns:
            The copy; valid until the next one is taken.
        """
        before, self._kept = self._kept, {}
        copy = self._copy(tree, (), before)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copy

    def _copy(self, value: Any, place: tuple[Any, ...], before: Mapping[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(value, Tensor):
            room = before.get(place)
            if room is None or room.shape != value.shape or room.dtype != value.dtype:
                room = torch.empty_like(value, device="cpu", requires_grad=False, pin_memory=value.is_cuda)
            self._kept[place] = room
            return room.copy_(value.detach(), non_blocking=value.is_cuda)
        if isinstance(value, Mapping):
            return {key: self._copy(part, (*place, key), before) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(part, (*place, index), before) for index, part in enumerate(value))
        return value


def snapshot(tree: Any) -> Any:
    """Copy a tree once, see Snapshots."""
    return Snapshots().take(tree)


def write_plain(folder: Path, checkpoint: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Write a snapshot's files and flush them to the disk.

    Args:
        folder: exists and is empty.
        checkpoint: Lightning's, of tensors that share nothing (see `snapshot`) and plain values.

    Returns:
        Name -> record of the files written.

    Raises:
        OSError, RuntimeError, SafetensorError: see WRITE_ERRORS.
    """
    weights = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    others = {name: value for name, value in checkpoint["state_dict"].items() if not isinstance(value, Tensor)}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    sync_file(folder / WEIGHTS)
    reach("checkpoint.after_weights")
    with (folder / STATE).open("xb") as stream:
        hashing = HashingStream(stream)
        # Nobody reads the archive's own checksums; making them takes half the time, and the interpreter's lock.
        with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            torch.save({**checkpoint, "state_dict": others}, cast(IO[bytes], hashing))
        flush(stream)
    reach("checkpoint.after_state")
    size = (folder / WEIGHTS).stat().st_size
    return {WEIGHTS: FileRecord(size, hash_file(folder / WEIGHTS)), STATE: hashing.record}


def read_plain(path: Path) -> dict[str, Any]:
    """Read what `write_plain` wrote, tensors on the CPU.

    Raises:
        ValueError: a file cannot be read as tensors and plain values.
    """
    content = load_values(path / STATE)
    try:
        weights = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path / WEIGHTS} cannot be read as tensors: {error}") from error
    if not isinstance(content, dict) or "global_step" not in content:
        raise ValueError(f"{path} is no training checkpoint; for plain weights use --model.backbone.pretrained")
    return {**content, "state_dict": {**weights, **content["state_dict"]}}


def load_values(path: Path) -> Any:
    """Read a torch file of tensors and plain values; nothing in it is ever executed.

    Raises:
        ValueError: it is damaged, or holds objects that would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint {path} cannot be read as tensors and plain values: {reason}") from error
