"""Real processes: a signal commits a checkpoint, the next command goes on; two ranks train what one does."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.checkpoint import list_checkpoints, step_of
from lightning_modules.cli import main

SCRIPT = str(Path(sys.executable).parent / "mirrorla")
CPU = ["--config", "digits/classification", "--config", "trainer/cpu", "--trainer.log_every_n_steps", "1"]


def curve(root, tag):
    events = EventAccumulator(str(root / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def start(*options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [SCRIPT, "fit", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)


def wait_for(process, text):
    told = []
    for line in process.stderr:
        told.append(line)
        if text in line:
            return told
    raise AssertionError("".join(told))


def test_ctrl_c_commits_and_last_continues(tmp_path, digits):
    options = [*CPU, f"--data.path={digits}", f"--run_dir={tmp_path}", "--data.batch_size=32", "--trainer.max_epochs=2"]
    with start(*options) as process:
        wait_for(process, "attempt 1")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait(60) == 130
    assert "SIGINT: stopping at the next step boundary" in told
    stopped = int(re.search(r"stopped by SIGINT after step (\d+); continue with --ckpt_path last", told)[1])
    (only,) = list_checkpoints(tmp_path / "checkpoints")
    assert step_of(only) == stopped
    assert 0 < stopped < 88
    assert main(["fit", *options, "--ckpt_path", "last"]) == 0
    assert [step for step, _ in curve(tmp_path, "train/loss")] == list(range(88))
    assert [step for step, _ in curve(tmp_path, "val/top1")] == [43, 87]
    assert "Traceback" not in told


def test_two_ranks_stop_together_and_one_rank_goes_on_as_if_alone(tmp_path, digits):
    """A network without BatchNorm, batches that two ranks cannot share evenly, 359 images that they cannot either."""
    options = [
        *CPU,
        *("--model.backbone.name", "test_convnext", "--model.optim.lr", "1e-4", "--model.optim.schedule", "constant"),
        *("--data.batch_size", "25", "--data.lanes", "5", "--trainer.limit_train_batches", "6"),
        f"--data.path={digits}",
    ]
    two, one = tmp_path / "two", tmp_path / "one"
    ddp = [f"--run_dir={two}", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1000"]
    with start(*options, *ddp) as process:
        told = wait_for(process, "epoch 1/1000")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [pid for pid in children if "mirrorla" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(int(ranks[0]), signal.SIGTERM)
        told += process.stderr.readlines()
        assert process.wait(60) == 143, told
    assert any("2 x cpu" in line for line in told)
    assert not any("Traceback" in line for line in told)
    stopped = step_of(list_checkpoints(two / "checkpoints")[-1])
    assert f"stopped by SIGTERM after step {stopped}; continue with --ckpt_path last\n" in told

    end = f"--trainer.max_epochs={stopped // 6 + 1}"
    assert main(["fit", *options, f"--run_dir={two}", "--ckpt_path=last", end]) == 0
    assert main(["fit", *options, f"--run_dir={one}", end]) == 0
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        ours, theirs = curve(two, tag), curve(one, tag)
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], rel=1e-3), tag
    assert curve(two, "val/top1")[0] == curve(one, "val/top1")[0]  # counted by two ranks, and by one
