"""What a source is to the packer: samples by split, each a key, a size and a way to get its files."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image, UnidentifiedImageError

from datamodules.decode import IMAGE_EXTENSIONS
from datamodules.types import DataError

Task = Literal["classification", "detection", "segmentation"]

_MAX_KEY = 85  # with ".seg.png" it stays well inside a ustar name, so no tar needs a header extension


class SourceSample(NamedTuple):
    """A sample to be packed.

    Attributes:
        key: unique in its split.
        size: bytes of its files, as far as known before reading them; decides where a shard is cut.
        stamp: changes when the sample does (its label, say); with key and size it identifies what is packed.
        read: gives its files by extension.
    """

    key: str
    size: int
    stamp: str
    read: Callable[[], dict[str, bytes]]


@dataclass(frozen=True)
class Source:
    """Everything to be packed.

    Attributes:
        name: short name of the dataset.
        task: what its samples are for.
        class_names: position is class id.
        splits: samples by split, in an order that does not matter: packing shuffles them.
        origin: where the samples come from, for dataset.json.
        licence: a note on their licence, for dataset.json.
        category_ids: the source's own number of every class, where it has one (COCO).
    """

    name: str
    task: Task
    class_names: list[str]
    splits: Mapping[str, Sequence[SourceSample]]
    origin: str
    licence: str
    category_ids: list[int] = field(default_factory=list)


def labelled_image(path: str, extension: str, label: int) -> dict[str, bytes]:
    """A classification sample's files: the image's bytes as they are, and its class id."""
    return {extension: read_bytes(path), "cls": str(label).encode()}


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); mend or remove it") from None


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """Width and height of an image file, from its header alone.

    Raises:
        DataError: no image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            return image.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise DataError(f"{where} is no JPEG, PNG or WEBP image; mend or remove it") from None


def list_files(folder: Path) -> Iterator[tuple[str, int]]:
    """Path and size of every file below a folder, sorted, hidden ones left out."""
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            yield from list_files(Path(entry.path))
        elif entry.is_file():
            yield entry.path, entry.stat().st_size


def image_extension(path: str) -> str:
    """The extension of an image file in lower case.

    Raises:
        DataError: a file of another kind.
    """
    extension = os.path.splitext(path)[1][1:].lower()  # noqa: PTH122 - a million calls, and Path is ten times slower
    if extension not in IMAGE_EXTENSIONS:
        raise DataError(f"{path} is no {', '.join(IMAGE_EXTENSIONS)} file; convert or remove it")
    return extension


def unique_key(name: str, taken: set[str]) -> str:
    """A key of plain ASCII letters without dots, since in a tar the first dot begins the extension.

    Args:
        name: of the file below its split, without its extension.
        taken: keys given out so far; the new one is added.
    """
    stem = re.sub(r"[^A-Za-z0-9_/-]", "_", name)[-_MAX_KEY:].lstrip("/")
    key, number = stem, 1
    while key in taken:
        number += 1
        key = f"{stem[: _MAX_KEY - 8]}-{number}"
    taken.add(key)
    return key
