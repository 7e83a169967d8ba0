"""`mirrorla status` and `mirrorla doctor` say in words what a run is doing and what is wrong, from its files alone."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_modules import cli, health_cli
from lightning_modules import lease as leases
from lightning_modules.attempts import begin_attempt, end_attempt, note_skip
from lightning_modules.checkpoint import list_checkpoints
from lightning_modules.diagnosis import CHECKS, diagnose
from lightning_modules.exit_codes import ExitCode
from lightning_modules.health import examine, file_clock
from lightning_modules.heartbeat import Note, Pulse, file_of, folder_of, read_beat
from lightning_modules.lease import Holder, acquire
from lightning_modules.process import Process

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = str(Path(sys.executable).parent / "mirrorla")
ELSEWHERE = Process("node7", "another boot/another namespace", 4711, 99)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps that came to its end."""
    spec = importlib.util.spec_from_file_location("guarded_ranks", Path(__file__).with_name("guarded_ranks.py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    root = tmp_path_factory.mktemp("runs") / "finished"
    script.fit(root, batches=4)
    return root


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def other():
    """A living process, to stand for a rank."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def process_of(pid):
    return replace(Process.here(), pid=pid, start=int(Path(f"/proc/{pid}/stat").read_text().split()[21]))


def write_rank(root, rank, process, note, stuck_s=0.0, world_size=1, token=2):
    pulse = Pulse(folder_of(root), rank)
    pulse.token, pulse.world_size, pulse.note, pulse._process = token, world_size, note, process
    pulse._last, pulse._stuck_s = note, stuck_s
    pulse.write()


def found(root, *, serious=True):
    return [finding.what for finding in diagnose(examine(root)) if finding.is_serious == serious]


def told(capsys, *words):
    code = cli.main(list(words))
    return code, capsys.readouterr().out


def test_a_finished_run_is_healthy(run, capsys):
    code, out = told(capsys, "doctor", str(run))
    assert (code, out) == (0, f"{run}  healthy, finished at step 4\n")
    code, out = told(capsys, "status", str(run))
    assert code == 0
    assert "now         finished at step 4\n" in out
    assert "checkpoint  step_00000004, " in out
    assert "completed (done)" in out


def test_both_are_quick_and_need_no_torch(run):
    for verb in ("status", "doctor"):
        program = f"import sys; from lightning_modules.cli import main; main(['{verb}', sys.argv[1]]); "
        program += "assert not {'torch', 'numpy', 'lightning'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", program, str(run)], check=True, capture_output=True, cwd=ROOT)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run([SCRIPT, verb, str(run)], capture_output=True, check=True)
            seconds.append(time.perf_counter() - began)
        assert min(seconds) < 0.5


def test_a_running_run_says_what_every_rank_does(run, capsys):
    begin_attempt(run, 4)
    lease = acquire(run)
    note = Note("forward", 60.0, 20.0, place=9, step=41, epoch=2, detail="samples 5, 6, 7")
    for rank in range(2):
        write_rank(run, rank, Process.here(), replace(note, place=9 + rank), world_size=2, token=lease.token)
    code, out = told(capsys, "doctor", str(run))
    assert code == 0
    assert f"healthy, running as process {os.getpid()} on " in out
    code, out = told(capsys, "status", str(run))
    assert ": phase forward at step 41 (samples 5, 6, 7)\n" in out
    assert "samples 5, 6, 7" in out.splitlines()[-4]


def test_an_owner_that_was_killed_is_named(run, other):
    begin_attempt(run, 4)
    acquire(run)
    holder = replace(leases.read_holder(run), process=process_of(other.pid))
    holder.file(run).write_text(leases._encode(holder))
    assert examine(run).condition == "running"
    other.kill()
    other.wait()
    assert examine(run).condition == "lost"
    assert found(run) == [
        f"process {os.getpid()} on {Process.here().host} died at step 4 without a word: killed, or out of memory"
    ]


def test_an_owner_elsewhere_is_lost_by_the_file_systems_clock_only(run, monkeypatch):
    begin_attempt(run, 4)
    holder = Holder(9, "x", ELSEWHERE)
    holder.file(run).write_text(leases._encode(holder))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert examine(run).condition == "running"
    old = file_clock(run) - 61
    os.utime(holder.file(run), (old, old))
    assert examine(run).condition == "lost"


def test_stopped_dead_hanging_silent_and_missing_ranks_are_named(run, other):
    begin_attempt(run, 4)
    token = acquire(run).token
    note = Note("backward", 60.0, 20.0, place=9, step=41)
    host = Process.here().host
    other.send_signal(signal.SIGSTOP)
    while process_of(other.pid).state() != "stopped":
        time.sleep(0.01)
    dead = replace(process_of(other.pid), start=1)
    for rank, process, stuck_s in ((0, Process.here(), 61.0), (1, process_of(other.pid), 5.0), (2, dead, 5.0)):
        write_rank(run, rank, process, note, stuck_s, world_size=5, token=token)
    write_rank(run, 4, ELSEWHERE, note, world_size=5, token=token)
    path = file_of(folder_of(run), 4)
    old = file_clock(run) - 30
    os.utime(path, (old, old))
    assert found(run) == [
        f"rank 0 on host {host} has been in phase backward at step 41 for 61 s (limit 60 s)",
        f"rank 1 on host {host} is held by a signal in phase backward at step 41",
        f"rank 2 on host {host} is dead; it was in phase backward at step 41",
        "rank 4 on host node7 has been silent for 30 s in phase backward at step 41",
        "rank 3 of 5 has left no heartbeat",
    ]


@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (1, "/logs, then start the same command with --ckpt_path last"),
        (ExitCode.HUNG, "then start the same command with --ckpt_path last"),
        (ExitCode.NOT_FINITE, "look at the newest folder in bundles/"),
        (ExitCode.NO_SPACE, "free some space, then start the same command with --ckpt_path last"),
    ],
)
def test_a_failed_attempt_is_told_with_its_mend(run, code, mend):
    begin_attempt(run, 4)
    end_attempt(run, 5, "the reason", int(code))
    (finding,) = diagnose(examine(run))
    assert finding.what == "attempt 2 ended at step 5: the reason"
    assert mend in finding.mend


def test_a_crash_loop_is_told(run):
    for _ in range(3):
        begin_attempt(run, 4)
        end_attempt(run, 4, "RuntimeError", 1)
    assert found(run)[1] == "crash loop: the last 3 attempts got no further than step 4"


def test_a_damaged_checkpoint_and_leftovers_are_told(run):
    newest = list_checkpoints(run / "checkpoints")[-1]
    (newest.parent / f"{newest.name}.tmp-1234").mkdir()
    victim = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (what,) = found(run)
    assert str(newest) in what and victim.name in what and "damaged" in what
    assert found(run, serious=False) == [f"{newest}.tmp-1234 was left behind by an interrupted write"]


def test_a_nearly_full_disk_is_told(run):
    health = replace(examine(run), free_bytes=100 << 20)
    (finding,) = diagnose(health)
    assert "has 100 MiB left, the next checkpoints may need 1024 MiB" in finding.what


def config_of(path, **options):
    return json.dumps({"data": {"init_args": {"path": path, **options}}})


def test_missing_data_is_told_where_it_must_be_there(run, tmp_path):
    for path in (str(tmp_path / "gone"), [{"path": str(tmp_path / "gone")}]):
        (run / "config.yaml").write_text(config_of(path))
        assert found(run) == [f"the data folder {tmp_path}/gone is missing"]
    (run / "config.yaml").write_text(config_of("data/gone"))
    assert found(run) == []  # relative to where the run was started, which may be another folder
    assert found(run, serious=False) == [f"the data folder data/gone is missing, seen from {Path.cwd()}"]
    for harmless in (config_of("s3://bucket/x"), config_of(str(tmp_path / "gone"), sources="digits"), "data: 3", "{"):
        (run / "config.yaml").write_text(harmless)
        assert found(run) == found(run, serious=False) == []


@pytest.mark.parametrize(("allowed", "sick"), [(5, False), (4, True), (0.05, False), (0.04, True)])
def test_more_damaged_samples_than_allowed_are_told(run, tmp_path, allowed, sick):
    (tmp_path / "dataset.json").write_text('{"splits": {"train": {"samples": 100}}}')
    (run / "config.yaml").write_text(config_of(str(tmp_path), max_skipped=allowed))
    (run / "quarantine.jsonl").write_text('{"split": "train"}\n' * 5)
    assert found(run) == [f"5 damaged samples are listed in {run}/quarantine.jsonl, data.max_skipped allows 4"] * sick


@pytest.mark.parametrize(("skips", "serious"), [(3, False), (11, True)])
def test_skipped_steps_are_told_and_many_are_serious(run, skips, serious):
    begin_attempt(run, 4)
    for step in range(skips):
        note_skip(run, step, "loss")
    end_attempt(run, 30, "completed", 0)
    assert found(run, serious=serious) == [f"{skips} steps were skipped: the loss or a gradient was not finite"]


def test_a_folder_of_runs_becomes_a_table(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "runs" / "a")
    shutil.copytree(finished, tmp_path / "runs" / "b")
    (tmp_path / "runs" / "notes").mkdir()
    code, out = told(capsys, "status", str(tmp_path / "runs"))
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [["a", "finished", "4"], ["b", "finished", "4"]]
    end_attempt(tmp_path / "runs" / "b", 4, "x", 1)
    begin_attempt(tmp_path / "runs" / "b", 4)
    code, out = told(capsys, "doctor", str(tmp_path / "runs"))
    assert code == 1
    assert "/a  healthy" in out and "/b  sick, lost" in out


def test_looking_leaves_nothing_behind(run):
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    diagnose(examine(run))
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one run directory: mirrorla status RUN"),
        (["a", "b"], "give one run directory: mirrorla status RUN"),
        (["nowhere"], "nowhere is no run directory and holds none; give the --run_dir of a mirrorla fit"),
    ],
)
def test_bad_words_are_refused_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["status", *words]) == 2
    assert capsys.readouterr().err == f"mirrorla status: error: {message}\n"


def test_help_is_there(capsys):
    for verb in ("status", "doctor"):
        assert told(capsys, verb, "--help")[1].startswith(f"usage: mirrorla {verb} RUN\n")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (180, "3 min"), (9000, "2.5 h")])
def test_durations_are_for_people(seconds, text):
    assert health_cli.duration(seconds) == text


def test_control_characters_of_a_file_do_not_reach_the_terminal(run, capsys):
    begin_attempt(run, 4)
    end_attempt(run, 4, "\x1b[31mred [bold]markup[/bold]", 1)
    out = told(capsys, "status", str(run))[1] + told(capsys, "doctor", str(run))[1]
    assert "\x1b" not in out
    assert "[bold]markup[/bold]" in out


def test_every_check_survives_an_empty_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert [finding for check in CHECKS for finding in check(examine(tmp_path)) if "disk" not in finding.what] == []
    assert examine(tmp_path).condition == "new"
    assert read_beat(tmp_path / "x") is None
