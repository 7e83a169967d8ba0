"""Run by test_chaos_data.py: one line of JSON in starts an attempt of several ranks, one line out says how it ended.

Ranks are forked from this process, which has imported everything, so an attempt starts in a second. Each is a process
of its own that trains over gloo until it is done or killed with -9; its peers then have a few seconds to notice.
"""

import json
import os
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from datamodules.ledger import ledger_file, parse_entries
from datamodules.module import ClassificationDataModule
from datamodules.transforms import EvalTransform, TrainTransform
from lightning_modules.callbacks.data_monitor import DataMonitor
from lightning_modules.callbacks.ledger import KeepLedger
from lightning_modules.checkpoint import step_path
from lightning_modules.checkpoint_io import CommittedCheckpointIO

GRACE_S = 10
EPOCHS = 2
SAVE_EVERY = 3
TRAIN = TrainTransform(8, crop=False, hflip=0.5, degrees=20, auto_augment=None, color_jitter=0.0, random_erasing=0.5)


class Linear(LightningModule):
    """A linear classifier with momentum: its losses tell whether weights and optimiser came back bit for bit."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 3)

    def training_step(self, batch, batch_idx):
        logits = self.layer(batch["image"].flatten(1))
        losses = torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")
        return (batch["weight"] * losses).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


class Save(Callback):
    """Commit a checkpoint every few steps, once every rank has written its ledger."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % SAVE_EVERY == 0:
            trainer.strategy.barrier()
            trainer.save_checkpoint(step_path(self.folder, trainer.global_step))


def train(order, rank):
    """One rank of one attempt."""
    world, folder = order["world"], Path(order["folder"])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(order["port"]), NODE_RANK="0")
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    data = ClassificationDataModule(
        order["data"],
        batch_size=10,
        num_workers=order["workers"],
        lanes=5,
        window=20,
        train_transform=TRAIN,
        eval_transform=EvalTransform(8, None),
        worker_start="fork",
        on_error="skip",
        max_skipped=2,
        quarantine_dir=str(folder),
    )
    trainer = Trainer(
        strategy="ddp" if world > 1 else "auto",
        devices=world,
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[KeepLedger(folder / "ledger"), DataMonitor(), Save(folder)],
        plugins=[CommittedCheckpointIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Linear(), datamodule=data, ckpt_path=order["checkpoint"])


def fork(order, rank):
    """Start one rank; its process never comes back here."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(Path(order["folder"]) / f"log-{order['attempt']}-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        train(order, rank)
        status = 0
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
    finally:
        os._exit(status)


def lines(order, rank):
    path = ledger_file(Path(order["folder"]) / "ledger", order["attempt"], rank)
    return len(parse_entries(path.read_text())) if path.exists() else 0


def watch(order, pids):
    """Kill the chosen rank when its ledger is long enough; report every rank's exit status."""
    statuses, killed, deadline = {}, False, time.monotonic() + 120
    while len(statuses) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in statuses and os.waitpid(pid, os.WNOHANG) != (0, 0):
                statuses[rank] = True
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if order["kill_after"] and not killed and lines(order, order["kill_rank"]) >= order["kill_after"]:
            killed = True
            os.kill(pids[order["kill_rank"]], signal.SIGKILL)
        if time.monotonic() > deadline:
            for rank, pid in enumerate(pids):
                if rank not in statuses:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return {"killed": killed}


def main():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "The .srun. command is available", UserWarning)
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)  # Lightning
    for line in sys.stdin:
        order = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            order["port"] = free.getsockname()[1]
        print(json.dumps(watch(order, [fork(order, rank) for rank in range(order["world"])])), flush=True)


if __name__ == "__main__":
    main()
