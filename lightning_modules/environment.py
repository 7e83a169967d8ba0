"""What a run ran on: versions, devices, git state and command, with secrets removed."""

import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("mirrorla", "torch", "torchvision", "triton", "lightning", "timm", "torchmetrics", "webdataset", "numpy")
_VARIABLES = re.compile(r"(SLURM|CUDA|NCCL|GLOO|OMP|MASTER|WORLD|RANK|LOCAL|TORCH|TRITON|HF|PL|DS)_\w+|WORLD_SIZE|RANK")
_SECRET_NAME = re.compile(r"token|secret|passw|api_?key|access_?key|private_?key|credential|auth", re.IGNORECASE)
_SWITCH = "(?:true|false|null)"  # cannot be a secret, as the value of host.class_token
_SECRET_OPTION = re.compile(
    rf"(--[\w.\-]*(?:{_SECRET_NAME.pattern})[\w.\-]*)(=| )(?!{_SWITCH}(?:\s|$))(\S+)", re.IGNORECASE
)
_SECRET_KEY = re.compile(
    rf"^([+\-\s]*[\w.\-]*(?:{_SECRET_NAME.pattern})[\w.\-]*:[ ]+)(?!{_SWITCH}\s*$)(\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_SECRET_STRING = re.compile(
    rf"([\w.\-]*(?:{_SECRET_NAME.pattern})[\w.\-]*[\"']?\s*[:=]\s*)([\"'])[^\"'\n]+\2", re.IGNORECASE
)
_URL_LOGIN = re.compile(r"(\w+://)[^/\s:@]+:[^/\s@]+@")
_HIDDEN = "<redacted>"
MAX_DIFF = 1 << 18


def redact(text: str) -> str:
    """Hide passwords in URLs, and values of options, YAML keys and quoted strings whose name sounds secret.

    True, false and null stay.

    Args:
        text: a command line, YAML, JSON, source code, or a diff of these.
    """
    text = _SECRET_OPTION.sub(rf"\1\2{_HIDDEN}", _URL_LOGIN.sub(rf"\1{_HIDDEN}@", text))
    text = _SECRET_STRING.sub(rf"\1\2{_HIDDEN}\2", text)
    return _SECRET_KEY.sub(rf"\1{_HIDDEN}", text)


def redact_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Keep the variables that steer a run; hide the values of those whose name sounds secret."""
    kept = {name: value for name, value in sorted(variables.items()) if _VARIABLES.fullmatch(name)}
    return {name: _HIDDEN if _SECRET_NAME.search(name) else redact(value) for name, value in kept.items()}


def describe_environment(argv: Sequence[str]) -> dict[str, Any]:
    """Everything needed to tell two runs apart, in plain types.

    Args:
        argv: the command line, program first.

    Returns:
        command, python, platform, host, packages, devices, git and variables.
    """
    return {
        "command": redact(" ".join(argv)),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "git": _git_state(),
        "variables": redact_variables(os.environ),
    }


def uncommitted_changes() -> str | None:
    """What the checkout this code runs from has on top of its commit, secrets hidden; None where nothing or no git.

    At most MAX_DIFF characters: what grew beyond that is a commit that was not made.
    """
    changes = _git("diff", "HEAD", "--", ".") if _git_state()["clean"] is False else None
    if not changes:
        return None
    changes = redact(changes)
    return changes if len(changes) <= MAX_DIFF else f"{changes[:MAX_DIFF]}\n[{len(changes) - MAX_DIFF} more characters]"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any]:
    """Commit and cleanliness of the checkout this code runs from; nulls where git does not track this very file."""
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    commit = _git("rev-parse", "HEAD") if tracked else None
    changed = _git("status", "--porcelain") if commit else None
    return {"commit": commit, "clean": None if changed is None else changed == ""}


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
