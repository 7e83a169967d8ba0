"""Where a run is written and which checkpoint a word means."""

import re
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoint import Score, step_path, write_scores
from lightning_modules.checkpoint_io import CommittedCheckpointIO
from lightning_modules.run_directory import RunDirectory, default_run_dir, resolve_checkpoint


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.prepare()
    return directory


def save(run, step):
    checkpoint = {"global_step": step, "state_dict": {"w": torch.zeros(1)}}
    CommittedCheckpointIO().save_checkpoint(checkpoint, step_path(run.checkpoints, step))


def damage(run, step):
    path = step_path(run.checkpoints, step) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


@pytest.fixture
def trained(run):
    for step in (10, 20, 30):
        save(run, step)
    write_scores(run.checkpoints, "val/top1", [Score(40, 0.99), Score(20, 0.9)])  # 40 was removed by hand
    return run


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("/home/me/configs/digits/classification.yaml", "runs/digits-classification"),
        ("/site-packages/mirrorla/configs/imagenet/tiny.yaml", "runs/imagenet-tiny"),
        ("/home/me/mine.yaml", "runs/mine"),
        (None, "runs/unnamed"),
    ],
    ids=["checkout", "wheel", "own", "none"],
)
def test_default_run_dir_follows_the_config(config, expected):
    assert default_run_dir(None if config is None else Path(config)) == Path(expected)


def test_prepared_run_is_private(run):
    assert run.root.stat().st_mode & 0o777 == 0o700
    assert run.checkpoints.is_dir()
    assert run.logs.is_dir()


def test_unwritable_run_dir_is_refused(tmp_path):
    (tmp_path / "file").touch()
    message = f"run_dir {tmp_path}/file/run cannot be written (Not a directory); give another --run_dir"
    with pytest.raises(PermissionError, match=re.escape(message)):
        RunDirectory(tmp_path / "file" / "run").prepare()


@pytest.mark.parametrize(
    ("word", "training", "step"),
    [("last", True, 30), ("best", True, 20), ("last", False, 30), ("best", False, 20), (None, False, 20)],
)
def test_words_mean_checkpoints(trained, word, training, step):
    assert resolve_checkpoint(word, trained, training=training) == step_path(trained.checkpoints, step)


@pytest.mark.parametrize(
    ("word", "training", "step"),
    [("last", True, 20), ("last", False, 20), ("best", False, 30)],
)
def test_damaged_checkpoint_gives_way_loudly_to_the_next(trained, caplog, word, training, step):
    write_scores(trained.checkpoints, "val/top1", [Score(20, 0.9), Score(30, 0.8)])
    damaged = 30 if word == "last" else 20
    damage(trained, damaged)
    assert resolve_checkpoint(word, trained, training=training) == step_path(trained.checkpoints, step)
    (line,) = caplog.messages
    assert re.search(rf"refused .*step_000000{damaged}: 'model.safetensors' has sha256 .* falling back", line)
    with pytest.raises(ValueError, match=r"'model\.safetensors' has sha256"):
        resolve_checkpoint(str(step_path(trained.checkpoints, damaged)), trained, training=training)
    assert resolve_checkpoint(word, trained, training=training, hashes=False) == step_path(trained.checkpoints, damaged)


def test_other_runs_and_files_mean_themselves(trained, tmp_path):
    other = RunDirectory(tmp_path / "other")
    assert resolve_checkpoint(str(trained.root), other, training=True) == step_path(trained.checkpoints, 30)
    assert resolve_checkpoint(str(trained.root), other, training=False) == step_path(trained.checkpoints, 20)
    assert resolve_checkpoint(str(trained.checkpoints / "LATEST"), other, training=True).name == "step_00000030"
    path = str(step_path(trained.checkpoints, 10))
    assert resolve_checkpoint(path, other, training=True) == Path(path)


def test_requeued_job_starts_from_nothing_with_the_same_command(run):
    assert resolve_checkpoint("last", run, training=True) is None
    assert resolve_checkpoint(None, run, training=True) is None
    assert resolve_checkpoint(None, run, training=False) is None


@pytest.mark.parametrize(
    ("word", "training", "message"),
    [
        (None, True, "already holds step_00000030; continue it with --ckpt_path last, or give another --run_dir"),
        ("http://host/x", True, "ckpt_path 'http://host/x' is a remote address; copy the directory here first"),
        ("s3://bucket/x", False, "ckpt_path 's3://bucket/x' is a remote address"),
        (__file__, True, "is a file; a checkpoint is a directory, weights go to --model.backbone.pretrained"),
        ("nowhere", False, "ckpt_path nowhere does not exist; use last, best, a checkpoint directory or a run"),
    ],
    ids=["occupied", "http", "s3", "file", "missing"],
)
def test_refusals(trained, word, training, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        resolve_checkpoint(word, trained, training=training)


def test_best_of_an_empty_run_is_refused(run):
    with pytest.raises(FileNotFoundError, match=r"ckpt_path best: nothing in .*checkpoints yet; train with"):
        resolve_checkpoint("best", run, training=True)
