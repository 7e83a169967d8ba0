"""What trained attention does with more tokens than it was trained with: `python -m benchmarks.diagnostics_tokens`.

The networks of `python -m benchmarks.maps digits "parts of mirror, digits"` see the same validation digits, stretched
so that the first stage has N = 64 (as in training) to 16 384 tokens. Written for every run and N: the share of the
energy that ReLU keeps, the entropy of attention rows over log N, the effective rank of the state and the smallest
denominator, each the mean over the layers of the first stage.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks.common import RESULTS, provenance, write_csv
from benchmarks.maps import MAPS, TASKS, folder, rows_of
from datamodules.sources import digits
from datamodules.transforms import eval_pipeline
from lightning_modules.ablate_grid import expand, read_factor, read_seeds, run_dir
from lightning_modules.checkpoint import read_latest
from lightning_modules.export_source import read_source
from mirrorla.diagnostics import mirror_metrics
from mirrorla.pyramid import MirrorPyramid

TOKENS = (64, 196, 784, 3136, 16384)
STRIDE = 4
IMAGES = 8
METRICS = {
    "retained_energy": ("mirror/retained_energy/q", "mirror/retained_energy/k"),
    "entropy": ("attn/entropy",),
    "effective_rank": ("attn/erank_kv",),
    "denominator_min": ("attn/denominator_min",),
}
"""Columns of the CSV and the metrics that they are the mean of."""
NAMES = ("digits", "parts of mirror, digits")
Rows = Sequence[Mapping[str, str]]


def measured(network: nn.Module, images: Tensor, tokens: int, layers: int) -> dict[str, str]:
    """The metrics of the first layers at a number of tokens.

    Args:
        network: a pyramid.
        images: (B, 3, n, n), normalised.
        tokens: of the first stage, a square.
        layers: of the first stage.

    Returns:
        Values by `METRICS`, empty for what the network's map does not have.
    """
    side = STRIDE * round(tokens**0.5)
    stretched = nn.functional.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    found = mirror_metrics(network, stretched)
    values = {}
    for column, tags in METRICS.items():
        known = [found[tag] for name in tags for n in range(layers) if (tag := f"{name}/layer_{n}") in found]
        values[column] = f"{fmean(known):.5g}" if known else ""
    return values


def run_rows(checkpoint: Path) -> list[dict[str, str]]:
    """One row for each number of tokens.

    Args:
        checkpoint: of a run on digits.
    """
    source = read_source(checkpoint)
    network = source.module.evaluated
    pipeline = eval_pipeline(source.transform)
    files = [sample.read()["png"] for sample in digits().splits["val"][:IMAGES]]
    images = torch.stack([pipeline(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    (pyramid,) = (part for part in network.modules() if isinstance(part, MirrorPyramid))
    return [{"N": str(n), **measured(network, images, n, pyramid.spec.depths[0])} for n in TOKENS]


def table(rows: Rows) -> list[str]:
    """The metrics at the fewest and the most tokens, mean over seeds, one line a setting.

    Args:
        rows: of diagnostics_tokens.csv.

    Returns:
        Markdown lines.
    """
    ends = (str(TOKENS[0]), str(TOKENS[-1]))
    heads = " | ".join(f"{column.replace('_', ' ')} at N = {' / '.join(ends)}" for column in METRICS)
    lines = [f"| trained with | seeds | {heads} |", "|---" + "|---:" * (len(METRICS) + 1) + "|"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        found = [row for row in rows if row["setting"] == setting]
        cells = (" / ".join(_mean(found, column, n) for n in ends) for column in METRICS)
        seeds = len({row["seed"] for row in found})
        lines.append(f"| {setting} | {seeds} | {' | '.join(cells)} |")
    return lines


def _mean(rows: Rows, column: str, tokens: str) -> str:
    values = [float(row[column]) for row in rows if row["N"] == tokens and row[column]]
    return f"{fmean(values):.3g}" if values else "–"


def plot(rows: Rows, path: Path) -> None:
    """Draw every metric over N, one line a setting.

    Args:
        rows: of diagnostics_tokens.csv.
        path: the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = dict.fromkeys(row["setting"] for row in rows)
    groups = [[name for name in settings if (name in MAPS) is told] for told in (True, False)]
    figure, lines = plt.subplots(2, len(METRICS), figsize=(18, 8), sharex=True, sharey="col", layout="constrained")
    for axes, group in zip(lines, groups, strict=True):
        for axis, column in zip(axes, METRICS, strict=True):
            for number, setting in enumerate(group):
                found = [row for row in rows if row["setting"] == setting and row[column]]
                tokens = list(dict.fromkeys(row["N"] for row in found))
                values = [fmean(float(row[column]) for row in found if row["N"] == n) for n in tokens]
                style = "-o" if number < 6 else "--s"
                axis.plot([int(n) for n in tokens], values, style, color=f"C{number % 10}", label=setting)
            axis.set_xscale("log", base=2)
            axis.set_title(column.replace("_", " "))
        axes[0].set_xlabel("tokens N")
        axes[-1].set_yscale("log")
        axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"first stage, trained on 64 tokens, {rows[0]['device']} (commit {rows[0]['commit']})")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Look into every finished run, write the CSV and draw it."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--runs", type=Path, default=Path("runs/benchmark-maps"), help="where benchmarks.maps keeps runs")
    made.add_argument("--out", type=Path, default=RESULTS / "diagnostics_tokens.csv", help="CSV; the plot beside it")
    args = made.parse_args(argv)
    source = provenance(torch.device("cpu"))
    rows: list[dict[str, str]] = []
    for name in NAMES:
        root = args.runs / folder(name)
        factor = read_factor(TASKS[name].over)
        if not (root / "results.csv").exists():
            made.error(f"{root} has no results.csv; run first: python -m benchmarks.maps {name!r}")
        cells = expand([factor], read_seeds(TASKS[name].seeds))
        for cell, run in track(list(zip(cells, rows_of(name, root), strict=True)), name, console=Console(stderr=True)):
            if run["state"] == "finished":
                head = {"setting": run["setting"], "seed": run["seed"]}
                checkpoint = read_latest(run_dir(root, [factor], cell) / "checkpoints" / "LATEST")
                values = run_rows(checkpoint)
                rows += [{**head, **row, **source} for row in values if any(row[column] for column in METRICS)]
    write_csv(args.out, rows)
    plot(rows, args.out.with_suffix(".png"))
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
