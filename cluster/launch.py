"""On a node: check it, prepare one rank's surroundings, start the training, pass signals on, note the first failure.

`python -m cluster.launch [options] -- COMMAND…`; srun starts one per rank. Standard library only.

It stays beside the training as a small process (10 MB) for two reasons. Batch systems signal either only the process
they started or everything it started, too: whatever they do, the training gets its signal. And srun ends all ranks as
soon as one has failed, so its exit code is that of the killing; the cause is kept in RUN/job/first_failure.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.preflight import Needs, unfit

UNFIT_NODE = 80
NOT_STARTED = 127
PASSED_ON = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGCONT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank.

    Args:
        argv: options, "--", the command.

    Returns:
        The command's exit code, 128 + n if signal n ended it; UNFIT_NODE if the node failed its check.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    dashes = words.index("--")
    options, command = _options().parse_args(words[:dashes]), words[dashes + 1 :]
    variables = dict(os.environ)
    if options.agent:
        code = _run(command, {**variables, **surroundings(variables, options.cpus)}, is_agent=True)
        if code:  # kept only if none of its ranks noted a cause: it could not start them
            note_failure(Path(options.job), code, place(variables)[0])
        return code
    if "TORCHELASTIC_RUN_ID" in variables:
        variables.pop("SLURM_NTASKS", None)  # or Lightning takes this rank for one that srun started
    rank, local_rank = place(variables)
    job = Path(options.job)
    if local_rank == 0:
        needs = Needs(options.gpus, options.min_free_gib, options.min_shm_gib, Path(options.run))
        if reasons := unfit(needs):
            host = node_name(variables)
            sys.stderr.write(f"node {host} is unfit: {'; '.join(reasons)}\n")
            with (job / "strikes").open("a") as stream:
                stream.write(f"{host} {'; '.join(reasons)}\n")
            note_failure(job, UNFIT_NODE, rank)
            return UNFIT_NODE
    code = _run(command, {**variables, **surroundings(variables, options.cpus)}, is_agent=False)
    if code:
        note_failure(job, code, rank)
    return code


def place(variables: Mapping[str, str]) -> tuple[int, int]:
    """Global and local rank of this process, as torchrun or srun announced them; 0 and 0 for a process alone."""
    if "TORCHELASTIC_RUN_ID" in variables:
        return int(variables["RANK"]), int(variables["LOCAL_RANK"])
    return int(variables.get("SLURM_PROCID", 0)), int(variables.get("SLURM_LOCALID", 0))


def node_name(variables: Mapping[str, str]) -> str:
    """This machine as SLURM calls it, which is what it can be told to leave out."""
    return variables.get("SLURMD_NODENAME") or socket.gethostname()


def surroundings(variables: Mapping[str, str], cpus: int) -> dict[str, str]:
    """Variables a rank needs; those already set stay as they are.

    Args:
        variables: the environment so far.
        cpus: cores of this rank.
    """
    local = Path(variables.get("SLURM_TMPDIR") or variables.get("TMPDIR") or tempfile.gettempdir())
    caches = local / f"mirrorla-cache-{os.getuid()}"
    wanted = {
        "OMP_NUM_THREADS": str(cpus),
        # Compiled kernels stay on the node: on a network file system ranks race for the same files.
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TORCH_EXTENSIONS_DIR": str(caches / "extensions"),
        # A failed collective ends its process with the reason instead of waiting half an hour.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "NCCL_DEBUG": "WARN",
    }
    return {name: value for name, value in wanted.items() if name not in variables}


def note_failure(job: Path, code: int, rank: int) -> None:
    """Keep the first failure of a start; of several ranks the first to come writes."""
    try:
        descriptor = os.open(job / "first_failure", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:  # another rank was first, or the disk is full: the exit code remains
        return
    os.write(descriptor, f"{code} {rank} {socket.gethostname()}\n".encode())
    os.close(descriptor)


def _run(command: Sequence[str], variables: Mapping[str, str], *, is_agent: bool) -> int:
    """Start the command, pass signals on until it ends.

    torchrun ends its ranks when it is signalled, and so is left out: they get the signal from here.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        if child is None:
            early.append(number)
        elif not is_agent:
            child.send_signal(number)
        else:
            for pid in _children(child.pid):
                os.kill(pid, signal.SIGUSR1 if number == signal.SIGTERM else number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    try:
        child = subprocess.Popen(command, env=variables, preexec_fn=_ignore_stop_signals if is_agent else None)
    except OSError as error:
        sys.stderr.write(f"{command[0]} cannot be started: {error}\n")
        return NOT_STARTED
    for waiting in early:
        pass_on(waiting, None)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _ignore_stop_signals() -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _options() -> argparse.ArgumentParser:
    usage = "python -m cluster.launch --job DIR --run DIR [options] -- COMMAND…"
    parser = argparse.ArgumentParser(prog="cluster.launch", usage=usage, allow_abbrev=False)
    parser.add_argument("--job", required=True, help="RUN/job, where failures are noted")
    parser.add_argument("--run", required=True, help="the run directory")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that this node must show")
    parser.add_argument("--cpus", type=int, default=1, help="cores of this rank")
    parser.add_argument("--min-free-gib", type=float, default=0.0)
    parser.add_argument("--min-shm-gib", type=float, default=0.0)
    parser.add_argument("--agent", action="store_true", help="the command starts the ranks itself (torchrun)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
