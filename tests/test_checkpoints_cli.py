"""`mirrorla checkpoints`: what it lists, removes and converts, and what it refuses."""

import pytest
import torch
from safetensors.torch import load_file

from lightning_modules.checkpoint import Score, list_checkpoints, step_path, write_scores
from lightning_modules.checkpoint_io import CommittedCheckpointIO
from lightning_modules.cli import main
from lightning_modules.lease import acquire


@pytest.fixture
def run(tmp_path):
    """A run of four checkpoints, of which step 2 is ranked best."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for step in (1, 2, 3, 4):
        weights = {"backbone.w": torch.full((100,), float(step))}
        content = {"global_step": step, "epoch": step, "state_dict": weights}
        CommittedCheckpointIO().save_checkpoint(content, step_path(folder, step))
    write_scores(folder, "val/top1", [Score(2, 0.9)])
    return tmp_path / "run"


def names(run):
    return [path.name for path in list_checkpoints(run / "checkpoints")]


def damage(run, step):
    path = step_path(run / "checkpoints", step) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damage_is_listed_where_every_byte_is_read(run, capsys):
    assert main(["checkpoints", str(run), "--verify"]) == 0
    assert capsys.readouterr().out.count("verified") == 4
    damage(run, 3)
    assert main(["checkpoints", str(run), "--verify"]) == 1
    told = capsys.readouterr().out
    assert told.count("verified") == 3 and "step_00000003" in told and "model.safetensors" in told


def test_pruning_keeps_the_newest_good_ones_and_the_ranked(run, capsys):
    damage(run, 4)
    assert main(["checkpoints", str(run), "--prune", "1"]) == 0
    assert {"step_00000002", "step_00000003"} <= set(names(run))
    assert "step_00000001" not in names(run)
    assert "removed step_00000001" in capsys.readouterr().out


def test_pruning_is_refused_while_a_job_holds_the_run(run, capsys):
    lease = acquire(run)
    try:
        assert main(["checkpoints", str(run), "--prune", "1"]) == 73
    finally:
        lease.release()
    assert len(names(run)) == 4
    assert "is in use by process" in capsys.readouterr().err


def test_converting_writes_the_best_ones_weights_once(run, tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    assert main(["checkpoints", str(run), "--convert", str(out)]) == 0
    assert torch.equal(load_file(out)["backbone.w"], torch.full((100,), 2.0))
    before = out.read_bytes()
    assert main(["checkpoints", str(run), "--convert", str(out)]) == 2
    assert "exists already; give another name" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_damaged_checkpoint_is_not_converted(run, tmp_path, capsys):
    damage(run, 2)
    chosen = step_path(run / "checkpoints", 2)
    assert main(["checkpoints", str(chosen), "--convert", str(tmp_path / "w.safetensors")]) != 0
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prune", "0"], "--prune 0 must be 1 or above"),
        (["--convert", "w.pt"], "--convert w.pt must end in .safetensors"),
        (["--zzz"], "see mirrorla checkpoints --help"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(run, capsys, options, message):
    assert main(["checkpoints", str(run), *options]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
