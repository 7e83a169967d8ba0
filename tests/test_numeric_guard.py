"""What is not finite never reaches the weights: the step is skipped, then the run goes back, then it stops."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_modules.attempts import Record, read_attempts
from lightning_modules.callbacks.step_seed import step_seed
from lightning_modules.checkpoint import list_checkpoints, step_of
from lightning_modules.exit_codes import ExitCode, GuardStop
from lightning_modules.guards import RolledBack
from lightning_modules.numeric_guard import Streak, count_rollbacks, good_step, not_finite, plain

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*not resumable"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]
SCRIPT = Path(__file__).with_name("guarded_ranks.py")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("guarded_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Film(Callback):
    """Everything that training changes, before the first batch and after every one."""

    def __init__(self):
        self.frames = []

    def take(self, trainer, module):
        moments = trainer.optimizers[0].state_dict()["state"]
        frame = {f"moment {i} {name}": t for i, part in moments.items() for name, t in part.items()}
        self.frames.append({name: t.clone() for name, t in {**frame, **module.state_dict()}.items()})

    def on_train_start(self, trainer, module):
        self.take(trainer, module)

    def on_train_batch_end(self, trainer, module, *_):
        self.take(trainer, module)


def changed(before, after):
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


@given(st.lists(st.booleans(), max_size=30))
def test_a_streak_counts_what_came_in_a_row_and_in_total(steps):
    streak = Streak()
    for is_finite in steps:
        streak = streak.after(is_finite)
    text = "".join("." if is_finite else "x" for is_finite in steps)
    assert streak == Streak(len(text) - len(text.rstrip("x")), text.count("x"))


@given(
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), max_size=6),
    st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), max_size=2),
)
def test_any_nan_or_inf_raises_the_flag_and_nothing_else_does(finite, others):
    tensors = [torch.tensor(finite), torch.tensor(others), torch.empty(0)]
    assert not_finite(tensors).item() == bool(others)


def test_nothing_at_all_is_finite():
    assert not_finite([]).item() == 0


@pytest.mark.parametrize(
    ("steps", "done", "in_a_row", "expected"),
    [
        ([2, 4, 6], 9, 3, 6),  # 7 steps were finite, the first skipped one is the 8th
        ([2, 4, 7], 9, 3, 4),  # the weights at 7 gave the first skipped one
        ([2, 4, 8], 9, 3, 4),  # taken while skipping
        ([5], 5, 1, 0),
        ([], 9, 3, 0),
    ],
)
def test_a_good_checkpoint_was_left_by_a_finite_step(steps, done, in_a_row, expected):
    assert good_step(steps, done, in_a_row) == expected


def test_rollbacks_count_only_in_a_row_and_to_one_checkpoint():
    def attempts(*targets):
        return [Record(i, 0, outcome="x", rolled_back_to=target) for i, target in enumerate(targets, 1)]

    assert count_rollbacks(attempts(4, 4), 4) == 2
    assert count_rollbacks(attempts(4, 4), 8) == 0
    assert count_rollbacks(attempts(4, None, 4), 4) == 1
    assert count_rollbacks([*attempts(4), Record(2, 4)], 4) == 1  # the attempt under way has no end yet


def test_numbers_become_json():
    assert json.dumps([plain(value) for value in (1.5, math.nan, -math.inf)]) == '[1.5, "nan", "-inf"]'


def test_a_skipped_step_changes_nothing_bit_for_bit_and_the_run_goes_on(script, tmp_path):
    film = Film()
    trainer, _ = script.fit(tmp_path, film, events=[(0, 3, "nan"), (0, 4, "nan")])
    changes = [changed(*pair) for pair in zip(film.frames, film.frames[1:], strict=False)]
    assert [bool(change) for change in changes] == [True, True, True, False, False, True, True, True]
    assert changes[5] == changes[2]  # weights, moments, running statistics, average: all go on
    assert any("running_mean" in name for name in changes[2])
    assert any(name.startswith("ema.") for name in changes[2])
    assert trainer.global_step == 8  # data and schedule went on
    assert all(torch.isfinite(value).all() for value in film.frames[-1].values())
    assert trainer.logged_metrics["train/skipped_steps"] == 2
    assert read_attempts(tmp_path)[-1].skipped == 2


def test_an_accumulated_step_with_one_bad_batch_is_skipped_whole(script, tmp_path):
    film = Film()
    script.fit(tmp_path, film, events=[(0, 2, "nan")], accumulate_grad_batches=2)
    weights = [{name: frame[name] for name in frame if name.startswith("network")} for frame in film.frames]
    statistics = [f"network.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
    steps = [changed(weights[i], weights[i + 2]) - set(statistics) for i in range(0, 8, 2)]
    assert [bool(step) for step in steps] == [True, False, True, True]
    assert all(torch.equal(weights[2][name], weights[4][name]) for name in statistics)


def test_a_gradient_scaler_skips_for_itself_and_is_not_counted(script, tmp_path):
    class Overflow(Callback):
        def on_after_backward(self, trainer, module):
            if trainer.global_step == 2:
                module.network[0].weight.grad.fill_(math.inf)

    film, precision = Film(), MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    script.fit(tmp_path, film, Overflow(), events=[(0, 4, "nan")], plugins=[precision])
    moved = [bool({n for n in changed(*p) if n == "network.0.weight"}) for p in zip(film.frames, film.frames[1:])]  # noqa: B905
    assert moved == [True, True, False, True, False, True, True, True]
    assert precision.scaler.get_scale() == 2.0  # halved for the overflow, and for the loss
    assert read_attempts(tmp_path)[-1].skipped == 1  # the loss


def test_too_many_in_a_row_go_back_to_the_last_good_checkpoint_then_stop_with_a_bundle(script, tmp_path):
    def attempt():
        events = [(0, batch, "nan") for batch in (4, 5, 6)]
        return script.fit(tmp_path, events=events, guard={"max_skips": 2}, every_n_steps=1)

    for number in (1, 2):
        with pytest.raises(RolledBack, match="loss was not finite for 3 steps in a row up to step 6; ") as back:
            attempt()
        assert (back.value.code, back.value.step) == (ExitCode.ROLLED_BACK, 3)
        # None was saved from the first skipped step on, however often saves are due.
        assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")][-1] == 3
        assert len(read_attempts(tmp_path)) == number
    with pytest.raises(GuardStop, match=r"going back to step 3 did not help 2 times: lower model.optim.lr") as stop:
        attempt()
    assert stop.value.code == ExitCode.NOT_FINITE
    assert [(r.step, r.rolled_back_to, r.code) for r in read_attempts(tmp_path)] == [
        (0, 3, 75),
        (3, 3, 75),
        (3, None, 78),
    ]
    (bundle,) = (tmp_path / "bundles").iterdir()
    assert bundle.name == "step_00000006"
    assert (bundle / "config.yaml").read_text() == "seed: 3\n"
    record = json.loads((bundle / "rank_00000.json").read_text())
    assert record["losses"] == ["nan"]
    # The fourth batch of this attempt: the loader of these tests begins anew.
    assert record["batches"] == [{"batch_idx": 6, "seed": step_seed(3, 0, 6, 0), "ids": [12, 13, 14, 15]}]
    assert record["last_logged"] == {"train/loss": "nan", "train/skipped_steps": 2.0}
    assert record["norms"]["network.0.weight"]["gradient"] == "nan"
    assert isinstance(record["norms"]["network.0.weight"]["weight"], float)
    assert sum(path.stat().st_size for path in bundle.iterdir()) < 10_000


def test_a_fault_that_does_not_come_back_costs_one_rollback(script, tmp_path):
    with pytest.raises(RolledBack):
        script.fit(tmp_path, events=[(0, 4, "nan")], guard={"max_skips": 0}, every_n_steps=1)
    trainer, _ = script.fit(tmp_path, guard={"max_skips": 0})
    assert trainer.global_step == 8
    assert [record.step for record in read_attempts(tmp_path)] == [0, 3]


def test_a_streak_goes_on_after_a_resume(script, tmp_path):
    script.fit(tmp_path, events=[(0, 6, "nan"), (0, 7, "nan")], guard={"max_skips": 2})
    with pytest.raises(RolledBack, match="3 steps in a row"):
        script.fit(tmp_path, events=[(0, 8, "nan")], guard={"max_skips": 2}, epochs=2)
