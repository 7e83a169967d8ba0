"""Where a run is written and which checkpoint a word means."""

import os
import re
from pathlib import Path

import pytest

from lightning_modules.attempts import begin_attempt, end_attempt
from lightning_modules.checkpoint import Score, step_file, write_scores
from lightning_modules.run_directory import RunDirectory, default_run_dir, resolve_checkpoint


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.prepare()
    return directory


@pytest.fixture
def trained(run):
    for step in (10, 20, 30):
        step_file(run.checkpoints, step).touch()
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
    assert resolve_checkpoint(word, trained, training=training) == step_file(trained.checkpoints, step)


def test_other_runs_and_files_mean_themselves(trained, tmp_path):
    other = RunDirectory(tmp_path / "other")
    assert resolve_checkpoint(str(trained.root), other, training=True) == step_file(trained.checkpoints, 30)
    assert resolve_checkpoint(str(trained.root), other, training=False) == step_file(trained.checkpoints, 20)
    path = str(step_file(trained.checkpoints, 10))
    assert resolve_checkpoint(path, other, training=True) == Path(path)


def test_requeued_job_starts_from_nothing_with_the_same_command(run):
    assert resolve_checkpoint("last", run, training=True) is None
    assert resolve_checkpoint(None, run, training=True) is None
    assert resolve_checkpoint(None, run, training=False) is None


@pytest.mark.parametrize(
    ("word", "training", "message"),
    [
        (None, True, "already holds step_00000030.ckpt; continue it with --ckpt_path last, or give another --run_dir"),
        ("http://host/x.ckpt", True, "ckpt_path 'http://host/x.ckpt' is a remote address"),
        ("nowhere", False, "ckpt_path nowhere is no file and no run directory; use last, best, a file or a run"),
    ],
    ids=["occupied", "remote", "missing"],
)
def test_refusals(trained, word, training, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        resolve_checkpoint(word, trained, training=training)


def test_best_of_an_empty_run_is_refused(run):
    with pytest.raises(FileNotFoundError, match=r"ckpt_path best: nothing in .*checkpoints yet; train with"):
        resolve_checkpoint("best", run, training=True)


def test_attempts_say_why_they_start(tmp_path):
    first = begin_attempt(tmp_path, 0)
    assert (first.number, first.reason) == (1, "first start")
    end_attempt(tmp_path, 120, "SIGTERM")
    second = begin_attempt(tmp_path, 120)
    assert (second.number, second.reason) == (2, "SIGTERM")
    with (tmp_path / "attempts.jsonl").open("a") as stream:
        stream.write('{"event": "en')  # cut short by a kill
    third = begin_attempt(tmp_path, 120)
    assert (third.number, third.reason) == (3, "killed or crashed")
    assert str(third) == f"attempt 3, process {os.getpid()}, resumed at step 120, reason: killed or crashed"
