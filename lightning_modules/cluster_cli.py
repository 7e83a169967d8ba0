"""`mirrorla plan|submit|logs|cancel|rehearse`: a training on a SLURM cluster. Only `plan` imports torch."""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from types import ModuleType

from cluster import plan, sbatch, settings, slurm, training
from cluster.config import SlurmConfig
from lightning_modules.errors import UsageError
from lightning_modules.exit_codes import MEANINGS, ExitCode
from lightning_modules.run_directory import default_run_dir

_KILLED = 137
"""A rank that something killed (a lost node, no memory): the job goes on, as long as it gets anywhere."""
_OURS = {"--run_dir", "--ckpt_path", "--trainer.num_nodes", "--trainer.devices"}
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
    "Write RUN/job/job.sh, a readable batch script, and hand it to sbatch.\n\n"
    f"{_FORMS}  --dry-run             write and print the script, submit nothing\n"
    "  --test-only           let SLURM check it and say when it would start\n",
    "logs": "usage: mirrorla logs RUN [--rank N]\n\nPrint what a run's job wrote, or one rank's log.\n",
    "cancel": "usage: mirrorla cancel RUN\n\nEnd a run's job.\n",
    "rehearse": "usage: mirrorla rehearse [--keep RUN]\n\n"
    "Train the digits as a job of 2 nodes on a real SLURM cluster, private to this command, on this machine: submit,\n"
    "preempt, queue again, resume, finish. About a minute; needs slurmctld, slurmd, slurm-client and munge.\n\n"
    "  --keep RUN            keep the run directory there\n",
}


@dataclass(frozen=True)
class Request:
    """One job to plan or submit.

    Attributes:
        slurm: what is asked of SLURM.
        fit: options of `mirrorla fit`, the --config names turned into files; without those the script decides.
        configs: the configuration files, in order.
        run: run directory, absolute.
        flags: --dry-run and the like.
    """

    slurm: SlurmConfig
    fit: tuple[str, ...]
    configs: tuple[Path, ...]
    run: Path
    flags: frozenset[str] = field(default=frozenset())


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


def read_request(argv: Sequence[str], flags: frozenset[str]) -> Request:
    """Tell the options for SLURM from those of the training.

    Args:
        argv: options of plan or submit.
        flags: options without a value that the verb knows.

    Raises:
        UsageError: an option without its value, or one that only the script may set.
        FileNotFoundError: no such configuration; the nearest is named.
    """
    layers: list[tuple[Path, bool]] = []
    options: list[tuple[str, str]] = []
    fit: list[str] = []
    run_dir, given, words = None, set(), list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in flags:
            given.add(word)
        elif name in ("--slurm", "--config", "-c") or name.startswith("--slurm.") or name in _OURS:
            value = value if equals else _next(name, words)
            if name in ("--config", "-c"):
                layers.append((_find_config(value), True))
                fit += ["--config", str(layers[-1][0])]
            elif name == "--slurm":
                layers.append((_find_config(value), False))
            elif name == "--run_dir":
                run_dir = value
            elif name in _OURS:
                raise UsageError(f"{name} {value} is set by the batch script, from --slurm.*; leave it out")
            else:
                options.append((name.removeprefix("--slurm."), value))
        else:
            fit.append(word)
    config = settings.merge(
        [
            *((str(path), settings.slurm_section(path)) for path, _ in layers),
            ("command line", settings.overrides(options)),
        ]
    )
    configs = tuple(path for path, is_training in layers if is_training)
    chosen = Path(run_dir) if run_dir else default_run_dir(configs[0] if configs else None)
    return Request(config, tuple(fit), configs, Path(os.path.abspath(chosen)), frozenset(given))  # noqa: PTH100 - "..", not links


def copied(request: Request, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The options of the training with every configuration file replaced by its copy in a folder.

    Returns:
        The options; file name -> text, without its `slurm` section.
    """
    words = list(request.fit)
    copies: dict[str, str] = {}
    for index, word in enumerate(words):
        if index and words[index - 1] == "--config":
            name = f"{len(copies):02d}-{Path(word).stem}.yaml"
            copies[name] = settings.without_section(Path(word))
            words[index] = str(folder / name)
    return words, copies


def script_of(request: Request) -> tuple[str, dict[str, str]]:
    """The batch script of a request and the configuration files it names, which stay as they are now.

    Returns:
        The script's text; file name in RUN/job/ -> text.
    """
    fit, copies = copied(request, request.run / "job")
    codes = tuple(int(code) for code, meaning in MEANINGS.items() if meaning.requeue)
    job = sbatch.Job(
        arguments=("-m", "lightning_modules.cli", "fit", *fit),
        run=request.run,
        folder=Path.cwd(),
        interpreter=sys.executable,
        requeue_codes=(*codes, _KILLED),
        crash_loop_code=int(ExitCode.CRASH_LOOP),
    )
    return sbatch.render(request.slurm, job), copies


def _submit(argv: list[str]) -> int:
    request = read_request(argv, frozenset({"--dry-run", "--test-only"}))
    if not request.configs:
        raise UsageError("no training is configured; give --config, for example --config digits/classification")
    queued = slurm.job_line(request.run)
    if queued is not None and not request.flags:
        raise UsageError(f"run_dir {request.run}: {queued}; wait for it, or first: mirrorla cancel {request.run}")
    refuse(request)
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
    """Refuse first what needs no torch, then parse everything as fit does and build the model without memory."""
    request = read_request(argv, frozenset({"--calibrate"}))
    refuse(request)
    described, folder = training.read(request.configs, request.fit), Path.cwd()
    samples = plan.samples_in(described, folder)
    from lightning_modules.forecast import weigh

    with tempfile.TemporaryDirectory() as folder_of_copies:
        words, copies = copied(request, Path(folder_of_copies))
        for name, text in copies.items():
            (Path(folder_of_copies) / name).write_text(text)
        sizes = weigh(words, calibrate="--calibrate" in request.flags)
    rows, refused = plan.forecast(described, request.slurm, sizes, samples)
    for label, text in [*plan.arithmetic(described, request.slurm, samples), *rows]:
        sys.stdout.write(f"{label:12}{text}\n")
    if refused:
        raise UsageError("; ".join(refused))
    return 0


def refuse(request: Request) -> None:
    """Refuse a job that cannot work.

    Raises:
        UsageError: every reason, each with its mend.
    """
    reasons = plan.refusals(training.read(request.configs, request.fit), request.slurm, Path.cwd())
    if reasons:
        raise UsageError("; ".join(reasons))


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
        return Rehearsal(kept, lambda line: print(line, flush=True)).play()


def _one_run(verb: str, argv: Sequence[str]) -> Path:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UsageError(f"give one run directory: mirrorla {verb} RUN")
    run_dir = Path(argv[0])
    if not run_dir.is_dir():
        raise UsageError(f"there is no run directory {run_dir}")
    return run_dir


def _next(name: str, words: list[str]) -> str:
    if not words or words[0].startswith("--"):
        raise UsageError(f"{name} needs a value: mirrorla submit {name} …")
    return words.pop(0)


def _find_config(name: str) -> Path:
    path: Path = _config_files().find_config(name)
    return path


def _config_files() -> ModuleType:
    """mirrorla.config_files without its package, whose import takes torch and seconds."""
    package = util.find_spec("mirrorla")
    assert package is not None and package.origin is not None
    spec = util.spec_from_file_location("_config_files", Path(package.origin).with_name("config_files.py"))
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
