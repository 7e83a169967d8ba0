"""Names of files made from names of images: below one folder whatever the image is called, and never two alike."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

_MAX_BYTES = 200  # of a part of a path: file systems take 255, and endings follow
_RESERVED = {"", ".", ".."}
_ESCAPED = set('%~\\:*?"<>|')  # % and ~ mark what was changed here; the rest means something to some file system
_OVERLAY = ".overlay"


class OutputNames:
    """Turns each image's name into the beginning of its files' names.

    `a/b.jpg` gives `a/b`. Images that would then share a name (`a/b.jpg` beside `a/b.png`) keep their extension, equal
    names (of two datasets) get their number.

    Args:
        names: of all images in the order of their ids, "/" between folders.
    """

    def __init__(self, names: Iterable[str]) -> None:
        stems: Counter[str] = Counter()
        self._full: Counter[str] = Counter()
        for name in names:
            stems[_stem(name)] += 1
            self._full[name] += 1
        self._shared = {stem for stem, count in stems.items() if count > 1}

    def of(self, sample: int, name: str) -> PurePosixPath:
        """A relative path without ending, safe to append endings such as ".png" to."""
        if self._full[name] > 1:
            return _escaped(name, f"~{sample}")
        stem = _stem(name)
        is_free = stem not in self._shared and stem not in self._full and not stem.endswith(_OVERLAY)
        return _escaped(stem if is_free or stem == name else name, "")


def _stem(name: str) -> str:
    """The name without its extension; a packed sample's key has none."""
    folder, _, file = name.rpartition("/")
    stem = file.rpartition(".")[0] or file
    return f"{folder}/{stem}" if folder else stem


def _escaped(name: str, ending: str) -> PurePosixPath:
    *folders, file = name.split("/")
    return PurePosixPath(*(_safe(folder) for folder in folders), _safe(file) + ending)


def _safe(part: str) -> str:
    """A part of a path with everything that is special to a file system written as %XX, and cut where it is long."""
    if part in _RESERVED:
        return "%" + "%".join(f"{ord(letter):02X}" for letter in part)
    text = "".join(f"%{ord(c):02X}" if c in _ESCAPED or ord(c) < 32 or ord(c) == 127 else c for c in part)
    data = text.encode("utf-8", "surrogateescape")
    if len(data) <= _MAX_BYTES:
        return text
    digest = hashlib.sha256(data).hexdigest()[:16]
    return data[:_MAX_BYTES].decode("utf-8", "ignore") + f"~{digest}"
