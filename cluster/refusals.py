"""Why a job cannot work: every known trap that shows in its settings, each with its mend. Pure."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.config import SlurmConfig
from cluster.deepspeed import named_twice
from cluster.training import DEFAULT_LANES, Training

_LOCAL = ("/tmp/", "/dev/shm/", "/var/tmp/", "/local", "/scratch/local", "/ssd", "/nvme")
_LIGHTNINGS = {"deepspeed", "fsdp", "DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"}
_REPLACED = {
    "ModelCheckpoint": "saves where a resume does not look, and torn where a signal comes; use --checkpoint.*",
    "OnExceptionCheckpoint": "saves where a resume does not look; use --checkpoint.*",
    "WeightAveraging": "knows no divided weights, and a resume loses its count; use --model.ema_decay",
    "EMAWeightAveraging": "knows no divided weights, and a resume loses its count; use --model.ema_decay",
    "StochasticWeightAveraging": "knows no divided weights; use --model.ema_decay",
}


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
        *_own_parts(training),
        *_node(training, config),
        *_environment(config),
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
        found.append("offloading has nothing to move: slurm.gpus_per_node is 0; use --config deepspeed/zero3")
    precision = training.text("trainer.precision", "32-true") or ""
    if not config.gpus_per_node and precision.startswith("16"):
        found.append(f"trainer.precision {precision} needs GPUs, slurm.gpus_per_node is 0; use 32-true or bf16-mixed")
    if training.is_on("trainer.use_distributed_sampler"):
        found.append("trainer.use_distributed_sampler true would divide every rank's share again; leave it out")
    return found


def _node(training: Training, config: SlurmConfig) -> list[str]:
    found = []
    if config.gpus_per_node and training.text("trainer.accelerator") == "cpu":
        found.append(
            f"trainer.accelerator cpu leaves the {config.gpus_per_node} GPUs of every node idle; use --config "
            "trainer/ddp after it, or --slurm.gpus_per_node 0"
        )
    workers = training.whole("data.num_workers", 0)
    if workers > config.cpus_per_task:
        found.append(
            f"data.num_workers {workers} is more than slurm.cpus_per_task {config.cpus_per_task}; use "
            f"--data.num_workers {max(config.cpus_per_task - 1, 0)} or --slurm.cpus_per_task {workers + 1}"
        )
    if config.gpus_per_node and workers and training.text("data.worker_start") == "fork":
        found.append("data.worker_start fork copies a process that uses a GPU; use forkserver or spawn")
    if "0" in (
        training.text("checkpoint.every_n_epochs"),
        str(training.whole("checkpoint.every_n_epochs", 1)),
    ) and not (training.number("checkpoint.every_n_steps") or training.number("checkpoint.every_n_minutes")):
        found.append(
            "checkpoint.every_n_epochs 0 saves nothing before the end: a lost node would cost everything; use "
            "--checkpoint.every_n_minutes 15"
        )
    return found


def _environment(config: SlurmConfig) -> list[str]:
    found = []
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        path = config.environment.get(name)
        if path and not path.startswith(_LOCAL):
            found.append(
                f"slurm.environment.{name} {path} is shared by the nodes, whose compilers would race there; leave it "
                "out: it is then local to the node"
            )
    if config.environment.get("TRITON_INTERPRET", "0") not in ("", "0"):
        found.append(
            "slurm.environment.TRITON_INTERPRET interprets the kernels: far slower, and wrong in bfloat16; leave it out"
        )
    return found


def _own_parts(training: Training) -> list[str]:
    """Lightning's parts in place of ours, which take care of requeueing."""
    found = []
    logger = _names(training.values.get("trainer.logger"))
    if any(name.endswith("Logger") for name in logger):
        found.append(
            f"trainer.logger {logger[0]} begins another curve at every start of the job; leave it out: the run's own "
            "keeps one"
        )
    callbacks = _names(training.values.get("trainer.callbacks"))
    return found + [f"trainer.callbacks {name} {_REPLACED[name]}" for name in callbacks if name in _REPLACED]


def _names(value: Any) -> list[str]:
    """Class names of a setting: one class, or a list of them."""
    items = value if isinstance(value, list) else [value]
    paths = [item.get("class_path", "") if isinstance(item, Mapping) else item for item in items]
    return [path.rpartition(".")[2] for path in paths if isinstance(path, str)]


def _data(training: Training, config: SlurmConfig, folder: Path) -> list[str]:
    found = []
    weights = training.text("model.backbone.pretrained")
    if weights and "://" not in weights and config.container is None and not (folder / weights).exists():
        found.append(f"model.backbone.pretrained {weights} is not there; mend the path")
    path = training.text("data.path")
    is_here = path is None or "://" in path or training.text("data.sources") or config.container is not None
    if is_here or path is None or (folder / path / "dataset.json").is_file():
        return found
    return [
        *found,
        f"data.path {path} has no dataset.json here; pack the data first (mirrorla shards pack) or mend the path",
    ]
