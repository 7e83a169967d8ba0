"""What `mirrorla plan` and `submit` are asked for: a job for SLURM and the training in it. No torch until checked."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from cluster import sbatch, settings, training
from cluster.config import SlurmConfig
from cluster.refusals import refusals
from lightning_modules.errors import UsageError
from lightning_modules.exit_codes import MEANINGS, ExitCode
from lightning_modules.run_directory import default_run_dir

_KILLED = 137
"""A rank that something killed (a lost node, no memory): the job goes on, as long as it gets anywhere."""
_OURS = {"--run_dir", "--ckpt_path", "--trainer.num_nodes", "--trainer.devices"}


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


def refuse(request: Request) -> None:
    """Refuse a job that cannot work; its settings tell, no torch is needed.

    Raises:
        UsageError: every reason, each with its mend.
    """
    reasons = refusals(training.read(request.configs, request.fit), request.slurm, Path.cwd())
    if reasons:
        raise UsageError("; ".join(reasons))


def checked_options(request: Request) -> Any:
    """The options of the training as `fit` will understand them. Imports torch, which takes seconds.

    Raises:
        UsageError: whatever `fit` would refuse on the nodes, after hours in the queue.
    """
    from lightning_modules.dry_fit import parse, refuse_options

    with TemporaryDirectory() as folder:
        words, copies = copied(request, Path(folder))
        for name, text in copies.items():
            (Path(folder) / name).write_text(text)
        try:
            options = parse(words)
            refuse_options(options)
        except ValueError as error:
            message = str(error)
            for path, name in zip(request.configs, copies, strict=True):
                message = message.replace(str(Path(folder) / name), str(path))
            if message == str(error):
                raise
            raise UsageError(message) from None
    return options


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
