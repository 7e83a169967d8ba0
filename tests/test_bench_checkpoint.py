"""The checkpoint benchmark measures what it says, on a timeline made by hand and on real, small trainings."""

import csv

import pytest

from benchmarks import checkpoint
from benchmarks.checkpoint import Scale, measure_writer, summary

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*srun.*command is available"),
]


def timeline(step_s, hooks, num):
    """Four times a step: before and behind the saving callback at its start and at its end.

    Args:
        step_s: a function of the step's number.
        hooks: number of a step -> seconds that the callback takes after it, a quarter of them at the next one's start.
        num: of steps.
    """
    now, times = 1000.0, []
    for number in range(num):
        times.append(now)
        now += hooks.get(number - 1, 0.0) / 4
        times.append(now)
        now += step_s(number)
        times.append(now)
        now += hooks.get(number, 0.0) * 3 / 4
        times.append(now)
        now += 0.001  # the next batch
    return times


def test_a_save_that_blocks_counts_whole_and_slows_nothing():
    times = timeline(lambda number: 0.5, {4: 8.0, 9: 2.0, 14: 2.4}, 19)
    committed = [times[4 * step + 5] for step in (4, 9, 14)]
    found = summary(times, committed, 5)
    assert found["blocked_first_s"] == pytest.approx(8.0)
    assert found["blocked_s"] == pytest.approx(2.2)
    assert found["share_percent"] == pytest.approx(100 * 2.2 / 300)
    assert found["lost_percent"] == pytest.approx(found["share_percent"])
    assert found["step_s"] == pytest.approx(0.5)
    assert found["committed_s"] == pytest.approx(2.4, abs=0.01)
    assert "step_while_written_s" not in found


def test_slower_steps_beside_a_write_count_as_lost():
    slow = (5, 6, 10, 11, 15, 16)
    times = timeline(lambda number: 1.5 if number in slow else 1.0, {4: 0.5, 9: 0.1, 14: 0.1}, 19)
    committed = [times[4 * (step + 2) + 2] + 0.0005 for step in (4, 9, 14)]  # right behind the second slow step
    found = summary(times, committed, 5)
    assert found["step_s"] == pytest.approx(1.0)
    assert found["step_while_written_s"] == pytest.approx(1.5)
    assert found["share_percent"] == pytest.approx(100 * 0.1 / 300)
    assert found["lost_percent"] == pytest.approx(100 * (0.1 + 1.0) / 300)


@pytest.mark.parametrize("writer", checkpoint.WRITERS)
def test_every_writer_is_measured(writer, tmp_path):
    found = measure_writer(writer, Scale("mirrorla_pico", 10, saves=2, every=6), tmp_path)
    assert found["parameters_m"] == pytest.approx(0.666, abs=1e-3)
    assert found["megabytes"] == pytest.approx(3 * 4 * found["parameters_m"], rel=0.1)  # weights and two moments
    assert 0 < found["blocked_s"] < 20 and 0 < found["committed_s"] < 60 and found["step_s"] > 0


@pytest.mark.slow
def test_the_whole_benchmark_writes_its_row_per_writer(tmp_path):
    small = ["--model", "mirrorla_pico", "--classes", "10", "--every", "8", "--saves", "2"]
    assert checkpoint.main([*small, "--out", str(tmp_path), "--folder", str(tmp_path)]) == 0
    with (tmp_path / "checkpoint.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["writer"] for row in rows] == list(checkpoint.WRITERS)
    assert 0 < float(rows[0]["restart_s"]) < float(rows[0]["restart_with_imports_s"])
    assert all(row["commit"] for row in rows)
