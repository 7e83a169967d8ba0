"""What `mirrorla shards …` does: thin functions whose signatures and docstrings become the command line.

Each returns the exit code. Errors meant for the user are DataErrors.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from datamodules.contact_sheet import write_sheet
from datamodules.histogram import class_counts
from datamodules.indexer import index_dataset
from datamodules.manifest import SPLITS, DatasetInfo, read_dataset
from datamodules.pack import pack as pack_source
from datamodules.resize import resized
from datamodules.sources import SourceName, SourceOptions, open_source
from datamodules.sources_base import Task
from datamodules.types import DataError
from datamodules.verify import find_duplicates, find_skew, verify_dataset

_BAR_WIDTH = 24


def pack(
    *,
    source: SourceName,
    out: str,
    data: str | None = None,
    task: Task | None = None,
    shard_size_mib: float = 256.0,
    resize: int | None = None,
    scenes: int | None = None,
    cells: int | None = None,
    classes: int | None = None,
    val_labels: str | None = None,
    seed: int = 0,
    workers: int = 4,
) -> int:
    """Pack images and their labels into WebDataset tars with an index.

    Interrupted or killed, the same command goes on behind the last finished shard. Image files keep their bytes.

    Args:
        source: digits (scikit-learn's 1797 handwritten digits, no download), digits-recall, digits-same-different or
            digits-counting (grids of them that ask a question), imagefolder (train/<class>/*, val/…), imagenet
            (train/<synset>/*, val likewise or flat), coco (annotations/instances_*.json, train*/, val*/), ade20k
            (images/ and annotations/ with training/, validation/) or idx (MNIST's files, .gz or not).
        out: folder to make; an identical complete dataset there is left alone, anything else is refused.
        data: input folder; every source but digits needs one.
        task: null means the source's own. digits can be packed for all three: for detection (boxes, masks) and
            segmentation (class maps) scenes are composed of them.
        shard_size_mib: largest size of a tar. 100 to 1000 suits network file systems.
        resize: scale images down to this many pixels on the shorter side (classification); null keeps every byte.
        scenes: training pictures composed of digits, by default 8000 scenes or 5000 grids; a fifth as many, 400 scenes
            or 1000 grids at most, are added for validation.
        cells: cells a side of a grid of digits; null means 16.
        classes: digits in play in a grid, from 0 on; more are harder to compare. Null means 4.
        val_labels: imagenet with a flat val folder - file with lines of image name and synset, or LOC_val_solution.csv.
        seed: of the shuffled order in the tars, and of what is composed.
        workers: threads that write tars; their number does not change a byte.

    Examples:
      mirrorla shards pack --source digits --out data/digits
      mirrorla shards pack --source digits --task detection --out data/digits-detection
      mirrorla shards pack --source imagefolder --data /path/to/imagenet --out data/imagenet
      mirrorla shards pack --source coco --data /path/to/coco --out data/coco --workers 16
    """
    opened = open_source(source, SourceOptions(data, task, scenes, cells, classes, seed, val_labels))
    if resize is not None:
        opened = resized(opened, resize)
    with _progress("samples") as progress:
        bar = progress.add_task(f"packing {source}", total=None)
        info = pack_source(
            opened,
            out,
            shard_size_mib=shard_size_mib,
            seed=seed,
            workers=workers,
            total=lambda samples: progress.update(bar, total=samples),
            advance=lambda samples: progress.advance(bar, samples),
        )
    Console().print(_splits_table(Path(out), info))
    return 0


def index(path: str, *, classes: str | None = None, task: Task | None = None) -> int:
    """Index tars made elsewhere, so that they can be trained on; or index again after a change.

    Args:
        path: folder with train/*.tar, val/*.tar and perhaps test/*.tar.
        classes: file with the class names by id, one a line or a JSON list. Without it, an existing dataset.json's
            names are kept, else the ids are the names.
        task: what the samples hold beside the image: classification .cls, detection .json, segmentation .seg.png.
            null keeps what an existing dataset.json says, else means classification.

    Examples:
      mirrorla shards index data/mine --classes names.txt
    """
    folder = Path(path)
    names = None if classes is None else _read_classes(Path(classes))
    total = sum(tar.stat().st_size for split in SPLITS for tar in (folder / split).glob("*.tar"))
    with _progress("bytes") as progress:
        bar = progress.add_task("indexing", total=total)
        info = index_dataset(folder, names, lambda size: progress.advance(bar, size), task)
    Console().print(_splits_table(folder, info))
    return 0


def verify(path: str, *, decode: bool = True, ranks: int = 1, workers: int = 1, threads: int = 4) -> int:
    """Read a whole dataset and report every fault in it; exit code 1 if there is one.

    Faults: damaged bytes and tars, images that do not decode, labels out of range, boxes outside their image, masks and
    class maps of another size. Notes, which leave the exit code 0: images that occur twice, shards that would fall
    unevenly on a run's readers.

    Args:
        path: the dataset's folder.
        decode: decode every image; false checks checksums, annotations and tars only, at the disk's speed.
        ranks: processes of the run that the shards are for; see the note on uneven shards.
        workers: loading processes of each rank.
        threads: shards that are checked at the same time.

    Examples:
      mirrorla shards verify data/digits
      mirrorla shards verify data/imagenet --ranks 8 --workers 6 --threads 16
    """
    for name, value in (("ranks", ranks), ("workers", workers), ("threads", threads)):
        if value < 1:
            raise DataError(f"--{name} is {value}; it must be at least 1")
    folder, console = Path(path), Console()
    info = read_dataset(folder)
    faults = 0
    with _progress("samples", console) as progress:
        bar = progress.add_task("verifying", total=sum(split.samples for split in info.splits.values()))
        for fault in verify_dataset(folder, info, decode, lambda samples: progress.advance(bar, samples), threads):
            faults += 1
            console.print(f"fault  {fault}", markup=False, highlight=False, soft_wrap=True)
    notes = [] if faults else [*find_duplicates(folder, info), *find_skew(folder, info, ranks, workers)]
    for note in notes:
        console.print(f"note   {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(_splits_table(folder, info))
    console.print(f"{faults} faults" if faults != 1 else "1 fault", style="red" if faults else "green")
    return 1 if faults else 0


def info(path: str, *, histogram: bool = True, sheet: str | None = None, split: str = "train") -> int:
    """Show what a packed dataset holds: splits, source, licence, digest and classes.

    Args:
        path: the dataset's folder.
        histogram: count every class: samples of a classification, objects of a detection, images and pixels of a
            segmentation dataset.
        sheet: a .png to draw 24 evenly spaced samples into, with their labels, boxes, masks or class maps.
        split: the split that the sheet shows.

    Examples:
      mirrorla shards info data/digits
      mirrorla shards info data/digits-detection --sheet digits.png --split val
    """
    folder, console = Path(path), Console()
    described = read_dataset(folder)
    console.print(_splits_table(folder, described))
    for title, text in (("source", described.source), ("licence", described.licence), ("digest", described.digest)):
        console.print(f"{title}: {text}", markup=False, highlight=False, soft_wrap=True)
    if histogram:
        with _progress("samples", console) as progress:
            bar = progress.add_task("counting", total=sum(part.samples for part in described.splits.values()))
            counts = class_counts(folder, described, lambda samples: progress.advance(bar, samples))
        console.print(_class_table(described, counts))
    if sheet is not None:
        write_sheet(Path(sheet), folder, described, split)
        console.print(f"sheet: {sheet}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _read_classes(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"--classes {path} cannot be read ({error})") from None
    names = [name for name in names if name != ""]
    if not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"--classes {path} must hold the class names, one a line or as a JSON list of texts")
    return names


def _progress(unit: str, console: Console | None = None) -> Progress:
    console = console or Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)


def _splits_table(folder: Path, described: DatasetInfo) -> Table:
    table = Table(title=f"{described.name} ({described.task}, {len(described.class_names)} classes) in {folder}")
    for column in ("split", "samples", "shards", "MiB", "bytes/sample"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, split in described.splits.items():
        mean = split.bytes / max(split.samples, 1)
        table.add_row(name, f"{split.samples}", f"{split.shards}", f"{split.bytes / 2**20:.1f}", f"{mean:.0f}")
    return table


def _class_table(described: DatasetInfo, counts: dict[str, NDArray[np.int64]]) -> Table:
    """Every class's counts; where there is room, a bar shows the first column."""
    table = Table("id", "class")
    for name in counts:
        table.add_column(name, justify="right")
    has_bar = len(counts) <= len(SPLITS)
    if has_bar:
        table.add_column("")
    first = next(iter(counts.values()))
    for label, class_name in enumerate(described.class_names):
        bar = "█" * round(_BAR_WIDTH * int(first[label]) / max(int(first.max()), 1))
        cells = [f"{label}", class_name, *(f"{count[label]}" for count in counts.values())]
        table.add_row(*cells, *([bar] if has_bar else []))
    return table
