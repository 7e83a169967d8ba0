"""Run by test_chaos_checkpoints.py and test_strategies.py: a line of JSON starts ranks, a line says how they ended.

Ranks are forked from this process, which has imported everything, so an attempt starts in a second. Each is a process
of its own that trains over gloo with the callbacks of `mirrorla fit` until it is done, stopped, or killed with -9; its
peers then have a few seconds to notice.
"""

import json
import os
import random
import resource
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import StrategyRegistry

from datamodules.ledger import ledger_file, parse_entries
from datamodules.module import ClassificationDataModule
from datamodules.transforms import EvalTransform, TrainTransform
from lightning_modules import stop_signals
from lightning_modules.callbacks.checkpointing import CheckpointConfig, RunCheckpoints
from lightning_modules.callbacks.ledger import KeepLedger
from lightning_modules.callbacks.preemption import StopOnSignal
from lightning_modules.callbacks.step_seed import StepSeed
from lightning_modules.checkpoint_io import CommittedCheckpointIO
from lightning_modules.ema import ExponentialAverage
from lightning_modules.exit_codes import GuardStop
from lightning_modules.run_directory import RunDirectory, newest
from lightning_modules.stop_signals import StopRequested
from lightning_modules.strategies import register_strategies
from lightning_modules.tensorboard import Tag
from lightning_modules.training import log_gradients

GRACE_S = 20
EPOCHS = 3
TRAIN = TrainTransform(8, crop=False, hflip=0.5, degrees=20, auto_augment=None, color_jitter=0.0, random_erasing=0.5)


class Small(LightningModule):
    """Two layers with dropout, an averaged copy, Adam and a schedule: everything that a resume can get wrong.

    Args:
        has_average: with the averaged copy.
        elastic: without what depends on the number of ranks (dropout) or amplifies the last bit (Adam's epsilon).
    """

    def __init__(self, has_average, elastic):
        super().__init__()
        self.elastic = elastic
        dropout = torch.nn.Dropout(0.0 if elastic else 0.2)
        layers = [torch.nn.Linear(192, 16), torch.nn.ReLU(), dropout, torch.nn.Linear(16, 3)]
        self.network = torch.nn.Sequential(*layers)
        self.average = ExponentialAverage(self.network, 0.9) if has_average else None

    def training_step(self, batch, batch_idx):
        losses = torch.nn.functional.cross_entropy(
            self.network(batch["image"].flatten(1)), batch["label"], reduction="none"
        )
        return (batch["weight"] * losses).mean()

    def optimizer_step(self, *args, **options):
        super().optimizer_step(*args, **options)
        if self.average is not None:
            self.average.update(self.network, step=self.trainer.global_step + 1)

    def on_before_optimizer_step(self, optimizer):
        log_gradients(self, self.network, optimizer)

    def validation_step(self, batch, batch_idx):
        loss = self.network(batch["image"].flatten(1)).square().mean()
        self.log("val/loss", loss, sync_dist=True, batch_size=len(batch["label"]))

    def configure_optimizers(self):
        groups = [{"params": list(self.network.parameters()), "name": "all"}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, eps=1e-2 if self.elastic else 1e-8)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Quota(Callback):
    """Between two steps no file of this process may grow beyond some kilobytes, as on a disk that is full.

    Args:
        first: step after which it begins.
        last: step after which it ends.
    """

    def __init__(self, first, last):
        self.first, self.last = first, last

    def on_train_batch_end(self, trainer, *_):
        limit = 8 << 10 if self.first <= trainer.global_step < self.last else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


