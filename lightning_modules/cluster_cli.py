"""`mirrorla plan|submit|logs|cancel|rehearse`: a training on a SLURM cluster.

Only `plan` and `submit` import torch, and only once everything that can be refused without it has been.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster import plan, slurm, training
from lightning_modules.errors import UsageError
from lightning_modules.job_request import Request, checked_options, read_request, refuse, script_of

_FORMS = """\
  --slurm NAME|FILE     what to ask SLURM for: a packaged name (slurm/debug) or a YAML file with a section `slurm`;
                        may be repeated, later ones win. A `slurm` section of a --config file counts as well
  --slurm.KEY VALUE     one key of it: --slurm.partition gpu --slurm.nodes 4 --slurm.environment.NCCL_DEBUG INFO
  --run_dir RUN         run directory, seen by all nodes; default as for fit
  everything else       is for `mirrorla fit`: --config FILE --data.batch_size 1024 …
"""
_HELP = {
    "plan": "usage: mirrorla plan [--slurm FILE]… [--calibrate] [options of fit]\n\n"
    "Say what a job would be and refuse what cannot work, before anything is submitted.\n\n"
    f"{_FORMS}  --calibrate           measure images/s with a few steps on this machine's device\n",
    "submit": "usage: mirrorla submit [--slurm FILE]… [--dry-run | --test-only] [options of fit]\n\n"
    "Check every option as fit will, write RUN/job/job.sh, a readable batch script, and hand it to sbatch.\n\n"
    f"{_FORMS}  --dry-run             write and print the script, submit nothing\n"
    "  --test-only           let SLURM check it and say when it would start\n",
    "logs": "usage: mirrorla logs RUN [--rank N]\n\nPrint what a run's job wrote, or one rank's log.\n",
    "cancel": "usage: mirrorla cancel RUN\n\nEnd a run's job.\n",
    "rehearse": "usage: mirrorla rehearse [--keep RUN]\n\n"
    "Train the digits as a job of 2 nodes on a real SLURM cluster, private to this command, on this machine: submit,\n"
    "preempt, queue again, resume, finish. About a minute; needs slurmctld, slurmd, slurm-client and munge.\n\n"
    "  --keep RUN            keep the run directory there\n",
}


def run(verb: str, argv: Sequence[str]) -> int:
    """Carry out one verb.

    Args:
        verb: plan, submit, logs, cancel or rehearse.
        argv: its options.

    Returns:
        Exit code: 0 done.

    Raises:
        UsageError: options that make no job.
        ValueError: a setting that is not valid, or SLURM refuses.
    """
    if any(word in ("-h", "--help") for word in argv):
        sys.stdout.write(_HELP[verb])
        return 0
    verbs = {"plan": _plan, "submit": _submit, "logs": _logs, "cancel": _cancel, "rehearse": _rehearse}
    return verbs[verb](list(argv))


def _submit(argv: list[str]) -> int:
    request = read_request(argv, frozenset({"--dry-run", "--test-only"}))
    if not request.configs:
        raise UsageError("no training is configured; give --config, for example --config digits/classification")
    queued = slurm.job_line(request.run)
    if queued is not None and not request.flags:
        raise UsageError(f"run_dir {request.run}: {queued}; wait for it, or first: mirrorla cancel {request.run}")
    refuse(request)
    _check(request)
    script, copies = script_of(request)
    path = slurm.write(request.run, script, copies)
    if "--dry-run" in request.flags:
        sys.stdout.write(script)
        sys.stderr.write(f"written to {path}; nothing submitted\n")
    elif "--test-only" in request.flags:
        sys.stdout.write(slurm.submit(request.run, test_only=True) + "\n")
    else:
        number = slurm.submit(request.run)
        sys.stdout.write(f"job {number}  {request.run}\n")
        sys.stderr.write(f"watch: mirrorla status {request.run}; mirrorla logs {request.run}\n")
    return 0


def _check(request: Request) -> None:
    """Refuse now what `fit` would refuse after hours in the queue; a login node may lack what `fit` needs."""
    try:
        checked_options(request)
    except ModuleNotFoundError as error:
        sys.stderr.write(f"options not checked: there is no {error.name} here; fit will check them on the nodes\n")


def _logs(argv: list[str]) -> int:
    words, rank = list(argv), None
    for index, word in enumerate(words):
        if word.partition("=")[0] == "--rank":
            text = word.partition("=")[2] or (words.pop(index + 1) if index + 1 < len(words) else "")
            if not text.isdecimal():
                raise UsageError(f"--rank {text!r} must be a number from 0 up")
            rank = int(text)
            words.pop(index)
            break
    path = slurm.output_file(_one_run("logs", words), rank)
    sys.stdout.write(path.read_text(errors="replace"))
    return 0


def _cancel(argv: list[str]) -> int:
    number = slurm.cancel(_one_run("cancel", argv))
    sys.stdout.write(f"job {number} cancelled\n")
    return 0


def _plan(argv: list[str]) -> int:
    """Refuse first what needs no torch, then what fit would refuse, then send a small step through the model."""
    request = read_request(argv, frozenset({"--calibrate"}))
    refuse(request)
    described, folder = training.read(request.configs, request.fit), Path.cwd()
    samples = plan.samples_in(described, folder)
    options = checked_options(request)
    from lightning_modules.forecast import weigh

    sizes = weigh(options, calibrate="--calibrate" in request.flags)
    rows, refused = plan.forecast(described, request.slurm, sizes, samples)
    for label, text in [*plan.arithmetic(described, request.slurm, samples), *rows]:
        sys.stdout.write(f"{label:12}{text}\n")
    if refused:
        raise UsageError("; ".join(refused))
    return 0


def _rehearse(argv: list[str]) -> int:
    from cluster.rehearse import Rehearsal

    words = [word for text in argv for word in text.split("=", 1)]
    if words and (words[0] != "--keep" or len(words) != 2):
        raise UsageError(f"{argv[0]!r} is not understood; see mirrorla rehearse --help")
    with tempfile.TemporaryDirectory(prefix="mirrorla-rehearsal-") as folder:
        kept = Path(os.path.abspath(words[1])) if words else Path(folder)  # noqa: PTH100
        if words and kept.exists() and any(kept.iterdir()):
            raise UsageError(f"--keep {kept} is not empty; give a new folder")
        kept.mkdir(parents=True, exist_ok=True)
        try:
            return Rehearsal(kept, lambda line: print(line, flush=True)).play()
        except (RuntimeError, TimeoutError) as error:  # it quotes the job's own output, line by line
            sys.stderr.write(f"mirrorla rehearse: error: {error}\n")
            return 1


def _one_run(verb: str, argv: Sequence[str]) -> Path:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UsageError(f"give one run directory: mirrorla {verb} RUN")
    run_dir = Path(argv[0])
    if not run_dir.is_dir():
        raise UsageError(f"there is no run directory {run_dir}")
    return run_dir
