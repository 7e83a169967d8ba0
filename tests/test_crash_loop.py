"""Three restarts that get nowhere are the last; a word from a person, a mend or progress lets it start again."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules import crash_loop
from lightning_modules.attempts import Record, read_attempts
from lightning_modules.crash_loop import MAX_RESTARTS, fruitless, refuse_crash_loop
from lightning_modules.errors import UsageError
from lightning_modules.exit_codes import ExitCode, GuardStop
from lightning_modules.guards import GuardConfig, guarded
from lightning_modules.run_directory import RunDirectory

FAILED = Record(1, 40, config="a", end_step=43, outcome="RuntimeError: x", code=1)


def numbered(*records):
    return [replace(record, number=i) for i, record in enumerate(records, 1)]


def test_three_failures_from_one_checkpoint_are_enough(tmp_path):
    row = numbered(FAILED, replace(FAILED, outcome=None, code=None), replace(FAILED, outcome="rank 1 hung", code=76))
    refuse_crash_loop(tmp_path, row[:2], 40, "a")
    message = (
        f"run_dir {tmp_path}: 3 restarts got no further than step 40 (attempt 1: RuntimeError: x; attempt 2: killed or "
        "crashed; attempt 3: rank 1 hung); mend the cause and start once with --guard.allow_crash_loop true"
    )
    with pytest.raises(GuardStop, match=f"^{re.escape(message)}$") as stop:
        refuse_crash_loop(tmp_path, row, 40, "a")
    assert stop.value.code == ExitCode.CRASH_LOOP == 77


@pytest.mark.parametrize(
    ("change", "step", "config"),
    [
        ({"step": 30}, 40, "a"),  # one of them began earlier: there was progress
        ({}, 44, "a"),  # the last one left a checkpoint
        ({}, 40, "b"),  # another configuration: somebody has mended something
        ({"code": 0}, 40, "a"),
        ({"code": 143, "outcome": "SIGTERM"}, 40, "a"),
        ({"code": 138, "outcome": "SIGUSR1"}, 40, "a"),
    ],
)
def test_progress_a_mend_or_an_end_that_was_asked_for_breaks_the_row(tmp_path, change, step, config):
    for place in range(3):
        row = [FAILED] * 3
        row[place] = replace(FAILED, **change)
        refuse_crash_loop(tmp_path, numbered(*row), step, config)


def test_a_refused_start_neither_counts_nor_breaks_the_row():
    refused = replace(FAILED, code=ExitCode.REFUSED, outcome="data.path is missing")
    assert len(fruitless(numbered(FAILED, refused, FAILED, refused), 40, "a")) == 2


@given(st.lists(st.sampled_from([0, 1, 2, 75, 76, 143, None]), max_size=8))
def test_the_row_is_the_failures_after_the_last_good_end(codes):
    row = numbered(*[replace(FAILED, code=code) for code in codes])
    counted = [code for code in codes if code != 2]
    good = [i for i, code in enumerate(counted) if code in (0, 143)]
    assert len(fruitless(row, 40, "a")) == len(counted) - (good[-1] + 1 if good else 0)


def attempt(root, error, **options):
    run = RunDirectory(root)
    run.prepare()
    with guarded(run, GuardConfig(**options), 0, 0, "config") as guards:
        guards.has_begun = not isinstance(error, UsageError)
        raise error


def test_a_run_that_crashes_again_and_again_is_stopped_and_can_be_let_go(tmp_path):
    for _ in range(MAX_RESTARTS):
        with pytest.raises(ZeroDivisionError):
            attempt(tmp_path, ZeroDivisionError("division by zero"))
    with pytest.raises(GuardStop, match="3 restarts got no further than step 0 "):
        attempt(tmp_path, ZeroDivisionError())
    assert len(read_attempts(tmp_path)) == MAX_RESTARTS  # a start that was stopped is no attempt
    with pytest.raises(ZeroDivisionError):  # and left the lease behind it free
        attempt(tmp_path, ZeroDivisionError(), allow_crash_loop=True)


def test_a_users_mistake_before_the_training_is_no_crash(tmp_path):
    for _ in range(MAX_RESTARTS + 2):
        with pytest.raises(UsageError):
            attempt(tmp_path, UsageError("data.path nowhere"))
    assert {record.code for record in read_attempts(tmp_path)} == {ExitCode.REFUSED}


def test_the_ends_that_are_no_crash_are_those_that_somebody_asked_for():
    assert {int(code) for code in crash_loop._NO_CRASH} == {0, 2, 130, 138, 143}
