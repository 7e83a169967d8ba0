"""A real SLURM cluster of several nodes on one machine, private to one process: for rehearsals and tests.

munged, slurmctld and one slurmd per node run in a mount, PID and host-name namespace of their own, with their own key,
ports and folders. Nothing of the system's SLURM is read or touched, and when the namespace's first process ends, by
whatever means, the kernel ends every process in it, jobs included.

Needs the Debian packages of PACKAGES, and root or unprivileged user namespaces.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from cluster.private_settings import Shape, write_settings

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "setpriv")
_READY_S = 30
_LIVING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "STOPPED", "SUSPENDED")
_SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])  # daemons, for plain users too


def missing_programs() -> list[str]:
    """Programs that a private cluster needs and this machine lacks."""
    return [name for name in _PROGRAMS if shutil.which(name, path=_SEARCH) is None]


class PrivateSlurm:
    """A context manager: the cluster runs inside it.

    Args:
        shape: nodes and what they have.

    Attributes:
        folder: configuration, logs and state; removed at the end.
        environment: what a client's environment needs so that sbatch, srun, squeue, scontrol and scancel talk to it.

    Raises:
        FileNotFoundError: a program is missing; says how to install it.
        RuntimeError: the cluster did not come up; quotes its logs.
    """

    def __init__(self, shape: Shape) -> None:
        missing = missing_programs()
        if missing:
            raise FileNotFoundError(
                f"a rehearsal needs {', '.join(missing)}; on Debian or Ubuntu: "
                f"sudo apt-get install --no-install-recommends {' '.join(PACKAGES)}"
            )
        self.shape = shape
        self.folder = Path(tempfile.mkdtemp(prefix="mirrorla-slurm-", dir="/tmp"))  # short: it holds a socket
        self.environment = {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": _SEARCH,
        }
        self._holder: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "PrivateSlurm":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def client(self, *command: str, check: bool = True) -> str:
        """What a SLURM command prints.

        Raises:
            RuntimeError: it failed.
        """
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """A job's state as squeue says it, finished ones included: PENDING, RUNNING, COMPLETED and so on."""
        return self.client("squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T")

    def finish(self, job: str, timeout_s: float = 120) -> str:
        """Wait for a job's end, whatever that is; whenever it is queued again, let it start at once.

        SLURM may end a start that comes too soon after a lost node, so a job can be queued again more than once.

        Returns:
            Its last state: COMPLETED, FAILED and so on.

        Raises:
            TimeoutError: it does not end.
        """
        update, state = ("scontrol", "update", f"JobId={job}", "StartTime=now"), "PENDING"
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            state = self.state(job)
            if state not in _LIVING:
                return state
            if state == "PENDING":
                time.sleep(2)  # a node takes a job that starts in the second of its end for the ended one
                self.client(*update, check=False)  # refused while its last processes end
            time.sleep(0.2)
        raise TimeoutError(f"job {job} is {state} after {timeout_s:g} s")

    def wait_for(self, job: str, *states: str, timeout_s: float = 120) -> str:
        """Wait until a job is in one of these states.

        Raises:
            TimeoutError: it is not; says which state it is in.
        """
        _wait_until(lambda: self.state(job) in states, timeout_s)
        if (state := self.state(job)) not in states:
            raise TimeoutError(f"job {job} is {state} after {timeout_s:g} s, not {' or '.join(states)}")
        return state

    def daemon(self, node: str) -> int:
        """The process number of a node's slurmd.

        Raises:
            ProcessLookupError: it does not run.
        """
        wanted = ["-N", node, "-f", self.environment["SLURM_CONF"]]
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_text().split("\0")
            except OSError:
                continue
            if Path(words[0]).name.startswith("slurmd") and words[2:6] == wanted:
                return int(path.parent.name)
        raise ProcessLookupError(f"there is no slurmd of {node}")

    def restart(self, node: str) -> None:
        """Start the slurmd of a node again, after it was killed."""
        (self.folder / f"restart.{node}").touch()

    def stop(self) -> None:
        """End every process of the cluster and remove its folder."""
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait()
            _wait_until(lambda: not self._lives(), 10)
            self._holder = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _lives(self) -> bool:
        """Whether the namespace still has processes; the folder's name is on every daemon's command line."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(self.folder) in path.read_text():
                    return True
            except OSError:
                continue
        return False

    def _start(self) -> None:
        write_settings(self.folder, self.shape)
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        namespaces = ["--mount", "--pid", "--uts", "--fork", "--mount-proc", "--propagation", "private"]
        serve = [sys.executable, "-m", "cluster.private_slurm", str(self.folder)]
        with (self.folder / "holder.log").open("wb") as log:
            self._holder = subprocess.Popen(
                # setpriv: a parent that is killed leaves no cluster behind.
                ["setpriv", "--pdeathsig", "KILL", "unshare", *user, *namespaces, "--kill-child", *serve],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_without_slurm(os.environ), **self.environment},
            )
        if not _wait_until(self._is_ready, _READY_S):
            logs = [path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log"))]
            raise RuntimeError("the private SLURM cluster did not start:\n" + "\n".join(logs))

    def _is_ready(self) -> bool:
        if self._holder is not None and self._holder.poll() is not None:
            raise RuntimeError(f"the private SLURM cluster ended: {(self.folder / 'holder.log').read_text()}")
        if not self.shape.is_running:  # sinfo does not show nodes in a cloud
            return "is UP" in self.client("scontrol", "ping", check=False)
        return self.client("sinfo", "-h", "-p", "main", "-o", "%T %D", check=False) == f"idle {self.shape.nodes}"


def _without_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """A rehearsal started inside a job must not look like that job."""
    return {name: value for name, value in environment.items() if not name.startswith(("SLURM", "SBATCH"))}


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def serve(folder: Path) -> None:
    """The namespace's first process: start the daemons, then only wait for whatever ends."""
    subprocess.run(["mount", "--bind", str(folder / "hosts"), "/etc/hosts"], check=True)
    socket.sethostname("head")
    munged = ["munged", "--foreground", "--force", "--num-threads", "2"]
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
    logs = {"log-file": "munge.log", "seed-file": "munge.seed"}
    _spawn([*munged, *(f"--{option}={folder / name}" for option, name in {**files, **logs}.items())])
    _wait_until((folder / "munge.socket").exists, _READY_S)
    conf = str(folder / "slurm.conf")
    _spawn(["slurmctld", "-D", "-c", "-i", "-f", conf])
    for spool in sorted(folder.glob("spool.*")):
        _start_node(spool.name.partition(".")[2], conf)
    while True:
        for request in folder.glob("restart.*"):
            request.unlink()
            _start_node(request.name.partition(".")[2], conf)
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        time.sleep(0.05)


def _start_node(node: str, conf: str) -> None:
    rename = 'hostname "$0" && exec slurmd -D -N "$0" -f "$1"'
    _spawn(["unshare", "--uts", "sh", "-c", rename, node, conf])


def _spawn(command: Sequence[str]) -> None:
    subprocess.Popen(command, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
