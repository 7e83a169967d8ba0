"""The whole life of a job in about a minute: submitted, preempted, queued again, resumed, done; on this machine.

The job is what `mirrorla submit` hands to any cluster. The cluster is real SLURM, private to the rehearsal.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster import slurm
from cluster.private_settings import Shape
from cluster.private_slurm import PrivateSlurm

Say = Callable[[str], None]

_TRAINING = (
    *("--config", "digits/classification", "--config", "trainer/cpu", "--trainer.strategy", "ddp"),
    *("--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1"),
)
_REQUEST = (
    *("--slurm.nodes=2", "--slurm.gpus_per_node=0", "--slurm.tasks_per_node=1", "--slurm.cpus_per_task=1"),
    *("--slurm.partition=grace", "--slurm.time=10:00", "--slurm.signal_lead_s=20", "--slurm.min_free_gib=0.1"),
)
_PATIENCE_S = 120


class Rehearsal:
    """One rehearsal.

    Args:
        folder: for the packed digits and the run directory.
        say: prints one line of the story.
    """

    def __init__(self, folder: Path, say: Say) -> None:
        self.run = folder / "run"
        self._data = folder / "digits"
        self._say = say
        self._began_s = time.monotonic()

    def play(self) -> int:
        """Tell and do everything.

        Returns:
            0 if the job ended as it should, 1 otherwise.

        Raises:
            FileNotFoundError: SLURM is not installed; says how to.
        """
        with PrivateSlurm(Shape(nodes=2, cpus=2, gpus=0)) as cluster:
            os.environ.update(cluster.environment)
            self._tell("a SLURM cluster of 2 nodes runs on this machine, for this command only")
            self._mirrorla("shards", "pack", "--source", "digits", "--out", str(self._data))
            self._tell("1797 handwritten digits are packed into WebDataset tars")
            self._mirrorla("submit", *_REQUEST, *_TRAINING, f"--data.path={self._data}", f"--run_dir={self.run}")
            job = slurm.job_number(self.run) or ""
            self._tell(f"mirrorla submit: job {job} is in the queue; its batch script is {slurm.script_path(self.run)}")
            cluster.wait_for(job, "RUNNING")
            self._tell("it runs: one process on each node; they import torch, meet and train …")
            self._wait_for_text(cluster, job, "epoch 1/")
            self._tell("the first epoch is done")
            self._preempt(cluster, job)
            self._tell("the queue lets it run again (a real one lets it wait two minutes; here that is skipped)")
            state = cluster.finish(job, timeout_s=_PATIENCE_S)
            self._quote("start 2", "attempt 2", "epoch 3/", "validation top-1", "done")
            self._tell(f"job {job} is {state}")
        self._say("")
        self._say(self._mirrorla("status", str(self.run)).rstrip())
        self._tell("the cluster is gone, and no process is left")
        return 0 if state == "COMPLETED" else 1

    def _preempt(self, cluster: PrivateSlurm, job: str) -> None:
        words = ("--parsable", "--partition=high", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null")
        other = cluster.client("sbatch", *words, "--wrap=sleep 1")
        self._tell(f"job {other} of a partition with a higher priority wants both nodes: job {job} is preempted")
        cluster.wait_for(job, "PENDING", timeout_s=_PATIENCE_S)
        self._quote("stopped by", "ended first", "queued again")
        self._tell("all processes agreed on a step, saved one checkpoint there and left; the job is queued again")
        cluster.wait_for(other, "COMPLETED", timeout_s=_PATIENCE_S)

    def _wait_for_text(self, cluster: PrivateSlurm, job: str, text: str) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while text not in self._told():
            state = cluster.state(job)
            if state in ("COMPLETED", "FAILED") or time.monotonic() > deadline:
                raise RuntimeError(f"job {job} is {state} and did not get as far as {text!r}:\n{self._told()}")
            time.sleep(0.1)

    def _told(self) -> str:
        try:
            return slurm.output_file(self.run).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def _quote(self, *texts: str) -> None:
        """Repeat what the job itself said: for each text the last line that holds it."""
        lines = self._told().splitlines()
        for text in texts:
            if found := [line for line in lines if text in line]:
                self._say(f"           | {found[-1]}")

    def _tell(self, text: str) -> None:
        self._say(f"{time.monotonic() - self._began_s:6.1f} s   {text}")

    def _mirrorla(self, *words: str) -> str:
        return _output([sys.executable, "-m", "lightning_modules.cli", *words])


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(list(command), capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
