"""How long a checkpoint holds up the training of 100 M parameters, and how soon a restart trains on.

    mirrorla bench checkpoint

mirrorla_large with 8400 classes and AdamW (1.2 GB of state) trains on a CPU, on one batch of small random images, and
is saved every few steps: by this project behind the training's back and with the training waiting for it, and by
Lightning's ModelCheckpoint, also through its AsyncCheckpointIO. Every writer has a process of its own, one after the
other in one run. Only this project's checkpoints are hashed and flushed to the disk; Lightning's count as committed
when the file is complete in the system's cache.

`blocked` is how long a save holds up the loop, `first` the same of the first save, which has to take memory for its
copy; `share` is that of a save every five minutes. Steps that run while a checkpoint is being written share processor
and memory with it: `lost` adds to the share what they take longer. The restart is `mirrorla fit --ckpt_path last` of
the same model on 10 classes in a new process, from its last import, and from its very start, to the end of the first
new step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.common import RESULTS, provenance, write_csv
from benchmarks.restart import measure_restart
from lightning_modules import console
from lightning_modules.callbacks.checkpointing import CheckpointConfig, RunCheckpoints
from lightning_modules.checkpoint import LATEST, list_checkpoints
from lightning_modules.checkpoint_io import CommittedCheckpointIO
from lightning_modules.run_directory import RunDirectory
from mirrorla import create_backbone

PERIOD_S = 300.0
WARM_UP = 3
BATCH, SIDE = 2, 32
OURS = ("mirrorla, behind", "mirrorla, waiting")
WRITERS = (*OURS, "ModelCheckpoint", "ModelCheckpoint, AsyncCheckpointIO")
COLUMNS = (
    *("parameters_m", "megabytes", "blocked_s", "blocked_first_s", "share_percent", "committed_s", "step_s"),
    *("step_while_written_s", "lost_percent", "restart_s", "restart_with_imports_s"),
)


@dataclass(frozen=True)
class Scale:
    """What is trained.

    Attributes:
        model: name of the backbone.
        classes: size of its classifier, which fills up the parameters.
        saves: checkpoints of each writer, at least 2.
        every: optimizer steps between two of them, more than fit into the writing of one.
    """

    model: str = "mirrorla_large"
    classes: int = 8400
    saves: int = 4
    every: int = 12


class Mark(Checkpoint):
    """Notes the time where Lightning runs the callbacks that save; a Checkpoint by class, to stand among them.

    Args:
        times: appended to.
    """

    def __init__(self, times: list[float]) -> None:
        self._times = times

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch is here."""
        self._times.append(time.time())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is done."""
        self._times.append(time.time())


class Watch(Checkpoint):
    """Notes when checkpoints got their names.

    Args:
        newest: that time of the newest one; 0 before the first.
    """

    def __init__(self, newest: Callable[[], float]) -> None:
        self.committed: list[float] = []
        self._newest = newest

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look once a step, for a tenth of a millisecond."""
        self.look()

    def look(self) -> None:
        """Take down one that is new."""
        newest = self._newest()
        if newest > (self.committed[-1] if self.committed else 0.0):
            self.committed.append(newest)


class Model(LightningModule):
    """A network that learns nothing from random images.

    Args:
        network: images (B, 3, H, W) -> logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """A loss with gradients everywhere."""
        loss: Tensor = self.network(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Two moments a parameter."""
        return torch.optim.AdamW(self.parameters(), lr=1e-6)


def measure_writer(writer: str, scale: Scale, folder: Path) -> dict[str, float]:
    """Train and save with one writer.

    Args:
        writer: one of WRITERS.
        scale: what is trained.
        folder: for its checkpoints, empty.

    Returns:
        The figures of `summary`, and parameters and size of a checkpoint, both in millions.
    """
    torch.manual_seed(0)
    model = Model(create_backbone(scale.model, num_classes=scale.classes))
    saving, plugin, newest = parts(writer, scale.every, folder)
    times: list[float] = []
    watch = Watch(newest)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[Mark(times), saving, Mark(times), watch],
        plugins=[plugin],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    steps = [torch.randn(BATCH, 3, SIDE, SIDE)] * (scale.every * (scale.saves + 1) - 1)
    trainer.fit(model, DataLoader(steps, batch_size=None))  # type: ignore[arg-type]
    figures = summary(times, watch.committed, scale.every)
    files = list_checkpoints(folder / "checkpoints")[-1].iterdir() if writer in OURS else folder.glob("*.ckpt")
    size = sum(path.stat().st_size for path in files)
    return {"parameters_m": sum(p.numel() for p in model.parameters()) / 1e6, "megabytes": size / 1e6, **figures}


