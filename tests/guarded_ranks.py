"""A small guarded training; run as a script it forks ranks that train over gloo.

One line of JSON in starts a group of ranks, one line out says how each ended and after how long. Ranks are forked from
this process, which has imported everything, so a group starts in a second.
"""

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from datamodules.module import ClassificationDataModule
from datamodules.transforms import EvalTransform, TrainTransform
from lightning_modules import console
from lightning_modules.callbacks.checkpointing import CheckpointConfig, RunCheckpoints
from lightning_modules.callbacks.heartbeat import Heartbeat
from lightning_modules.callbacks.numeric_guard import NumericGuard
from lightning_modules.checkpoint import step_of
from lightning_modules.checkpoint_io import CommittedCheckpointIO
from lightning_modules.ema import ExponentialAverage
from lightning_modules.errors import UsageError
from lightning_modules.exit_codes import GuardStop
from lightning_modules.guards import GuardConfig, guarded
from lightning_modules.run_directory import RunDirectory, resolve_checkpoint
from lightning_modules.strategies import register_strategies

BATCH = 4
SEED = 3
CONFIG = "seed: 3\n"


class Data(LightningDataModule):
    """Batches that are made from their number in `Model`, so that no loader has to be positioned."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return DataLoader(range(self.batches * BATCH), BATCH, collate_fn=self.collate)

    @staticmethod
    def collate(ids):
        return {"id": torch.tensor(ids), "image": torch.zeros(len(ids), 3)}


class DeadDisk(Callback):
    """Put named pipes in the place of shards before any is opened: reading one hangs, as on a dead file system.

    Args:
        folder: the dataset's.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_start(self, trainer, pl_module):
        for path in (self.folder / "train").glob("*.tar"):
            path.unlink()
            os.mkfifo(path)


class Model(LightningModule):
    """Weights, momentum, running statistics and an average: everything that a skipped step must leave alone.

    Args:
        events: [rank, batch of the run, what]: "nan" in its images, "stop" (SIGSTOP), "kill" (SIGKILL), "hang", "slow"
            (half a second), "usurp" (another job takes the lease).
        lr: learning rate.
    """

    def __init__(self, events=(), lr=0.1):
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))
        self.ema = ExponentialAverage(self.network, 0.5)
        self.events = {(rank, batch): what for rank, batch, what in events}
        self.lr = lr

    def training_step(self, batch, batch_idx):
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        self.happen(self.events.get((self.trainer.global_rank, number)))
        generator = torch.Generator().manual_seed(10 * number + self.trainer.global_rank)
        images = torch.randn(len(batch["id"]), 3, generator=generator, dtype=torch.float32).to(self.device)
        if self.events.get((self.trainer.global_rank, number)) == "nan":
            images[0] = torch.nan
        loss = self.network(images).square().mean()
        self.log("train/loss", loss.detach())
        return loss

    def happen(self, what):
        if what in ("stop", "kill", "usurp"):
            time.sleep(0.6)  # longer than from one heartbeat to the next, and than a save takes
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "usurp":
            root = self.trainer.default_root_dir
            Path(root, "lease", "00000099.json").write_text('{"owner": "another", "process": null}')
        elif what == "hang":
            threading.Event().wait()
        elif what == "slow":
            time.sleep(0.5)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.ema.update(self.network, step=self.trainer.global_step + 1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


def shards(folder):
    """A data module with one worker, which the trainer waits two seconds for."""
    plain = TrainTransform(8, crop=False, auto_augment=None, color_jitter=0.0, random_erasing=0.0)
    options = {"train_transform": plain, "eval_transform": EvalTransform(8, None)}
    return ClassificationDataModule(folder, 4, num_workers=1, worker_start="fork", timeout_s=2.0, lanes=2, **options)


def fit(root, *callbacks, data=None, batches=8, epochs=1, guard=None, events=(), rank=0, word="last", **options):
    """One attempt in this process.

    Returns:
        The trainer and the model; whatever ends the attempt comes out as it is.
    """
    torch.manual_seed(SEED)
    run = RunDirectory(Path(root))
    run.prepare()
    model, data = Model(events), data or Data(batches)
    resume_from = resolve_checkpoint(word, run, training=True)
    step = 0 if resume_from is None else step_of(resume_from)
    config = CheckpointConfig(every_n_steps=options.pop("every_n_steps", 1))
    with guarded(run, GuardConfig(**(guard or {})), rank, step, CONFIG) as guards:
        saving = RunCheckpoints(run, config, guards.token)
        watching = [NumericGuard(run, guards.config, SEED, CONFIG, saving), saving, Heartbeat(guards)]
        trainer = Trainer(
            **{
                "accelerator": "cpu",
                "devices": 1,
                "max_epochs": epochs,
                "limit_val_batches": 0,
                "num_sanity_val_steps": 0,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
                "default_root_dir": root,
                "plugins": [CommittedCheckpointIO(), *options.pop("plugins", [])],
                "callbacks": [*callbacks, *watching],
                **options,
            }
        )
        assert isinstance(trainer.callbacks[-1], Heartbeat)
        trainer.fit(model, datamodule=data, ckpt_path=None if resume_from is None else str(resume_from))
    return trainer, model


def train(order, rank):
    """One rank of a group; returns its exit code as `mirrorla fit` would."""
    world, root = order["world"], Path(order["root"])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(order["port"]), NODE_RANK="0")
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    console.speak(rank)
    register_strategies()
    strategy = {"strategy": order.get("strategy", "ddp"), "devices": world} if world > 1 else {}
    keys = ("batches", "epochs", "guard", "events", "every_n_steps")
    folder = order["data"][rank] if "data" in order else None
    dead = [DeadDisk(folder)] if order.get("dead_disk") == rank else []
    try:
        _, model = fit(
            root,
            *dead,
            data=folder and shards(folder),
            rank=rank,
            **{key: order[key] for key in keys if key in order},
            **strategy,
        )
    except GuardStop as stop:
        logging.getLogger("mirrorla").error("%s", stop)
        return int(stop.code)
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return getattr(error, "exit_code", 2)
    state = model.state_dict()
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    weights = {name: value.tolist() for name, value in whole.items()}
    (root / f"weights-{rank}.json").write_text(json.dumps(weights))
    return 0


def fork(order, rank):
    """Start one rank; its process never comes back here."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(f"{order['root']}.log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        code = train(order, rank)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(pids, limit_s):
    """Exit code of every rank (negative: the signal) and the seconds since the first one started."""
    began_s, ends = time.monotonic(), {}
    while len(ends) < len(pids):
        for rank, pid in enumerate(pids):
            found, status = os.waitpid(pid, os.WNOHANG) if rank not in ends else (0, 0)
            if found:
                ends[rank] = (os.waitstatus_to_exitcode(status), time.monotonic() - began_s)
            elif rank not in ends and time.monotonic() - began_s > limit_s:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [ends[rank] for rank in range(len(pids))]


def main():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)  # Lightning
    warnings.filterwarnings("ignore", "Found .* in eval mode")  # the average, on purpose
    for message in (
        ".*val_dataloader.* but have no",
        ".*does not have many workers",
        ".*srun.*command is available",
        ".*not resumable",
    ):
        warnings.filterwarnings("ignore", message)
    for line in sys.stdin:
        order = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            order["port"] = free.getsockname()[1]
        pids = [fork(order, rank) for rank in range(order["world"])]
        print(json.dumps(pids), flush=True)
        print(json.dumps(wait(pids, order.get("limit_s", 60))), flush=True)


if __name__ == "__main__":
    main()
