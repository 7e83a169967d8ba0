"""A heartbeat says what its rank is at, costs the training nothing, and trusts no clock but its own ticks."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules import heartbeat
from lightning_modules.callbacks.heartbeat import limit_s
from lightning_modules.guards import GuardConfig
from lightning_modules.heartbeat import PHASES, Note, Pulse, encode, file_of, forget, read_beat, read_beats

INTERVAL_S = 0.05


@pytest.fixture
def pulse(tmp_path):
    made = Pulse(tmp_path / "heartbeat", 2, interval_s=INTERVAL_S)
    made.token = 1
    yield made
    made.stop()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_file_follows_the_notes(tmp_path, pulse):
    pulse.start()
    path = file_of(pulse.folder, 2)
    for phase in PHASES:
        pulse.note = Note(phase, 60.0, 20.0, place=3, step=7, epoch=1, detail="samples 1, 2")
        until(lambda phase=phase: (beat := read_beat(path)) is not None and beat.note.phase == phase)
    beat = read_beat(path)
    assert (beat.rank, beat.note, beat.process.state()) == (2, pulse.note, "alive")
    assert str(beat) == "phase evaluation at step 7 (samples 1, 2)"
    until(lambda: read_beat(path).stuck_s > 2 * INTERVAL_S)
    pulse.note = replace(pulse.note)  # the same words again are a sign of life
    until(lambda: read_beat(path).stuck_s == 0)
    assert [path.name for path in pulse.folder.iterdir()] == ["rank_00002.json"]


def test_readers_never_see_half_a_file(pulse):
    pulse.folder.mkdir()
    pulse.note = Note(detail="x" * 20_000)
    pulse.write()
    ended = threading.Event()

    def write():
        while not ended.is_set():
            pulse.write()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(read_beat(file_of(pulse.folder, 2)) is not None for _ in range(2000))
    finally:
        ended.set()
        writer.join()


@given(st.lists(st.floats(0.5, 1.5), max_size=20), st.floats(10, 1e6))
def test_time_in_which_the_process_was_stopped_counts_for_two_heartbeats(tmp_path_factory, ticks, pause_s):
    pulse = Pulse(tmp_path_factory.mktemp("pulse"), 0, interval_s=1.0)
    for elapsed_s in [*ticks, pause_s]:
        pulse.tick(elapsed_s)
    assert pulse.beat.stuck_s == pytest.approx(sum(ticks) + 2, abs=1e-3)


def test_a_jump_of_the_wall_clock_changes_nothing(pulse, monkeypatch):
    pulse.start()
    until(lambda: read_beat(file_of(pulse.folder, 2)) is not None)
    clock = time.time
    for shift_s in (-1e9, 1e9):
        monkeypatch.setattr(time, "time", lambda shift_s=shift_s: clock() + shift_s)
        before = read_beat(file_of(pulse.folder, 2))
        until(lambda before=before: read_beat(file_of(pulse.folder, 2)).count >= before.count + 3)
        after = read_beat(file_of(pulse.folder, 2))
        assert 0 < after.stuck_s - before.stuck_s < 20


def test_a_folder_that_cannot_be_written_does_not_end_the_watch(tmp_path, pulse):
    beats = []
    pulse._on_beat = lambda: beats.append(1)
    pulse.start()
    pulse.folder.rename(tmp_path / "gone")
    until(lambda: len(beats) > 3)


def test_nothing_is_written_before_the_run_directory_is_held(pulse):
    beats = []
    pulse.token = 0
    pulse._on_beat = lambda: beats.append(1)
    pulse.start()
    until(lambda: len(beats) > 2)
    assert list(pulse.folder.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rank": 0}', "null"])
def test_a_damaged_heartbeat_says_nothing(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    assert read_beat(tmp_path / "x.json") is None


def test_only_the_latest_group_is_read_and_an_old_one_is_forgotten(tmp_path):
    folder = heartbeat.folder_of(tmp_path)
    for rank, token in ((0, 2), (1, 2), (2, 1)):
        pulse = Pulse(folder, rank)
        folder.mkdir(exist_ok=True)
        pulse.token = token
        file_of(folder, rank).write_text(encode(pulse.beat))
    assert [beat.rank for beat in read_beats(tmp_path)] == [0, 1]
    forget(folder)
    assert read_beats(tmp_path) == []


def test_a_note_costs_the_training_microseconds(pulse):
    began = time.perf_counter()
    for place in range(10_000):
        pulse.note = Note("forward", 60.0, 20.0, place, place)
    assert (time.perf_counter() - began) / 10_000 < 100e-6  # about 2 microseconds; room for a busy machine


CONFIG = GuardConfig()


@pytest.mark.parametrize(
    ("phase", "is_new", "step_s", "loader_s", "expected"),
    [
        ("forward", False, 0.5, None, 60.0),
        ("forward", False, 9.0, None, 180.0),  # 20 median steps
        ("forward", True, 0.0, None, 1800.0),  # compiling
        ("checkpoint", False, 0.5, None, 1800.0),
        ("evaluation", False, 200.0, None, 4000.0),
        ("fetch", False, 0.5, None, 60.0),
        ("fetch", False, 0.5, 600.0, 630.0),  # the loader names its worker first
        ("fetch", False, 0.5, 5.0, 60.0),
        ("fetch", False, 0.5, 0.0, None),  # the user lets it wait for ever
    ],
)
def test_every_phase_has_its_limit(phase, is_new, step_s, loader_s, expected):
    assert limit_s(CONFIG, phase, is_new, step_s, loader_s) == expected


def test_the_watch_can_be_turned_off():
    assert limit_s(GuardConfig(hang_timeout_s=0), "forward", False, 1.0, None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hang_timeout_s": -1}, "guard.hang_timeout_s -1 must be 0 or above"),
        ({"max_skips": -2}, "guard.max_skips -2 must be 0 or above"),
        ({"silence_s": 0.5}, "guard.silence_s 0.5 must be 1 or above: a heartbeat comes every second"),
    ],
)
def test_impossible_limits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GuardConfig(**options)


def test_an_encoded_heartbeat_is_small_json():
    text = encode(Pulse(Path("nowhere"), 0).beat)
    assert json.loads(text)["note"]["phase"] == "setup"
    assert len(text) < 1000
