"""Explicit wiring: which callbacks, logger and plugins a verb gets."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from datamodules.ledger import ledger_folder
from lightning_modules.callbacks.board import RunBoard
from lightning_modules.callbacks.checkpointing import CheckpointConfig, RunCheckpoints
from lightning_modules.callbacks.data_monitor import DataMonitor
from lightning_modules.callbacks.figures import MonitoringConfig, ValidationFigures
from lightning_modules.callbacks.heartbeat import Heartbeat
from lightning_modules.callbacks.ledger import KeepLedger
from lightning_modules.callbacks.mirror_metrics import MirrorMetrics
from lightning_modules.callbacks.numeric_guard import NumericGuard
from lightning_modules.callbacks.predictions import WritePredictions
from lightning_modules.callbacks.preemption import StopOnSignal
from lightning_modules.callbacks.progress import EpochLines, progress_bar
from lightning_modules.callbacks.run_record import Introduction, RunRecord
from lightning_modules.callbacks.step_seed import StepSeed
from lightning_modules.callbacks.throughput import Throughput
from lightning_modules.checkpoint import step_of
from lightning_modules.checkpoint_io import CommittedCheckpointIO
from lightning_modules.guards import Guards
from lightning_modules.painting import PAINTERS, task_of
from lightning_modules.run_directory import RunDirectory


@dataclass(frozen=True)
class Wiring:
    """What the parts of one command need to know.

    Attributes:
        verb: fit, validate, test or predict.
        run: the run directory.
        resume_from: the checkpoint to continue or evaluate, if any.
        seed: the run's seed.
        config_text: the resolved configuration as YAML.
        checkpoint: how often to save.
        monitoring: how often to look closely.
        guards: what stands around a training; None where it is neither held nor watched.
    """

    verb: str
    run: RunDirectory
    resume_from: Path | None
    seed: int
    config_text: str
    checkpoint: CheckpointConfig
    monitoring: MonitoringConfig
    guards: Guards | None = None


def is_terminal() -> bool:
    """Whether a person watches, rather than a log file."""
    return sys.stderr.isatty() and sys.stdout.isatty()


def build_callbacks(wiring: Wiring, model: LightningModule, enable_progress: bool | None) -> list[Callback]:
    """The callbacks of a verb, in the order their hooks run (Lightning moves checkpoints to the end).

    Args:
        wiring: the command.
        model: decides which figures fit.
        enable_progress: the Trainer's enable_progress_bar; None is on.
    """
    progress: list[Callback] = []
    if enable_progress is not False:
        progress = [progress_bar() if is_terminal() else EpochLines()]
    task = task_of(model)
    if wiring.verb != "fit":
        predictions = [WritePredictions(wiring.run, task)] if task and wiring.verb == "predict" else []
        return [StopOnSignal(None), Introduction(), *predictions, *progress]
    guards = wiring.guards
    checkpoints = RunCheckpoints(wiring.run, wiring.checkpoint, *([guards.token] if guards else []))
    figures = [ValidationFigures(wiring.monitoring, PAINTERS[task])] if task else []
    board = [RunBoard(task, wiring.config_text)] if task else []
    folder = ledger_folder()
    return [
        StepSeed(wiring.seed),
        *([KeepLedger(folder)] if folder else []),
        Introduction(),
        RunRecord(wiring.run, wiring.config_text, None if guards is None else guards.attempt),
        *([NumericGuard(wiring.run, guards.config, wiring.seed, wiring.config_text, checkpoints)] if guards else []),
        *board,
        Throughput(),
        DataMonitor(),
        *figures,
        MirrorMetrics(wiring.monitoring),
        *progress,
        StopOnSignal(checkpoints, wiring.checkpoint.max_minutes),
        checkpoints,
        *([Heartbeat(guards)] if guards else []),
    ]


def build_logger(wiring: Wiring, wanted: Any) -> Any:
    """One TensorBoard curve per run directory, however often it is resumed.

    Args:
        wiring: the command; entries at or beyond the step of its checkpoint belong to steps that are trained again
            and are purged.
        wanted: the Trainer's logger option; None or True takes ours.

    Returns:
        The logger; False where only evaluating, so that a run's curve stays its training's.
    """
    if wanted is False or wiring.verb != "fit":
        return False
    if wanted is not None and wanted is not True:
        return wanted
    purge_step = None if wiring.resume_from is None else step_of(wiring.resume_from)
    folder = wiring.run.tensorboard
    logger: Logger = TensorBoardLogger(
        folder.parent, name=folder.name, version="", purge_step=purge_step, default_hp_metric=False
    )
    return logger


def build_plugins(wanted: Any) -> list[Any]:
    """Committed checkpoint files, and SLURM without Lightning's own requeueing."""
    given = wanted if isinstance(wanted, list) else [] if wanted is None else [wanted]
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    return [*given, CommittedCheckpointIO(), *slurm]
