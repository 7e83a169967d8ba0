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
    *("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"),
)
_REQUEST = (
    *("--slurm.nodes=2", "--slurm.gpus_per_node=0", "--slurm.tasks_per_node=1", "--slurm.cpus_per_task=1"),
    *("--slurm.partition=grace", "--slurm.time=10:00", "--slurm.signal_lead_s=20", "--slurm.min_free_gib=0.1"),
)
_PATIENCE_S = 300


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
        private = PrivateSlurm(Shape(nodes=2, cpus=2, gpus=0))
        packing = _start(_mirrorla("shards", "pack", "--source", "digits", "--out", str(self._data)))
        with packing, private as cluster:  # both take seconds, and want different cores
            os.environ.update(cluster.environment)
            self._tell("a SLURM cluster of 2 nodes runs on this machine, for this command only")
            _output(packing)
            self._tell("1797 handwritten digits are packed into WebDataset tars")
            paths = (f"--data.path={self._data}", f"--run_dir={self.run}")
            _output(_start(_mirrorla("submit", *_REQUEST, *_TRAINING, *paths)))
            job = slurm.job_number(self.run) or ""
            self._tell(f"mirrorla submit: job {job} is in the queue; its batch script is {slurm.script_path(self.run)}")
            cluster.wait_for(job, "RUNNING")
            self._tell("it runs: one process on each node; they import torch, meet and train …")
            self._wait_for_text(cluster, job, "attempt 1")
            self._tell("they train; amid the first of two epochs somebody else needs the nodes")
            self._preempt(cluster, job)
            self._tell("the queue lets it run again (a real one lets it wait two minutes; here that is skipped)")
            state = cluster.finish(job, timeout_s=_PATIENCE_S)
            self._quote("start 2", "attempt 2", "epoch 2/", "validation top-1", "done")
            self._tell(f"job {job} is {state}")
            self._say("")  # status asks the queue: without a cluster its answer would take a minute to fail
            self._say(_output(_start(_mirrorla("status", str(self.run)))).rstrip())
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


def _mirrorla(*words: str) -> list[str]:
    return [sys.executable, "-m", "lightning_modules.cli", *words]


def _start(command: Sequence[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(list(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _output(process: "subprocess.Popen[str]") -> str:
    told, complaint = process.communicate(timeout=300)
    assert isinstance(process.args, list)
    if process.returncode:
        raise RuntimeError(f"{' '.join(process.args)} ended with {process.returncode}: {complaint.strip()}")
    return told