def parts(writer: str, every: int, folder: Path) -> tuple[Callback, CheckpointIO, Callable[[], float]]:
    """What saves: its callback, its plugin, and a function that tells when its newest checkpoint got its name."""
    if writer in OURS:
        run = RunDirectory(folder)
        config = CheckpointConfig(every_n_steps=every, every_n_epochs=0, asynchronous=writer == OURS[0])
        latest = run.checkpoints / LATEST
        return RunCheckpoints(run, config), CommittedCheckpointIO(), lambda: _named_at([latest])
    saving = ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=1)
    plugin = TorchCheckpointIO() if writer == WRITERS[2] else AsyncCheckpointIO(TorchCheckpointIO())
    return saving, plugin, lambda: _named_at(list(folder.glob("*.ckpt")))


def summary(times: Sequence[float], committed: Sequence[float], every: int) -> dict[str, float]:
    """The figures of one writer.

    Args:
        times: four for each step: before and behind the saving callback at its start, and the same at its end.
        committed: when the checkpoints got their names.
        every: steps between two of them.

    Returns:
        Seconds and shares by column, as the top of this file defines them; without step_while_written_s where no step
        ran while a checkpoint was written.
    """
    batches = [times[i : i + 4] for i in range(0, len(times), 4)]
    last = range(every - 1, len(batches) - 1, every)  # the steps that are saved
    blocked = [batches[i][3] - batches[i][2] + batches[i + 1][1] - batches[i + 1][0] for i in last]
    spans = [(batches[i][2], batches[i + 1][1], done) for i, done in zip(last, committed, strict=False)]
    steps = [(began, ended) for _, began, ended, _ in batches[WARM_UP:]]
    alone = [b - a for a, b in steps if not any(a < done and b > begun for begun, _, done in spans)]
    during = [b - a for a, b in steps if any(free <= a and b <= done for _, free, done in spans)]
    touched = [b - a for a, b in steps if any(a < done and b > begun for begun, _, done in spans)]
    step_s, usual_s = statistics.median(alone), statistics.median(blocked[1:])
    slower_s = max(0.0, sum(touched) - step_s * len(touched)) / len(blocked)
    return {
        "blocked_s": usual_s,
        "blocked_first_s": blocked[0],
        "share_percent": 100 * usual_s / PERIOD_S,
        "committed_s": statistics.median(done - begun for begun, _, done in spans),
        "step_s": step_s,
        "lost_percent": 100 * (usual_s + slower_s) / PERIOD_S,
        **({"step_while_written_s": statistics.median(during)} if during else {}),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure every writer and the restart in processes of their own, write the CSV, print a table.

    Args:
        arguments: command line; None takes the process's.

    Returns:
        The exit code.
    """
    options = parser().parse_args(arguments)
    scale = Scale(options.model, options.classes, options.saves, options.every)
    console.quiet_libraries()
    if options.point:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            print(json.dumps(measure_writer(options.point, scale, Path(folder))))
        return 0
    rows = [_row(writer, _in_a_process(writer, options)) for writer in WRITERS]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        restart = measure_restart(scale.model, Path(folder))
    rows[0] |= {name: f"{value:.4g}" for name, value in restart.items()}
    write_csv(options.out / "checkpoint.csv", [{**row, **provenance(torch.device("cpu"))} for row in rows])
    Console().print(table(rows))
    print(f"written: {options.out / 'checkpoint.csv'}")
    return 0


def table(rows: Sequence[dict[str, str]]) -> Table:
    """The rows for the eye, figures downwards."""
    found = Table("", *(row["writer"].replace(", ", ",\n") for row in rows), box=None)
    for name in COLUMNS:
        found.add_row(name.replace("_", " "), *(row[name] for row in rows))
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    usual = Scale()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=usual.model, help=f"a backbone (default {usual.model})")
    parser.add_argument("--classes", type=int, default=usual.classes, help="of its classifier (default %(default)s)")
    parser.add_argument("--saves", type=int, default=usual.saves, help="checkpoints a writer (default %(default)s)")
    parser.add_argument("--every", type=int, default=usual.every, help="steps between two (default %(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; 5 GB are written there and removed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--point", choices=WRITERS, help=argparse.SUPPRESS)
    return parser


def _in_a_process(writer: str, options: argparse.Namespace) -> dict[str, float]:
    given = {"model": options.model, "classes": options.classes, "saves": options.saves, "every": options.every}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    words += [] if options.folder is None else ["--folder", str(options.folder)]
    command = [sys.executable, "-m", "benchmarks.checkpoint", *words, "--point", writer]
    found: dict[str, float] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    return found


def _row(writer: str, figures: dict[str, float]) -> dict[str, str]:
    return {"writer": writer, **{name: f"{figures[name]:.4g}" if name in figures else "" for name in COLUMNS}}


def _named_at(paths: Sequence[Path]) -> float:
    """When the latest of these files was renamed or made."""
    return max((path.stat().st_ctime for path in paths if path.exists()), default=0.0)


if __name__ == "__main__":
    sys.exit(main())
