"""A plain folder of images, read like a split whose samples have nothing beside their image."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from datamodules.decode import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES
from datamodules.reader import RawSample
from datamodules.types import CorruptSampleError


def list_images(folder: Path) -> list[str]:
    """Names of all images below a folder, relative to it and sorted; hidden files and linked folders are left out."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(place).relative_to(folder)
        found += [(below / name).as_posix() for name in files if _is_image(name)]
    return sorted(found)


def has_images(folder: Path) -> bool:
    """Whether there is an image anywhere below a folder; ends at the first."""
    return any(_is_image(name) for _, _, files in os.walk(folder) for name in files)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and _extension(name) in IMAGE_EXTENSIONS


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


class FolderReader:
    """The images of a folder by number.

    Args:
        folder: where they are.
        names: of the files below it; a sample's id is its place in this list.
    """

    is_labelled = False

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, sample: int) -> str:
        """A file's name below the folder."""
        return self.names[sample]

    def where(self, sample: int) -> str:
        """A file's path, for messages."""
        return str(self.folder / self.names[sample])

    def read(self, sample: int, extensions: Collection[str]) -> RawSample:
        """Read a file, if its extension is among those wanted.

        Raises:
            CorruptSampleError: it cannot be read, or is larger than any image may be.
        """
        where, extension = self.where(sample), _extension(self.names[sample])
        try:
            if (size := Path(where).stat().st_size) > MAX_IMAGE_BYTES:
                raise CorruptSampleError(f"{where}: {size} bytes; the limit is {MAX_IMAGE_BYTES}", "over_limit")
            data = Path(where).read_bytes()
        except OSError as error:
            raise CorruptSampleError(f"{where} cannot be read ({error.strerror})") from None
        return RawSample(self.names[sample], where, {extension: data} if extension in extensions else {})
