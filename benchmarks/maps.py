"""Compares the attention maps in the same network on one task after another: `python -m benchmarks.maps`.

    python -m benchmarks.maps                         every task, two trainings at a time where there are two cores
    python -m benchmarks.maps counting --collect      only gather what is there

Every map trains with the task's learning rate, schedule and augmentation, from the same seeds; every run is kept and
stands in results/maps.csv. A training that was interrupted goes on when the command is given again.
fashion and fashion-10k need `make fashion-mnist` first. To read the table: `make results`.
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
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.common import RESULTS, write_csv
from lightning_modules.ablate_grid import split_values
from lightning_modules.paired import paired_difference, summary
from lightning_modules.tensorboard import SCORES

MAPS = ("mirror", "relu", "elu", "focused", "polar", "norm_aware", "softmax")
SEVERAL = "mirror x4"
"""Mirrors of kind "mirror" with four of the queries, at power 2."""
_COLUMNS = (MAPS[0], SEVERAL, *MAPS[1:])
Row = dict[str, str]
Scores = Mapping[str, Mapping[int, float]]
"""Score in percent of each setting, seed by seed; the first setting is the reference."""


@dataclass(frozen=True)
class Task:
    """What is compared.

    Attributes:
        config: packaged configuration.
        over: what varies, the first value the reference.
        seeds: of weights and order.
        options: of the training, beside the configuration.
        labels: of the values in tables; none means the values themselves.
        pack: of `mirrorla shards pack`, for a smaller dataset than the configuration's own.
        table: name of the task whose rows these join; none means a task of its own.
    """

    config: str
    over: str = f"attention={','.join(MAPS)}"
    seeds: str = "0,1,2,3,4"
    options: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    pack: tuple[str, ...] = ()
    table: str = ""


_PARTS = {
    "off": "{modulation: none, cross_head: false, block_mirror: false}",
    "cross-head only": "{modulation: none, block_mirror: false}",
    "block only, static": "{modulation: none, cross_head: false}",
    "block only, modulated": "{cross_head: false}",
    "block static, cross-head": "{modulation: none}",
    "block modulated, cross-head": "{modulation: instance}",
    "block modulated by ema, cross-head": "{modulation: ema}",
    "init aligned": "{init: aligned}",
    "init uniform": "{init: uniform}",
    "power 2": "{power: 2.0}",
    "power 3": "{power: 3.0}",
    "power 4": "{power: 4.0}",
}
_SEVERAL = "{power: 2.0, query_mirrors: 4}"
_SHOWN_AT_32 = ("--data.train_transform.image_size", "32", "--data.eval_transform.image_size", "32")
_SCENES = ("--source", "digits", "--scenes", "1000", "--task")
_PARTS_OVER = f"model.backbone.mirror={','.join(_PARTS.values())}"

TASKS = {
    "counting": Task("digits/counting"),
    "counting, lr 1e-3": Task("digits/counting", seeds="0,1,2", options=("--model.optim.lr", "1e-3")),
    "counting, lr 4e-3": Task("digits/counting", seeds="0,1,2", options=("--model.optim.lr", "4e-3")),
    "recall": Task("digits/recall", options=("--trainer.max_epochs", "1")),
    "recall, 3 epochs": Task("digits/recall", over="attention=mirror,polar", seeds="0,1"),
    "digits": Task("digits/classification"),
    "fashion-10k": Task(
        "fashion_mnist/classification",
        seeds="0,1,2",
        options=("--data.path", "data/fashion-mnist-10k", "--trainer.max_epochs", "2", *_SHOWN_AT_32),
    ),
    "fashion": Task("fashion_mnist/classification", over="attention=mirror,relu", seeds="0"),
    "fashion, 6 epochs": Task(
        "fashion_mnist/classification",
        over="attention=mirror,relu",
        seeds="0",
        options=("--trainer.max_epochs", "6"),
    ),
    "fashion, 6 epochs at 32": Task(
        "fashion_mnist/classification",
        over="attention=mirror,relu",
        seeds="0",
        options=("--trainer.max_epochs", "6", *_SHOWN_AT_32),
    ),
    "segmentation": Task(
        "digits/segmentation",
        seeds="0,1,2",
        options=("--data.path", "data/digits-segmentation-1000"),
        pack=(*_SCENES, "segmentation", "--out", "data/digits-segmentation-1000"),
    ),
    "detection": Task(
        "digits/detection_retinanet",
        seeds="0,1,2",
        options=("--data.path", "data/digits-detection-1000"),
        pack=(*_SCENES, "detection", "--out", "data/digits-detection-1000"),
    ),
    "parts of mirror, counting": Task("digits/counting", over=_PARTS_OVER, labels=tuple(_PARTS)),
    "parts of mirror, digits": Task("digits/classification", over=_PARTS_OVER, seeds="0", labels=tuple(_PARTS)),
}
TASKS |= {
    f"{name}, {SEVERAL}": replace(TASKS[name], over=f"model.backbone.mirror={_SEVERAL}", labels=(SEVERAL,), table=name)
    for name in ("counting", "recall", "recall, 3 epochs", "digits", "fashion-10k", "segmentation", "detection")
}
"""By the name in results/maps.csv."""


def folder(name: str) -> str:
    """A task's folder: its name in letters that a shell takes as they are."""
    return name.replace(", ", "-").replace(" ", "-")