class KeepNorms(Callback):
    """Write down the norm of the gradients that every step logged."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        with self.path.open("a") as stream:
            stream.write(f"{trainer.global_step} {float(trainer.callback_metrics[Tag.GRAD_NORM])}\n")


def train(order, rank):
    """One rank of one attempt."""
    world, run = order["world"], RunDirectory(Path(order["run"]))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(order["port"]), NODE_RANK="0")
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MIRRORLA_FAULT=order.get("fault", ""))
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    random.seed(time.time_ns())  # what a resume must not depend on
    torch.manual_seed(time.time_ns() if order.get("resume") else 0)
    run.prepare()
    data = ClassificationDataModule(
        order["data"],
        batch_size=4,
        num_workers=0,
        lanes=2,
        window=20,
        train_transform=TRAIN,
        eval_transform=EvalTransform(8, None),
    )
    options = {"every_n_steps": 3, "every_n_epochs": 0, "keep_best": 1, "monitor": "val/loss", "mode": "min"}
    config = CheckpointConfig(**{**options, **order.get("checkpoint", {})})
    checkpoints = RunCheckpoints(run, config)
    strategy = order.get("strategy") or ("ddp" if world > 1 else "auto")
    trainer = Trainer(
        strategy=strategy,
        devices=world,
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[
            *([Quota(*order["quota"])] if "quota" in order else []),
            StepSeed(0),
            KeepLedger(run.root / "ledger"),
            StopOnSignal(checkpoints, config.max_minutes),
            checkpoints,
            *([KeepNorms(run.root / f"norms-{order['attempt']}")] if order.get("norms") and rank == 0 else []),
        ],
        log_every_n_steps=1 if order.get("norms") else 50,
        plugins=[CommittedCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        default_root_dir=run.root,
    )
    torch.manual_seed(0)
    model = Small(order.get("average", True), order.get("elastic", False))
    resume = newest(run) if order.get("resume") else None
    trainer.fit(model, datamodule=data, ckpt_path=None if resume is None else str(resume))


def fork(order, rank):
    """Start one rank; its process never comes back here."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(Path(order["run"]) / f"log-{order['attempt']}-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        train(order, rank)
        status = 0
    except StopRequested as stop:
        status = stop.exit_code
    except GuardStop as stop:
        sys.stderr.write(f"{stop}\n")
        status = int(stop.code)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stderr.flush()
        os._exit(status)


def lines(order, rank):
    path = ledger_file(Path(order["run"]) / "ledger", order["attempt"], rank)
    return len(parse_entries(path.read_text())) if path.exists() else 0


def watch(order, pids):
    """Send the chosen signal to the chosen ranks when the first one's ledger is long enough; report exit statuses."""
    statuses, sent, deadline = {}, False, time.monotonic() + 200
    number, ranks = order.get("signal", 0), order.get("ranks", [0])
    while len(statuses) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in statuses and (ended := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                statuses[rank] = os.waitstatus_to_exitcode(ended[1])
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if number and not sent and lines(order, ranks[0]) >= order["after"]:
            sent = True
            time.sleep(order.get("delay_s", 0))
            for rank in ranks:
                if rank not in statuses:
                    os.kill(pids[rank], number)
        if time.monotonic() > deadline:
            for rank, pid in enumerate(pids):
                if rank not in statuses:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [statuses[rank] for rank in range(len(pids))]


def main():
    stop_signals.install()  # ranks inherit it: a command installs it within milliseconds, before torch is imported
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)  # Lightning
    warnings.filterwarnings("ignore", "The .srun. command is available", UserWarning)
    warnings.filterwarnings("ignore", "Found .* in eval mode", UserWarning)  # the averaged copy stays so on purpose
    for line in sys.stdin:
        order = json.loads(line)
        if "strategy" in order:
            warnings.simplefilter("ignore")  # torch's and DeepSpeed's about themselves
            register_strategies()
            StrategyRegistry.get(order["strategy"])  # imports DeepSpeed, once for all ranks
        Path(order["run"]).mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            order["port"] = free.getsockname()[1]
        print(json.dumps(watch(order, [fork(order, rank) for rank in range(order["world"])])), flush=True)


if __name__ == "__main__":
    main()
