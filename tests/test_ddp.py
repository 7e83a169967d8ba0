"""Plain data parallelism on more than two ranks: a resume rounds as the run that was never interrupted."""

import importlib.util
import signal
from pathlib import Path

_spec = importlib.util.spec_from_file_location("attempts", Path(__file__).with_name("checkpoint_attempts.py"))
attempts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attempts)
ranks, logs, merge, start_of = attempts.ranks, attempts.logs, attempts.merge, attempts.start_of

WORLD = 4  # a ring of two adds only two numbers, in whatever order


def interrupted(ranks, folder, **order):
    """A run of three attempts, one killed and one told to stop; its final checkpoint and its ledger."""
    kill = {"signal": signal.SIGKILL, "ranks": [1], "after": 8}
    assert -signal.SIGKILL in ranks.attempt(folder, 1, WORLD, **order, **kill), logs(folder)
    starts = [0, start_of(folder)]
    stop = {"signal": signal.SIGUSR1, "ranks": [2], "after": 5}
    assert 138 in ranks.attempt(folder, 2, WORLD, **order, **stop), logs(folder)
    starts.append(start_of(folder))
    assert ranks.attempt(folder, 3, WORLD, **order) == [0] * WORLD, logs(folder)
    return attempts.final(folder), merge(folder, starts)


def test_four_ranks_resume_bit_for_bit(ranks, tmp_path):
    whole = tmp_path / "whole"
    assert ranks.attempt(whole, 1, WORLD, strategy="ddp") == [0] * WORLD, logs(whole)
    final, ledger = interrupted(ranks, tmp_path / "interrupted", strategy="ddp")
    assert ledger == merge(whole, [0])
    attempts.assert_same(final["state_dict"], attempts.final(whole)["state_dict"])
