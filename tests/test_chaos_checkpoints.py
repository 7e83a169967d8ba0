"""Real processes over gloo, killed, signalled and out of space at random, train what an untouched run does."""

import importlib.util
import random
import signal
from pathlib import Path

import pytest

from datamodules.ledger import read_attempt
from lightning_modules.checkpoint import list_checkpoints, read_scores, verify
from lightning_modules.exit_codes import ExitCode

_spec = importlib.util.spec_from_file_location("attempts", Path(__file__).with_name("checkpoint_attempts.py"))
attempts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attempts)
ranks, logs, merge, final = attempts.ranks, attempts.logs, attempts.merge, attempts.final
assert_same, start_of, check_elastic = attempts.assert_same, attempts.start_of, attempts.check_elastic

EVERY = 3
SYNCHRONOUS = {"asynchronous": False}
POINTS = (
    *("due", "after_snapshot", "begin", "after_weights", "after_state", "after_files", "after_manifest"),
    *("after_rename", "after_latest", "before_removal"),
)


def assert_same_end(run, untouched):
    ours, theirs = final(run), final(untouched)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "ClassificationDataModule"):
        assert_same(ours[key], theirs[key], key)
    assert read_scores(run / "checkpoints") == read_scores(untouched / "checkpoints")


@pytest.fixture(scope="module")
def untouched(ranks, tmp_path_factory):
    """The run of one rank that nothing happened to, and that of two: folder and ledger by world size."""
    runs = {}
    for world in (1, 2):
        run = tmp_path_factory.mktemp(f"untouched{world}")
        assert ranks.attempt(run, 1, world) == [0] * world, logs(run)
        runs[world] = run, merge(run, [0])
    return runs


def schedule(ranks, run, worlds, rng, **order):
    """Attempts on these numbers of ranks, all but the last killed at a random moment; the merged ledger."""
    # Steps trained while a save is under way are lost with it; the next save waits for it.
    most_lost = EVERY if order.get("checkpoint") == SYNCHRONOUS else 2 * EVERY
    starts = []
    for number, world in enumerate(worlds, 1):
        starts.append(start_of(run))
        is_last = number == len(worlds)
        kill = {
            "signal": signal.SIGKILL,
            "ranks": [rng.randrange(world)],
            "after": rng.randint(1, 9),
            "delay_s": rng.random() * 0.02,
        }
        statuses = ranks.attempt(run, number, world, **order, **({} if is_last else kill))
        if is_last:
            assert statuses == [0] * world, logs(run)
        else:
            assert -signal.SIGKILL in statuses and 0 not in statuses, logs(run)
        lost = [len(rank) - (start_of(run) - starts[-1]) for rank in read_attempt(run / "ledger", number)]
        assert is_last or max(lost) <= most_lost
    return merge(run, starts)


@pytest.fixture(scope="module")
def elastic(ranks, tmp_path_factory):
    """The ledger of an untouched run of one rank whose losses may be compared with those of several."""
    run = tmp_path_factory.mktemp("elastic")
    assert ranks.attempt(run, 1, 1, elastic=True) == [0], logs(run)
    return merge(run, [0])


@pytest.mark.parametrize("checkpoint", [{}, SYNCHRONOUS], ids=["behind", "waiting"])
def test_kill_at_any_moment_on_two_ranks_changes_nothing(ranks, tmp_path, untouched, checkpoint):
    whole, ledger = untouched[2]
    assert schedule(ranks, tmp_path, [2, 2, 2], random.Random(0), checkpoint=checkpoint) == ledger
    assert_same_end(tmp_path, whole)


def test_kill_and_another_number_of_ranks_trains_the_same_samples_to_the_same_losses(ranks, tmp_path, elastic):
    check_elastic(schedule(ranks, tmp_path, [1, 3, 2], random.Random(7), elastic=True), elastic)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 125))
def test_many_random_kills(ranks, tmp_path, untouched, elastic, seed):
    rng = random.Random(seed)
    worlds = rng.choice([[2, 2, 2, 2], [1, 1, 1], [1, 3, 2], [4, 2, 1], [2, 4, 2]])
    if len(set(worlds)) > 1:
        check_elastic(schedule(ranks, tmp_path, worlds, rng, elastic=True), elastic)
        return
    whole, ledger = untouched[worlds[0]]
    assert schedule(ranks, tmp_path, worlds, rng) == ledger
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("point", POINTS)
def test_kill_at_every_point_of_a_write_changes_nothing(ranks, tmp_path, untouched, point):
    whole, ledger = untouched[1]
    assert ranks.attempt(tmp_path, 1, 1, fault=f"checkpoint.{point}:kill:3") == [-signal.SIGKILL], logs(tmp_path)
    for path in list_checkpoints(tmp_path / "checkpoints"):
        verify(path)
    start = start_of(tmp_path)
    # The save before may still be under way when one is due.
    assert start >= {"due": 3, "before_removal": 12}.get(point, 6)
    assert ranks.attempt(tmp_path, 2, 1) == [0], logs(tmp_path)
    assert merge(tmp_path, [0, start]) == ledger
    assert_same_end(tmp_path, whole)
    assert not list((tmp_path / "checkpoints").glob("*.tmp-*"))


