"""Files that are committed or absent, never torn. Standard library only.

A file is written under a temporary name in its own directory, flushed to the disk, renamed, and the directory entry is
flushed too: a kill at any moment leaves the previous file or the new one.
"""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

_TEMPORARY = ".tmp-"


def commit_file(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file so that a crash leaves the old content or the new one.

    Args:
        path: final name; its directory must exist.
        write: puts the content into a binary stream.

    Raises:
        OSError: disk full, quota, permission; the old file is untouched and the temporary one removed.
    """
    temporary = path.with_name(f"{path.name}{_TEMPORARY}{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def commit_text(path: Path, text: str) -> None:
    """Commit a small UTF-8 text file."""

    def write(stream: IO[bytes]) -> None:
        stream.write(text.encode())

    commit_file(path, write)


def sync_directory(folder: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> list[Path]:
    """Remove what interrupted writes left behind; returns what was removed."""
    leftovers = sorted(folder.glob(f"*{_TEMPORARY}*"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers
