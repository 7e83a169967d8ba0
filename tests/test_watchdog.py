"""A rank that stands still is named, in real groups over gloo, and the group ends with a code that says: again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_modules.attempts import read_attempts
from lightning_modules.checkpoint import list_checkpoints, read_manifest
from lightning_modules.exit_codes import ExitCode
from lightning_modules.heartbeat import Beat, Note, read_beats
from lightning_modules.lease import read_holder
from lightning_modules.process import Process
from lightning_modules.watchdog import Seen, judge

SCRIPT = Path(__file__).with_name("guarded_ranks.py")
GUARD = {"silence_s": 1.5, "hang_timeout_s": 2.0, "slow_timeout_s": 12.0}
HERE = Process.here()


@pytest.fixture(scope="module")
def start():
    """A function that runs a group of ranks and returns their exit codes, durations and logs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}
    with subprocess.Popen(
        [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:

        def group(root, world=2, meanwhile=None, **order):
            order = {"root": str(root), "world": world, "batches": 300, **order}
            server.stdin.write(json.dumps(order) + "\n")
            server.stdin.flush()
            pids = json.loads(server.stdout.readline())
            try:
                if meanwhile is not None:
                    meanwhile(pids)
            finally:
                ends = json.loads(server.stdout.readline())
            logs = [Path(f"{root}.log-{rank}").read_text() for rank in range(world)]
            return [code for code, _ in ends], [seconds for _, seconds in ends], logs

        yield group
        server.stdin.close()
        assert server.wait(30) == 0


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_by_its_peer_within_seconds(start, tmp_path, stopped):
    codes, seconds, logs = start(tmp_path / "run", guard=GUARD, events=[(stopped, 6, "stop")], every_n_steps=2)
    assert codes[1 - stopped] == ExitCode.HUNG == 76, logs
    assert codes[stopped] == -signal.SIGKILL  # it cannot leave by itself
    assert max(seconds) < 15
    line = rf"^rank {stopped} on host {re.escape(HERE.host)} has been silent for [\d.]+ s in phase forward at step 6 "
    assert re.search(line + r"\(samples 24, 25, 26, …\); stacks in \S+; exit code 76$", logs[1 - stopped], re.M)
    stacks = (tmp_path / "run" / "logs" / f"hang_rank_{1 - stopped:05d}.txt").read_text()
    assert stacks.startswith(f"rank {stopped} on host") and "most recent call first" in stacks
    (attempt,) = read_attempts(tmp_path / "run")
    assert attempt.code == ExitCode.HUNG and attempt.reason.startswith(f"rank {stopped} on host")
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_00000006"
    assert read_holder(tmp_path / "run").is_released == (stopped != 0)
    assert read_holder(tmp_path / "run").process.state() == "gone"


def test_a_rank_that_hangs_alive_is_named_and_both_write_their_stacks(start, tmp_path):
    codes, seconds, logs = start(tmp_path / "run", guard=GUARD, events=[(1, 6, "hang")])
    assert codes == [ExitCode.HUNG] * 2, logs
    assert max(seconds) < 20
    told = [
        log
        for log in logs
        if re.search(r"^rank 1 on host \S+ has been in phase forward at step 6 .*limit 2 s", log, re.M)
    ]
    assert told
    stacks = [(tmp_path / "run" / "logs" / f"hang_rank_{rank:05d}.txt").read_text() for rank in range(2)]
    assert "in happen" in stacks[1] and "in happen" not in stacks[0]
    assert read_holder(tmp_path / "run").is_released


def test_a_hung_rank_alone_ends_itself_and_the_next_attempt_goes_on(start, tmp_path):
    root = tmp_path / "run"
    codes, _, logs = start(root, world=1, guard=GUARD, events=[(0, 6, "hang")], every_n_steps=2, batches=8)
    assert codes == [ExitCode.HUNG], logs
    assert start(root, world=1, every_n_steps=2, batches=8)[0] == [0]
    first, second = read_attempts(root)
    assert (first.end_step, second.step, second.code) == (6, 6, ExitCode.DONE)
    assert "rank 0 on host" in first.reason


def test_a_hung_data_worker_is_named_with_rank_shard_and_sample(start, data, tmp_path):
    """By the heartbeat while the rank waits, and by the loader when its patience ends: exit code 1, failed."""
    copies = [str(shutil.copytree(data, tmp_path / f"data-{rank}")) for rank in range(2)]
    place = rf"data worker 0 at {re.escape(copies[1])}/train/\S+\.tar, sample '\S+'"
    beaten = []

    def listen(pids):
        deadline = time.monotonic() + 30
        while not beaten and time.monotonic() < deadline:
            beats = read_beats(tmp_path / "run")
            beaten.extend(beat for beat in beats if beat.rank == 1 and re.search(place, beat.note.detail))
            time.sleep(0.02)

    codes, seconds, logs = start(tmp_path / "run", guard=GUARD, data=copies, dead_disk=1, meanwhile=listen)
    assert codes == [ExitCode.FAILED] * 2, logs
    assert max(seconds) < 15
    assert re.search(r"rank 1: " + place.replace("worker 0 at", r"worker 0 hangs since \d s at"), logs[1]), logs
    assert beaten and beaten[0].note.phase == "fetch" and beaten[0].stuck_s > 0
    assert re.fullmatch(rf"phase fetch at step 0 \({place}\)", str(beaten[0]))


def test_a_slow_rank_and_a_pause_of_all_are_no_hang(start, tmp_path):
    """A step of half a second, and SIGSTOP of the whole group for longer than any limit, as a suspended job."""

    limits = {"silence_s": 3.0, "hang_timeout_s": 3.0, "slow_timeout_s": 3.0}

    def pause(pids):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            beats = read_beats(tmp_path / "run")
            if len(beats) == 2 and all(beat.note.step >= 5 for beat in beats):
                break
            time.sleep(0.02)
        assert time.monotonic() < deadline
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(limits["hang_timeout_s"] + 1)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    slow = [(1, batch, "slow") for batch in range(4, 9)]
    codes, _, logs = start(tmp_path / "run", guard=limits, events=slow, batches=10, meanwhile=pause)
    assert codes == [0, 0], logs
    assert not list((tmp_path / "run" / "logs").glob("hang*"))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_nan_on_one_rank_makes_all_ranks_skip_the_same_step(start, tmp_path, strategy):
    codes, _, logs = start(tmp_path / "run", events=[(1, 3, "nan")], batches=6, strategy=strategy)
    assert codes == [0, 0], logs
    first, second = (json.loads((tmp_path / "run" / f"weights-{rank}.json").read_text()) for rank in range(2))
    shared = [name for name in first if "running" not in name]  # BatchNorm's statistics are each rank's own
    assert {name: first[name] for name in shared} == {name: second[name] for name in shared}
    assert "nan" not in json.dumps([first, second]).lower()
    assert read_attempts(tmp_path / "run")[-1].skipped == 1
    assert "skipped step   3: the loss was not finite (1 in a row, at most 10)" in logs[0]


def test_all_ranks_go_back_with_one_code_and_a_bundle_each(start, tmp_path):
    root = tmp_path / "run"
    codes, _, logs = start(
        root, events=[(1, 4, "nan"), (1, 5, "nan")], batches=8, every_n_steps=3, guard={"max_skips": 1}
    )
    assert codes == [ExitCode.ROLLED_BACK] * 2, logs
    assert "continue from step 3 with --ckpt_path last" in logs[0]
    losses = [json.loads(path.read_text())["losses"] for path in sorted(root.glob("bundles/*/rank_*.json"))]
    assert losses[1] == ["nan"] and isinstance(losses[0][0], float)  # the bundle tells which rank it was
    assert start(root, batches=8, every_n_steps=3)[0] == [0, 0]
    assert [record.step for record in read_attempts(root)] == [0, 3]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_deepspeed_cannot_skip_and_goes_back_at_once(start, tmp_path, strategy):
    """A bad loss never reaches its optimizer; a bad gradient of a finite loss is not seen, as it keeps them itself."""
    root = tmp_path / "run"
    codes, _, logs = start(root, events=[(1, 4, "nan")], batches=6, every_n_steps=2, strategy=strategy, limit_s=250)
    assert codes == [ExitCode.ROLLED_BACK] * 2, logs
    assert "the loss was not finite for 1 step in a row up to step 4" in logs[0]
    assert "continue from step 2 with --ckpt_path last" in logs[0]


def test_a_second_job_is_refused_while_the_first_trains_on(start, tmp_path):
    root, second = tmp_path / "run", []

    def try_it(pids):
        while (holder := read_holder(root)) is None or holder.process is None or not (root / "attempts.jsonl").exists():
            time.sleep(0.02)
        program = f"from pathlib import Path; from lightning_modules.lease import acquire; acquire(Path({str(root)!r}))"
        done = subprocess.run([sys.executable, "-c", program], cwd=SCRIPT.parent.parent, capture_output=True)
        second.append(done.stderr.decode())

    codes, _, logs = start(root, world=1, batches=40, meanwhile=try_it)
    assert codes == [0], logs
    assert f"run_dir {root} is in use by process" in second[0]


def test_the_job_after_a_killed_one_takes_over_at_once_with_a_higher_token(start, tmp_path):
    root = tmp_path / "run"
    codes, _, logs = start(root, world=1, batches=8, every_n_steps=2, events=[(0, 5, "kill")])
    assert codes == [-signal.SIGKILL], logs
    codes, seconds, logs = start(root, world=1, batches=8, every_n_steps=2)
    assert codes == [0], logs
    assert seconds[0] < 10  # it does not watch for guard.takeover_s, a minute
    tokens = [read_manifest(path).token for path in list_checkpoints(root / "checkpoints")]
    assert tokens == [2, 2]
    first, second = read_attempts(root)
    assert (first.outcome, second.step, second.code) == (None, 4, ExitCode.DONE)


def test_a_job_whose_run_was_taken_over_commits_nothing_more(start, tmp_path):
    root = tmp_path / "run"
    codes, _, logs = start(root, world=1, every_n_steps=2, events=[(0, 3, "usurp")])
    assert codes == [ExitCode.LEASE_LOST], logs
    assert "was taken over by an unknown job (lease 99) while this job did not answer; nothing more is" in logs[0]
    assert [path.name for path in list_checkpoints(root / "checkpoints")] == ["step_00000002"]


def beat(rank=0, phase="backward", place=5, stuck_s=10.0, limit_s=60.0, world_size=2, silence_s=20.0):
    note = Note(phase, limit_s, silence_s, place, step=120)
    return Beat(rank, world_size, 1, replace(HERE, host=f"n{rank}"), 9, note, stuck_s)


def test_nobody_is_judged_while_this_rank_moves():
    assert judge(beat(stuck_s=0.0), {1: Seen(beat(1), 1e9)}) is None


def test_silence_counts_only_while_this_rank_waits_for_as_long():
    silent = Seen(beat(1, "forward"), silent_s=25.0)
    assert judge(beat(stuck_s=5.0), {1: silent}) is None
    verdict = judge(beat(stuck_s=21.0), {1: silent})
    assert verdict.rank == 1
    assert verdict.message == "rank 1 on host n1 has been silent for 25 s in phase forward at step 120"


def test_a_rank_that_never_wrote_is_named_after_the_limit_of_the_one_that_waits():
    assert judge(beat(stuck_s=50.0), {1: Seen(None, 50.0)}) is None
    assert judge(beat(stuck_s=60.0), {1: Seen(None, 60.0)}).message == "rank 1 has left no heartbeat for 60 s"


def test_the_rank_furthest_behind_is_at_fault_and_its_own_limit_counts():
    """A rank that rightly waits ten minutes for data keeps the others, whose own limit is a minute, from ending."""
    own, seen = beat(stuck_s=300.0), Seen(beat(1, "fetch", place=4, stuck_s=301.0, limit_s=630.0), 0.0)
    assert judge(own, {1: seen}) is None
    late = Seen(replace(seen.beat, stuck_s=631.0), 0.0)
    assert (
        judge(own, {1: late}).message == "rank 1 on host n1 has been in phase fetch at step 120 for 631 s (limit 630 s)"
    )


def test_of_ranks_at_the_same_place_the_one_there_for_longest_is_named():
    assert judge(beat(stuck_s=61.0), {1: Seen(beat(1, stuck_s=64.0), 0.0)}).rank == 1
    assert judge(beat(stuck_s=64.0), {1: Seen(beat(1, stuck_s=61.0), 0.0)}).rank == 0


def test_without_a_limit_nothing_hangs():
    assert (
        judge(beat(stuck_s=1e9, limit_s=None), {1: Seen(beat(1, stuck_s=1e9, limit_s=None, silence_s=None), 1e9)})
        is None
    )
