"""Is this node fit to train? Devices, disk, shared memory and clock, before anything starts. Standard library only."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MAX_CLOCK_SKEW_S = 60.0

_GIB = 2**30
_GPU_LINE = re.compile(r"^GPU \d+: ", re.MULTILINE)


@dataclass(frozen=True)
class Needs:
    """What a node must have.

    Attributes:
        gpus: that it shows.
        free_gib: on the run directory's file system.
        shm_gib: in /dev/shm.
        run: the run directory.
    """

    gpus: int
    free_gib: float
    shm_gib: float
    run: Path


def unfit(needs: Needs) -> list[str]:
    """What is wrong with this node, each in a few words with the mend; empty for a fit one."""
    found = [_gpus(needs.gpus), _free(needs.run, needs.free_gib), _shared_memory(needs.shm_gib), _clock(needs.run)]
    return [reason for reason in found if reason]


def _gpus(wanted: int) -> str:
    if not wanted:
        return ""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer ({type(error).__name__})"
    shown = len(_GPU_LINE.findall(done.stdout))
    if done.returncode or shown < wanted:
        return f"{shown} of {wanted} GPUs answer; nvidia-smi ended with code {done.returncode}"
    return ""


def _free(folder: Path, wanted_gib: float) -> str:
    try:
        free = shutil.disk_usage(folder).free / _GIB
    except OSError as error:
        return f"the run directory {folder} cannot be reached ({os.strerror(error.errno or 0)})"
    if free < wanted_gib:
        return f"{free:.1f} GiB free in {folder}, {wanted_gib:g} wanted; remove old runs or lower slurm.min_free_gib"
    return ""


def _shared_memory(wanted_gib: float) -> str:
    try:
        size = shutil.disk_usage("/dev/shm").total / _GIB
    except OSError:
        size = 0.0
    if size < wanted_gib:
        return f"/dev/shm has {size:.1f} GiB, {wanted_gib:g} wanted; mount a bigger one or lower slurm.min_shm_gib"
    return ""


def _clock(folder: Path) -> str:
    """A file just written carries the file server's time."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as stream:
            skew = os.fstat(stream.fileno()).st_mtime - time.time()
    except OSError as error:
        return f"the run directory {folder} cannot be written ({os.strerror(error.errno or 0)})"
    if abs(skew) > MAX_CLOCK_SKEW_S:
        return f"its clock is {-skew:+.0f} s from that of the run directory's file server"
    return ""
