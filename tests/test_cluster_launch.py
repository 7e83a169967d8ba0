"""One rank on a node: its surroundings, its signals, the first failure, and a node that is not fit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import launch, preflight, slurm
from lightning_modules import cli
from lightning_modules.exit_codes import ExitCode

WAITING = (
    "import signal, sys, time; signal.signal(10, lambda *_: sys.exit(138)); print('on', flush=True); time.sleep(30)"
)


def start(folder, *words, options=(), **variables):
    command = [
        sys.executable,
        "-m",
        "cluster.launch",
        "--job",
        str(folder),
        "--run",
        str(folder),
        *options,
        "--",
        *words,
    ]
    environment = {**os.environ, **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_rank_gets_its_signal_and_its_code_is_kept(tmp_path):
    with start(tmp_path, sys.executable, "-c", WAITING, SLURM_PROCID="3", SLURM_LOCALID="1") as process:
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 138
    assert (tmp_path / "first_failure").read_text().startswith("138 3 ")


def test_an_early_signal_ends_the_start_with_the_code_that_queues_a_job_again(tmp_path):
    for delay_s in (0.0, 0.02, 0.05, 0.1):
        with start(tmp_path, "sleep", "30") as process:
            time.sleep(delay_s)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(20) in (138, -signal.SIGUSR1)  # srun reports either as 138


def test_only_the_first_failure_is_kept(tmp_path):
    launch.note_failure(tmp_path, 2, 5)
    launch.note_failure(tmp_path, 143, 0)
    assert (tmp_path / "first_failure").read_text().split()[:2] == ["2", "5"]


def test_a_killed_rank_and_a_missing_program_have_codes(tmp_path):
    with start(tmp_path, "sh", "-c", "kill -9 $$") as process:
        assert process.wait(20) == 137
    (tmp_path / "first_failure").unlink()
    with start(tmp_path, "no-such-program") as process:
        assert process.wait(20) == launch.NOT_STARTED
        assert "no-such-program cannot be started" in process.stderr.read()


def test_an_agents_ranks_get_the_signal_and_the_agent_does_not(tmp_path):
    agent = f'{sys.executable} -c "{WAITING.replace(chr(34), chr(39))}" & wait; exit 5'
    with start(tmp_path, "sh", "-c", agent, options=["--agent"]) as process:
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 5


def test_an_agent_that_cannot_start_its_ranks_is_the_first_failure(tmp_path):
    with start(tmp_path, "sh", "-c", "exit 2", options=["--agent"], SLURM_PROCID="1") as process:
        assert process.wait(20) == 2
    assert (tmp_path / "first_failure").read_text().startswith("2 1 ")


def test_surroundings_are_local_to_the_node_and_leave_what_is_set():
    found = launch.surroundings({"TMPDIR": "/local/7", "NCCL_DEBUG": "INFO"}, 6)
    assert found["OMP_NUM_THREADS"] == "6" and "NCCL_DEBUG" not in found
    assert found["TRITON_CACHE_DIR"] == f"/local/7/mirrorla-cache-{os.getuid()}/triton"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 0)),
        ({"SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, (5, 1)),
        ({"SLURM_PROCID": "1", "TORCHELASTIC_RUN_ID": "x", "RANK": "6", "LOCAL_RANK": "2"}, (6, 2)),
    ],
)
def test_a_rank_knows_its_place(variables, expected):
    assert launch.place(variables) == expected


def test_an_unfit_node_is_named_gets_a_strike_and_starts_nothing(tmp_path):
    with start(tmp_path, "touch", str(tmp_path / "started"), options=["--min-free-gib", "1e9"]) as process:
        assert process.wait(20) == launch.UNFIT_NODE
        assert "GiB free in" in process.stderr.read()
    assert not (tmp_path / "started").exists()
    host, _, reason = (tmp_path / "strikes").read_text().partition(" ")
    assert host == os.uname().nodename and "1e+09 wanted" in reason
    assert launch.UNFIT_NODE == ExitCode.UNFIT_NODE
    assert launch.node_name({"SLURMD_NODENAME": "node7"}) == "node7"  # the name that SLURM can leave out


def test_the_check_names_devices_disks_shared_memory_and_clocks(tmp_path, monkeypatch):
    fit = preflight.Needs(gpus=0, free_gib=0, shm_gib=0, run=tmp_path)
    assert preflight.unfit(fit) == []
    (program := tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: H100'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    reasons = preflight.unfit(preflight.Needs(gpus=2, free_gib=0, shm_gib=1e6, run=tmp_path))
    assert reasons[0].startswith("1 of 2 GPUs answer")
    assert "/dev/shm has" in reasons[1]
    assert "cannot be reached" in preflight.unfit(preflight.Needs(0, 0, 0, tmp_path / "gone"))[0]
    real = time.time
    monkeypatch.setattr(preflight.time, "time", lambda: real() + 300)
    (late,) = preflight.unfit(fit)
    assert late.startswith("its clock is +300 s from that of")


def test_logs_are_read_and_what_is_missing_is_said(tmp_path, capsys):
    logs = tmp_path / "logs"
    logs.mkdir()
    assert cli.main(["logs", str(tmp_path)]) == 2
    (logs / "slurm_9.out").write_text("old\n")
    (logs / "slurm_10.out").write_text("new\n")
    (logs / "rank_1.log").write_text("one\n")
    assert cli.main(["logs", str(tmp_path)]) == 0
    assert cli.main(["logs", str(tmp_path), "--rank", "1"]) == 0
    assert capsys.readouterr().out == "new\none\n"
    assert cli.main(["logs", str(tmp_path), "--rank=7"]) == 2
    assert "rank 7 has no log" in capsys.readouterr().err
    assert cli.main(["logs", str(tmp_path), "--rank", "x"]) == 2
    assert cli.main(["cancel", str(tmp_path)]) == 2
    assert "was never submitted" in capsys.readouterr().err
    assert slurm.job_line(tmp_path) is None
    assert cli.main(["logs", str(Path(tmp_path, "nowhere"))]) == 2
