"""The batch script on a real SLURM cluster of two nodes: to the end, and through everything that happens to jobs.

What every job leaves behind must be what an uninterrupted one does: ledger, weights, one curve.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import sbatch, slurm
from cluster.config import SlurmConfig
from cluster.private_settings import Shape
from datamodules.ledger import read_attempt
from lightning_modules import cli
from lightning_modules.attempts import read_attempts
from lightning_modules.checkpoint import list_checkpoints
from tests.slurm_cluster import (
    PATIENCE_S,
    STEPS,
    assert_same_weights,
    held_until_signalled,
    ledger,
    processes,
    running,
    send,
    told,
    wait_for_steps,
    wait_until,
    weights,
)

pytestmark = pytest.mark.timeout(1800)  # a job starts twice or more, on whatever else the machine does


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, digits):
    with running(tmp_path_factory.mktemp("runs"), digits) as found:
        yield found


@pytest.fixture(scope="module")
def reference(cluster):
    run, job = cluster.submit("uninterrupted")
    cluster.finish(run, job)
    return run


def curve(run):
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def samples_by_step(run):
    found = {}
    for (step, _), entry in sorted(ledger(run, ranks=None).items()):
        found.setdefault(step, []).extend(entry.ids)
    return {step: sorted(ids) for step, ids in found.items()}


def assert_as_if_uninterrupted(run, reference):
    assert ledger(run) == ledger(reference)
    assert_same_weights(weights(run), weights(reference))
    assert [step for step, _ in curve(run)] == list(range(STEPS))
    assert curve(run) == curve(reference)


def test_two_nodes_with_two_processes_each_train_to_the_end(cluster, reference):
    assert "4 x cpu" in told(reference)
    assert len(ledger(reference)) == STEPS * 4
    assert cluster.state(slurm.job_number(reference)) == "COMPLETED"
    assert [attempt.outcome for attempt in read_attempts(reference)] == ["completed"]


def test_a_signalled_job_saves_is_queued_again_and_ends_as_if_nothing_had_happened(cluster, reference, capsys):
    run, job = cluster.submit("signalled")
    wait_for_steps(run, 5)
    assert slurm.job_line(run).startswith(f"job {job} running for ")
    assert cli.main(["submit", "--config", "digits/classification", f"--run_dir={run}"]) == 2
    assert f"mirrorla cancel {run}" in capsys.readouterr().err
    cluster.client("scancel", "--signal=USR1", job)
    cluster.finish(run, job)
    assert_as_if_uninterrupted(run, reference)
    first, second = read_attempts(run)
    assert (first.outcome, first.code, second.outcome) == ("SIGUSR1", 138, "completed")
    assert second.step == first.end_step >= 5
    assert told(run).count("queued again after code 138") == 1


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["grace", "main"])
def test_a_preempted_job_goes_on_and_ends_as_if_nothing_had_happened(partition, cluster, reference):
    """With grace time it saves first; without, it is killed and goes on from the checkpoint before."""
    options = [f"--slurm.partition={partition}", "--checkpoint.every_n_steps", "4"]
    run, job = cluster.submit(f"preempted-{partition}", *options)
    wait_for_steps(run, 10)
    words = ("--parsable", "--partition=high", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null")
    other = cluster.client("sbatch", *words, "--wrap=sleep 1")
    cluster.wait_for(other, "COMPLETED", timeout_s=PATIENCE_S)
    cluster.finish(run, job)
    assert_as_if_uninterrupted(run, reference)
    first, second = read_attempts(run)
    assert second.step > 0
    if partition == "grace":
        assert (first.outcome, first.end_step) == ("SIGTERM", second.step)


@pytest.mark.slow
def test_the_time_limit_is_no_end(cluster, reference):
    """The training is too short for SLURM's shortest limits, so it is held in the middle until the signal is there."""
    request = ["--slurm.time=2", "--slurm.signal_lead_s=30", "--slurm.max_fruitless_restarts=9"]
    run, job = cluster.submit("limited", *request)
    wait_for_steps(run, 10)
    with held_until_signalled(run, 4, 130):
        pass
    cluster.finish(run, job)
    assert_as_if_uninterrupted(run, reference)
    stopped = [attempt for attempt in read_attempts(run) if attempt.outcome == "SIGUSR1"]
    assert stopped[-1].end_step >= 10
    assert told(run).count("queued again after code 138") == len(stopped)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["down", "killed"])
