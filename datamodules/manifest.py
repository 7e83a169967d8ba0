"""dataset.json: what a packed dataset is: its task, classes, splits, source, licence note and digest."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.index import INDEX_NAME, ShardIndex
from datamodules.types import DataError

if TYPE_CHECKING:
    from datamodules.cache import ShardCache

MANIFEST_NAME = "dataset.json"
MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 2 << 20
SPLITS = ("train", "val", "test")
TASKS = ("classification", "detection", "segmentation")


@dataclass(frozen=True)
class SplitInfo:
    """A split as dataset.json describes it: samples, shards, their bytes and the digest of its index."""

    samples: int
    shards: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class DatasetInfo:
    """A packed dataset.

    Attributes:
        name: short name.
        task: "classification", "detection" or "segmentation".
        class_names: position is class id.
        splits: by name; the folder of a split has the split's name.
        source: where the samples come from, for readers.
        licence: a note on their licence, for readers.
        plan: fingerprint of what was packed (keys, labels, lengths), empty for tars made elsewhere.
        category_ids: the source's own number of every class, where it has one (COCO's 1 to 90); else empty.
    """

    name: str
    task: str
    class_names: list[str]
    splits: dict[str, SplitInfo]
    source: str = ""
    licence: str = ""
    plan: str = ""
    category_ids: list[int] = field(default_factory=list)
    schema: int = field(default=MANIFEST_VERSION)

    @property
    def digest(self) -> str:
        """SHA-256 over task, class names and every split's index: two datasets with one digest train alike."""
        content = [self.task, self.class_names, sorted((name, split.digest) for name, split in self.splits.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write dataset.json into `folder` in one step, so that no reader sees half of it."""
        document = {**asdict(self), "digest": self.digest}
        write_atomically(folder / MANIFEST_NAME, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old one or wholly the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_dataset(folder: Path) -> DatasetInfo:
    """Read and check dataset.json.

    Args:
        folder: the dataset's folder.

    Raises:
        DataError: the folder or the file is missing, or it is not what this program writes; with the mend.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        mend = f"`mirrorla shards pack --source digits --out {folder}`"
        raise DataError(f"dataset folder {folder} does not exist; pack one, for example with {mend}")
    if not path.is_file():
        tars = sorted(tar.relative_to(folder) for tar in folder.glob("*/*.tar"))
        if tars:
            raise DataError(f"{folder} has shards ({tars[0]}, …) but no index; run `mirrorla shards index {folder}`")
        raise DataError(f"{folder} has neither {MANIFEST_NAME} nor <split>/*.tar; data.path must be a packed dataset")
    try:
        if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
            raise ValueError(f"{size} bytes; the limit is {MAX_MANIFEST_BYTES}")
        document = json.loads(path.read_bytes())
        info = _parse(document)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); run `mirrorla shards index {folder}`") from None
    if info.digest != document.get("digest"):
        raise DataError(f"{path} was changed by hand: its digest does not fit; run `mirrorla shards index {folder}`")
    return info


def _parse(document: dict[str, Any]) -> DatasetInfo:
    if document["schema"] != MANIFEST_VERSION:
        raise ValueError(f"schema {document['schema']!r}, this program reads {MANIFEST_VERSION}")
    class_names = document["class_names"]
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        raise ValueError("class_names is no list of texts")
    splits = {name: SplitInfo(**split) for name, split in document["splits"].items()}
    if unknown := sorted(splits.keys() - set(SPLITS)):
        raise ValueError(f"unknown split {unknown[0]!r}; splits are {', '.join(SPLITS)}")
    name, task, source, licence, plan = (
        str(document.get(key, "")) for key in ("name", "task", "source", "licence", "plan")
    )
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; tasks are {', '.join(TASKS)}")
    category_ids = [int(number) for number in document.get("category_ids", [])]
    return DatasetInfo(name, task, class_names, splits, source, licence, plan, category_ids)


def open_split(folder: Path, info: DatasetInfo, split: str, cache: ShardCache | None = None) -> ShardIndex:
    """Open a split's index and check it against dataset.json and against the shards' names and sizes.

    Args:
        folder: the dataset's folder.
        info: its dataset.json.
        split: which one.
        cache: of a remote dataset, whose shards are fetched when they are needed.

    Raises:
        DataError: the split is not in the dataset, or index and shards do not fit each other.
    """
    if split not in info.splits:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(info.splits) or 'none'}")
    index = ShardIndex(folder / split) if cache is None else cache.open_index(split, info.splits[split].digest)
    if index.digest != info.splits[split].digest:
        raise DataError(
            f"{folder / split / INDEX_NAME} does not belong to {folder / MANIFEST_NAME}; "
            f"run `mirrorla shards index {folder}`"
        )
    index.check_digest()
    index.check_shards()
    return index


def planned_batches(path: str, batch_size: int) -> int:
    """Training batches of an epoch, from dataset.json alone (for planning a job before any data is opened)."""
    return read_dataset(Path(path)).splits["train"].samples // batch_size
