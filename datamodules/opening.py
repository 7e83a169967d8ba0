"""Opens what data.path names: one packed dataset, several with weights, which look like one, or a folder of images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from datamodules.cache import open_cache
from datamodules.folder import FolderReader, has_images, list_images
from datamodules.index import ShardIndex
from datamodules.manifest import MANIFEST_NAME, SPLITS, DatasetInfo, open_split, read_dataset
from datamodules.reader import ShardReader
from datamodules.remote import shown_path
from datamodules.types import DataError


@dataclass(frozen=True)
class MixtureSource:
    """One dataset of a mixture.

    Attributes:
        path: folder or URL of a packed dataset.
        weight: share of the training samples, relative to the other weights.
    """

    path: str
    weight: float = 1.0

    @property
    def shown(self) -> str:
        """The path for messages and names, without a URL's credentials."""
        return shown_path(self.path)


class OpenedData:
    """Packed datasets of one task and the same classes; everything is read when first needed, and once.

    Args:
        path: a folder or URL, or the sources of a mixture; or a plain folder of images, which can only be predicted on.
        task: that they must be packed for.
        cache_dir: see open_cache; only for URLs.
        cache_gib: see open_cache.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[MixtureSource],
        task: str = "classification",
        cache_dir: str | None = None,
        cache_gib: float = 50.0,
    ) -> None:
        self.is_mixture = not isinstance(path, str | os.PathLike)
        self.sources = [MixtureSource(os.fspath(path))] if isinstance(path, str | os.PathLike) else list(path)
        self._caches = [open_cache(source.path, cache_dir, cache_gib) for source in self.sources]
        self.task = task
        self._indexes: dict[str, list[ShardIndex]] = {}
        if not self.sources:
            raise DataError("data.path is an empty list; give a folder or a list of {path, weight}")

    @property
    def folder(self) -> Path:
        """Of the first source."""
        return Path(self.sources[0].path)

    @property
    def is_there(self) -> bool:
        """Whether the first source is remote or its folder holds something."""
        folder = self.folder
        return self._caches[0] is not None or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir())))

    @cached_property
    def is_plain(self) -> bool:
        """Whether path is a plain folder of images: nothing packed, an image somewhere below."""
        folder = self.folder
        if self.is_mixture or self._caches[0] is not None or not folder.is_dir():
            return False
        is_packed = (folder / MANIFEST_NAME).exists() or any(folder.glob("*/*.tar"))
        return not is_packed and has_images(folder)

    @cached_property
    def image_names(self) -> list[str]:
        """The images of a plain folder, relative to it and sorted."""
        return list_images(self.folder)

    def require_packed(self, stage: str) -> None:
        """Raise DataError if path is a plain folder and the stage needs labels: any but "predict"."""
        if self.is_plain and stage != "predict":
            raise DataError(
                f"data.path {self.folder} is a plain folder of images, which only predict takes; for {stage} pack "
                f"images and labels with `mirrorla shards pack --source … --data {self.folder} --out …`"
            )

    @cached_property
    def infos(self) -> list[DatasetInfo]:
        """dataset.json of every source.

        Raises:
            DataError: a source is no packed dataset, or for another task, or its classes are not those of the first.
        """
        pairs = zip(self.sources, self._caches, strict=True)
        infos = [read_dataset(Path(source.path)) if cache is None else cache.describe() for source, cache in pairs]
        for source, info in zip(self.sources, infos, strict=True):
            if info.task != self.task:
                raise DataError(f"{source.shown} is packed for {info.task}; data.path must be packed for {self.task}")
            if info.class_names != infos[0].class_names:
                raise DataError(
                    f"{source.shown} has {_difference(info, infos[0])} {self.sources[0].shown}; "
                    "datasets can be mixed only if their classes are the same, in the same order"
                )
        return infos

    @property
    def class_names(self) -> list[str]:
        """Names by class id; empty for a plain folder, which says nothing about classes."""
        return [] if self.is_plain else self.infos[0].class_names

    @property
    def splits(self) -> list[str]:
        """Splits of which at least one source has one; none in a plain folder."""
        if self.is_plain:
            return []
        return sorted({split for info in self.infos for split in info.splits})

    @property
    def digest(self) -> str:
        """SHA-256 that two data.path share only if shards, classes and, in a mixture, weights are the same."""
        if self.is_plain:
            return hashlib.sha256(json.dumps(self.image_names).encode()).hexdigest()
        if not self.is_mixture:
            return self.infos[0].digest
        rows = [(info.digest, source.weight) for info, source in zip(self.infos, self.sources, strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @property
    def weights(self) -> list[float] | None:
        """Of the sources of a mixture; None without one."""
        return [source.weight for source in self.sources] if self.is_mixture else None

    @property
    def names(self) -> list[str]:
        """A name for every source: its folder's, numbered where two are the same."""
        names = [Path(source.shown).name for source in self.sources]
        return [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]

    def __str__(self) -> str:
        if self.is_plain:
            return f"{self.folder}: {len(self.image_names)} images"
        splits = ", ".join(f"{self.num_samples(name)} {name}" for name in SPLITS if name in self.splits)
        return f"{' + '.join(source.shown for source in self.sources)}: {splits}, {len(self.class_names)} classes"

    def num_samples(self, split: str) -> int:
        """Samples of a split over all sources; in a plain folder its images, whatever the split."""
        if self.is_plain:
            return len(self.image_names)
        return sum(info.splits[split].samples for info in self.infos if split in info.splits)

    def readers(self, split: str) -> Sequence[ShardReader | FolderReader]:
        """What reads the samples of a split, source by source; of a plain folder, its images."""
        if self.is_plain:
            return [FolderReader(self.folder, self.image_names)]
        return [ShardReader(index) for index in self.split(split)]

    def split(self, name: str) -> list[ShardIndex]:
        """The indexes of a split, of the sources that have it; training needs it of all of them.

        Raises:
            DataError: nothing to read, or index and shards do not fit each other.
        """
        if name not in self._indexes:
            rows = list(zip(self.sources, self.infos, self._caches, strict=True))
            wanted = [row for row in rows if name == "train" or name in row[1].splits] or rows
            self._indexes[name] = [open_split(Path(source.path), info, name, cache) for source, info, cache in wanted]
        return self._indexes[name]


def _difference(info: DatasetInfo, first: DatasetInfo) -> str:
    if len(info.class_names) != len(first.class_names):
        return f"{len(info.class_names)} classes instead of the {len(first.class_names)} of"
    number = next(k for k, pair in enumerate(zip(info.class_names, first.class_names, strict=True)) if len({*pair}) > 1)
    return f"class {number} {info.class_names[number]!r} instead of {first.class_names[number]!r} as"
