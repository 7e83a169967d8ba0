"""FSDP2 and DeepSpeed ZeRO on CPUs over gloo, real processes: the same commits and resumes on any number of ranks."""

import importlib.util
import signal
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoint import load_plain, newest_valid

_spec = importlib.util.spec_from_file_location("attempts", Path(__file__).with_name("checkpoint_attempts.py"))
attempts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attempts)
ranks, logs, merge, start_of = attempts.ranks, attempts.logs, attempts.merge, attempts.start_of

FSDP = pytest.param("fsdp2", True, id="fsdp2")
ZERO = [
    pytest.param(f"zero{stage}", stage < 3, id=f"zero{stage}", marks=[] if stage == 2 else pytest.mark.slow)
    for stage in (1, 2, 3)
]


@pytest.fixture(scope="module")
def elastic(ranks, tmp_path_factory):
    """An untouched run under DDP of two ranks: its folder and ledger."""
    run = tmp_path_factory.mktemp("ddp")
    assert ranks.attempt(run, 1, 2, elastic=True, norms=True) == [0, 0], logs(run)
    return run, merge(run, [0])


def norms(run, attempt):
    """Norm of the gradients by step, as logged."""
    return dict(line.split() for line in (run / f"norms-{attempt}").read_text().splitlines())


@pytest.mark.parametrize(("strategy", "average"), [FSDP, *ZERO])
def test_kill_and_other_numbers_of_ranks_train_what_ddp_does(ranks, tmp_path, elastic, strategy, average):
    whole, ledger = elastic
    order = {"strategy": strategy, "elastic": True, "average": average, "norms": True}
    kill = {"signal": signal.SIGKILL, "ranks": [1], "after": 8}
    assert -signal.SIGKILL in ranks.attempt(tmp_path, 1, 2, **order, **kill), logs(tmp_path)
    starts = [0, start_of(tmp_path)]
    assert -signal.SIGKILL in ranks.attempt(tmp_path, 2, 2, **order, **kill), logs(tmp_path)
    starts.append(start_of(tmp_path))
    assert ranks.attempt(tmp_path, 3, 3, **order, signal=signal.SIGTERM, ranks=[2], after=5) == [143] * 3, logs(
        tmp_path
    )
    starts.append(start_of(tmp_path))
    assert ranks.attempt(tmp_path, 4, 1, **order) == [0], logs(tmp_path)
    attempts.check_elastic(merge(tmp_path, starts), ledger)
    for attempt in (1, 2, 3, 4):
        expected, found = norms(whole, 1), norms(tmp_path, attempt)
        assert len(found) >= 3 and found.keys() <= expected.keys()
        for step, norm in found.items():
            assert float(norm) == pytest.approx(float(expected[step]), rel=1e-3) and float(norm) > 0
    ours, theirs = load_plain(newest_valid(tmp_path / "checkpoints")), attempts.final(whole)
    assert ours["global_step"] == theirs["global_step"]
    for name, tensor in ours["state_dict"].items():
        torch.testing.assert_close(tensor, theirs["state_dict"][name], rtol=1e-4, atol=1e-5)
    assert (set(ours["state_dict"]) == set(theirs["state_dict"])) == average
    assert not list((tmp_path / "checkpoints").glob("*.tmp-*"))


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_a_full_disk_leaves_the_old_checkpoint_and_the_training_goes_on(ranks, tmp_path, elastic, strategy):
    order = {"strategy": strategy, "elastic": True, "quota": [5, 10]}  # the saves of steps 6 and 9 fail
    assert ranks.attempt(tmp_path, 1, 2, **order) == [0, 0], logs(tmp_path)
    attempts.check_elastic(merge(tmp_path, [0]), elastic[1])
    told = (tmp_path / "log-1-0").read_text()
    assert "failure 1 in a row; step_00000003 stands" in told and "failure 2 in a row; step_00000003 stands" in told
    assert "failure 3 in a row" not in told
    assert attempts.step_of(newest_valid(tmp_path / "checkpoints")) == attempts.STEPS
    assert not list((tmp_path / "checkpoints").glob("*.tmp-*"))
