"""Where samples come from before they are packed: the embedded handwritten digits, and folders of images."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from datamodules.decode import IMAGE_EXTENSIONS
from datamodules.manifest import SPLITS
from datamodules.order import Role, hash_key
from datamodules.types import DataError

SourceName = Literal["digits", "imagefolder"]

DIGITS_CLASSES = [str(digit) for digit in range(10)]
_DIGITS_VAL_SHARE = 0.2
_MAX_KEY = 90  # with ".jpeg" it fits a ustar name, so no tar needs a header extension


class SourceSample(NamedTuple):
    """A sample to be packed: its key, class id, image extension, and its image's bytes or the file that holds them."""

    key: str
    label: int
    extension: str
    content: bytes | Path

    def read(self) -> bytes:
        """The image file's bytes, unchanged."""
        if isinstance(self.content, bytes):
            return self.content
        try:
            return self.content.read_bytes()
        except OSError as error:
            raise DataError(f"{self.content} cannot be read ({error.strerror}); mend or remove it") from None

    def size(self) -> int:
        """The image file's length in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Source:
    """Everything to be packed.

    Attributes:
        name: short name of the dataset.
        task: "classification".
        class_names: position is class id.
        splits: samples by split, in an order that does not matter: packing shuffles them.
        origin: where the samples come from, for dataset.json.
        licence: a note on their licence, for dataset.json.
    """

    name: str
    task: str
    class_names: list[str]
    splits: dict[str, Sequence[SourceSample]]
    origin: str
    licence: str


def digits() -> Source:
    """scikit-learn's bundled digits: 1797 images of 8x8 pixels, 17 grey levels, stretched to 8 bits and stored as PNG.

    The split is fixed: in every class the fifth of the images whose hashed number is smallest validates.
    """
    from sklearn.datasets import load_digits  # two seconds, and only packing needs it

    bunch = load_digits()
    labels = bunch.target.astype(int).tolist()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    validation = {
        index
        for label in range(10)
        for index in _smallest_hashes([i for i, other in enumerate(labels) if other == label], _DIGITS_VAL_SHARE)
    }
    splits: dict[str, list[SourceSample]] = {"train": [], "val": []}
    for index, label in enumerate(labels):
        sample = SourceSample(f"digit-{index:04d}", label, "png", _png(pixels[index]))
        splits["val" if index in validation else "train"].append(sample)
    return Source(
        name="digits",
        task="classification",
        class_names=DIGITS_CLASSES,
        splits=dict(splits),
        origin="scikit-learn load_digits: UCI Optical Recognition of Handwritten Digits, test set (Alpaydin, Kaynak)",
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
    )


def _smallest_hashes(indices: Sequence[int], share: float) -> list[int]:
    count = round(len(indices) * share)
    return sorted(indices, key=lambda index: hash_key(0, Role.SPLIT, index))[:count]


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def imagefolder(folder: Path) -> Source:
    """Class folders below train/ and val/ (and test/), as torchvision's ImageFolder has them; bytes are kept.

    Args:
        folder: holds <split>/<class>/**/<image>. Class ids follow the sorted names of train's folders.

    Raises:
        DataError: no train folder, an empty class, a class that train lacks, or a file that is no JPEG, PNG or WEBP.
    """
    if not (folder / "train").is_dir():
        raise DataError(
            f"--data {folder} has no train folder; imagefolder needs train/<class>/*.jpg and val/<class>/*.jpg"
        )
    class_names = _class_folders(folder / "train")
    numbers = {name: number for number, name in enumerate(class_names)}
    splits: dict[str, Sequence[SourceSample]] = {}
    for split in SPLITS:
        if (folder / split).is_dir():
            unknown = sorted(set(_class_folders(folder / split)) - set(class_names))
            if unknown:
                raise DataError(f"{folder / split / unknown[0]} is no class of train; add it there or remove it here")
            splits[split] = _folder_samples(folder / split, numbers)
    return Source(folder.resolve().name, "classification", class_names, splits, "image folder", "not stated")


def _class_folders(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders; imagefolder needs {folder}/<class>/*.jpg")
    return names


def _folder_samples(folder: Path, numbers: dict[str, int]) -> list[SourceSample]:
    samples: list[SourceSample] = []
    taken: set[str] = set()
    for name in _class_folders(folder):
        files = sorted(path for path in (folder / name).rglob("*") if path.is_file() and not path.name.startswith("."))
        if not files:
            raise DataError(f"{folder / name} has no images; add some or remove the folder")
        for path in files:
            extension = path.suffix[1:].lower()
            if extension not in IMAGE_EXTENSIONS:
                raise DataError(f"{path} is no {', '.join(IMAGE_EXTENSIONS)} file; convert or remove it")
            key = _key(path.relative_to(folder).with_suffix(""), taken)
            samples.append(SourceSample(key, numbers[name], extension, path))
    return samples


def _key(path: Path, taken: set[str]) -> str:
    """A unique key of plain ASCII letters without dots, since in a tar the first dot begins the extension."""
    stem = re.sub(r"[^A-Za-z0-9_/-]", "_", path.as_posix())[-_MAX_KEY:].lstrip("/")
    key, number = stem, 1
    while key in taken:
        number += 1
        key = f"{stem[: _MAX_KEY - 8]}-{number}"
    taken.add(key)
    return key


SOURCES: dict[str, Callable[[Path | None], Source]] = {
    "digits": lambda data: digits(),
    "imagefolder": lambda data: imagefolder(_required(data, "imagefolder")),
}


def _required(data: Path | None, source: str) -> Path:
    if data is None:
        raise DataError(f"--source {source} needs --data, the folder to pack")
    if not data.is_dir():
        raise DataError(f"--data {data} is no folder; --source {source} packs a folder")
    return data


def open_source(name: str, data: str | None = None) -> Source:
    """List what a source holds; image files are opened only while packing.

    Args:
        name: "digits" or "imagefolder".
        data: input folder, for sources that need one.

    Raises:
        DataError: an unknown source, or see the source.
    """
    if name not in SOURCES:
        raise DataError(f"--source {name!r} is unknown; known are {', '.join(SOURCES)}")
    return SOURCES[name](None if data is None else Path(data))


def source_classes(name: str) -> list[str] | None:
    """Class names that a source is known to have before it is packed, None if only its data tells."""
    return DIGITS_CLASSES if name == "digits" else None
