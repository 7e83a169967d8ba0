"""Damaged, cut, tampered and linked checkpoints: each is refused by name and none runs code."""

import os
import pickle
import random
import re
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoint import (
    load_plain,
    newest_valid,
    read_latest,
    read_manifest,
    step_path,
    verify,
)
from lightning_modules.checkpoint_io import CommittedCheckpointIO
from lightning_modules.manifest import MANIFEST
from tests.checkpoint_files import reseal, save

CANARY = Path("/nonexistent-canary")


class Evil:
    def __reduce__(self):
        return (CANARY.touch, ())


def test_thousand_bit_flips_are_all_refused_and_the_previous_one_is_used(tmp_path, caplog):
    good = save(tmp_path, 1)
    path = save(tmp_path, 2, **{"config.yaml": "a: 1\n"})
    files = sorted(file for file in path.iterdir())
    contents = [file.read_bytes() for file in files]
    rng = random.Random(0)
    for _ in range(1000):
        file, content = rng.choice(list(zip(files, contents, strict=True)))
        flipped = bytearray(content)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            verify(path)
        assert newest_valid(tmp_path) == good
        file.write_bytes(content)
    assert newest_valid(tmp_path) == path
    assert len(caplog.records) == 1000


def test_damage_is_named_with_both_hashes(tmp_path):
    path = save(tmp_path)
    record = read_manifest(path).files["model.safetensors"]
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        ValueError, match=rf"'model.safetensors' has sha256 \w+, its manifest says {record.sha256}: it is"
    ):
        verify(path)
    assert verify(path, hashes=False).step == 7


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", MANIFEST])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_truncated_checkpoint_is_refused(tmp_path, name, share):
    path = save(tmp_path)
    os.truncate(path / name, int((path / name).stat().st_size * share))
    with pytest.raises(ValueError, match=re.escape(name)):
        load_plain(path)


def tampered(path, how):
    if how == "extra file":
        (path / "more.pt").touch()
    elif how == "extra file in a folder":
        (path / "sub").mkdir()
        (path / "sub" / "more.pt").touch()
    elif how == "missing file":
        (path / "state.pt").unlink()
    elif how == "no manifest":
        (path / MANIFEST).unlink()
    elif how == "linked file":
        (path / "state.pt").rename(path.parent / "elsewhere.pt")
        (path / "state.pt").symlink_to(path.parent / "elsewhere.pt")
    elif how == "linked manifest":
        (path / MANIFEST).rename(path.parent / "elsewhere.json")
        (path / MANIFEST).symlink_to(path.parent / "elsewhere.json")
    elif how == "pipe":
        os.mkfifo(path / "pipe")
    elif how == "step changed":
        reseal(path, step=8)
    elif how == "schema":
        reseal(path, schema=2)
    elif how == "text changed":
        (path / MANIFEST).write_text((path / MANIFEST).read_text().replace('"step": 7', '"step": 8'))
    elif how == "blank added":
        (path / MANIFEST).write_text((path / MANIFEST).read_text() + " ")
    elif how == "no JSON":
        (path / MANIFEST).write_text("[" * 100_000)
    else:
        record = read_manifest(path).files["state.pt"]
        reseal(path, files={**read_manifest(path).files, how: record})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("extra file", "'more.pt' is not in its manifest"),
        ("extra file in a folder", "'sub/more.pt' is not in its manifest"),
        ("missing file", "'state.pt' is missing"),
        ("no manifest", "is no committed checkpoint: it has no MANIFEST.json"),
        ("linked file", "'state.pt' is a link or no plain file"),
        ("linked manifest", "is no plain file of at most"),
        ("pipe", "'pipe' is a link or no plain file"),
        ("step changed", "holds step 8: it was renamed"),
        ("schema", "has schema 2, this program reads 1; use the version that wrote it"),
        ("text changed", "is damaged: it does not have the sha256"),
        ("blank added", "is damaged: it does not have the sha256"),
        ("no JSON", "is no manifest"),
        *[
            (name, "does not lie plainly in its folder")
            for name in (
                "../state.pt",
                "/etc/passwd",
                "a/../../b",
                "a//b",
                "./state.pt",
                "a/..",
                "",
                "x\ny",
                "a\\b",
                MANIFEST,
            )
        ],
    ],
)
def test_tampered_checkpoint_is_refused(tmp_path, how, message):
    path = save(tmp_path)
    tampered(path, how)
    with pytest.raises(ValueError, match=re.escape(message)):
        verify(path, hashes=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_plain(path)
    assert newest_valid(tmp_path) is None


def test_linked_checkpoint_is_refused_loudly(tmp_path, caplog):
    outside = save(tmp_path / "outside", 9)
    good = save(tmp_path / "run", 3)
    step_path(tmp_path / "run", 9).symlink_to(outside)
    assert newest_valid(tmp_path / "run") == good
    assert "step_00000009 is a symbolic link, which is never followed" in caplog.text
    assert "falling back to the checkpoint before it" in caplog.text


def test_latest_is_read_only_where_it_lies(tmp_path):
    path = save(tmp_path)
    assert read_latest(tmp_path / "LATEST") == path
    for text in ("../../etc", "/etc/passwd", "step_1", "step_00000007\nx", ""):
        (tmp_path / "LATEST").write_text(text)
        with pytest.raises(ValueError, match="which is no checkpoint beside it; give the checkpoint's directory"):
            read_latest(tmp_path / "LATEST")
    (tmp_path / "other").write_text("step_00000007")
    (tmp_path / "LATEST").unlink()
    (tmp_path / "LATEST").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="LATEST is a symbolic link, which is never followed"):
        read_latest(tmp_path / "LATEST")


def test_objects_are_never_unpickled(tmp_path):
    path = save(tmp_path)
    torch.save({"global_step": 7, "callbacks": Evil()}, path / "state.pt")
    reseal(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path / 'state.pt'))} cannot be read as tensors and plain"):
        CommittedCheckpointIO().load_checkpoint(path, weights_only=False)
    for name in ("state.pt", "model.safetensors"):
        (path / name).write_bytes(pickle.dumps(Evil()))
        reseal(path)
        with pytest.raises(ValueError, match="cannot be read"):
            load_plain(path)
    assert not CANARY.exists()
