"""Writes a source into shards with webdataset's TarWriter: the same bytes always, published whole or not at all.

While packing, everything lies in the folder `.<out>.packing` beside `out`, which one process holds by a file lock. A
shard gets its name when it is complete and on the disk, so after a kill the next call goes on behind the last one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from webdataset.writer import TarWriter

from datamodules.index import ShardRows
from datamodules.indexer import index_shard, split_info, write_index
from datamodules.manifest import (
    MANIFEST_NAME,
    DatasetInfo,
    open_split,
    read_dataset,
    sync_folder,
    write_atomically,
)
from datamodules.order import Role, hash_key, permutation
from datamodules.pack_folder import LOCK_NAME, held_folder
from datamodules.sources import SourceOptions, open_source
from datamodules.sources_base import Source, SourceSample
from datamodules.types import DataError

_HEADERS = 1024  # tar headers of an image and its label, for estimating a shard's size
_PLAN_NAME = "plan"


@dataclass(frozen=True)
class _Shard:
    split: str
    name: str
    samples: list[SourceSample]


def pack(
    source: str | Source,
    out: str,
    *,
    data: str | None = None,
    shard_size_mib: float = 256.0,
    seed: int = 0,
    workers: int = 4,
    total: Callable[[int], None] = lambda samples: None,
    advance: Callable[[int], None] = lambda samples: None,
) -> DatasetInfo:
    """Pack a source into <out>/<split>/<split>-000000.tar …, each split with its index, and dataset.json.

    The same source, shard size and seed give the same bytes whatever the number of workers and interruptions. `out`
    either holds the whole dataset or does not exist.

    Args:
        source: a source, or the name of one.
        out: folder to make. If it already holds exactly this dataset, nothing is done.
        data: input folder, for sources given by name that need one.
        shard_size_mib: a shard is closed when it would grow beyond this.
        seed: of the samples' order in the shards (a sorted folder would put one class into each shard).
        workers: threads that write shards.
        total: told the number of samples before writing starts.
        advance: told the samples of each finished shard.

    Returns:
        The dataset as its dataset.json describes it.

    Raises:
        DataError: an unknown source, an input it refuses, `out` holds something else, or it cannot be written to.
    """
    if shard_size_mib <= 0:
        raise DataError(f"--shard-size-mib is {shard_size_mib}; it must be above 0")
    if workers < 1:
        raise DataError(f"--workers is {workers}; it must be at least 1")
    opened = open_source(source, SourceOptions(data, seed=seed)) if isinstance(source, str) else source
    shards = _plan(opened, round(shard_size_mib * 2**20), seed)
    fingerprint = _fingerprint(opened, shards)
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    total(sum(len(shard.samples) for shard in shards))
    with held_folder(target.with_name(f".{target.name}.packing")) as folder:
        if (existing := _existing(target, fingerprint)) is not None:
            shutil.rmtree(folder)
            return existing
        try:
            _resume(folder, fingerprint)
            info = _write(opened, shards, fingerprint, folder, workers, advance)
        except DataError:  # the input must change, and with it the plan: nothing here can be used again
            shutil.rmtree(folder)
            raise
        except OSError as error:
            fault = f"{error.filename or target}: {error.strerror}; the finished shards are kept"
            raise DataError(f"{fault}, mend that and run the same command again") from error
        (folder / _PLAN_NAME).unlink()
        folder.rename(target)
        (target / LOCK_NAME).unlink()  # last: who waits for the lock must not find it free in the old place
    sync_folder(target.parent)
    return info


def _plan(source: Source, limit: int, seed: int) -> list[_Shard]:
    """Shuffle every split and cut it into shards of at most `limit` bytes, at least one sample each."""
    shards = []
    for number, (split, samples) in enumerate(source.splits.items()):
        parts: list[list[SourceSample]] = []
        filled = limit + 1
        for index in permutation(len(samples), hash_key(seed, Role.PACKING, number)).tolist():
            size = samples[index].size + 2 * _HEADERS
            if filled + size > limit:
                parts.append([])
                filled = 0
            parts[-1].append(samples[index])
            filled += size
        shards += [_Shard(split, f"{split}-{i:06d}.tar", part) for i, part in enumerate(parts)]
    return shards


def _fingerprint(source: Source, shards: Sequence[_Shard]) -> str:
    """SHA-256 of the plan: classes, and key, size and stamp of every sample in its place (not files' contents)."""
    digest = hashlib.sha256(repr((source.task, source.class_names, source.category_ids)).encode())
    for shard in shards:
        digest.update(repr((shard.split, shard.name)).encode())
        for sample in shard.samples:
            digest.update(repr((sample.key, sample.size, sample.stamp)).encode())
    return digest.hexdigest()


def _existing(target: Path, fingerprint: str) -> DatasetInfo | None:
    """The dataset at `target` if it is this very one and complete; None if there is nothing."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not (target / MANIFEST_NAME).is_file():
        raise DataError(f"--out {target} exists and is no packed dataset; choose another folder")
    info = read_dataset(target)
    if info.plan != fingerprint:
        raise DataError(f"--out {target} holds another dataset ({_summary(info)}); choose another folder or remove it")
    for split in info.splits:
        open_split(target, info, split)
    return info


def _summary(info: DatasetInfo) -> str:
    return f"{info.name}: " + ", ".join(f"{split.samples} {name}" for name, split in info.splits.items())


def _resume(folder: Path, fingerprint: str) -> None:
    """Keep what an interrupted call with the same plan has finished, and clear away everything else."""
    plan = folder / _PLAN_NAME
    if plan.is_file() and plan.read_text() == fingerprint:
        for partial in folder.glob("*/*.partial"):
            partial.unlink()
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_NAME:
            path.unlink()
    write_atomically(plan, fingerprint.encode())


def _write(
    source: Source,
    shards: Sequence[_Shard],
    fingerprint: str,
    folder: Path,
    workers: int,
    advance: Callable[[int], None],
) -> DatasetInfo:
    for split in source.splits:
        (folder / split).mkdir(exist_ok=True)
    rows: dict[str, list[ShardRows]] = {split: [] for split in source.splits}
    with ThreadPoolExecutor(workers) as pool:  # reading, checksums and writing release the interpreter lock
        futures = [pool.submit(_write_shard, folder, shard, source.task) for shard in shards]
        try:
            for shard, future in zip(shards, futures, strict=True):
                rows[shard.split].append(future.result())
                advance(len(shard.samples))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    splits = {split: split_info(write_index(folder / split, parts)) for split, parts in rows.items()}
    info = DatasetInfo(
        name=source.name,
        task=source.task,
        class_names=source.class_names,
        splits=splits,
        source=source.origin,
        licence=source.licence,
        plan=fingerprint,
        category_ids=source.category_ids,
    )
    info.write(folder)
    return info


def _write_shard(folder: Path, shard: _Shard, task: str) -> ShardRows:
    """Write one tar unless it is there, make it durable, name it, and index it from its own bytes."""
    path = folder / shard.split / shard.name
    if path.is_file():
        return index_shard(path, task)
    partial = path.with_name(f"{shard.name}.partial")
    with partial.open("wb") as stream:
        with TarWriter(stream, encoder=False, mtime=0, user="", group="") as writer:
            for sample in shard.samples:
                writer.write({"__key__": sample.key, **sample.read()})
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)
    sync_folder(path.parent)
    return index_shard(path, task)
