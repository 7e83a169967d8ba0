"""The ledger of attempts says who ran from where to where, and why it ended, whatever a kill does to its last line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.attempts import begin_attempt, end_attempt, note_skip, read_attempts


def test_an_attempt_knows_how_the_one_before_it_ended(tmp_path):
    assert str(begin_attempt(tmp_path, 0)).endswith(", started")
    end_attempt(tmp_path, 120, "SIGTERM", 143)
    assert begin_attempt(tmp_path, 120).reason == "SIGTERM"
    third = begin_attempt(tmp_path, 120)
    assert third.reason == "killed or crashed"
    assert str(third).startswith("attempt 3, process ")
    assert str(third).endswith("resumed at step 120, reason: killed or crashed")


def test_it_records_place_job_code_and_skips(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    assert str(begin_attempt(tmp_path, 5, "digest")) == "attempt 1, job 812, resumed at step 5, reason: first start"
    note_skip(tmp_path, 7, "loss")
    note_skip(tmp_path, 8, "gradient")
    end_attempt(tmp_path, 9, "why", 75, rolled_back_to=5)
    (record,) = read_attempts(tmp_path)
    assert (record.step, record.end_step, record.outcome, record.code) == (5, 9, "why", 75)
    assert (record.job, record.config, record.skipped, record.rolled_back_to) == ("812", "digest", 2, 5)
    assert record.host and record.pid and record.time.endswith("+00:00")


def test_the_first_word_about_an_end_counts(tmp_path):
    begin_attempt(tmp_path, 0)
    end_attempt(tmp_path, 3, "rank 1: the cause", 1, attempt=1)
    end_attempt(tmp_path, 3, "rank 0: connection closed by peer", 1, attempt=1)
    begin_attempt(tmp_path, 0)
    end_attempt(tmp_path, 4, "a straggler of the first", 1, attempt=1)
    assert [record.outcome for record in read_attempts(tmp_path)] == ["rank 1: the cause", None]


@given(cut=st.integers(1, 400))
def test_a_line_cut_short_costs_itself_only(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    for _ in range(2):
        begin_attempt(folder, 0)
    path = folder / "attempts.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: -min(cut, len(whole))])
    kept = len(read_attempts(folder))
    begin_attempt(folder, 7)
    records = read_attempts(folder)
    assert len(records) == kept + 1
    assert records[-1].step == 7
    assert all(json.loads(line) for line in path.read_bytes().splitlines()[-1:])


@pytest.mark.parametrize("text", ["", "\n\n", "no json\n", '{"event": "end", "step": 3, "reason": "x"}\n'])
def test_a_ledger_without_a_start_has_no_attempts(tmp_path, text):
    (tmp_path / "attempts.jsonl").write_text(text)
    assert read_attempts(tmp_path) == []
    assert read_attempts(tmp_path / "nowhere") == []
