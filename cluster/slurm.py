"""Submit, watch, read and cancel the job of a run directory: thin shells around sbatch, squeue and scancel."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.sbatch import SCRIPT

_JOB = re.compile(r"\d+")
_OUTPUT = re.compile(r"slurm_(\d+)\.out")
_SHOWN = "%i|%T|%r|%M|%l|%D|%N"


def script_path(run: Path) -> Path:
    """Where the batch script of a run is."""
    return run / "job" / SCRIPT


def write(run: Path, script: str, configs: Mapping[str, str]) -> Path:
    """Write the batch script and the configurations it uses; they do not change while the job waits.

    Args:
        run: run directory; made if missing, for its owner only.
        script: text of the batch script.
        configs: file name -> text, for RUN/job/.

    Returns:
        The script's path.
    """
    for folder in (run, run / "job", run / "logs"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, text in configs.items():
        (run / "job" / name).write_text(text)
    path = script_path(run)
    path.write_text(script)
    path.chmod(0o700)
    return path


def submit(run: Path, *, test_only: bool = False) -> str:
    """Hand the script to sbatch.

    Args:
        run: run directory with a script.
        test_only: let SLURM check it and say when it would start, without queueing it.

    Returns:
        The job's number; what sbatch says where it only checks.

    Raises:
        ValueError: sbatch refuses; its reason is quoted.
    """
    options = ["--test-only"] if test_only else ["--parsable"]
    done = _call(["sbatch", *options, str(script_path(run))])
    if done.returncode:
        raise ValueError(f"sbatch refuses {script_path(run)}: {_line(done.stderr)}")
    if test_only:
        return _line(done.stderr or done.stdout)
    number = done.stdout.strip().partition(";")[0]
    (run / "job" / "id").write_text(number + "\n")
    return number


def job_number(run: Path) -> str | None:
    """The number of a run's latest job; None if it was never submitted."""
    try:
        number = (run / "job" / "id").read_text().strip()
    except FileNotFoundError:
        return None
    return number if _JOB.fullmatch(number) else None


def job_line(run: Path) -> str | None:
    """What the queue says of a run's job; None if it is not queued, was never submitted, or there is no SLURM here."""
    number = job_number(run)
    if number is None or shutil.which("squeue") is None:
        return None
    done = _call(["squeue", "--noheader", "--jobs", number, "--format", _SHOWN])
    lines = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == _SHOWN.count("|")]
    return "; ".join(_describe(fields) for fields in lines) or None


def output_file(run: Path, rank: int | None = None) -> Path:
    """The log to read: the batch script's output with everything printed, or one rank's own.

    Raises:
        FileNotFoundError: there is none yet.
    """
    logs = run / "logs"
    if rank is not None:
        path = logs / f"rank_{rank}.log"
        if not path.is_file():
            there = sorted(p.name for p in logs.glob("rank_*.log"))
            raise FileNotFoundError(f"rank {rank} has no log in {logs}; there are: {', '.join(there) or 'none yet'}")
        return path
    found = [(int(match[1]), path) for path in logs.glob("slurm_*.out") if (match := _OUTPUT.fullmatch(path.name))]
    if not found:
        raise FileNotFoundError(f"there is no job's output in {logs} yet; see mirrorla status {run}")
    return max(found)[1]


def cancel(run: Path) -> str:
    """End a run's job; its training is told first, and saves.

    Returns:
        The job's number.

    Raises:
        ValueError: it has no job, or scancel refuses.
    """
    number = job_number(run)
    if number is None:
        raise ValueError(f"run_dir {run} was never submitted: it has no job/id")
    done = _call(["scancel", number])
    if done.returncode:
        raise ValueError(f"scancel refuses job {number}: {_line(done.stderr)}")
    return number


def _describe(fields: Sequence[str]) -> str:
    number, state, reason, elapsed, limit, nodes, names = fields
    if state == "PENDING":
        return f"job {number} waits ({reason}), {nodes} nodes wanted, limit {limit}"
    return f"job {number} {state.lower()} for {elapsed} of {limit} on {names or 'no node yet'}"


def _call(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run a SLURM command outside of any job this process may be part of."""
    environment = {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or "SLURM_" not in name}
    try:
        return subprocess.run(list(command), env=environment, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise ValueError(
            f"there is no {command[0]} here: submit on a login node of a SLURM cluster, or try it out on this machine "
            "with mirrorla rehearse"
        ) from None


def _line(text: str) -> str:
    return " ".join(text.replace("sbatch: error: ", "").replace("sbatch: ", "").split())
