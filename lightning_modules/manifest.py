"""MANIFEST.json: what a checkpoint directory holds, and the proof that it still holds just that. Standard library only.

A hash is no signature: it finds decay and accidents. Who can write into the run directory can write a manifest, too;
that is why every file is also read as plain values only.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_modules.commit import commit_text, hash_file

MANIFEST = "MANIFEST.json"
SCHEMA = 1

_STEP_FOLDER = re.compile(r"step_(\d{8,})(?:-(\d+))?")
_MAX_BYTES = 64 << 20
_WORTH_THREADS = 64 << 20
_PLAIN_NAME = re.compile(r"[\w.,=+@ -]+", re.ASCII)


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes:
        step: optimizer steps done.
        epoch: epochs begun, from 0.
        world_size: ranks that wrote it.
        strategy: "plain" (loads on any number of ranks), "fsdp" or "deepspeed".
        order: position in the data {"committed", "guard"}; None without this project's data module.
        dataset_digest: of the training data; a mixture has one per dataset.
        config_sha256: of the resolved configuration beside it.
        git: commit of the code, where it runs from a checkout.
        attempt: number of the start of the run that wrote it.
        token: fencing token of the lease under which it was written.
        files: name, with / between folders -> record, of every file but the manifest.
        schema: of this file.
    """

    step: int
    epoch: int
    world_size: int
    strategy: str
    order: dict[str, Any] | None
    dataset_digest: str | None
    config_sha256: str | None
    git: str | None
    attempt: int
    token: int
    files: dict[str, FileRecord]
    schema: int = SCHEMA

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(record.bytes for record in self.files.values())


def render(manifest: Manifest) -> str:
    """The one text of a manifest, its own hash inside: any other text is refused, down to the blanks."""
    content = asdict(manifest)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def parse(text: str) -> Manifest:
    """Read a manifest.

    Raises:
        ValueError: it is damaged, of another version, or names files outside its folder.
    """
    try:
        content = json.loads(text)
        digest = content.pop("sha256")
        schema = content["schema"]
        files = {str(name): FileRecord(**record) for name, record in content.pop("files").items()}
        manifest = Manifest(**content, files=files)
        numbers = (manifest.step, manifest.epoch, manifest.world_size, manifest.attempt, manifest.token)
        if not all(type(number) is int for number in (*numbers, *(record.bytes for record in files.values()))):
            raise TypeError("a number is none")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"is no manifest ({type(error).__name__}: {error})") from None
    if schema != SCHEMA:
        raise ValueError(f"has schema {schema!r}, this program reads {SCHEMA}; use the version that wrote it")
    if render(manifest) != text:
        raise ValueError(f"is damaged: it does not have the sha256 {str(digest)[:16]} that it states")
    for name in files:
        if not _is_inside(name):
            raise ValueError(f"names the file {name!r}, which does not lie plainly in its folder")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit the manifest of a folder whose files are complete."""
    commit_text(folder / MANIFEST, render(manifest))


def read_manifest(path: Path) -> Manifest:
    """What a checkpoint directory says about itself, without looking at its files' content.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: it is a link or no committed checkpoint, or its manifest is damaged.
    """
    if path.is_symlink():
        raise ValueError(f"checkpoint {path} is a symbolic link, which is never followed; give the directory itself")
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint {path} does not exist" if not path.exists() else f"{path} is no directory")
    place = path / MANIFEST
    try:
        state = place.lstat()
    except FileNotFoundError:
        raise ValueError(f"{path} is no committed checkpoint: it has no {MANIFEST}") from None
    if not stat.S_ISREG(state.st_mode) or state.st_size > _MAX_BYTES:
        raise ValueError(f"{place} is no plain file of at most {_MAX_BYTES >> 20} MiB")
    try:
        manifest = parse(place.read_bytes().decode())
    except ValueError as error:
        raise ValueError(f"{place} {error}") from None
    match = _STEP_FOLDER.fullmatch(path.name)
    if match and int(match[1]) != manifest.step:
        raise ValueError(f"checkpoint {path} holds step {manifest.step}: it was renamed")
    return manifest


def verify(path: Path, *, hashes: bool = True) -> Manifest:
    """Prove that a checkpoint directory holds just what its manifest says.

    Args:
        path: the directory.
        hashes: read all files (about 1.5 GB/s a core); otherwise names and sizes only.

    Returns:
        Its manifest.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: naming the file at fault, and both sizes or hashes.
    """
    manifest = read_manifest(path)
    found = dict(_walk(path))
    if extra := sorted(found.keys() - manifest.files.keys()):
        raise ValueError(f"checkpoint {path}: {extra[0]!r} is not in its manifest")
    for name, record in manifest.files.items():
        if name not in found:
            raise ValueError(f"checkpoint {path}: {name!r} is missing")
        if found[name] != record.bytes:
            raise ValueError(f"checkpoint {path}: {name!r} has {found[name]} bytes, its manifest says {record.bytes}")
    if hashes:
        _compare_hashes(path, manifest)
    return manifest


def step_of(path: Path) -> int:
    """Optimizer steps behind a checkpoint, from its name or else from its manifest."""
    match = _STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else read_manifest(path).step


def step_and_version(name: str) -> tuple[int, int] | None:
    """Step and version in the name of a checkpoint directory; None for any other name."""
    match = _STEP_FOLDER.fullmatch(name)
    return (int(match[1]), int(match[2] or 1)) if match else None


def folder_name(step: int, version: int = 1) -> str:
    """Name of the checkpoint after `step` optimizer steps; written again, it gets the next version, from 1."""
    return f"step_{step:08d}" + (f"-{version}" if version > 1 else "")


def _compare_hashes(path: Path, manifest: Manifest) -> None:
    places = [path / name for name in manifest.files]
    if manifest.bytes < _WORTH_THREADS:
        _compare(path, manifest, map(hash_file, places))
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        _compare(path, manifest, pool.map(hash_file, places))


def _compare(path: Path, manifest: Manifest, hashes: Iterable[str]) -> None:
    for (name, record), found in zip(manifest.files.items(), hashes, strict=True):
        if found != record.sha256:
            raise ValueError(
                f"checkpoint {path}: {name!r} has sha256 {found}, its manifest says {record.sha256}: it is damaged"
            )


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Names and sizes of all plain files below a folder, the manifest left out; anything but files is refused."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = prefix + entry.name
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            raise ValueError(f"checkpoint {folder}: {name!r} is a link or no plain file")
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{name}/")
        elif name != MANIFEST:
            yield name, entry.stat(follow_symlinks=False).st_size


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    plain = all(_PLAIN_NAME.fullmatch(part) and part.strip(".") for part in parts)
    return plain and str(PurePosixPath(name)) == name and name != MANIFEST
