"""The folder that one packer at a time works in; held by a file lock, which ends with its process however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = ".lock"


@contextmanager
def held_folder(folder: Path) -> Iterator[Path]:
    """Make `folder` if need be and hold it; waits while another process does.

    Args:
        folder: its parent exists. The holder may rename it with its lock file, or remove it; who waited then starts
            with a new one.

    Raises:
        OSError: the file system has no locks.
    """
    descriptor = _acquire(folder)
    try:
        yield folder
    finally:
        os.close(descriptor)  # ends the lock


def _acquire(folder: Path) -> int:
    lock = folder / LOCK_NAME
    while True:
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # the folder's holder was done in this moment
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_same(descriptor, lock):
            return descriptor
        os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
