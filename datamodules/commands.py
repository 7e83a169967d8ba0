"""What `mirrorla shards …` does: thin functions whose signatures and docstrings become the command line.

Each returns the exit code. Errors meant for the user are DataErrors.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from datamodules.indexer import index_dataset
from datamodules.manifest import SPLITS, DatasetInfo, open_split, read_dataset
from datamodules.pack import pack as pack_source
from datamodules.sources import SourceName
from datamodules.types import DataError
from datamodules.verify import verify_dataset

_BAR_WIDTH = 24


def pack(
    source: SourceName,
    out: str,
    *,
    data: str | None = None,
    shard_size_mib: float = 256.0,
    seed: int = 0,
    workers: int = 4,
) -> int:
    """Pack images into WebDataset tars with an index.

    Args:
        source: digits (scikit-learn's 1797 handwritten digits, no download) or imagefolder (train/<class>/*, val/…).
        out: folder to make; an identical complete dataset there is left alone, anything else is refused.
        data: input folder; needed for imagefolder.
        shard_size_mib: largest size of a tar. 100 to 1000 suits network file systems.
        seed: of the shuffled order in the tars.
        workers: threads that write tars.
    """
    with _progress("samples") as progress:
        task = progress.add_task(f"packing {source}", total=None)
        info = pack_source(
            source,
            out,
            data=data,
            shard_size_mib=shard_size_mib,
            seed=seed,
            workers=workers,
            total=lambda samples: progress.update(task, total=samples),
            advance=lambda samples: progress.advance(task, samples),
        )
        done = sum(split.samples for split in info.splits.values())
        progress.update(task, total=done, completed=done)
    Console().print(_splits_table(Path(out), info))
    return 0


def index(path: str, *, classes: str | None = None) -> int:
    """Index tars made elsewhere, so that they can be trained on; or index again after a change.

    Args:
        path: folder with train/*.tar, val/*.tar and perhaps test/*.tar.
        classes: file with the class names by id, one a line or a JSON list. Without it, an existing dataset.json's
            names are kept, else the ids are the names.
    """
    folder = Path(path)
    names = None if classes is None else _read_classes(Path(classes))
    total = sum(tar.stat().st_size for split in SPLITS for tar in (folder / split).glob("*.tar"))
    with _progress("bytes") as progress:
        task = progress.add_task("indexing", total=total)
        info = index_dataset(folder, names, lambda size: progress.advance(task, size))
    Console().print(_splits_table(folder, info))
    return 0


def verify(path: str, *, decode: bool = True) -> int:
    """Read a whole dataset and report every damaged, mislabelled or undecodable sample; exit code 1 if there is one.

    Args:
        path: the dataset's folder.
        decode: decode every image; false checks checksums, labels and tar structure only, at the disk's speed.
    """
    folder, console = Path(path), Console()
    info = read_dataset(folder)
    faults = 0
    with _progress("samples", console) as progress:
        task = progress.add_task("verifying", total=sum(split.samples for split in info.splits.values()))
        for fault in verify_dataset(folder, info, decode, lambda samples: progress.advance(task, samples)):
            faults += 1
            console.print(fault, markup=False, highlight=False, soft_wrap=True)
    console.print(_splits_table(folder, info))
    console.print(f"{faults} faults" if faults != 1 else "1 fault", style="red" if faults else "green")
    return 1 if faults else 0


def info(path: str, *, histogram: bool = True) -> int:
    """Show what a packed dataset holds.

    Args:
        path: the dataset's folder.
        histogram: list the samples of every class.
    """
    folder, console = Path(path), Console()
    described = read_dataset(folder)
    console.print(_splits_table(folder, described))
    for title, text in (("source", described.source), ("licence", described.licence), ("digest", described.digest)):
        console.print(f"{title}: {text}", markup=False, highlight=False, soft_wrap=True)
    if histogram:
        console.print(_class_table(folder, described))
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


def _class_table(folder: Path, described: DatasetInfo) -> Table:
    """Samples of every class in every split; the bar shows the first split."""
    num_classes = len(described.class_names)
    counts = {
        name: np.bincount(open_split(folder, described, name).labels(), minlength=num_classes)
        for name in described.splits
    }
    table = Table("id", "class")
    for name in counts:
        table.add_column(name, justify="right")
    table.add_column("")
    first = next(iter(counts.values()))
    for label, class_name in enumerate(described.class_names):
        bar = "█" * round(_BAR_WIDTH * int(first[label]) / max(int(first.max()), 1))
        table.add_row(f"{label}", class_name, *(f"{count[label]}" for count in counts.values()), bar)
    return table
