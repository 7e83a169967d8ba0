"""Trains the digits' configurations from their seeds and writes down what they reach: `python -m benchmarks.digits`.

    python -m benchmarks.digits                              every configuration, seed 0
    python -m benchmarks.digits segmentation --seeds 0 1 2   one configuration, three seeds

The backbones of dense tasks start from the classifier of the same seed, as `make train` does it.

Scores are those of the averaged weights on the held-out split after the last epoch, as the run logged them; seconds are
those of the whole command, on the clock and of the processor. Runs are kept under --runs, and a finished one is only
evaluated when the command is given again; rows of other configurations and seeds stay in results/digits.csv. Of dense
tasks, what the first seed predicts for one held-out scene is kept beside it as digits_<configuration>.png.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from benchmarks.common import RESULTS, provenance, write_csv
from lightning_modules.ablate_results import last_scores
from lightning_modules.tensorboard import Tag

CONFIGS = ("classification", "segmentation", "segmentation_upernet", "detection", "detection_retinanet")
SCORES = ("top1", "miou", "pixel_accuracy", "box_ap", "box_ap50", "mask_ap", "mask_ap50")
"""Logged as val/<name>; which of them exist depends on the task."""

Row = dict[str, str]


def train(config: str, seed: int, runs: Path) -> Row:
    """Train one configuration to its end.

    Args:
        config: name under configs/digits.
        seed: of the weights and of the data's order and augmentation.
        runs: folder of runs.

    Raises:
        CalledProcessError: the training failed; it has said why.
    """
    run = runs / f"{config}-{seed}"
    classifier = runs / f"{CONFIGS[0]}-{seed}"
    if config != CONFIGS[0] and not classifier.exists():
        train(CONFIGS[0], seed, runs)
    command = [sys.executable, "-m", "lightning_modules.cli", "fit", "--config", f"digits/{config}"]
    command += ["--seed_everything", str(seed), "--data.seed", str(seed), "--run_dir", str(run), "--ckpt_path", "last"]
    if config != CONFIGS[0]:
        command += ["--model.backbone.pretrained", str(classifier)]
    began_s, cpu_s = time.perf_counter(), _children_cpu_s()
    subprocess.run(command, check=True)
    seconds = {"wall_s": time.perf_counter() - began_s, "cpu_s": _children_cpu_s() - cpu_s}
    epochs = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"]
    return {
        "config": config,
        "seed": str(seed),
        "epochs": str(epochs),
        **{name: f"{value:.4f}" for name, value in scores(run).items()},
        **{name: f"{value:.0f}" for name, value in seconds.items()},
    }


def scores(run: Path) -> dict[str, float]:
    """The last validation that a run logged, by name; NaN for what its task does not have."""
    logged = last_scores(run)
    return {name: logged.get(name, float("nan")) for name in SCORES}


def picture(run: Path) -> bytes:
    """The second of the fixed validation pictures of a dense run, after its last validation, as PNG."""
    events = EventAccumulator(str(run / "tensorboard"), {"images": 0})
    events.Reload()
    tag = sorted(tag for tag in events.Tags()["images"] if tag.startswith(f"{Tag.PREDICTIONS}/"))[1]
    shown: bytes = events.Images(tag)[-1].encoded_image_string
    return shown


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows of both, the new one where both have a configuration and seed, in the order of CONFIGS."""
    rows = {(row["config"], row["seed"]): row for row in [*old, *new]}
    return [rows[key] for key in sorted(rows, key=lambda key: (CONFIGS.index(key[0]), int(key[1])))]


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("configs", nargs="*", metavar="CONFIG", help=f"of {', '.join(CONFIGS)}; none means all")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--runs", type=Path, default=Path("runs/benchmark-digits"), help="where the runs are kept")
    made.add_argument("--output", type=Path, default=RESULTS / "digits.csv")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Train one after the other and write the table after each."""
    made = parser()
    args = made.parse_args(argv)
    unknown = [name for name in args.configs if name not in CONFIGS]
    if unknown:
        made.error(f"there is no configuration digits/{unknown[0]}; choose from {', '.join(CONFIGS)}")
    for config in args.configs or CONFIGS:
        for seed in args.seeds:
            origin = provenance(torch.device("cpu"))
            row = train(config, seed, args.runs) | origin | {"threads": os.environ.get("OMP_NUM_THREADS", "all")}
            write_csv(args.output, merged(_read(args.output), [row]))
            if config != CONFIGS[0] and seed == args.seeds[0]:
                args.output.with_name(f"digits_{config}.png").write_bytes(picture(args.runs / f"{config}-{seed}"))
            sys.stdout.write(f"{row}\n")
    return 0


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
