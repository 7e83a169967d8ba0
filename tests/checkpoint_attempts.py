"""What test_chaos_checkpoints.py and test_strategies.py share: attempts of real ranks, and comparing two runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.ledger import read_attempt
from lightning_modules.checkpoint import load_plain, newest_valid, step_of

SCRIPT = Path(__file__).with_name("checkpoint_ranks.py")
STEPS = 3 * 14  # 3 epochs of 57 samples in batches of 4; the tail of an epoch is dropped


class Ranks:
    """Starts attempts in real processes, all from one that has imported everything."""

    def __init__(self, data, server):
        self._data, self._server = str(data), server

    def attempt(self, run, number, world, **order):
        """Train; returns the exit statuses of all ranks. A number above 1 resumes."""
        row = {"data": self._data, "run": str(run), "attempt": number, "world": world, "resume": number > 1, **order}
        self._server.stdin.write(json.dumps(row) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@pytest.fixture(scope="module")
def ranks(data):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}
    command = [sys.executable, str(SCRIPT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        yield Ranks(data, server)
        server.stdin.close()
        assert server.wait(120) == 0


def logs(run):
    return "".join(f"{path.name}: {path.read_text()[-2000:]}\n" for path in sorted(run.glob("log-*")))


def merge(run, starts):
    """Per step all ranks' ids in order and their losses: of each attempt what the next one did not train again."""
    steps = []
    for number, first in enumerate(starts, 1):
        entries = read_attempt(run / "ledger", number)
        last = starts[number] if number < len(starts) else STEPS
        assert len(steps) == first
        for step in range(first, last):
            row = [rank[step - first] for rank in entries]
            assert {entry.step for entry in row} == {step}
            steps.append(([i for entry in row for i in entry.ids], [entry.loss for entry in row]))
    return steps


def final(run):
    path = newest_valid(run / "checkpoints")
    assert step_of(path) == STEPS, logs(run)
    return load_plain(path)


def assert_same(first, second, path="checkpoint"):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{path}/{index}")
    else:
        assert first == second, path


def start_of(run):
    path = newest_valid(run / "checkpoints")
    return 0 if path is None else step_of(path)


def check_elastic(steps, expected):
    assert [ids for ids, _ in steps] == [ids for ids, _ in expected]
    ours, theirs = ([np.mean(losses) for _, losses in run] for run in (steps, expected))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
