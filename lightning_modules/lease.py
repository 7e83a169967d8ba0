"""Who may write into a run directory: one job at a time, with a number that only grows. Standard library only.

RUN/lease/00000007.json is the lease with fencing token 7; the highest number counts. Creating a file that must not
exist (O_EXCL) decides between two jobs that want the same number, on network file systems too, without locks. The
holder counts up a heartbeat in its file. A job that finds a holder asks the kernel, if both run on one machine;
otherwise it watches whether the count changes. Two machines' clocks are never compared.
"""

import contextlib
import json
import logging
import os
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lightning_modules.commit import sync_directory
from lightning_modules.errors import UsageError
from lightning_modules.exit_codes import ExitCode, GuardStop
from lightning_modules.process import Process

WATCH_S = 60.0
"""How long another machine's holder is watched; a network file system may show a file as it was half a minute ago."""

_FOLDER = "lease"
_POLL_S = 0.25
_log = logging.getLogger("mirrorla")


class RunInUseError(UsageError):
    """Another job holds the run directory."""

    exit_code = ExitCode.IN_USE


@dataclass(frozen=True)
class Holder:
    """What a lease file says.

    Attributes:
        token: the fencing token.
        owner: random, told apart from any other start's.
        process: the holder; None while its file is just being written, or is damaged.
        job: the batch system's number, if any.
        beats: counted up while the holder lives.
        is_released: whether it has left in order.
    """

    token: int
    owner: str = ""
    process: Process | None = None
    job: str | None = None
    beats: int = 0
    is_released: bool = False

    def __str__(self) -> str:
        """Who it is, for a message."""
        if self.process is None:
            return f"an unknown job (lease {self.token})"
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.process.pid} on {self.process.host}"

    def file(self, root: Path) -> Path:
        """Where it is written in a run directory."""
        return _file(root / _FOLDER, self.token)


class Lease:
    """The right to write into a run directory, held by this process until it is released or taken over.

    Args:
        folder: of the lease files.
        holder: what this process's file says.
    """

    def __init__(self, folder: Path, holder: Holder) -> None:
        self._folder = folder
        self._holder = holder

    @property
    def token(self) -> int:
        """The fencing token: higher than that of every lease before."""
        return self._holder.token

    def check(self) -> int:
        """The token, if the lease is still ours; called before anything that a later holder would regret.

        Raises:
            GuardStop: another job has taken the run over; it is named.
        """
        latest = _latest(self._folder)
        if latest is not None and (latest.token, latest.owner) != (self.token, self._holder.owner):
            raise GuardStop(
                f"run_dir {self._folder.parent} was taken over by {latest} while this job did not answer; "
                "nothing more is written here",
                ExitCode.LEASE_LOST,
            )
        return self.token

    def renew(self) -> None:
        """Count the heartbeat up.

        Raises:
            GuardStop: see check.
        """
        self.check()
        self._holder = replace(self._holder, beats=self._holder.beats + 1)
        self._write()

    def release(self) -> None:
        """Leave; the file stays, so that the next token is higher. Nothing if the run was taken over or is gone."""
        with contextlib.suppress(GuardStop, OSError):
            self.check()
            self._holder = replace(self._holder, is_released=True)
            self._write()

    def _write(self) -> None:
        """Replace the file in one move; not flushed to the disk: after a power cut the holder is gone anyway."""
        temporary = self._folder / f".{self._holder.owner}"
        temporary.write_text(_encode(self._holder))
        temporary.replace(_file(self._folder, self.token))


def acquire(root: Path, watch_s: float = WATCH_S) -> Lease:
    """Take the lease of a run directory.

    Args:
        root: the run directory; it must exist.
        watch_s: how long a holder on another machine may leave its heartbeat unchanged before it counts as gone.

    Returns:
        The lease, with a token above all before.

    Raises:
        RunInUseError: another job holds it; it is named.
    """
    folder = root / _FOLDER
    folder.mkdir(exist_ok=True, mode=0o700)
    while True:
        latest = _latest(folder)
        living = None if latest is None else _living(folder, latest, watch_s)
        if living is not None:
            raise RunInUseError(
                f"run_dir {root} is in use by {living}; wait until it ends, stop it, or give another --run_dir"
            )
        lease = _claim(folder, 1 if latest is None else latest.token + 1)
        if lease is not None:
            return lease


def read_holder(root: Path) -> Holder | None:
    """The latest holder of a run directory; None if there never was one."""
    return _latest(root / _FOLDER)


def _living(folder: Path, holder: Holder, watch_s: float) -> Holder | None:
    """The holder, or one that came after it while it was watched, if it lives."""
    if holder.is_released:
        return None
    state = "elsewhere" if holder.process is None else holder.process.state()
    if state != "elsewhere":
        return None if state == "gone" else holder
    _log.info("run directory  last held by %s: watching its heartbeat for up to %.0f s", holder, watch_s)
    end_s = time.monotonic() + watch_s
    while time.monotonic() < end_s:
        time.sleep(min(_POLL_S, watch_s))
        latest = _latest(folder)
        if latest != holder:
            return latest if latest is not None and not latest.is_released else None
    return None


def _claim(folder: Path, token: int) -> Lease | None:
    """Create the lease file of a token; None if another job was faster."""
    holder = Holder(token, uuid.uuid4().hex, Process.here(), os.environ.get("SLURM_JOB_ID"))
    try:
        descriptor = os.open(_file(folder, token), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return None
    with os.fdopen(descriptor, "w") as stream:
        stream.write(_encode(holder))
        stream.flush()
        os.fsync(descriptor)
    sync_directory(folder)
    latest = _latest(folder)
    if latest is None or latest.token != token:  # we slept while others came and went, and their files were removed
        _file(folder, token).unlink(missing_ok=True)
        return None
    for path in [*_files(folder)[:-1], *folder.glob(".*")]:
        path.unlink(missing_ok=True)
    return Lease(folder, holder)


def _latest(folder: Path) -> Holder | None:
    files = _files(folder) if folder.is_dir() else []
    if not files:
        return None
    token = int(files[-1].stem)
    try:
        row = json.loads(files[-1].read_text())
        return Holder(**{**row, "token": token, "process": Process(**row["process"])})
    except FileNotFoundError:  # its holder was replaced between the two looks
        return _latest(folder)
    except (ValueError, TypeError, KeyError):
        return Holder(token)


def _files(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("*.json") if path.stem.isdigit()), key=lambda path: int(path.stem))


def _file(folder: Path, token: int) -> Path:
    return folder / f"{token:08d}.json"


def _encode(holder: Holder) -> str:
    return json.dumps(asdict(holder)) + "\n"
