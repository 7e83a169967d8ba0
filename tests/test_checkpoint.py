"""Checkpoint files: committed or absent, never torn, read as plain values only."""

import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.callbacks.checkpointing import CheckpointConfig, Moment, between_steps
from lightning_modules.checkpoint import (
    CommittedCheckpointIO,
    Score,
    list_checkpoints,
    load_plain,
    rank_scores,
    read_scores,
    step_file,
    step_of,
    write_scores,
)
from lightning_modules.commit import commit_file, commit_text, sweep

GOOD = {"global_step": 7, "state_dict": {"w": torch.arange(3.0)}}


class Evil:
    def __reduce__(self):
        return (Path("/nonexistent-canary").touch, ())


def test_save_and_load_is_exact(tmp_path):
    path = step_file(tmp_path / "checkpoints", 7)
    CommittedCheckpointIO().save_checkpoint(GOOD, path)
    loaded = CommittedCheckpointIO().load_checkpoint(path, weights_only=False)
    assert loaded["global_step"] == 7
    assert torch.equal(loaded["state_dict"]["w"], GOOD["state_dict"]["w"])
    assert [p.name for p in path.parent.iterdir()] == ["step_00000007.ckpt"]


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "file"
    commit_text(target, "old")

    def fail_midway(stream):
        stream.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        commit_file(target, fail_midway)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_file_size_limit_leaves_the_old_file(tmp_path):
    path = step_file(tmp_path, 1)
    CommittedCheckpointIO().save_checkpoint(GOOD, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises((OSError, RuntimeError)):
            CommittedCheckpointIO().save_checkpoint({**GOOD, "large": torch.zeros(10**5)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_kill_while_writing_leaves_whole_files_only(tmp_path):
    program = textwrap.dedent(
        """
        import sys, pathlib
        from lightning_modules.commit import commit_file
        target = pathlib.Path(sys.argv[1])
        def write(stream):
            for _ in range(2000):
                stream.write(mark * 100)
        print("ready", flush=True)
        for number in range(10**6):
            mark = bytes([number % 256])
            commit_file(target, write)
        """
    )
    target = tmp_path / "file"
    for milliseconds in (10, 25, 40, 55, 70):
        process = subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE)
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(milliseconds / 1000)
        process.kill()
        process.wait()
        process.stdout.close()
        content = target.read_bytes()
        assert len(content) == 200_000
        assert len(set(content)) == 1
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [target]


def test_objects_are_never_unpickled(tmp_path):
    path = step_file(tmp_path, 1)
    torch.save({"global_step": 1, "callbacks": Evil()}, path)
    with pytest.raises(ValueError, match=f"checkpoint {re.escape(str(path))} cannot be read as tensors and plain"):
        CommittedCheckpointIO().load_checkpoint(path, weights_only=False)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="cannot be read"):
        load_plain(path)
    assert not Path("/nonexistent-canary").exists()


@pytest.mark.parametrize("size", [0, 100, 1000], ids="{}B".format)
def test_truncated_checkpoint_is_refused(tmp_path, size):
    path = step_file(tmp_path, 1)
    CommittedCheckpointIO().save_checkpoint(GOOD, path)
    os.truncate(path, size)
    with pytest.raises(ValueError, match="cannot be read"):
        load_plain(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*none.ckpt does not exist"):
        load_plain(tmp_path / "none.ckpt")
    torch.save({"w": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"is no training checkpoint; for plain weights use --model\.backbone"):
        load_plain(tmp_path / "weights.pt")


def test_listing_is_by_step_and_without_temporaries(tmp_path):
    for name in (
        "step_00000010.ckpt",
        "step_00000009.ckpt",
        "step_123456789.ckpt",
        "step_00000011.ckpt.tmp-ab",
        "x.ckpt",
    ):
        (tmp_path / name).touch()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [9, 10, 123456789]


def test_step_of_a_renamed_file_comes_from_its_content(tmp_path):
    torch.save(GOOD, tmp_path / "mine.ckpt")
    assert step_of(tmp_path / "mine.ckpt") == 7


def test_scores_survive_the_disk(tmp_path):
    assert read_scores(tmp_path) == []
    scores = [Score(20, 0.9), Score(10, 0.8)]
    write_scores(tmp_path, "val/top1", scores)
    assert read_scores(tmp_path) == scores


@given(
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), max_size=20),
    st.integers(1, 5),
    st.booleans(),
)
def test_ranking_keeps_the_best(rows, keep, maximise):
    ranking, latest = [], {}
    for step, value in rows:
        latest[step] = value
        ranking = rank_scores(ranking, Score(step, value), keep=keep, maximise=maximise)
        assert len(ranking) <= keep
    assert ranking == sorted(ranking, key=lambda s: (-s.value if maximise else s.value, s.step))
    if len(latest) == len(rows) and rows:
        best = (max if maximise else min)(latest.values())
        assert ranking[0].value == best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": 0}, "checkpoint.keep_last 0 must be 1 or above"),
        ({"every_n_steps": -1}, "checkpoint.every_n_steps -1 must be 0 or above; 0 turns it off"),
    ],
    ids=["keep_last", "every_n_steps"],
)
def test_options_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**options)


def test_counters_are_corrected_in_a_copy():
    def progress(ready):
        return {"ready": ready, "started": 3, "processed": 3, "completed": 3}

    loops = {
        "fit_loop": {
            "epoch_loop.batch_progress": {"total": progress(4), "current": progress(4), "is_last_batch": True},
            "epoch_loop.val_loop.batch_progress": {"total": progress(3), "current": progress(3)},
        }
    }
    fetched = between_steps(loops, Moment.NEXT_BATCH_READY)["fit_loop"]["epoch_loop.batch_progress"]
    assert fetched == {"total": progress(3), "current": progress(3), "is_last_batch": False}
    begun = between_steps(loops, Moment.INSIDE_VALIDATION)["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    assert begun == {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    assert between_steps(loops, Moment.AS_COUNTED) == loops
