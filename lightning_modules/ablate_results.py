"""What an ablation found: one row per run, and each setting's mean beside the first's. Reads runs; starts nothing."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_modules import ablate_grid as grid
from lightning_modules.ablate_grid import Cell, Factor
from lightning_modules.ablate_runs import condition
from lightning_modules.paired import CONFIDENCE, Difference, Summary, paired_difference, summary
from lightning_modules.tensorboard import SCORES

_ORIGIN = ("commit", "device", "torch")


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        cell: what it is.
        state: "finished", or how far it is.
        scores: the last validation by name ("top1"); empty unless the run is finished.
        origin: commit, device and torch's version, as far as the run recorded them.
        run: its directory.
    """

    cell: Cell
    state: str
    scores: dict[str, float] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    run: Path = Path()


@dataclass(frozen=True)
class Line:
    """One setting in the table.

    Attributes:
        setting: the value of every factor.
        summary: of its finite scores.
        difference: from the first setting; None for that one.
    """

    setting: tuple[str, ...]
    summary: Summary
    difference: Difference | None


def read_row(root: Path, factors: Sequence[Factor], cell: Cell) -> Row:
    """What a cell's run directory says."""
    run = grid.run_dir(root, factors, cell)
    state = condition(run)
    if state != "finished":
        return Row(cell, "not started" if state == "new" else state, run=run)
    return Row(cell, state, last_scores(run), _origin(run / "environment.json"), run)


def last_scores(run: Path) -> dict[str, float]:
    """The last validation that a run logged, by name without "val/"."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 1, "images": 1, "tensors": 1})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("val/")]
    return {tag.removeprefix("val/"): float(events.Scalars(tag)[-1].value) for tag in tags}


def headline(rows: Sequence[Row]) -> str | None:
    """The score that settings are compared by: the first of the task's that a run has; None without one."""
    return next((name for name in SCORES if any(name in row.scores for row in rows)), None)


def lines(rows: Sequence[Row], score: str) -> list[Line]:
    """Every setting in the order of its first row; runs without a finite score count in no mean."""
    by_setting: dict[tuple[str, ...], dict[int, float]] = {}
    for row in rows:
        found = by_setting.setdefault(row.cell.setting, {})
        if math.isfinite(value := row.scores.get(score, math.nan)):
            found[row.cell.seed] = value
    first = next(iter(by_setting.values()), {})
    return [
        Line(setting, summary(list(found.values())), paired_difference(first, found) if found is not first else None)
        for setting, found in by_setting.items()
    ]


def markdown(title: str, factors: Sequence[Factor], rows: Sequence[Row], score: str) -> str:
    """The table, in percent, and beneath it the runs that are missing from it."""
    found = lines(rows, score)
    first = grid.label(factors, found[0].setting)
    head = [*(factor.name for factor in factors), "runs", f"{SCORES[score]} [%]", f"difference to {first} [points]", ""]
    body = [[*line.setting, *_cells(line)] for line in found]
    table = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
    notes = [
        f"Mean ± standard deviation over seeds; differences within seeds, {CONFIDENCE:.0%} confidence interval "
        "(Student's t). Not corrected for the number of comparisons."
    ]
    missing = [row for row in rows if not math.isfinite(row.scores.get(score, math.nan))]
    states = [f"{grid.label(factors, row.cell.setting)} seed {row.cell.seed} ({_why(row)})" for row in missing]
    if states:
        notes.append(f"In no mean: {'; '.join(states)}.")
    return "\n".join([f"# {title}", "", *table, "", *notes, ""])


def write_csv(path: Path, factors: Sequence[Factor], rows: Sequence[Row]) -> None:
    """One row per run, whatever became of it."""
    present = {name for row in rows for name in row.scores}
    scores = [name for name in SCORES if name in present] + sorted(present - SCORES.keys())
    names = [*(factor.name for factor in factors), "seed", "state", *scores, *_ORIGIN, "run"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            values = [_number(row.scores[name]) if name in row.scores else "" for name in scores]
            origin = [row.origin.get(name, "") for name in _ORIGIN]
            writer.writerow([*row.cell.setting, row.cell.seed, row.state, *values, *origin, row.run])


def _cells(line: Line) -> list[str]:
    mean, std = (
        f"{100 * value:.2f}" if math.isfinite(value) else "–" for value in (line.summary.mean, line.summary.std)
    )
    cells = [str(line.summary.count), f"{mean} ± {std}" if line.summary.count > 1 else mean]
    difference = line.difference
    if difference is None or not difference.count:
        return [*cells, "–", ""]
    shift = f"{100 * difference.mean:+.2f}"
    if difference.count < 2:
        return [*cells, shift, "one pair: no interval"]
    cells.append(f"{shift} [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]")
    return [*cells, ("higher" if difference.mean > 0 else "lower") if difference.is_significant else "not significant"]


def _why(row: Row) -> str:
    return row.state if row.state != "finished" else "its score is not finite"


def _number(value: float) -> str:
    return f"{value:.6g}"


def _origin(path: Path) -> dict[str, str]:
    """What environment.json says of commit, device and torch."""
    if not path.is_file():
        return {}
    record: Mapping[str, object] = json.loads(path.read_text())
    git, devices, packages = record.get("git"), record.get("devices"), record.get("packages")
    return {
        "commit": _commit(git) if isinstance(git, dict) else "",
        "device": str(devices[0]) if isinstance(devices, list) and devices else "",
        "torch": str(packages.get("torch", "")) if isinstance(packages, dict) else "",
    }


def _commit(git: Mapping[str, object]) -> str:
    """Its first letters; "+" where the working tree differed from it."""
    return str(git.get("commit") or "")[:12] + ("+" if git.get("clean") is False else "")