def rows_of(name: str, root: Path) -> list[Row]:
    """One row per run of an ablation.

    Args:
        name: of the task.
        root: the ablation's folder with results.csv.
    """
    key, _, values = TASKS[name].over.partition("=")
    labels = dict(zip(split_values(values), TASKS[name].labels, strict=False))
    with (root / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    metric = next(name for name in SCORES if name in found[0])
    return [
        {
            "task": TASKS[name].table or name,
            "setting": labels.get(row[key], row[key]),
            "seed": row["seed"],
            "state": row["state"],
            "metric": metric,
            "score": row[metric],
            **{column: row[column] for column in ("commit", "device", "torch")},
            "threads": os.environ.get("OMP_NUM_THREADS", ""),
            "python": platform.python_version(),
        }
        for row in found
    ]


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """All rows, the new ones in place of old ones of the same task and setting.

    Args:
        old: of maps.csv.
        new: of one task, or of some of its settings.
    """
    made = {(row["task"], row["setting"]) for row in new}
    kept = [row for row in old if (row["task"], row["setting"]) not in made]
    place = next((n for n, row in enumerate(old) if (row["task"], row["setting"]) in made), len(kept))
    return [*kept[:place], *new, *kept[place:]]


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Mean and deviation of every setting, which of them differ from the first, and which tasks tell maps apart.

    Args:
        rows: of maps.csv.

    Returns:
        Markdown lines: tasks down and maps across, then one table for each other task of several seeds.
    """
    scores: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["score"]:
            by_setting = scores.setdefault(row["task"], {})
            by_setting.setdefault(row["setting"], {})[int(row["seed"])] = 100 * float(row["score"])
    tasks = {task: found for task, found in scores.items() if set(found) <= {*MAPS, SEVERAL}}
    metrics = {row["task"]: SCORES[row["metric"]] for row in rows}
    counts = {task: max(map(len, found.values())) for task, found in tasks.items()}
    lines = [f"| % | seeds | {' | '.join(_COLUMNS)} |", "|---" * (len(_COLUMNS) + 2) + "|"]
    lines += [
        f"| {task}: {metrics[task]} | {counts[task]} | {' | '.join(_cell(found, name) for name in _COLUMNS)} |"
        for task, found in tasks.items()
    ]
    lines += ["", *(_separates(task, found) for task, found in tasks.items() if {"softmax", "relu"} <= found.keys())]
    for task, found in scores.items():
        if task not in tasks and len(found[_first(found)]) > 1:
            lines += ["", f"| {task} | seeds | {metrics[task]} % | against the first (95 %) |", "|---|---:|---:|---:|"]
            lines += [
                f"| {name} | {len(found[name])} | {_cell(found, name)} | {_apart(found, name)} |" for name in found
            ]
    return lines


def _first(scores: Scores) -> str:
    return next(iter(scores))


def _cell(scores: Scores, name: str) -> str:
    """Mean ± deviation, and a star where the interval of the difference from the first holds no zero."""
    if name not in scores:
        return "–"
    found = summary(list(scores[name].values()))
    apart = name != _first(scores) and paired_difference(scores[_first(scores)], scores[name]).is_significant
    deviation = f" ± {found.std:.1f}" if found.count > 1 else ""
    return f"{found.mean:.1f}{deviation}{' *' if apart else ''}"


def _apart(scores: Scores, name: str) -> str:
    if name == _first(scores):
        return ""
    found = paired_difference(scores[_first(scores)], scores[name])
    if found.count < 2:
        return f"{found.mean:+.1f}"
    return f"{found.mean:+.1f} ({found.low:+.1f} … {found.high:+.1f})"


def _separates(task: str, scores: Scores) -> str:
    """Whether softmax beats relu by more than three standard errors of the paired difference."""
    softmax, relu = scores["softmax"], scores["relu"]
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
        program = [sys.executable, "-m", "lightning_modules.cli"]
        ablate = [*program, "ablate", task.config, "--over", task.over, "--seeds", task.seeds]
        ablate += ["--run_dir", str(args.runs / folder(name)), *task.options, *(["--collect"] if args.collect else [])]
        pack = [[*program, "shards", "pack", *task.pack]] if task.pack and not args.collect else []
        for command in [*pack, ablate]:
            if code := subprocess.run(command, check=False).returncode:
                return code
        old = list(csv.DictReader(args.output.open(newline=""))) if args.output.exists() else []
        new = rows_of(name, args.runs / folder(name))
        write_csv(args.output, merged(old, new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
