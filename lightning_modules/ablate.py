"""Trains the cells of an ablation that are not finished, and makes the results of all of them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from lightning_modules import ablate_grid as grid
from lightning_modules import ablate_results as results
from lightning_modules.ablate_grid import Cell, Request
from lightning_modules.ablate_runs import Job, condition, environments, last_words, run_all
from lightning_modules.exit_codes import describe
from lightning_modules.tensorboard import SCORES

_log = logging.getLogger("mirrorla")


def train(request: Request, jobs: int | None) -> list[Cell]:
    """Run what is not finished, a line for each run that ends.

    Args:
        request: the ablation.
        jobs: trainings at a time; None decides by GPUs and cores.

    Returns:
        The cells that failed.

    Raises:
        Stopped: by a stop signal.
    """
    runs = {cell: grid.run_dir(request.root, request.factors, cell) for cell in request.cells}
    open_cells = {Job(run, request.words(cell)): cell for cell, run in runs.items() if condition(run) != "finished"}
    devices = _devices()
    cores = _cores()
    num_jobs = max(1, min(jobs or len(devices) or cores, len(open_cells)))
    done = len(request.cells) - len(open_cells)
    _log.info("%s  %d runs, %d finished, %d at a time, in %s", request.title, len(runs), done, num_jobs, request.root)
    spent_s: list[float] = []

    def tell(job: Job, code: int, seconds: float) -> None:
        spent_s.append(seconds)
        left_s = (len(open_cells) - len(spent_s)) * sum(spent_s) / len(spent_s) / num_jobs
        cell = open_cells[job]
        what = f"failed: {_describe(code)}; {last_words(job.run)}" if code else _score(request, cell)
        _log.info(
            "%d/%d  %s seed %d  %s  %s%s",
            done + len(spent_s),
            len(runs),
            grid.label(request.factors, cell.setting),
            cell.seed,
            what,
            _duration(seconds),
            f", about {_duration(left_s)} left" if len(spent_s) < len(open_cells) else "",
        )

    codes = run_all(list(open_cells), environments(num_jobs, cores, devices, os.environ), tell)
    return [open_cells[job] for job, code in codes.items() if code]


def collect(request: Request, cells: Sequence[Cell]) -> None:
    """Write table, rows, figure and TensorBoard of all runs, and print the table.

    Args:
        request: the ablation.
        cells: its own and those of earlier commands for the same folder.
    """
    rows = [results.read_row(request.root, request.factors, cell) for cell in cells]
    results.write_csv(request.root / "results.csv", request.factors, rows)
    score = results.headline(rows)
    if score is None:
        states = ", ".join(sorted({row.state for row in rows}))
        _log.info("no run has a score yet (%s); see %s", states, request.root / "results.csv")
        return
    from lightning_modules.ablate_board import draw, write_hparams

    table = results.markdown(request.title, request.factors, rows, score)
    (request.root / "results.md").write_text(table)
    lines = results.lines(rows, score)
    draw(request.title, request.factors, rows, lines, score).savefig(request.root / "results.png")
    write_hparams(request.root / "tensorboard", request.factors, rows)
    sys.stdout.write(f"{table}\n")
    sys.stdout.write(f"results      {request.root}/results.md, .csv, .png\n")
    sys.stdout.write(f"TensorBoard  tensorboard --logdir {request.root / 'tensorboard'}\n")


def _score(request: Request, cell: Cell) -> str:
    row = results.read_row(request.root, request.factors, cell)
    score = results.headline([row])
    return "no validation" if score is None else f"val {SCORES[score]} {row.scores[score]:.2%}"


def _describe(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else describe(code)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _cores() -> int:
    from datamodules.worker import available_cores

    return available_cores()


def _devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [str(number) for number in range(torch.cuda.device_count())]
    return found if not named or not found else named.split(",")[: len(found)]
