"""Start from weights in a file, and say exactly what fitted and what did not."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_log = logging.getLogger(__name__)
_WRAPPERS = ("_orig_mod.", "module.", "model.")
# Of a training checkpoint, from the outside in: where one is present, only what lies in it is the network.
_PARTS = ("ema.module.", "network.", "backbone.", "trunk.", "body.")
# Parts whose shape follows the task: they may differ or be absent; everything else must fit.
_TASK_PARTS = ("head.", "norms.", "fc.", "classifier.")


@dataclass(frozen=True)
class KeyReport:
    """What loading a checkpoint did.

    Attributes:
        loaded: number of tensors taken over.
        missing: names in the model that the file lacks; they keep their start.
        unexpected: names in the file that the model lacks.
        mismatched: "name: file shape, model shape" of tensors left out because their shapes differ.
    """

    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors loaded"]
        for label in ("missing", "unexpected", "mismatched"):
            names = getattr(self, label)
            if names:
                rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
                parts.append(f"{len(names)} {label} ({', '.join(names[:3])}{rest})")
        return "; ".join(parts)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a .safetensors file, or a torch checkpoint of weights, without ever unpickling objects.

    Args:
        path: the file, the directory of a training checkpoint, or that of a run, whose newest checkpoint is taken. Of
            a checkpoint the averaged weights are taken if it has them, else the model's.

    Returns:
        Names, without the prefixes of wrappers and of this project's training modules, to tensors on the CPU; of a
        detector or segmenter the backbone's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds pickled objects, or no weights.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_of_checkpoint(path)
    if not path.is_file():
        raise FileNotFoundError(f"pretrained weights {str(path)!r} do not exist: give a .safetensors or .pt file")
    state = _load_file(path)
    for key in ("ema_state_dict", "state_dict_ema", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    if not tensors:
        raise ValueError(f"pretrained weights {str(path)!r} hold no tensors: export them with safetensors")
    tensors = {_unwrapped(name): tensor for name, tensor in tensors.items()}
    for part in _PARTS:
        chosen = {_unwrapped(name.removeprefix(part)): t for name, t in tensors.items() if name.startswith(part)}
        tensors = chosen or tensors
    return tensors


def load_pretrained(
    model: nn.Module, path: str | Path, own_name: Callable[[str], str] = lambda name: name
) -> KeyReport:
    """Load weights strictly, except for the parts that belong to the task.

    A classifier of another class count, a missing classifier or missing dense norms keep their start; any other
    difference means another architecture and is refused.

    Args:
        model: changed in place.
        path: a .safetensors or torch file of weights.
        own_name: how the model calls what the file calls so.

    Returns:
        What was loaded and what was not; also logged.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the weights are of another variant; the first differing tensor is named.
    """
    weights = {own_name(name): tensor for name, tensor in read_weights(path).items()}
    own = model.state_dict()
    shared = {name for name in weights if name in own}
    mismatched = sorted(name for name in shared if weights[name].shape != own[name].shape)
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    for problem, names in (("differs in shape", mismatched), ("is missing", missing), ("is unknown here", unexpected)):
        wrong = [name for name in names if not name.startswith(_TASK_PARTS)]
        if wrong:
            sizes = f" ({_shape(weights, wrong[0])} in the file, {_shape(own, wrong[0])} in the model)"
            raise ValueError(
                f"{str(path)!r} is a checkpoint of another model: {wrong[0]} {problem}{sizes}, and "
                f"{len(wrong) - 1} more tensors; choose the variant and mirror options it was trained with"
            )
    model.load_state_dict({name: weights[name] for name in shared.difference(mismatched)}, strict=False)
    report = KeyReport(
        loaded=len(shared) - len(mismatched),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=tuple(f"{name}: {_shape(weights, name)}, {_shape(own, name)}" for name in mismatched),
    )
    _log.info("%s: %s", path, report)
    return report


def _weights_of_checkpoint(folder: Path) -> Path:
    """The weights of a training checkpoint of this project, or of a run's newest, compared with its manifest's hash."""
    latest = folder / "checkpoints" / "LATEST"
    if latest.is_file():
        folder = latest.parent / Path(latest.read_text().strip()).name
    weights = folder / "model.safetensors"
    try:
        files = json.loads((folder / "MANIFEST.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"pretrained weights {str(folder)!r} are a directory, but neither a training checkpoint nor a run"
        ) from error
    if weights.name not in files:
        raise ValueError(
            f"checkpoint {str(folder)!r} is divided among ranks; gather it first: "
            f"mirrorla checkpoints {folder} --convert OUT.safetensors"
        )
    with weights.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != files[weights.name]["sha256"]:
        raise ValueError(f"checkpoint {str(folder)!r} is damaged: {weights.name} has sha256 {found}; take another one")
    return weights


def _load_file(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes fail anywhere inside a parser, with KeyError or struct.error
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"pretrained weights {str(path)!r} are damaged or hold more than tensors, and are refused "
            f"({type(error).__name__}: {reason}): export them with safetensors"
        ) from error


def _unwrapped(name: str) -> str:
    while prefix := next((p for p in _WRAPPERS if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return "x".join(str(size) for size in tensors[name].shape) or "scalar" if name in tensors else "absent"
