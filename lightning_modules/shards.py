"""What FSDP and DeepSpeed wrote, read as plain values only, gathered, and resharded.

Both libraries unpickle freely. Here torch is told to load weights only, whatever they ask for, with the three harmless
DeepSpeed classes that its files name; and the one file that bypasses torch, .metadata, is looked through first.
"""

import io
import os
import pickle
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from lightning_modules.plain import load_values

SHARDS = "sharded"
"""Folder inside a checkpoint where FSDP and DeepSpeed put their parts."""

TAG = "checkpoint"
"""Folder inside that one where DeepSpeed puts them."""

_DAMAGE = ("PytorchStreamReader", "nvalid magic number", "corrupt", "mmap can only be used")
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_METADATA = ".metadata"
_METADATA_CLASSES = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    ),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _METADATA_CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} is none of its classes")
        return super().find_class(module, name)


@contextmanager
def values_only(path: Path, kind: str) -> Iterator[None]:
    """Inside, both libraries can read a checkpoint's parts without executing anything in them.

    Args:
        path: the checkpoint directory.
        kind: "fsdp" or "deepspeed".

    Raises:
        ValueError: a part holds objects that would run code, or is damaged.
    """
    if kind == "fsdp":
        _check_metadata(path / SHARDS / _METADATA)
    else:
        _check_tag(path / SHARDS / "latest")
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_classes() if kind == "deepspeed" else []):
            yield
    except (pickle.UnpicklingError, EOFError, RuntimeError, CheckpointException) as error:
        reason = _fault(error)
        if reason is None:
            raise
        raise ValueError(f"checkpoint {path / SHARDS} cannot be read as tensors and plain values: {reason}") from error
    finally:
        if before is None:
            os.environ.pop(_FORCE, None)
        else:
            os.environ[_FORCE] = before


def _check_metadata(path: Path) -> None:
    """Look through the one file of FSDP that bypasses torch: it may name harmless classes only."""
    try:
        found = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(found, Metadata):
            raise TypeError(f"it holds {type(found).__name__} and no metadata")
    except Exception as error:
        raise ValueError(f"checkpoint {path} is refused: {error}") from error


def _check_tag(path: Path) -> None:
    """DeepSpeed opens the folder that this file names, wherever it is."""
    found = path.read_bytes()[:100]
    if found.strip() != TAG.encode():
        raise ValueError(f"checkpoint {path} is refused: it names {found!r} and not {TAG!r} beside it")


def _fault(error: BaseException) -> str | None:
    """What is wrong with a file, in one line; None if something else went wrong, such as a lost connection."""
    if isinstance(error, CheckpointException):  # of any rank
        faults = (_fault(found) for found, _ in error.failures.values())
        return next((fault for fault in faults if fault is not None), None)
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    is_file = not isinstance(error, RuntimeError) or any(word in text for word in _DAMAGE)
    return text if is_file and isinstance(error, (pickle.UnpicklingError, EOFError, RuntimeError)) else None


def gather(path: Path, kind: str) -> dict[str, Any]:
    """One Lightning checkpoint of whole weights, on the CPU, from the parts of all ranks; no optimizer state.

    Args:
        path: a verified checkpoint directory.
        kind: "fsdp" or "deepspeed".

    Raises:
        ValueError: see values_only.
    """
    with values_only(path, kind):
        return _gather_fsdp(path / SHARDS) if kind == "fsdp" else _gather_deepspeed(path / SHARDS)


def make_universal(path: Path, out: Path) -> None:
    """Convert DeepSpeed's parts into its universal form, which any number of ranks loads.

    Args:
        path: a verified checkpoint directory.
        out: a new folder for it, as large as the checkpoint.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    out.mkdir(parents=True)
    options = {"input_folder": str(path / SHARDS / TAG), "output_folder": str(out / TAG)}
    switches = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    # One worker is this process: another would not know that it must load weights only.
    with values_only(path, "deepspeed"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        main(Namespace(**options, **switches, num_extract_workers=1, num_merge_workers=1))


def _gather_fsdp(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys={"state_dict"})
    _load_state_dict(state, storage_reader=FileSystemReader(folder), planner=planner, no_dist=True)
    if "state_dict" not in state:
        raise ValueError(f"checkpoint {folder} holds no weights: it is damaged; take the one before it")
    return {**load_values(folder / "meta.pt"), "state_dict": state["state_dict"]}


def _gather_deepspeed(folder: Path) -> dict[str, Any]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        trained: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    state = load_values(sorted((folder / TAG).glob("*mp_rank_00_model_states.pt"))[0])
    # What is not trained, the averaged copy for example, lies there as it is; a divided parameter is an empty tensor.
    whole = {name: tensor for name, tensor in state.pop("module").items() if tensor.numel()}
    buffers = {name: whole[name] for name in state.get("buffer_names") or [] if name in whole}
    return {**state, "state_dict": {**whole, **trained, **buffers}}


def _deepspeed_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler]
