"""`mirrorla ablate CONFIG --over KEY=V1,V2 --seeds 0,1,2`: the same training with other settings, compared fairly."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_modules import ablate_grid as grid
from lightning_modules import console, stop_signals
from lightning_modules.ablate_grid import Cell, Request
from lightning_modules.ablate_runs import Stopped
from lightning_modules.commit import commit_text
from lightning_modules.errors import UsageError
from lightning_modules.run_directory import default_run_dir
from lightning_modules.verb_parser import VerbParser

_log = logging.getLogger("mirrorla")
_RECORD = "ablation.json"
_SUBMIT_ONLY = ("--dry-run", "--test-only")
_DESCRIPTION = """\
Train CONFIG once for every combination of values and every seed, each with mirrorla fit in a run directory of its own,
and compare: mean and standard deviation of every setting, its difference from the first one within seeds with a 95 %
confidence interval, a table, a figure, one row per run, and TensorBoard's HParams page.

Given again, the same command goes on: what is finished stays, what was interrupted continues from its checkpoint.
More values or seeds add runs. A run that fails is named, the others go on, and the exit code is 1."""
_EPILOG = """\
every other option is one of mirrorla fit and the same for all runs: --trainer.max_epochs 2 --data.batch_size 32

examples:
  Which attention recalls best? 3 values x 3 seeds, two trainings at a time:
    mirrorla ablate digits/recall --over attention=mirror,relu,softmax --seeds 0,1,2 --jobs 2
  The mirrors' parts, a setting with commas in brackets, and a short look:
    mirrorla ablate digits/recall --over model.backbone.mirror.modulation=instance,ema,none --seeds 0,1
    mirrorla ablate digits/classification --over model.optim.lr=1e-3,3e-3 --over data.batch_size=32,64 --seeds 0
  On a cluster, an array of jobs for each setting; afterwards the same with --collect instead of --slurm:
    mirrorla ablate imagenet/mirrorla_tiny --over attention=mirror,relu --seeds 0,1,2 --slurm slurm/one_node

attention= is short for model.backbone.attention=. RUN holds the results: results.md, .csv, .png and tensorboard/."""


def run(verb: str, argv: Sequence[str]) -> int:
    """Run, continue, submit or collect an ablation.

    Args:
        verb: "ablate".
        argv: its options.

    Returns:
        0; 1 if a run failed.

    Raises:
        UsageError: options that make no ablation, or that `mirrorla fit` would refuse; nothing was started.
    """
    if not argv:
        raise UsageError(f"which configuration? mirrorla {verb} CONFIG --over KEY=V1,V2; see mirrorla {verb} --help")
    options, fit = _parser(verb).parse_known_args(argv)
    slurm, fit = _slurm_words(options.slurm, fit)
    request = _request(options, fit)
    stop_signals.install()
    console.speak(rank=0)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # steps that a resumed run trained again are no news
    try:
        if not options.collect:
            refuse(request)
        elif not (request.root / _RECORD).is_file():
            raise UsageError(f"run_dir {request.root} holds no ablation to collect; leave --collect out to start it")
        cells = _recorded(request)
        if slurm:
            from lightning_modules.ablate_slurm import submit

            return submit(request, slurm)
        from lightning_modules.ablate import collect, train

        failed = [] if options.collect else train(request, options.jobs)
        collect(request, cells)
        return 1 if failed else 0
    except Stopped as stop:
        _log.info("%s", stop)
        return stop.exit_code
    finally:
        console.fall_silent()


def refuse(request: Request) -> None:
    """Find out for every setting what `fit` would refuse, before anything is started.

    Raises:
        UsageError: in `fit`'s words.
    """
    from lightning_modules.dry_fit import parse, refuse_options

    for cell in {cell.setting: cell for cell in request.cells}.values():
        refuse_options(parse(request.words(cell)))


def _request(options: Namespace, fit: Sequence[str]) -> Request:
    if options.jobs is not None and options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs} must be 1 or above")
    if not options.over:
        raise UsageError("nothing to compare; give --over KEY=V1,V2, such as --over attention=mirror,softmax")
    taken = next(
        (word for word in fit if word.split("=")[0] in ("--ckpt_path", "--seed_everything", "--data.seed")), None
    )
    if taken is not None:
        raise UsageError(f"{taken} is set for every run; seeds are given with --seeds, and a run always continues")
    factors = tuple(grid.read_factor(text) for text in options.over)
    cells = tuple(grid.expand(factors, grid.read_seeds(options.seeds)))
    from mirrorla.config_files import find_config

    name = default_run_dir(find_config(options.config)).name
    root = options.run_dir or Path("runs") / f"ablate-{name}-{'-'.join(factor.name for factor in factors)}"
    return Request(options.config, factors, cells, root, tuple(fit))


def _recorded(request: Request) -> list[Cell]:
    """Write down what is compared here; the cells of this command first, then those of earlier ones.

    Raises:
        UsageError: the folder holds another ablation.
    """
    wanted = {
        "keys": [factor.name for factor in request.factors],
        "fit": list(request.fit),
        "configs": _configs(request),
    }
    wanted = json.loads(json.dumps(wanted, default=str))  # as it will be read again
    path = request.root / _RECORD
    cells = list(request.cells)
    if path.is_file():
        found = json.loads(path.read_text())
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            what = {"keys": "keys of --over", "fit": "options", "configs": "configuration"}[differing[0]]
            raise UsageError(f"run_dir {request.root} holds an ablation with other {what}; give another --run_dir")
        earlier = [Cell(tuple(setting), seed) for setting, seed in found["cells"]]
        cells += [cell for cell in earlier if cell not in request.cells]
    request.root.mkdir(parents=True, exist_ok=True)
    commit_text(path, json.dumps({**wanted, "cells": [[cell.setting, cell.seed] for cell in cells]}, indent=1) + "\n")
    return cells


def _configs(request: Request) -> list[Any]:
    """What the configuration files say: a changed comment is no other configuration."""
    from lightning_modules.config_checks import expand_configs

    return [yaml.safe_load(path.read_text()) for path in expand_configs(["--config", request.config, *request.fit])[1]]


def _slurm_words(files: Sequence[str] | None, fit: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options for SLURM, and those of the training."""
    slurm, rest, words = [word for name in files or () for word in ("--slurm", name)], [], list(fit)
    while words:
        word = words.pop(0)
        if word not in _SUBMIT_ONLY and not word.startswith("--slurm."):
            rest.append(word)
        elif word in _SUBMIT_ONLY or "=" in word or not words:
            slurm.append(word)
        else:
            slurm += [word, words.pop(0)]
    return slurm, rest


def _parser(verb: str) -> VerbParser:
    parser = VerbParser(verb, _DESCRIPTION, _EPILOG)
    parser.add_argument("config", metavar="CONFIG", help="configuration to vary: a file or a packaged name")
    parser.add_argument(
        "--over", action="append", metavar="KEY=V1,V2", help="a key and its values, the first the reference; repeatable"
    )
    parser.add_argument("--seeds", default="0,1,2", metavar="0,1,2", help="of weights and data order; default 0,1,2")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="trainings at a time; default one per GPU, or per core without GPUs"
    )
    parser.add_argument(
        "--run_dir", type=Path, metavar="RUN", help="folder of all runs and results; default runs/ablate-CONFIG-KEYS"
    )
    parser.add_argument(
        "--slurm",
        action="append",
        metavar="NAME|FILE",
        help="submit instead; this, --slurm.KEY VALUE and --dry-run are those of mirrorla submit",
    )
    parser.add_argument("--collect", action="store_true", help="start nothing; make the results of what is there")
    return parser
