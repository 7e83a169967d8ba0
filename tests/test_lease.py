"""One job per run directory: decided by the kernel on one machine, by watching between machines, never by clocks."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_modules import lease as leases
from lightning_modules.exit_codes import ExitCode, GuardStop
from lightning_modules.lease import Holder, RunInUseError, acquire, read_holder
from lightning_modules.process import Process

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys, time
from pathlib import Path
from lightning_modules.lease import acquire
lease = acquire(Path(sys.argv[1]), float(sys.argv[2]))
print(lease.token, flush=True)
sys.stdin.readline()
lease.release()
"""
RACE = """
import sys, time
from pathlib import Path
from lightning_modules.lease import RunInUseError, acquire
sys.stdin.readline()
try:
    lease = acquire(Path(sys.argv[1]), 0.2)
except RunInUseError:
    print("refused", flush=True)
else:
    print(lease.token, flush=True)
    sys.stdin.readline()
"""
ELSEWHERE = Process("node7", "another boot/another namespace", 4711, 99)


def start(program, root, *options):
    return subprocess.Popen(
        [sys.executable, "-c", program, str(root), *map(str, options)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the run directory."""
    with start(HOLD, tmp_path, 1) as process:
        assert process.stdout.readline() == "1\n"
        yield process
        process.kill()


def write_holder(root, holder):
    """A lease as a process of another machine would write it."""
    (root / "lease").mkdir(exist_ok=True)
    holder.file(root).write_text(leases._encode(holder))


def test_tokens_grow_over_releases(tmp_path):
    tokens = []
    for _ in range(3):
        lease = acquire(tmp_path)
        tokens.append(lease.check())
        lease.release()
    assert tokens == [1, 2, 3]
    assert [path.name for path in (tmp_path / "lease").iterdir()] == ["00000003.json"]


def test_the_second_job_is_refused_and_told_who_holds_it(tmp_path, holder):
    message = f"run_dir {tmp_path} is in use by process {holder.pid} on {Process.here().host}; wait until it ends, stop"
    with pytest.raises(RunInUseError, match=re.escape(message)) as error:
        acquire(tmp_path)
    assert error.value.exit_code == ExitCode.IN_USE == 73
    assert "\n" not in str(error.value)


def test_the_batch_job_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    acquire(tmp_path)
    with pytest.raises(RunInUseError, match=rf"in use by job 812, process {os.getpid()} on "):
        acquire(tmp_path)


def test_a_killed_holder_is_replaced_at_once_even_before_anybody_waited_for_it(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    while Process.here().state() and read_holder(tmp_path).process.state() != "gone":
        time.sleep(0.01)
    began = time.monotonic()
    assert acquire(tmp_path, watch_s=60).token == 2
    assert time.monotonic() - began < 1
    assert Path(f"/proc/{holder.pid}").exists()  # a zombie still


def test_a_stopped_holder_still_holds(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    while read_holder(tmp_path).process.state() != "stopped":
        time.sleep(0.01)
    with pytest.raises(RunInUseError):
        acquire(tmp_path, watch_s=0.1)


def test_a_number_used_again_by_another_process_is_not_the_holder(tmp_path):
    here = Process.here()
    write_holder(tmp_path, Holder(4, "x", replace(here, start=here.start - 1)))
    assert acquire(tmp_path, watch_s=60).token == 5


def test_a_silent_holder_on_another_machine_is_replaced_after_watching(tmp_path, caplog):
    write_holder(tmp_path, Holder(7, "x", ELSEWHERE, job="5", beats=3))
    began = time.monotonic()
    with caplog.at_level("INFO", "mirrorla"):
        assert acquire(tmp_path, watch_s=0.6).token == 8
    assert 0.6 <= time.monotonic() - began < 5
    assert "last held by job 5, process 4711 on node7: watching its heartbeat for up to 1 s" in caplog.text


def test_a_beating_holder_on_another_machine_is_respected(tmp_path):
    first = Holder(7, "x", ELSEWHERE)
    write_holder(tmp_path, first)
    beat = threading.Timer(0.3, write_holder, (tmp_path, replace(first, beats=1)))
    beat.start()
    began = time.monotonic()
    with pytest.raises(RunInUseError, match="process 4711 on node7"):
        acquire(tmp_path, watch_s=30)
    assert time.monotonic() - began < 5
    beat.join()


def test_a_holder_that_leaves_while_it_is_watched_is_followed_at_once(tmp_path):
    first = Holder(7, "x", ELSEWHERE)
    write_holder(tmp_path, first)
    leave = threading.Timer(0.3, write_holder, (tmp_path, replace(first, is_released=True)))
    leave.start()
    began = time.monotonic()
    assert acquire(tmp_path, watch_s=30).token == 8
    assert time.monotonic() - began < 5
    leave.join()


@pytest.mark.parametrize("content", ["", '{"token": 3', "[]", '{"process": null}'])
def test_a_torn_lease_is_watched_and_then_replaced(tmp_path, content):
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "00000003.json").write_text(content)
    assert acquire(tmp_path, watch_s=0.1).token == 4


def test_a_lease_taken_over_is_noticed_before_anything_is_committed(tmp_path):
    lease = acquire(tmp_path)
    write_holder(tmp_path, Holder(2, "y", ELSEWHERE))
    for act in (lease.check, lease.renew):
        with pytest.raises(GuardStop, match="was taken over by process 4711 on node7 while this job did not") as error:
            act()
        assert error.value.code == ExitCode.LEASE_LOST
    lease.release()
    assert read_holder(tmp_path) == Holder(2, "y", ELSEWHERE)


def test_renewing_counts_the_heartbeat(tmp_path):
    lease = acquire(tmp_path)
    for _ in range(3):
        lease.renew()
    assert read_holder(tmp_path).beats == 3
    assert [path.name for path in (tmp_path / "lease").iterdir()] == ["00000001.json"]


@pytest.mark.parametrize("shift_s", [-1e9, 1e9])
def test_wall_clocks_decide_nothing(tmp_path, monkeypatch, shift_s):
    """This machine's clock jumps, and the files carry the times of one that is decades off."""
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + shift_s)
    first = Holder(7, "x", ELSEWHERE)
    write_holder(tmp_path, first)
    os.utime(first.file(tmp_path), (clock() + shift_s, clock() + shift_s))
    lease = acquire(tmp_path, watch_s=0.3)
    os.utime(tmp_path / "lease" / "00000008.json", (0, 0))
    assert lease.check() == 8
    with pytest.raises(RunInUseError):
        acquire(tmp_path, watch_s=0.3)


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_jobs_that_start_at_once_one_gets_the_lease(tmp_path, stale):
    if stale:
        write_holder(tmp_path, Holder(7, "x", ELSEWHERE))
    processes = [start(RACE, tmp_path) for _ in range(6)]
    try:
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        answers = sorted(process.stdout.readline().strip() for process in processes)
    finally:
        for process in processes:
            process.communicate("\n", timeout=20)
    assert answers == [("8" if stale else "1"), *["refused"] * 5]


def test_a_process_knows_itself_and_says_nothing_about_other_machines():
    here = Process.here()
    assert here.state() == "alive"
    assert ELSEWHERE.state() == "elsewhere"
    assert json.loads(json.dumps(vars(here))) == vars(here)
