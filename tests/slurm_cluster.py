"""A private SLURM cluster for tests: jobs of the digits on it, and what they leave behind."""

import os
import signal
import time
from contextlib import contextmanager, suppress
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
PATIENCE_S = 600  # a machine that does other things, too, starts four processes in minutes
OPTIONS = [
    *("--slurm.gpus_per_node=0", "--slurm.cpus_per_task=1", "--slurm.time=10:00", "--slurm.signal_lead_s=20"),
    *("--config", "digits/classification", "--config", "trainer/cpu"),
    *("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"),
    *("--trainer.strategy", "ddp"),
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

    def finish(self, run, job, state="COMPLETED"):
        """Wait for a job's end, however often it is queued again; its output is shown where it ends otherwise."""
        try:
            found = super().finish(job, PATIENCE_S)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{told(run)}\n{self.noted(job)}") from error
        assert found == state, f"{told(run)}\n{self.noted(job)}"

    def restarts(self, job):
        """How often a job was queued again."""
        return int(self.client("scontrol", "show", "job", job).partition("Restarts=")[2].split()[0])

    def nodes(self, job, restarts):
        """Where a job runs after so many restarts, which SLURM would let wait."""

        def runs():
            if (state := self.state(job)) == "PENDING":
                time.sleep(2)  # as in finish
                self.client("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            return state == "RUNNING" and self.restarts(job) == restarts

        wait_until(runs, PATIENCE_S)
        return self.client("squeue", "--noheader", "--jobs", job, "--format=%N")

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


def mentions(path, text):
    """Whether a command line holds a text; a process that is gone by now does not."""
    try:
        return str(text) in path.read_text()
    except OSError:
        return False


def told(run):
    return "\n".join(path.read_text(errors="replace") for path in sorted((run / "logs").glob("slurm_*.out")))


def wait_until(condition, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def trained_steps(run):
    """Steps that every rank has noted, over all attempts."""
    files = sorted((run / "ledger").glob("attempt_*.rank_00000.ledger"))
    return max((len(path.read_text().splitlines()) for path in files), default=0)


def processes(run):
    """The training processes of a run's job; not those that launched them."""
    ours = [path for path in Path("/proc").glob("[0-9]*/cmdline") if mentions(path, run)]
    trained = [
        path for path in ours if mentions(path, "lightning_modules.cli") and not mentions(path, "cluster.launch")
    ]
    return [int(path.parent.name) for path in trained]


def send(pids, number):
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def is_held(pid):
    """Whether a process is stopped, and no SIGUSR1 waits for it to go on."""
    try:
        lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    except OSError:
        return False
    pending = [int(words[1], 16) >> (signal.SIGUSR1 - 1) & 1 for words in lines if words[0] in ("SigPnd:", "ShdPnd:")]
    return ["State:", "T", "(stopped)"] in lines and not any(pending)


@contextmanager
def held_until_signalled(run, count, patience_s):
    """Hold a run's ranks, which would end too soon, until SIGUSR1 waits for every one of them."""
    ranks = processes(run)
    assert len(ranks) == count
    send(ranks, signal.SIGSTOP)
    try:
        wait_until(lambda: all(is_held(pid) for pid in ranks), 10)
        yield
        wait_until(lambda: not any(is_held(pid) for pid in ranks), patience_s)
    finally:
        send(ranks, signal.SIGCONT)


def wait_for_steps(run, least):
    deadline = time.monotonic() + PATIENCE_S
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
