"""Compares the attention maps in the same network on one task after another: `python -m benchmarks.maps`.

    python -m benchmarks.maps                         every task, two trainings at a time where there are two cores
    python -m benchmarks.maps counting --collect      only gather what is there

Every map trains with the configuration's own learning rate, schedule and augmentation, from the same seeds; every run
is kept and stands in results/maps.csv. A training that was interrupted goes on when the command is given again.
fashion-10k needs `make fashion-mnist` first. To read the table: `make results`.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import RESULTS, write_csv
from lightning_modules.paired import paired_difference, summary

MAPS = ("mirror", "relu", "elu", "focused", "polar", "norm_aware", "softmax")
Row = dict[str, str]


@dataclass(frozen=True)
class Task:
    """What is compared.

    Attributes:
        config: packaged configuration.
        over: what varies, the first value the reference.
        seeds: of weights and order.
        options: of the training, beside the configuration.
    """

    config: str
    over: str = f"attention={','.join(MAPS)}"
    seeds: str = "0,1,2,3,4"
    options: tuple[str, ...] = ()


_POWERS = "model.backbone.mirror.power=1,2,3,4"

TASKS = {
    "counting": Task("digits/counting"),
    "recall": Task("digits/recall", options=("--trainer.max_epochs", "1")),
    "fashion-10k": Task(
        "fashion_mnist/classification",
        seeds="0,1,2",
        options=("--data.path", "data/fashion-mnist-10k", "--trainer.max_epochs", "2"),
    ),
    "counting-power": Task("digits/counting", over=_POWERS, seeds="0,1,2"),
}
"""By the name in results/maps.csv."""


def rows_of(name: str, root: Path) -> list[Row]:
    """One row per run of an ablation.

    Args:
        name: of the task.
        root: the ablation's folder with results.csv.
    """
    key = TASKS[name].over.partition("=")[0]
    with (root / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return [
        {
            "task": name,
            "setting": row[key],
            "seed": row["seed"],
            "state": row["state"],
            "top1": row.get("top1", ""),
            **{column: row[column] for column in ("commit", "device", "torch")},
            "threads": os.environ.get("OMP_NUM_THREADS", ""),
            "python": platform.python_version(),
        }
        for row in found
    ]


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Mean and deviation of every setting, its paired difference from the first, and which tasks tell maps apart.

    Args:
        rows: of maps.csv.

    Returns:
        Markdown lines.
    """
    lines = ["| task | setting | seeds | top-1 % | against the first (95 %) | |", "|---|---|---:|---:|---:|---|"]
    notes = []
    for task in dict.fromkeys(row["task"] for row in rows):
        scores: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["task"] == task and row["top1"]:
                scores.setdefault(row["setting"], {})[int(row["seed"])] = 100 * float(row["top1"])
        first = next(iter(scores))
        for setting, by_seed in scores.items():
            found = summary(list(by_seed.values()))
            cells = [f"{found.mean:.1f} ± {found.std:.1f}", "", ""]
            if setting != first:
                apart = paired_difference(scores[first], by_seed)
                verdict = "" if apart.is_significant else "not significant"
                cells[1:] = [f"{apart.mean:+.1f} ({apart.low:+.1f} … {apart.high:+.1f})", verdict]
            lines.append(f"| {task} | {setting} | {found.count} | {' | '.join(cells)} |")
        if {"softmax", "relu"} <= scores.keys():
            notes.append(_separates(task, scores["relu"], scores["softmax"]))
    return [*lines, "", *notes]


def _separates(task: str, relu: Mapping[int, float], softmax: Mapping[int, float]) -> str:
    """Whether softmax beats relu by more than three standard errors of the paired difference."""
    apart = summary([softmax[seed] - relu[seed] for seed in sorted(relu.keys() & softmax.keys())])
    error = apart.std / math.sqrt(apart.count)
    word = "separates the maps" if apart.mean > 3 * error else "does not separate the maps"
    return f"* {task} {word}: softmax - relu = {apart.mean:+.1f}, standard error {error:.2f}."


def main(argv: Sequence[str] | None = None) -> int:
    """Run each ablation and write the table after each."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; none means all")
    made.add_argument("--runs", type=Path, default=Path("runs/benchmark-maps"), help="where the runs are kept")
    made.add_argument("--collect", action="store_true", help="start nothing")
    made.add_argument("--output", type=Path, default=RESULTS / "maps.csv")
    args = made.parse_args(argv)
    if unknown := [name for name in args.tasks if name not in TASKS]:
        made.error(f"there is no task {unknown[0]!r}; choose from {', '.join(TASKS)}")
    for name in args.tasks or TASKS:
        task = TASKS[name]
        command = [sys.executable, "-m", "lightning_modules.cli", "ablate", task.config, "--over", task.over]
        command += ["--seeds", task.seeds, "--run_dir", str(args.runs / name), *task.options]
        code = subprocess.run([*command, *(["--collect"] if args.collect else [])], check=False).returncode
        if code:
            return code
        old = list(csv.DictReader(args.output.open(newline=""))) if args.output.exists() else []
        write_csv(args.output, [row for row in old if row["task"] != name] + rows_of(name, args.runs / name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
