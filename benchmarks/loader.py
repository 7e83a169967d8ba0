"""Samples a second of every stage of loading, beside webdataset's reader and plain files; and the index at full scale.

    python -m benchmarks.loader [--data data/benchmark-images] [--seconds 3]

The images are photograph-like, about 500x400 pixels, made from a fixed seed by the first run (a minute) and kept in
--data. All readers take the same images, cut, flip and augment them by the same functions, and are measured in turn in
one run. The figures at full scale are those of 1281 shards of 1000 samples, with no image data behind them.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from benchmarks.common import RESULTS, measure, provenance, quantiles_ms, write_csv
from datamodules.bench import READERS, Rate, rate_table
from datamodules.bench import measure as measure_rates
from datamodules.bench_streams import STAGES
from datamodules.index import FIELD, INDEX_NAME, ShardIndex, ShardRows, encode_index
from datamodules.order import OrderSpec, PassOrder
from datamodules.pack import pack

ROOT = Path(__file__).resolve().parent.parent
IMAGES, CLASSES = 5200, 26
SHARDS, SHARD_SAMPLES, BATCH = 1281, 1000, 1024
CPU = torch.device("cpu")


def main(arguments: list[str] | None = None) -> int:
    """Make the images unless they are there, measure everything, write the CSVs and the plot, print the tables.

    Args:
        arguments: command line; None takes the process's.

    Returns:
        The exit code.
    """
    options = parser().parse_args(arguments)
    if options.memory_of:
        print(json.dumps(memory_per_sample(options.memory_of)))
        return 0
    dataset = prepare(options.data, options.images)
    workers = [int(count) for count in options.workers.split(",")]
    rates = measure_rates(dataset, workers, seconds=options.seconds, batch_size=32, samples=options.images)
    scale = scale_rows(options.data / "scale", options.scale_shards, options.seconds)
    rows = [{**_row(rate), **provenance(CPU)} for rate in rates]
    write_csv(options.out / "loader.csv", rows)
    write_csv(options.out / "loader_scale.csv", [{**row, **provenance(CPU)} for row in scale])
    plot(rows, options.out / "loader.png")
    Console().print(rate_table(rates))
    for row in scale:
        print(f"{row['figure']:34} {row['value']:>10} {row['unit']:6} target {row['target']}")
    print(f"written: {options.out / 'loader.csv'}, loader_scale.csv and loader.png")
    return 0


def prepare(folder: Path, count: int) -> Path:
    """The packed images: made once, then found again.

    Args:
        folder: what to fill, with images/ (removed when packed) and packed-<count>/.
        count: of images.

    Returns:
        The dataset's folder.
    """
    packed = folder / f"packed-{count}"
    if not packed.exists():
        rng = np.random.default_rng(0)
        for number in track(range(count), "making images", transient=True):
            path = folder / "images" / "train" / f"class-{number % CLASSES:02d}" / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photograph(rng))
        pack("imagefolder", str(packed), data=str(folder / "images"), shard_size_mib=48)
        shutil.rmtree(folder / "images")
    return packed


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG of about 500x400 pixels with smooth areas, edges and noise, of about ImageNet's 110 kB.

    Args:
        rng: decides everything.
    """
    width, height = int(rng.integers(440, 561)), int(rng.integers(340, 461))
    coarse = Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noise = rng.integers(-20, 21, (height, width, 1), dtype=np.int16)
    stream = io.BytesIO()
    Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(stream, format="JPEG", quality=90)
    return stream.getvalue()


def scale_rows(folder: Path, shards: int, seconds: float) -> list[dict[str, str]]:
    """Time of index and order, and memory of the index, at ImageNet's number of samples.

    Args:
        folder: where the index is written, and removed afterwards.
        shards: of SHARD_SAMPLES samples each.
        seconds: of repetitions for each figure.

    Returns:
        Rows of figure, value, unit, quantiles and target.
    """
    write_scale_index(folder, shards)
    spec = OrderSpec(0, (SHARD_SAMPLES,) * shards, BATCH)
    order = PassOrder(spec, 0)
    batches = itertools.cycle(range(spec.batches_per_pass))
    seeks = itertools.cycle(np.random.default_rng(0).integers(0, spec.batches_per_pass, 1000).tolist())
    timed = {
        "index open": (lambda: ShardIndex(folder), "< 50 ms"),
        "index open and check of its digest": (lambda: ShardIndex(folder).check_digest(), "none"),
        "order of one batch": (lambda: order.batch(next(batches)), "<= 1 ms"),
        "seek to any batch": (lambda: PassOrder(spec, 1).batch(next(seeks)), "<= 10 ms"),
    }
    rows = []
    for figure, (run, target) in timed.items():
        quantiles = quantiles_ms(measure(run, CPU, budget_s=seconds, max_repeats=500))
        rows.append({"figure": figure, "value": quantiles["p50_ms"], "unit": "ms", **quantiles, "target": target})
    rows.append({**_mean_order_row(spec), "target": "<= 1 ms"})
    command = [sys.executable, "-m", "benchmarks.loader", "--memory_of", str(folder)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    empty = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), "")
    for figure, value in found.items():
        rows.append({"figure": figure, "value": f"{value:.1f}", "unit": "bytes", **empty, "target": "<= 100 bytes"})
    shutil.rmtree(folder)
    return rows


