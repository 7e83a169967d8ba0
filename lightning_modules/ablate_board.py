"""An ablation to look at: one figure, and TensorBoard's HParams page with every run and its scores."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_modules import ablate_grid as grid
from lightning_modules.ablate_grid import Factor
from lightning_modules.ablate_results import Line, Row
from lightning_modules.tensorboard import BAD, GOOD, INK, PALE, SCORES


def draw(title: str, factors: Sequence[Factor], rows: Sequence[Row], lines: Sequence[Line], score: str) -> Figure:
    """Every run as a dot, every setting's mean and standard deviation, the first setting's mean as a line.

    Args:
        title: of the figure.
        factors: what was varied.
        rows: the runs.
        lines: their settings, the first on top; orange where the difference from the first is significant and negative.
        score: which of the runs' scores.
    """
    figure = Figure(figsize=(6.4, 1.2 + 0.45 * len(lines)), dpi=110, layout="constrained")
    axis = figure.subplots()
    if lines and math.isfinite(lines[0].summary.mean):
        axis.axvline(100 * lines[0].summary.mean, color=PALE, zorder=0)
    for place, line in enumerate(lines):
        found = [100 * row.scores[score] for row in rows if row.cell.setting == line.setting and score in row.scores]
        difference = line.difference
        is_worse = difference is not None and difference.is_significant and difference.mean < 0
        colour = BAD if is_worse else GOOD
        axis.plot(found, [place] * len(found), "o", color=INK, alpha=0.35, markersize=4)
        spread = 100 * line.summary.std if line.summary.count > 1 else 0.0
        axis.errorbar(100 * line.summary.mean, place, xerr=spread, fmt="D", color=colour, markersize=6, capsize=4)
    axis.set_yticks(range(len(lines)), [grid.label(factors, line.setting) for line in lines], fontsize=8)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xlabel(f"{SCORES[score]} [%]: runs, mean ± standard deviation", fontsize=8, color=INK)
    axis.set_title(title, fontsize=9, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    return figure


def write_hparams(folder: Path, factors: Sequence[Factor], rows: Sequence[Row]) -> None:
    """A TensorBoard folder with each finished run as one row of the HParams page, newly made.

    Args:
        folder: everything in it is replaced.
        factors: what was varied; the page's columns, beside the seed.
        rows: the runs.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for row in rows:
        if not row.scores:
            continue
        settings = {factor.name: value for factor, value in zip(factors, row.cell.setting, strict=True)}
        scores = {f"val/{name}": value for name, value in row.scores.items()}
        place = folder / grid.folder_name(factors, row.cell.setting) / f"seed_{row.cell.seed}"
        with SummaryWriter(str(place)) as writer:
            for summary in hparams({**settings, "seed": row.cell.seed}, scores):
                writer._get_file_writer().add_summary(summary)
            for tag, value in scores.items():
                writer.add_scalar(tag, value)
