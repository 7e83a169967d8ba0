"""`mirrorla fit` under every strategy that divides the model: two real processes on CPUs, mirrors, validation, resume.

The oracle of a resume is the run that was not interrupted: the same weights and the same curve, bit for bit.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.checkpoint import list_checkpoints, load_plain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent
STEPS, SAVED = 4, 2
OPTIONS = [
    *("--trainer.devices", "2", "--trainer.max_steps", str(STEPS), "--trainer.log_every_n_steps", "1"),
    *("--trainer.val_check_interval", str(SAVED), "--trainer.limit_val_batches", "2", "--data.batch_size", "16"),
    *("--checkpoint.every_n_steps", str(SAVED), "--checkpoint.keep_last", "3", "--monitoring.num_probes", "4"),
]
ALONE = ["--model.ema_decay", "null"]  # averaged weights need whole ones, which stage 3 divides
WHOLE = {"zero2": ["--config", "deepspeed/zero2"]}
DIVIDED = {
    "zero3": ["--config", "deepspeed/zero3", *ALONE],
    "zero3_cpu": ["--config", "deepspeed/zero3_cpu", *ALONE],
    "fsdp2": ["--trainer.strategy", "fsdp2"],
}


def fit(run, data, *options):
    """Train as a user does; gives what was printed."""
    task = ["--config", "digits/classification", "--config", "trainer/cpu", "--data.path", data, "--run_dir", run]
    command = [sys.executable, "-m", "lightning_modules.cli", "fit", *map(str, task), *OPTIONS, *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    where = {"cwd": run.parent, "env": environment, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600, **where)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def weights(run):
    """Of the newest checkpoint, put together."""
    return load_plain(list_checkpoints(run / "checkpoints")[-1])["state_dict"]


def curves(run):
    """(step, value) of every scalar that is no time."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("train/loss", "train/grad", "val/", "mirror"))]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@pytest.mark.parametrize("name", [*WHOLE, *DIVIDED])
def test_a_model_with_mirrors_trains_validates_saves_and_resumes(name, tmp_path, digits):
    options = {**WHOLE, **DIVIDED}[name]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    told = fit(whole, digits, *options)
    assert "2 x cpu" in told and "0.67 M parameters" in told
    first, last = list_checkpoints(whole / "checkpoints")
    assert (first.name, last.name) == (f"step_{SAVED:08d}", f"step_{STEPS:08d}")
    shutil.copytree(first, resumed / "checkpoints" / first.name)
    assert f"resumed at step {SAVED}" in fit(resumed, digits, *options, "--ckpt_path", "last")
    ours, theirs = weights(resumed), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    expected = {tag: [point for point in points if point[0] >= SAVED] for tag, points in curves(whole).items()}
    found = curves(resumed)
    assert found.keys() == expected.keys()
    assert {tag: points for tag, points in found.items() if points != expected[tag]} == {}
    assert [step for step, _ in expected["val/top1"]] == [STEPS - 1]
    assert any(tag.startswith("mirror") for tag in expected) == (name in WHOLE)