def _mean_order_row(spec: OrderSpec) -> dict[str, str]:
    """The mean over a whole pass, window changes included, which the median hides."""
    order, batches = PassOrder(spec, 2), min(spec.batches_per_pass, 1000)
    started = time.perf_counter()
    for batch in range(batches):
        order.batch(batch)
    mean_ms = (time.perf_counter() - started) / batches * 1e3
    quantiles = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), "")
    return {"figure": "order of one batch, mean", "value": f"{mean_ms:.3f}", "unit": "ms", **quantiles}


def write_scale_index(folder: Path, shards: int) -> None:
    """Write an index with ImageNet's key lengths.

    Args:
        folder: where to.
        shards: of SHARD_SAMPLES samples each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = np.zeros(2 * SHARD_SAMPLES, dtype=FIELD)
    fields["size"], fields["extension"] = 110_000, np.arange(2 * SHARD_SAMPLES) % 2
    counts = np.full(SHARD_SAMPLES, 2, dtype=np.int64)
    parts = [
        ShardRows(
            f"train-{shard:06d}.tar",
            SHARD_SAMPLES * 111_000,
            [f"n{shard:08d}/n{shard:08d}_{sample}" for sample in range(SHARD_SAMPLES)],
            counts,
            fields,
            ["jpg", "cls"],
        )
        for shard in range(shards)
    ]
    (folder / INDEX_NAME).write_bytes(encode_index(parts))


def memory_per_sample(folder: Path) -> dict[str, float]:
    """Growth of this process's resident memory, in bytes a sample, for an index of which every page was read.

    Args:
        folder: of the index.
    """
    before = _resident()
    index = ShardIndex(folder)
    index.check_digest()
    order = PassOrder(OrderSpec(0, index.counts, min(BATCH, len(index))), 0)
    order.batch(0)
    total, shared = (now - then for now, then in zip(_resident(), before, strict=True))
    return {"memory a sample": total / len(index), "of it private to the process": (total - shared) / len(index)}


def _resident() -> tuple[int, int]:
    """Bytes in memory, and those of them that are pages of files, which all processes of a node share."""
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[1]) * 4096, int(pages[2]) * 4096


def plot(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draw the rates: a panel for each number of workers, a group of bars for each stage.

    Args:
        rows: of loader.csv.
        path: the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    workers = sorted({int(row["workers"]) for row in rows})
    figure, panels = plt.subplots(1, len(workers), figsize=(4 * len(workers), 4), sharey=True, squeeze=False)
    for panel, count in zip(panels[0], workers, strict=True):
        for place, reader in enumerate(READERS):
            chosen = [row for row in rows if (int(row["workers"]), row["reader"]) == (count, reader)]
            positions = [STAGES.index(row["stage"]) + 0.27 * (place - 1) for row in chosen]
            panel.bar(positions, [float(row["samples_per_s"]) for row in chosen], 0.27, label=reader)
        panel.set(yscale="log", title=f"{count} workers", xticks=range(len(STAGES)), xticklabels=STAGES)
        panel.grid(axis="y", alpha=0.3)
    panels[0][0].set_ylabel("samples/s, each stage with those before it")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _row(rate: Rate) -> dict[str, str]:
    return {
        "reader": rate.reader,
        "stage": rate.stage,
        "workers": str(rate.workers),
        "samples_per_s": f"{rate.samples_per_s:.1f}",
        "lowest": f"{rate.lowest:.1f}",
        "highest": f"{rate.highest:.1f}",
        "mb_per_s": f"{rate.mb_per_s:.1f}",
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=ROOT / "data" / "benchmark-images", help="where the images are kept"
    )
    parser.add_argument("--images", type=int, default=IMAGES, help="number of images")
    parser.add_argument("--workers", default="0,1,2", help="numbers of loading processes, by commas")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--scale_shards", type=int, default=SHARDS, help="shards of the index at full scale")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSVs and the plot")
    parser.add_argument("--memory_of", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
