"""Files and directories that are committed or absent, never torn. Standard library only.

What is written lies under a temporary name in its own folder, is flushed to the disk, renamed, and the folder's entry
is flushed too: a kill at any moment leaves the previous state or the new one.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

_TEMPORARY = ".tmp-"
BLOCK = 1 << 24
"""Bytes hashed at once: large, for another thread takes the interpreter between two blocks."""


def temporary(path: Path) -> Path:
    """A new name beside `path`, which `sweep` recognises."""
    return path.with_name(f"{path.name}{_TEMPORARY}{uuid.uuid4().hex}")


def commit_file(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file so that a crash leaves the old content or the new one.

    Args:
        path: final name; its directory must exist. A symbolic link there is replaced, never followed.
        write: puts the content into a binary stream.

    Raises:
        OSError: disk full, quota, permission; the old file is untouched and the temporary one removed.
    """
    new = temporary(path)
    try:
        with new.open("xb") as stream:
            write(stream)
            flush(stream)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def commit_text(path: Path, text: str) -> None:
    """Commit a small UTF-8 text file."""

    def write(stream: IO[bytes]) -> None:
        stream.write(text.encode())

    commit_file(path, write)


def publish(folder: Path, final: Path) -> None:
    """Give a complete folder its final name, which must not exist.

    Its files must be on the disk already; its folders' entries are flushed here, before and after the rename.

    Raises:
        FileExistsError: something has that name.
    """
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        sync_directory(inner)
    sync_directory(folder)
    if os.path.lexists(final):
        raise FileExistsError(f"{final} exists already; a committed checkpoint is never overwritten")
    folder.rename(final)
    sync_directory(final.parent)


def discard(path: Path) -> None:
    """Remove a committed file or folder; a kill meanwhile leaves it whole, or as a leftover for `sweep`."""
    doomed = temporary(path)
    path.rename(doomed)
    remove(doomed)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder, also when it is gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(stream: IO[bytes]) -> None:
    """Bring what was written to an open file to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_file(path: Path) -> None:
    """Bring a closed file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(folder: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename survives a power cut."""
    sync_file(folder)


def sweep(folder: Path) -> list[Path]:
    """Remove what interrupted writes and removals left behind; returns what was removed."""
    leftovers = sorted(folder.glob(f"*{_TEMPORARY}*"))
    for path in leftovers:
        remove(path)
    return leftovers


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        block = memoryview(bytearray(min(BLOCK, os.fstat(stream.fileno()).st_size + 1)))
        while size := stream.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()
