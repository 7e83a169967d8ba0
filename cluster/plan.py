"""What a job would be, and what cannot work, from its settings alone: arithmetic, known traps, forecast. Pure."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import SlurmConfig, seconds
from cluster.deepspeed import named_twice
from cluster.training import DEFAULT_LANES, Training

GIB = 2**30
WRITE_GIB_S = 0.5
"""Stated, not measured: what a shared file system takes from one process."""
_LOCAL = ("/tmp/", "/dev/shm/", "/var/tmp/", "/local", "/scratch/local", "/ssd", "/nvme")
_LIGHTNINGS = {"deepspeed", "fsdp", "DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"}


@dataclass(frozen=True)
class Sizes:
    """What a model weighs.

    Attributes:
        parameters: values that are trained.
        activation_bytes: that one training sample's forward pass keeps for the backward pass; None: not measured.
        samples_per_s: that one device trains; None: not measured.
        measured_on: the device and its settings, where measured.
    """

    parameters: int
    activation_bytes: int | None = None
    samples_per_s: float | None = None
    measured_on: str = ""


def refusals(training: Training, config: SlurmConfig, folder: Path) -> list[str]:
    """Why the job cannot work, each with its mend; empty if nothing is seen.

    Args:
        training: the settings of the training.
        config: what is asked of SLURM.
        folder: where relative paths start.
    """
    found = [
        *_batch(training, config),
        *_strategy(training, config),
        *_node(training, config),
        *_data(training, config, folder),
    ]
    return [reason for reason in found if reason]


def _batch(training: Training, config: SlurmConfig) -> list[str]:
    batch, world = training.number("data.batch_size"), config.world_size
    if batch is None:
        return []
    size, step = int(batch), training.whole("data.lanes", DEFAULT_LANES) * training.whole("data.repeats", 1)
    if size < world:
        valid = math.ceil(world / step) * step
        return [f"data.batch_size {size} leaves some of {world} processes without a sample; nearest valid: {valid}"]
    if size % step:
        below = size // step * step
        valid_sizes = [value for value in (below, below + step) if value >= world]
        return [
            f"data.batch_size {size} is not divisible by data.lanes x data.repeats = {step}; nearest valid: "
            + " or ".join(map(str, valid_sizes))
        ]
    return []


def _strategy(training: Training, config: SlurmConfig) -> list[str]:
    strategy, found = training.strategy, named_twice(training.deepspeed)
    if strategy in _LIGHTNINGS or strategy.startswith(("deepspeed_", "fsdp_")):
        found.append(
            f"trainer.strategy {strategy} writes checkpoints of its own kind; use fsdp2, zero1, zero2 or zero3, for "
            "example --config deepspeed/zero2"
        )
    if config.launcher == "srun" and strategy.endswith(("_spawn", "_fork", "_notebook")):
        found.append(f"trainer.strategy {strategy} starts processes itself, as srun does; use ddp")
    division = training.division
    if division.stage == 3 and strategy not in ("fsdp2", "FSDP2Strategy") and training.is_averaging:
        found.append(
            f"model.ema_decay {training.text('model.ema_decay')} needs whole weights, which ZeRO stage 3 divides; use "
            "--trainer.strategy fsdp2 or zero2, or --model.ema_decay null"
        )
    if not config.gpus_per_node and (division.offloads_optimizer or division.offloads_parameters):
        found.append("offloading to main memory needs GPUs; slurm.gpus_per_node is 0")
    precision = training.text("trainer.precision", "32-true") or ""
    if not config.gpus_per_node and precision.startswith("16"):
        found.append(f"trainer.precision {precision} needs GPUs, slurm.gpus_per_node is 0; use 32-true or bf16-mixed")
    if training.is_on("trainer.use_distributed_sampler"):
        found.append("trainer.use_distributed_sampler true would divide every rank's share again; leave it out")
    return found


def _node(training: Training, config: SlurmConfig) -> list[str]:
    found = []
    workers = training.whole("data.num_workers", 0)
    if workers > config.cpus_per_task:
        found.append(
            f"data.num_workers {workers} is more than slurm.cpus_per_task {config.cpus_per_task}; use "
            f"--data.num_workers {max(config.cpus_per_task - 1, 0)} or --slurm.cpus_per_task {workers + 1}"
        )
    if config.gpus_per_node and workers and training.text("data.worker_start") == "fork":
        found.append("data.worker_start fork copies a process that uses a GPU; use forkserver or spawn")
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        path = config.environment.get(name)
        if path and not path.startswith(_LOCAL):
            found.append(
                f"slurm.environment.{name} {path} is shared by the nodes, whose compilers would race there; leave it "
                "out: it is then local to the node"
            )
    if "0" in (
        training.text("checkpoint.every_n_epochs"),
        str(training.whole("checkpoint.every_n_epochs", 1)),
    ) and not (training.number("checkpoint.every_n_steps") or training.number("checkpoint.every_n_minutes")):
        found.append(
            "checkpoint.every_n_epochs 0 saves nothing before the end: a lost node would cost everything; use "
            "--checkpoint.every_n_minutes 15"
        )
    return found


def _data(training: Training, config: SlurmConfig, folder: Path) -> list[str]:
    path = training.text("data.path")
    is_here = path is None or "://" in path or training.text("data.sources") or config.container is not None
    if is_here or path is None or (folder / path / "dataset.json").is_file():
        return []
    return [f"data.path {path} has no dataset.json here; pack the data first (mirrorla shards pack) or mend the path"]


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
    device = f"{config.gpus_per_node} GPUs" if config.gpus_per_node else f"{config.num_tasks_per_node} CPU processes"
    rows = [
        (
            "processes",
            f"{world}: {config.nodes} nodes x {device}, {config.cpus_per_task} cores and {workers} workers each",
        ),
        ("strategy", f"{training.strategy}, precision {training.text('trainer.precision', '32-true')}"),
    ]
    if batch is not None:
        below, over = divmod(int(batch), world)
        share = f"{below}" if not over else f"{below} or {below + 1}, weighted"
        even = "" if not over else f"; even: {below * world} or {(below + 1) * world}"
        step = f", {accumulate} batches a step" if accumulate > 1 else ""
        rows.append(("batch", f"{int(batch)} samples, {share} a process{even}{step}"))
    epochs = training.number("trainer.max_epochs")
    if batch is not None and samples is not None:
        batches = max(1, samples // int(batch))
        steps = math.ceil(batches / accumulate)
        total = "" if epochs is None else f", {steps * int(epochs)} steps in {int(epochs)} epochs"
        rows.append(("epoch", f"{samples} samples, {batches} batches, {steps} steps{total}"))
    lead = f"told to save {config.signal_lead_s} s before the end"
    rows.append(("time", f"limit {config.time} ({seconds(config.time) / 3600:.1f} h), {lead}"))
    return rows


def forecast(
    training: Training, config: SlurmConfig, sizes: Sizes, samples: int | None
) -> tuple[list[tuple[str, str]], list[str]]:
    """What the job would take: memory by part, time, checkpoints.

    Returns:
        Rows of label and text; reasons to refuse.
    """
    parts = memory_parts(training, config, sizes)
    known = sum(bytes_ for bytes_ in parts.values() if bytes_ is not None)
    text = ", ".join(f"{name} {_gib(bytes_)}" for name, bytes_ in parts.items())
    rows = [("memory", f"{_gib(known)} a process: {text}; without buffers of libraries and fragmentation")]
    saved = checkpoint_bytes(training, sizes)
    save_s = saved / GIB / WRITE_GIB_S
    rows.append(
        (
            "checkpoint",
            f"{_gib(saved)}, {save_s:.0f} s at a stated {WRITE_GIB_S:g} GiB/s; the lead is {config.signal_lead_s} s",
        )
    )
    refused = []
    if save_s > config.signal_lead_s / 2:
        refused.append(
            f"slurm.signal_lead_s {config.signal_lead_s} is too short: a checkpoint of {_gib(saved)} takes about "
            f"{save_s:.0f} s; at least {math.ceil(2 * save_s / 60) * 60}"
        )
    if sizes.samples_per_s is None:
        rows.append(("speed", "not measured; --calibrate measures it on this machine's device"))
        return rows, refused
    speed = sizes.samples_per_s * config.world_size
    rows.append(
        (
            "speed",
            f"{speed:.0f} samples/s at best: {sizes.samples_per_s:.0f} a process measured on "
            f"{sizes.measured_on}, without loading and communication",
        )
    )
    epochs = training.number("trainer.max_epochs")
    if samples is not None and epochs is not None:
        hours = samples * epochs / speed / 3600
        starts = math.ceil(hours / (seconds(config.time) / 3600))
        rows.append(("duration", f"{hours:.1f} h at best, {starts} start{'s' if starts > 1 else ''} of this job"))
    return rows, refused


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

    batch = training.number("data.batch_size")
    share = None if batch is None else math.ceil(batch / world)
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


def _gib(bytes_: int | None) -> str:
    if bytes_ is None:
        return "not measured"
    return f"{bytes_ / GIB:.1f} GiB" if bytes_ >= GIB else f"{bytes_ / 2**20:.0f} MiB"
