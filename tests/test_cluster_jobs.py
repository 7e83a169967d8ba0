"""The batch script on a real SLURM cluster of two nodes: to the end, and through everything that happens to jobs.

What every job leaves behind must be what an uninterrupted one does: ledger, weights, one curve.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import slurm
from cluster.private_settings import Shape
from lightning_modules import cli
from lightning_modules.attempts import read_attempts
from tests.slurm_cluster import STEPS, assert_same_weights, ledger, running, told, wait_for_steps, weights


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
    cluster.start_now(job)
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
    cluster.wait_for(other, "COMPLETED")
    cluster.start_now(job)
    cluster.finish(run, job)
    assert_as_if_uninterrupted(run, reference)
    first, second = read_attempts(run)
    assert second.step > 0
    if partition == "grace":
        assert (first.outcome, first.end_step) == ("SIGTERM", second.step)


@pytest.mark.slow
def test_the_time_limit_is_no_end(cluster, reference):
    """SLURM's shortest limit is a minute: the signal comes within it, and the job goes on with what is left to do."""
    slow = ["--slurm.time=1", "--slurm.signal_lead_s=30", "--trainer.limit_val_batches", "1.0"]
    run, job = cluster.submit("limited", *slow)
    cluster.wait_for(job, "PENDING", "COMPLETED")
    if cluster.state(job) == "PENDING":
        cluster.start_now(job)
    cluster.finish(run, job)
    assert_as_if_uninterrupted(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["down", "killed"])
def test_a_lost_node_costs_no_more_than_the_steps_since_the_checkpoint(how, cluster, reference):
    run, job = cluster.submit(f"lost-{how}", "--checkpoint.every_n_steps", "4")
    wait_for_steps(run, 10)
    if how == "down":
        cluster.client("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    else:
        os.kill(cluster.daemon("node2"), signal.SIGKILL)
    cluster.wait_for(job, "PENDING")
    if how == "killed":
        cluster.restart("node2")
    cluster.client("scontrol", "update", "NodeName=node2", "State=RESUME", check=False)
    cluster.start_now(job)
    cluster.finish(run, job)
    assert_as_if_uninterrupted(run, reference)
    assert read_attempts(run)[1].step >= 8


@pytest.mark.slow
def test_an_array_trains_one_run_for_each_seed(cluster):
    run, job = cluster.submit("array", "--slurm.array=1-2", "--trainer.max_epochs", "1", nodes=1, tasks=1)
    deadline = time.monotonic() + 200
    while cluster.client("squeue", "--noheader", "--jobs", job):
        assert time.monotonic() < deadline, told(run)
        time.sleep(0.5)
    first, second = (weights(run / f"seed_{seed}") for seed in (1, 2))
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_job_goes_on_with_fewer_nodes(cluster, reference):
    run, job = cluster.submit("fewer")
    wait_for_steps(run, 10)
    cluster.client("scancel", "--signal=USR1", job)
    cluster.wait_for(job, "PENDING")
    cluster.client("scancel", job)
    run, job = cluster.submit("fewer", nodes=1)
    cluster.finish(run, job)
    first, second = read_attempts(run)
    assert second.step == first.end_step
    ours, theirs = samples_by_step(run), samples_by_step(reference)
    assert ours == theirs


@pytest.mark.slow
def test_a_job_that_gets_nowhere_ends_with_its_own_code(cluster):
    """Every start is refused at once: code 2 is the training's, and SLURM says so."""
    run, job = cluster.submit("refused", "--trainer.max_step", "3")
    cluster.finish(run, job, state="FAILED")
    assert "unknown key trainer.max_step" in told(run)
    assert "ExitCode=2:0" in cluster.client("scontrol", "show", "job", job)


@pytest.mark.slow
def test_torchrun_saves_and_goes_on_too(cluster, reference):
    run, job = cluster.submit("torchrun", "--slurm.launcher", "torchrun")
    wait_for_steps(run, 5)
    cluster.client("scancel", "--signal=USR1", job)
    cluster.start_now(job)
    cluster.finish(run, job)
    assert_as_if_uninterrupted(run, reference)


@pytest.mark.slow
def test_bandwidth_decides_before_the_training_starts(cluster):
    options = ["--slurm.requeue=false", "--slurm.min_bandwidth_gb_s=10000"]
    run, job = cluster.submit("bandwidth", *options)
    cluster.finish(run, job, state="FAILED")
    assert "GB/s, 10000 wanted: too slow" in told(run)
    assert not (run / "attempts.jsonl").exists()


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
        assert cli.main([*words, "--slurm.nodes=1025"]) == 2
        assert cli.main([*words, "--slurm.nodes=512", "--slurm.cpus_per_task=13"]) == 2
        assert cli.main([*words, "--slurm.nodes=512", "--slurm.partition=nowhere"]) == 2
