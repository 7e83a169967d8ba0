"""What every benchmark shares: where its numbers come from, how it repeats, and how it writes them down."""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lightning_modules.errors import UsageError

RESULTS = Path(__file__).resolve().parent / "results"


def provenance(device: torch.device) -> dict[str, str]:
    """Commit, device and versions, to stand on every row of a result.

    Args:
        device: the device that is measured.

    Returns:
        Column names to values; the commit ends in "+" when the working tree differs from it.
    """
    return {
        "commit": _commit(),
        "device": _device_name(device),
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def chosen_device(name: str) -> torch.device:
    """The device to measure.

    Args:
        name: "cpu" or "cuda".

    Raises:
        UsageError: a GPU where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; choose --device cpu")
    return torch.device(name)


def numbers(text: str) -> list[int]:
    """Whole numbers by commas, from a command line.

    Raises:
        ArgumentTypeError: anything else.
    """
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers >= 1 by commas, such as 256,1024")
    return found


def measure(
    run: Callable[[], object], device: torch.device, *, budget_s: float = 2.0, max_repeats: int = 50
) -> list[float]:
    """Time a call after one warm-up, as often as fits into the budget, at least three times.

    A call that takes longer than four budgets is its own warm-up and timed once.

    Args:
        run: what to time.
        device: synchronised around each call.
        budget_s: seconds to spend.
        max_repeats: most repetitions.

    Returns:
        Seconds of each repetition.
    """
    first = _timed(run, device)
    if first > 4 * budget_s:
        return [first]
    repeats = min(max_repeats, max(3, int(budget_s / max(first, 1e-6))))
    return [_timed(run, device) for _ in range(repeats)]


def quantiles_ms(seconds: Sequence[float]) -> dict[str, str]:
    """The 20, 50 and 80 % quantiles in milliseconds, as CSV columns."""
    values = torch.tensor(seconds, dtype=torch.float64) * 1e3
    return {f"p{q}_ms": f"{values.quantile(q / 100).item():.3f}" for q in (20, 50, 80)}


def write_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows of equal columns.

    Args:
        path: the file; its folder is made.
        rows: at least one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, text=True).strip()
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=here, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