def signalled(ranks, run, world, number, rng):
    """One attempt stopped by a signal at a random moment: it must lose nothing and end in one checkpoint."""
    chosen = rng.choice([[rng.randrange(world)], list(range(world))])
    sent = rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    before = start_of(run)
    order = {"signal": sent, "ranks": chosen, "after": rng.randint(0, 4), "delay_s": rng.random() * 0.05}
    statuses = ranks.attempt(run, number, world, **order)
    if statuses == [0] * world:
        return before, True
    told = 128 + sent
    assert all(statuses[rank] == told for rank in chosen), logs(run)
    assert all(status in (told, ExitCode.TERMINATED) for status in statuses), logs(run)
    trained = {len(rank) for rank in read_attempt(run / "ledger", number)}
    assert len(trained) == 1 and start_of(run) == before + trained.pop(), logs(run)
    assert not list((run / "checkpoints").glob("*.tmp-*"))
    return before, False


def stop_and_go(ranks, run, world, rng, wanted):
    """Attempts until the training is done or `wanted` signals were sent; the merged ledger."""
    starts, is_done = [], False
    while not is_done:
        number = len(starts) + 1
        if number > wanted:
            starts.append(start_of(run))
            assert ranks.attempt(run, number, world) == [0] * world, logs(run)
            break
        start, is_done = signalled(ranks, run, world, number, rng)
        starts.append(start)
    return merge(run, starts), len(starts) - 1


def test_signals_at_random_moments_lose_no_step(ranks, tmp_path, untouched):
    whole, ledger = untouched[2]
    steps, num_signals = stop_and_go(ranks, tmp_path, 2, random.Random(1), 5)
    assert steps == ledger
    assert_same_end(tmp_path, whole)
    assert num_signals == 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 10))
def test_two_hundred_signals_in_all_lose_no_step(ranks, tmp_path, untouched, seed):
    whole, ledger = untouched[2]
    rng, num_signals = random.Random(seed), 0
    while num_signals < 25:
        run = tmp_path / str(num_signals)
        steps, count = stop_and_go(ranks, run, 2, rng, 25 - num_signals)
        assert steps == ledger
        assert_same_end(run, whole)
        num_signals += count


def test_clock_stops_a_training_as_a_signal_does(ranks, tmp_path, untouched):
    statuses = ranks.attempt(tmp_path, 1, 2, checkpoint={"max_minutes": 0.001})
    assert statuses == [ExitCode.PREEMPTED] * 2, logs(tmp_path)
    start = start_of(tmp_path)
    assert ranks.attempt(tmp_path, 2, 2) == [0, 0], logs(tmp_path)
    assert merge(tmp_path, [0, start]) == untouched[2][1]


def test_full_disk_costs_a_warning_and_not_the_training(ranks, tmp_path, untouched):
    whole, ledger = untouched[2]
    faults = ",".join(f"checkpoint.after_weights:full:{nth}" for nth in (2, 3))
    assert ranks.attempt(tmp_path, 1, 2, fault=faults) == [0, 0], logs(tmp_path)
    assert merge(tmp_path, [0]) == ledger
    assert_same_end(tmp_path, whole)
    told = (tmp_path / "log-1-0").read_text()
    assert "could not be written ([Errno 28] No space left on device), failure 1 in a row; step_00000003 stands" in told
    assert "failure 2 in a row" in told and "failure 3 in a row" not in told


def test_disk_that_stays_full_ends_the_run_with_its_own_code(ranks, tmp_path):
    faults = ",".join(f"checkpoint.after_weights:full:{nth}" for nth in range(3, 20))
    statuses = ranks.attempt(tmp_path, 1, 2, fault=faults, checkpoint={"max_failures": 2})
    assert statuses == [ExitCode.NO_SPACE] * 2, logs(tmp_path)
    assert start_of(tmp_path) == 6
    assert "free some space there, then continue with --ckpt_path last" in (tmp_path / "log-1-0").read_text()
