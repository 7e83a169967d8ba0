"""What a job would be, from its settings alone: arithmetic and forecast. Pure; what cannot work is in refusals.py."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import SlurmConfig, seconds
from cluster.training import Training

GIB = 2**30
WRITE_GIB_S = 0.5
"""Stated, not measured: what a shared file system takes from one process."""


@dataclass(frozen=True)
class Sizes:
    """What a model weighs.

    Attributes:
        parameters: values that are trained.
        activation_bytes: that the forward pass of one of the largest training samples keeps for the backward pass;
            None: not measured.
        size: height and width of such a sample in pixels.
        samples_per_s: that one device trains; None: not measured.
        measured_on: the device and its settings, where measured.
        why_not: why nothing but the parameters is known, if so.
    """

    parameters: int
    activation_bytes: int | None = None
    size: tuple[int, int] = (0, 0)
    samples_per_s: float | None = None
    measured_on: str = ""
    why_not: str = ""


def samples_in(training: Training, folder: Path) -> int | None:
    """Training samples as the dataset's own description says; None where it cannot be read here."""
    path = training.text("data.path")
    try:
        content: Mapping[str, Any] = json.loads((folder / (path or "") / "dataset.json").read_text())
        return int(content["splits"]["train"]["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def arithmetic(training: Training, config: SlurmConfig, samples: int | None) -> list[tuple[str, str]]:
    """Label and text of what follows from the settings."""
    world, workers = config.world_size, training.whole("data.num_workers", 0)
    batch, accumulate = training.number("data.batch_size"), training.whole("trainer.accumulate_grad_batches", 1)
    gpus, processes = _many(config.gpus_per_node, "GPU"), f"{config.num_tasks_per_node} on CPUs"
    device = gpus if config.gpus_per_node else processes
    rows = [
        (
            "processes",
            f"{world}: {_many(config.nodes, 'node')} x {device}; {_many(config.cpus_per_task, 'core')} and "
            f"{_many(workers, 'worker')} each",
        ),
        ("strategy", f"{training.strategy}, precision {training.text('trainer.precision', '32-true')}"),
    ]
    if batch is not None:
        below, over = divmod(int(batch), world)
        share = f"{below}" if not over else f"{below} or {below + 1}, weighted"
        even = "" if not over else f"; even: {below * world} or {(below + 1) * world}"
        step = f", {accumulate} batches a step" if accumulate > 1 else ""
        rows.append(("batch", f"{int(batch)} samples, {share} a process{even}{step}"))
    if batch is not None:
        rows.append(("epoch", _epoch(training, int(batch), samples)))
    lead = f"told to save {config.signal_lead_s} s before the end"
    rows.append(("time", f"limit {config.time} ({seconds(config.time) / 3600:.1f} h), {lead}"))
    return rows


def _epoch(training: Training, batch: int, samples: int | None) -> str:
    if samples is None:
        return "unknown: the number of training samples is not known here, and so neither is the duration"
    batches = max(1, samples // batch)
    steps = math.ceil(batches / training.whole("trainer.accumulate_grad_batches", 1))
    total = total_steps(training, samples)
    in_all = "" if total is None else f"; {total} steps in all, {total / steps:.4g} epochs"
    return f"{samples} samples, {batches} batches, {steps} steps{in_all}"


def total_steps(training: Training, samples: int) -> int | None:
    """Optimizer steps of the whole training; None where neither epochs nor steps are limited."""
    batch = int(training.number("data.batch_size") or 1)
    steps = math.ceil(max(1, samples // batch) / training.whole("trainer.accumulate_grad_batches", 1))
    epochs, most = training.number("trainer.max_epochs", -1), training.number("trainer.max_steps", -1)
    limits = [int(limit) for limit in (-1 if epochs is None else epochs * steps, most) if limit is not None]
    return min((limit for limit in limits if limit >= 0), default=None)


def forecast(
    training: Training, config: SlurmConfig, sizes: Sizes, samples: int | None
) -> tuple[list[tuple[str, str]], list[str]]:
    """What the job would take: memory by part, time, checkpoints.

    Returns:
        Rows of label and text; reasons to refuse.
    """
    saved = checkpoint_bytes(training, sizes)
    save_s = saved / GIB / WRITE_GIB_S
    duration = f"{save_s:.0f} s" if save_s >= 1 else "less than 1 s"
    lead = f"the lead is {config.signal_lead_s} s"
    rows = [
        ("memory", _memory(training, config, sizes)),
        ("checkpoint", f"{_gib(saved)}, {duration} at a stated {WRITE_GIB_S:g} GiB/s; {lead}"),
    ]
    refused = []
    if save_s > config.signal_lead_s / 2:
        refused.append(
            f"slurm.signal_lead_s {config.signal_lead_s} is too short: a checkpoint of {_gib(saved)} takes about "
            f"{save_s:.0f} s; at least {math.ceil(2 * save_s / 60) * 60}"
        )
    if sizes.samples_per_s is None:
        why = sizes.why_not or "not measured; --calibrate measures it on this machine's device"
        return [*rows, ("speed", why)], refused
    speed = sizes.samples_per_s * config.world_size
    each = f"{sizes.samples_per_s:.3g} a process measured on {sizes.measured_on}, samples of {_pixels(sizes)}"
    rows.append(("speed", f"{speed:.3g} samples/s at best: {each}, without loading and communication"))
    total = None if samples is None else total_steps(training, samples)
    if total is not None:
        accumulate = training.whole("trainer.accumulate_grad_batches", 1)
        hours = total * accumulate * (training.number("data.batch_size") or 1) / speed / 3600
        starts = math.ceil(hours / (seconds(config.time) / 3600))
        rows.append(("duration", f"{hours:.1f} h at best, {_many(starts, 'start')} of this job"))
    return rows, refused


def _memory(training: Training, config: SlurmConfig, sizes: Sizes) -> str:
    parts = memory_parts(training, config, sizes)
    known = sum(bytes_ for bytes_ in parts.values() if bytes_ is not None)
    text = ", ".join(f"{name} {_gib(bytes_)}" for name, bytes_ in parts.items() if bytes_ is not None)
    if parts["activations"] is None:
        why = sizes.why_not or "data.batch_size is not given"
        return f"{_gib(known)} a process and activations, which are unknown ({why}): {text}"
    share = _many(_share(training, config) or 0, "sample")
    return (
        f"{_gib(known)} a process: {text} ({share} of {_pixels(sizes)}); without buffers of libraries and fragmentation"
    )


def _pixels(sizes: Sizes) -> str:
    height, width = sizes.size
    return f"{height} x {width} pixels" if height == width else f"at most {height} x {width} pixels"


def _share(training: Training, config: SlurmConfig) -> int | None:
    """Samples of a batch that the busiest process has."""
    batch = training.number("data.batch_size")
    return None if batch is None else math.ceil(batch / config.world_size)


def memory_parts(training: Training, config: SlurmConfig, sizes: Sizes) -> dict[str, int | None]:
    """Bytes on one device by part; None: not measured.

    Mixed precision keeps parameters, gradients and both moments of AdamW in 4 bytes each; the averaged copy is one
    more. What a strategy divides is divided by the number of processes; what it offloads is not on the device.
    """
    division, count, world = training.division, sizes.parameters * 4, config.world_size

    def part(copies: int, divided_from: int, is_elsewhere: bool) -> int:
        if is_elsewhere:
            return 0
        return math.ceil(copies * count / (world if division.stage >= divided_from else 1))

    share = _share(training, config)
    precision = training.text("trainer.precision", "32-true") or ""
    ratio = 1.0 if precision.startswith("32") else 0.5
    kept = sizes.activation_bytes
    return {
        "parameters": part(1, 3, division.offloads_parameters),
        "gradients": part(1, 2, False),
        "optimizer": part(2, 1, division.offloads_optimizer),
        **({"average": part(1, 3, False)} if training.is_averaging else {}),
        "activations": None if kept is None or share is None else int(kept * share * ratio),
    }


def checkpoint_bytes(training: Training, sizes: Sizes) -> int:
    """Bytes of one checkpoint: parameters, two moments and the averaged copy in 4 bytes each."""
    return sizes.parameters * 4 * (4 if training.is_averaging else 3)


def _gib(bytes_: int) -> str:
    return f"{bytes_ / GIB:.1f} GiB" if bytes_ >= GIB else f"{bytes_ / 2**20:.0f} MiB"


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
