"""Bring a snapshot to the disk as a committed checkpoint, on the calling thread or behind its back."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue

from lightning_modules.checkpoint import LATEST
from lightning_modules.commit import commit_text, flush, publish, remove, temporary
from lightning_modules.fault_points import reach
from lightning_modules.manifest import FileRecord, Manifest, write_manifest


@dataclass(frozen=True)
class Draft:
    """A checkpoint about to be written.

    Attributes:
        path: its final name.
        manifest: complete but for the files and the token.
        token: gives the fencing token of the run's lease; raises when the lease is lost.
        beside: small text files written with it, name -> text.
    """

    path: Path
    manifest: Manifest
    token: Callable[[], int] = lambda: 0
    beside: Mapping[str, str] = field(default_factory=dict)


def commit_checkpoint(draft: Draft, write: Callable[[Path], dict[str, FileRecord]]) -> None:
    """Write a checkpoint under a temporary name and give it its final one.

    Args:
        draft: what it is.
        write: puts its files into an empty folder, flushed to the disk, and returns their records.

    Raises:
        OSError, RuntimeError: nothing was committed and nothing is left behind.
    """
    folder = temporary(draft.path)
    draft.path.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    try:
        reach("checkpoint.begin")
        seal(folder, draft, write(folder))
    except BaseException:
        remove(folder)
        raise


def seal(folder: Path, draft: Draft, files: Mapping[str, FileRecord]) -> None:
    """Write what stands beside the files and the manifest, and give the folder its final name.

    Args:
        folder: under a temporary name; its files are on the disk.
        draft: what it is.
        files: records of all files in it.
    """
    beside = {name: _write_text(folder / name, text) for name, text in draft.beside.items()}
    reach("checkpoint.after_files")
    write_manifest(folder, replace(draft.manifest, token=draft.token(), files={**files, **beside}))
    reach("checkpoint.after_manifest")
    draft.token()
    publish(folder, draft.path)
    reach("checkpoint.after_rename")
    commit_text(draft.path.parent / LATEST, draft.path.name + "\n")
    reach("checkpoint.after_latest")


class Background:
    """One thread at a time that finishes a save while the training goes on.

    The interpreter waits for it when it ends, so a save that was begun is committed before the process leaves.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._outcomes: SimpleQueue[BaseException | None] = SimpleQueue()

    def start(self, job: Callable[[], None]) -> None:
        """Run a job on its own thread, after the one before it has ended."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint")
        self._thread.start()

    def wait(self) -> float:
        """Until nothing is under way; returns the seconds it took."""
        began_s = time.monotonic()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return time.monotonic() - began_s

    def take_outcomes(self) -> list[BaseException | None]:
        """For every job that ended since the last call what it failed with, None if it did not."""
        return [self._outcomes.get() for _ in range(self._outcomes.qsize())]

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # the training thread deals with it
            self._outcomes.put(error)
        else:
            self._outcomes.put(None)


def text_hash(text: str) -> str:
    """SHA-256 of a text, as hexadecimal digits."""
    return sha256(text.encode()).hexdigest()


def _write_text(path: Path, text: str) -> FileRecord:
    content = text.encode()
    with path.open("xb") as stream:
        stream.write(content)
        flush(stream)
    return FileRecord(len(content), sha256(content).hexdigest())