def test_a_lost_node_costs_no_more_than_the_steps_since_the_checkpoint(how, cluster, reference):
    run, job = cluster.submit(f"lost-{how}", "--checkpoint.every_n_steps", "4")
    wait_for_steps(run, 10)
    if how == "down":
        cluster.client("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    else:
        send(processes(run), signal.SIGSTOP)  # or the training ends before the controller misses the daemon
        os.kill(cluster.daemon("node2"), signal.SIGKILL)
    wait_until(lambda: cluster.restarts(job) > 0, PATIENCE_S)
    if how == "killed":
        cluster.restart("node2")
    cluster.client("scontrol", "update", "NodeName=node2", "State=RESUME", check=False)
    cluster.finish(run, job)
    assert_as_if_uninterrupted(run, reference)
    assert read_attempts(run)[1].step >= 8


@pytest.mark.slow
def test_an_array_trains_one_run_for_each_seed_and_goes_on_with_the_one_that_was_signalled(cluster):
    """Each number is a job of its own: a signal to one leaves the other alone, and both end as the same run alone."""
    short = ["--trainer.max_epochs", "1", "--checkpoint.every_n_steps", "2"]
    run, job = cluster.submit("array", "--slurm.array=1-2", *short, nodes=1, tasks=1)
    first, second = run / "seed_1", run / "seed_2"
    wait_until(lambda: len(list_checkpoints(first / "checkpoints")) > 0, PATIENCE_S)
    with held_until_signalled(first, 1, 30):
        cluster.client("scancel", "--signal=USR1", f"{job}_1")
    for number in (1, 2):
        cluster.finish(run, f"{job}_{number}")
    assert [attempt.outcome for attempt in read_attempts(first)] == ["SIGUSR1", "completed"]
    assert [attempt.outcome for attempt in read_attempts(second)] == ["completed"]
    for seed, folder in ((1, first), (2, second)):
        seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
        alone, single = cluster.submit(f"alone-{seed}", *short, *seeds, nodes=1, tasks=1)
        cluster.finish(alone, single)
        assert_same_weights(weights(folder), weights(alone))
        assert curve(folder) == curve(alone)
    assert any(not torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


@pytest.mark.slow
def test_a_job_goes_on_with_fewer_nodes(cluster, reference):
    """One of two nodes is gone when the job is queued again; min_nodes lets it start on the other one.

    From there on it is, bit for bit, a job of one node that goes on from the same checkpoint; not one of two nodes,
    whose BatchNorm sees smaller shares of every batch.
    """
    saving = ["--checkpoint.every_n_steps", "4"]
    run, job = cluster.submit("fewer", "--slurm.min_nodes=1", *saving)
    wait_for_steps(run, 10)
    try:
        for state in ("DRAIN", "DOWN"):  # a node that is only down comes back by itself
            cluster.client("scontrol", "update", "NodeName=node2", f"State={state}", "Reason=test")
        cluster.wait_for(job, "PENDING", timeout_s=PATIENCE_S)
        shutil.copytree(run / "checkpoints", cluster.runs / "on-one-node" / "checkpoints")
        cluster.finish(run, job)
    finally:
        cluster.client("scontrol", "update", "NodeName=node2", "State=RESUME", check=False)
    number, last = len(read_attempts(run)), read_attempts(run)[-1]
    assert last.step >= 8 and last.outcome == "completed"
    assert "4 x cpu" in told(run) and "2 x cpu" in told(run)
    assert samples_by_step(run) == samples_by_step(reference)
    assert [step for step, _ in curve(run)] == list(range(STEPS))
    assert curve(run)[: last.step] == curve(reference)[: last.step]
    alone, job = cluster.submit("on-one-node", *saving, nodes=1)
    cluster.finish(alone, job)
    assert read_attempt(alone / "ledger", 1) == read_attempt(run / "ledger", number)
    assert_same_weights(weights(run), weights(alone))
    assert curve(run)[last.step :] == curve(alone)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_range_of_nodes_shrinks_and_grows_again(launcher, cluster, tmp_path):
    """What the script asks for, with a job that only waits: all nodes, then the one that is left, then all again."""
    config = SlurmConfig(nodes=2, min_nodes=1, gpus_per_node=0, tasks_per_node=2, cpus_per_task=1, launcher=launcher)
    words = sbatch.header(config, sbatch.Job((), tmp_path, tmp_path, "python", (), 77))
    script, nodes = tmp_path / "job.sh", []
    (tmp_path / "logs").mkdir()
    script.write_text("\n".join(["#!/bin/bash", *words, "srun true && sleep 900\n"]))
    job = cluster.client("sbatch", "--parsable", str(script))
    for restarts, states in enumerate([(), ("DRAIN", "DOWN"), ("RESUME",)]):
        for state in states:
            cluster.client("scontrol", "update", "NodeName=node2", f"State={state}", "Reason=test")
        if states == ("RESUME",):
            time.sleep(2)  # until the node counts as idle
            cluster.client("scontrol", "requeue", job)
        nodes.append(cluster.nodes(job, restarts))
    cluster.client("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    assert nodes == ["node[1-2]", "node1", "node[1-2]"]


@pytest.mark.slow
def test_a_job_that_is_refused_on_the_node_ends_with_its_own_code(cluster):
    """Only the data says how many classes there are: code 2 is the training's, and the job is not tried again."""
    run, job = cluster.submit("refused", "--model.num_classes", "11")
    cluster.finish(run, job, state="FAILED")
    assert "model.num_classes 11 differs from the data's 10 classes" in told(run)
    assert "not one to go on after" in told(run) and "queued again" not in told(run)
    assert "ExitCode=2:0" in cluster.client("scontrol", "show", "job", job)
    assert cluster.restarts(job) == 0


@pytest.mark.slow
def test_torchrun_saves_and_goes_on_too(cluster, reference):
    run, job = cluster.submit("torchrun", "--slurm.launcher", "torchrun")
    wait_for_steps(run, 5)
    cluster.client("scancel", "--signal=USR1", job)
    cluster.finish(run, job)
    assert_as_if_uninterrupted(run, reference)


@pytest.mark.slow
def test_bandwidth_decides_before_the_training_starts(cluster):
    run, job = cluster.submit("slow", "--slurm.requeue=false", "--slurm.min_bandwidth_gb_s=10000")
    cluster.finish(run, job, state="FAILED")
    assert "GB/s, 10000 wanted: too slow" in told(run)
    assert not (run / "attempts.jsonl").exists()
    strikes = (run / "job" / "strikes").read_text().splitlines()
    assert sorted(line.split()[0] for line in strikes) == ["node1", "node2"]
    run, job = cluster.submit("fast", "--slurm.min_bandwidth_gb_s=0.000001", "--trainer.max_steps=2")
    cluster.finish(run, job)
    assert " GB/s, 1e-06 wanted\n" in told(run) and not (run / "job" / "strikes").exists()


@pytest.mark.slow
def test_the_rehearsal_tells_its_story_in_two_minutes(tmp_path):
    began = time.monotonic()
    command = [sys.executable, "-m", "lightning_modules.cli", "rehearse", "--keep", str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for words in ("is preempted", "queued again after code 143", "attempt 2, job 1, resumed at", "job 1 is COMPLETED"):
        assert words in done.stdout
    assert time.monotonic() - began < 120


@pytest.mark.slow
def test_a_controller_of_1024_nodes_accepts_what_fits_and_refuses_what_does_not(tmp_path, digits):
    with running(tmp_path, digits, Shape(nodes=1024, cpus=96, gpus=8, is_running=False)):
        words = ["submit", "--test-only", "--config", "digits/classification", f"--run_dir={tmp_path / 'run'}"]
        words += ["--data.batch_size", "8192", "--slurm.gpus_per_node=8", "--slurm.cpus_per_task=12"]
        assert cli.main([*words, "--slurm.nodes=512"]) == 0
        assert cli.main([*words, "--slurm.nodes=512", "--slurm.time=2-00:00:00", "--slurm.memory=0"]) == 0
        assert cli.main([*words, "--slurm.nodes=512", "--slurm.min_nodes=500"]) == 0
        assert cli.main([*words, "--slurm.nodes=1025"]) == 2
        assert cli.main([*words, "--slurm.nodes=512", "--slurm.cpus_per_task=13"]) == 2
        assert cli.main([*words, "--slurm.nodes=512", "--slurm.min_nodes=500", "--slurm.cpus_per_task=13"]) == 2
        assert cli.main([*words, "--slurm.nodes=512", "--slurm.partition=nowhere"]) == 2
