"""A private SLURM cluster for tests: jobs of the digits on it, and what they leave behind."""

import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from cluster import slurm
from cluster.private_settings import Shape
from cluster.private_slurm import PrivateSlurm
from datamodules.ledger import read_attempt
from lightning_modules import cli
from lightning_modules.checkpoint import list_checkpoints

STEPS = 44
TWO_NODES = Shape()
OPTIONS = [
    *("--slurm.gpus_per_node=0", "--slurm.cpus_per_task=1", "--slurm.time=10:00", "--slurm.signal_lead_s=20"),
    *("--config", "digits/classification", "--config", "trainer/cpu"),
    *("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"),
    # Plain ddp regroups gradients after the first step of every start. A ring of four then adds them up in another
    # order in the first step after a resume, which rounds differently; this name keeps the groups as they are.
    *("--trainer.strategy", "ddp_find_unused_parameters_true"),
]


class Cluster(PrivateSlurm):
    """The cluster, its folder for runs, and the packed digits."""

    def __init__(self, runs, data, shape):
        super().__init__(shape)
        self.runs, self.data = runs, data

    def submit(self, name, *options, nodes=2, tasks=2):
        """Submit a training of the digits as a user does; gives its run directory and the job's number."""
        run = self.runs / name
        words = [f"--slurm.nodes={nodes}", f"--slurm.tasks_per_node={tasks}", f"--data.path={self.data}"]
        words += [f"--slurm.environment.MIRRORLA_LEDGER_DIR={run}/ledger", f"--run_dir={run}"]
        assert cli.main(["submit", *OPTIONS, *words, *options]) == 0
        return run, slurm.job_number(run)

    def finish(self, run, job, state="COMPLETED", timeout_s=120):
        """Wait for a job's end; its output is shown where it ends otherwise."""
        try:
            found = self.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", timeout_s=timeout_s)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{told(run)}") from error
        assert found == state, f"{told(run)}\n{self.noted(job)}"

    def noted(self, job):
        """What the controller wrote about a job."""
        lines = (self.folder / "slurmctld.log").read_text().splitlines()
        return "\n".join(line for line in lines if f"JobId={job}" in line)


@contextmanager
def running(folder, data, shape=TWO_NODES):
    """A cluster on which everything in this process submits; it leaves no process behind."""
    before = dict(os.environ)
    with Cluster(folder, data, shape) as cluster:
        os.environ.update(cluster.environment)
        try:
            yield cluster
        finally:
            os.environ.clear()
            os.environ.update(before)
    left = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if mentions(path, folder)]
    assert left == []


def mentions(path, folder):
    try:
        return str(folder) in path.read_text()
    except OSError:
        return False


def told(run):
    return "\n".join(path.read_text(errors="replace") for path in sorted((run / "logs").glob("slurm_*.out")))


def trained_steps(run):
    """Steps that every rank has noted, over all attempts."""
    files = sorted((run / "ledger").glob("attempt_*.rank_00000.ledger"))
    return max((len(path.read_text().splitlines()) for path in files), default=0)


def wait_for_steps(run, least, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while trained_steps(run) < least:
        assert time.monotonic() < deadline, told(run)
        time.sleep(0.02)


def ledger(run, ranks=4):
    """Every step's entry of every rank: of a step trained twice the later one counts, on as many ranks as it had."""
    attempts = {int(path.name[8:12]) for path in (run / "ledger").iterdir()}
    found = {}
    for attempt in sorted(attempts):
        for rank, entries in enumerate(read_attempt(run / "ledger", attempt)):
            first = min((entry.step for entry in entries), default=STEPS)
            found = {key: entry for key, entry in found.items() if rank or key[0] < first}
            found |= {(entry.step, rank): entry for entry in entries}
    steps = {step for step, _ in found}
    assert steps == set(range(STEPS))
    assert ranks is None or len(found) == STEPS * ranks
    return found


def weights(run):
    return load_file(list_checkpoints(run / "checkpoints")[-1] / "model.safetensors")


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
