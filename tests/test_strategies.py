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
    assert ranks.attempt(run, 1, 2, elastic=True) == [0, 0], logs(run)
    return run, merge(run, [0])


@pytest.mark.parametrize(("strategy", "average"), [FSDP, *ZERO])
def test_kill_and_other_numbers_of_ranks_train_what_ddp_does(ranks, tmp_path, elastic, strategy, average):
    whole, ledger = elastic
    order = {"strategy": strategy, "elastic": True, "average": average}
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
    ours, theirs = load_plain(newest_valid(tmp_path / "checkpoints")), attempts.final(whole)
    assert ours["global_step"] == theirs["global_step"]
    for name, tensor in ours["state_dict"].items():
        torch.testing.assert_close(tensor, theirs["state_dict"][name], rtol=1e-4, atol=1e-5)
    assert (set(ours["state_dict"]) == set(theirs["state_dict"])) == average
    assert not list((tmp_path / "checkpoints").glob("*.tmp-*"))
