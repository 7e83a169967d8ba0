"""Submits an ablation to SLURM: for each setting one array of jobs, whose numbers are its seeds."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_modules import ablate_grid as grid
from lightning_modules import cluster_cli
from lightning_modules.ablate_grid import Cell, Request
from lightning_modules.ablate_runs import condition


def submit(request: Request, slurm: Sequence[str]) -> int:
    """Hand every setting's unfinished seeds to `mirrorla submit`.

    Args:
        request: the ablation.
        slurm: options for SLURM.

    Returns:
        0; 1 as soon as one could not be submitted.

    Raises:
        UsageError: `mirrorla submit` refuses a setting; those before it are submitted.
    """
    seeds: dict[tuple[str, ...], list[int]] = {}
    for cell in request.cells:
        if condition(grid.run_dir(request.root, request.factors, cell)) != "finished":
            seeds.setdefault(cell.setting, []).append(cell.seed)
    for setting, numbers in seeds.items():
        code = cluster_cli.run("submit", _words(request, setting, numbers, slurm))
        if code:
            return code
    if not seeds:
        sys.stdout.write(f"all {len(request.cells)} runs are finished; collect them with --collect\n")
    return 0


def _words(request: Request, setting: tuple[str, ...], seeds: Sequence[int], slurm: Sequence[str]) -> list[str]:
    """The options of `mirrorla submit`; the script sets the seed from the number of the array's job."""
    keys = [f"--{factor.key}={value}" for factor, value in zip(request.factors, setting, strict=True)]
    folder = grid.run_dir(request.root, request.factors, Cell(setting, seeds[0])).parent
    array = ",".join(str(seed) for seed in seeds)
    return [*slurm, "--slurm.array", array, "--config", request.config, *request.fit, *keys, "--run_dir", str(folder)]
