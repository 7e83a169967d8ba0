"""The plan: arithmetic by hand, every trap that shows in a configuration refused with its mend, no torch on the way."""

import inspect
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from cluster import deepspeed, plan, training
from cluster.config import SlurmConfig
from datamodules.base_module import PackedDataModule
from lightning_modules import cli, cluster_cli
from lightning_modules.forecast import activation_bytes
from mirrorla.config_files import find_config

SCRIPT = str(Path(sys.executable).parent / "mirrorla")
BASE = ["--config", "digits/classification"]
GPUS = SlurmConfig(nodes=2, gpus_per_node=8, cpus_per_task=8)


def described(*options):
    files = [find_config(name) for flag, name in pairwise(options) if flag == "--config"]
    return training.read(files, options)


def refused(*options, config=GPUS, folder=Path()):
    return plan.refusals(described(*BASE, *options), config, folder)


@pytest.mark.parametrize("verb", ["plan", "submit", "rehearse", "logs", "cancel"])
def test_help_is_quick_and_needs_no_torch(verb):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([SCRIPT, verb, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert done.stdout.startswith(f"usage: mirrorla {verb}")
    assert min(seconds) < 0.3


def test_a_dry_run_needs_no_torch_and_keeps_the_configuration_as_it_is_now(tmp_path):
    run, config = tmp_path / "run", tmp_path / "mine.yaml"
    config.write_text("slurm:\n  nodes: 3\ntrainer:\n  max_epochs: 2 # few\n")
    options = ["submit", "--dry-run", *BASE, "--config", str(config), "--slurm.partition", "gpu", f"--run_dir={run}"]
    program = "import sys; from lightning_modules.cli import main; code = main(sys.argv[1:])\n"
    program += "assert not {'torch', 'lightning', 'mirrorla'} & set(sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = (run / "job" / "job.sh").read_text()
    assert script == done.stdout
    assert "#SBATCH --nodes=3\n" in script and "#SBATCH --partition=gpu\n" in script
    assert (run / "job" / "01-mine.yaml").read_text() == "trainer:\n  max_epochs: 2 # few\n"
    assert f"--config {run}/job/00-classification.yaml --config {run}/job/01-mine.yaml" in script
    assert (run.stat().st_mode & 0o777, (run / "job" / "job.sh").stat().st_mode & 0o777) == (0o700, 0o700)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slurm.nods", "2"], "unknown key slurm.nods (command line); nearest: slurm.nodes"),
        (["--slurm", "slurm/debg"], "did you mean slurm/debug?"),
        (["--slurm.nodes"], "--slurm.nodes needs a value"),
        (["--ckpt_path", "last"], "--ckpt_path last is set by the batch script, from --slurm.*; leave it out"),
        (["--trainer.devices=2"], "--trainer.devices 2 is set by the batch script"),
        (["--data.batch_size", "4", "--slurm.nodes", "8"], "data.batch_size 4 leaves some of 8 processes without"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["submit", *BASE, *words]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_slurm_submit_says_where_to_go(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["submit", *BASE, f"--run_dir={tmp_path / 'run'}"]) == 2
    assert "there is no sbatch here: submit on a login node" in capsys.readouterr().err


TRAPS = {
    "batch": (
        ["--data.batch_size", "1001"],
        "1001 is not divisible by data.lanes x data.repeats = 8; nearest valid: 1000 or",
    ),
    "ranks": (["--data.batch_size", "8"], "leaves some of 16 processes without a sample; nearest valid: 16"),
    "deepspeed": (["--trainer.strategy", "deepspeed_stage_2"], "use fsdp2, zero1, zero2 or zero3"),
    "fsdp": (
        ["--trainer.strategy=lightning.pytorch.strategies.FSDPStrategy"],
        "FSDPStrategy writes checkpoints of its own",
    ),
    "spawn": (["--trainer.strategy", "ddp_spawn"], "starts processes itself, as srun does; use ddp"),
    "average": (
        ["--config", "deepspeed/zero3"],
        "model.ema_decay 0.99 needs whole weights, which ZeRO stage 3 divides",
    ),
    "average by name": (
        ["--trainer.strategy", "zero3"],
        "use --trainer.strategy fsdp2 or zero2, or --model.ema_decay null",
    ),
    "sampler": (["--trainer.use_distributed_sampler", "true"], "would divide every rank's share again; leave it out"),
    "workers": (
        ["--data.num_workers", "9"],
        "data.num_workers 9 is more than slurm.cpus_per_task 8; use --data.num_workers 7",
    ),
    "fork": (
        ["--data.num_workers=2", "--data.worker_start=fork"],
        "fork copies a process that uses a GPU; use forkserver",
    ),
    "unsaved": (
        ["--checkpoint.every_n_epochs", "0"],
        "saves nothing before the end: a lost node would cost everything",
    ),
    "shards": (
        ["--data.sources", "null", "--data.path", "none"],
        "data.path none has no dataset.json here; pack the data",
    ),
    "accumulation": (
        ["--config", "deepspeed/zero2", "--trainer.strategy.config.gradient_accumulation_steps", "4"],
        "DeepSpeed's gradient_accumulation_steps is decided by trainer.accumulate_grad_batches; take it out",
    ),
    "clipping": (
        ["--config", "deepspeed/zero2", "--trainer.strategy.init_args.config.gradient_clipping=1.0"],
        "DeepSpeed's gradient_clipping is decided by trainer.gradient_clip_val",
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_refused_with_its_mend(name):
    options, message = TRAPS[name]
    assert refused() == []
    (reason,) = refused(*options)
    assert message in reason


def test_traps_of_processes_without_gpus_are_refused():
    cpus = SlurmConfig(gpus_per_node=0, tasks_per_node=2)
    offload = ["--config", "deepspeed/zero3_cpu", "--model.ema_decay", "null"]
    assert refused(*offload) == []
    assert refused(*offload, config=cpus) == ["offloading to main memory needs GPUs; slurm.gpus_per_node is 0"]
    assert (
        "needs GPUs, slurm.gpus_per_node is 0; use 32-true"
        in refused("--trainer.precision", "16-mixed", config=cpus)[0]
    )


def test_a_compiler_cache_on_a_shared_disk_is_refused():
    shared = SlurmConfig(environment={"TRITON_CACHE_DIR": "/home/me/cache"})
    assert "/home/me/cache is shared by the nodes, whose compilers would race there" in refused(config=shared)[0]
    assert refused(config=SlurmConfig(environment={"TRITON_CACHE_DIR": "/tmp/cache"})) == []


def test_a_lead_too_short_for_the_checkpoint_is_refused():
    large = plan.Sizes(30_000_000_000)
    _, (reason,) = plan.forecast(described(*BASE), GPUS, large, None)
    seconds = 30e9 * 4 * 4 / 2**30 / 0.5
    assert "slurm.signal_lead_s 300 is too short" in reason and f"about {seconds:.0f} s; at least" in reason


def test_memory_is_counted_by_part():
    sizes = plan.Sizes(1000, activation_bytes=64)

    def parts(*options):
        return plan.memory_parts(described(*BASE, *options), GPUS, sizes)

    assert parts() == {"parameters": 4000, "gradients": 4000, "optimizer": 8000, "average": 4000, "activations": 256}
    assert parts("--trainer.strategy", "zero1") == {**parts(), "optimizer": 500}
    assert parts("--trainer.strategy", "zero2") == {**parts(), "optimizer": 500, "gradients": 250}
    divided = {"parameters": 250, "gradients": 250, "optimizer": 500, "average": 250}
    assert parts("--trainer.strategy", "fsdp2", "--trainer.precision", "bf16-mixed") == {**divided, "activations": 128}
    offloaded = parts("--config", "deepspeed/zero3_nvme", "--model.ema_decay", "null")
    assert offloaded == {"parameters": 0, "gradients": 250, "optimizer": 0, "activations": 256}


def test_activations_are_those_that_autograd_keeps():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    images = torch.zeros(3, 3, 2, 2)
    # The input of either layer; tanh keeps its output, which is the second layer's input.
    assert activation_bytes(network, images) == 4 * 3 * (12 + 5)


def test_arithmetic_is_that_of_the_data_module(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"splits": {"train": {"samples": 1438}}}))
    options = ["--data.path", str(tmp_path), "--trainer.accumulate_grad_batches", "4"]
    settings = described(*BASE, *options)
    samples = plan.samples_in(settings, Path())
    rows = dict(plan.arithmetic(settings, SlurmConfig(nodes=3, gpus_per_node=4), samples))
    assert rows["batch"] == "64 samples, 5 or 6, weighted a process; even: 60 or 72, 4 batches a step"
    assert rows["epoch"] == "1438 samples, 22 batches, 6 steps, 90 steps in 15 epochs"


def test_defaults_of_the_plan_are_those_of_the_data_module():
    assert inspect.signature(PackedDataModule).parameters["lanes"].default == training.DEFAULT_LANES


def test_the_plan_refuses_a_typo_and_describes_a_job(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cpus = ["--slurm.gpus_per_node", "0", "--slurm.tasks_per_node", "2"]
    assert cli.main(["plan", *BASE, *cpus, "--model.lr", "2"]) == 2
    assert "unknown key model.lr (command line); nearest: model.optim.lr" in capsys.readouterr().err
    assert cli.main(["plan", *BASE, *cpus, "--calibrate"]) == 0
    told = capsys.readouterr().out
    for words in (
        "2: 1 nodes x 2 CPU processes",
        "64 samples, 32 a process",
        "CPU threads, float32, 32 pixels",
        "optimizer 5 MiB",
    ):
        assert words in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero1", deepspeed.settings(1)),
        ("zero2", deepspeed.settings(2)),
        ("zero3", deepspeed.settings(3)),
        ("zero3_cpu", deepspeed.settings(3, "cpu")),
        ("zero3_nvme", deepspeed.settings(3, "nvme", "/local/nvme")),
    ],
)
def test_packaged_deepspeed_configurations_are_the_functions(name, expected):
    strategy = yaml.safe_load(find_config(f"deepspeed/{name}").read_text())["trainer"]["strategy"]
    assert strategy["init_args"]["config"] == expected
    assert deepspeed.named_twice(expected) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, "cpu"), "offload 'cpu' needs stage 2 or 3, not 1"),
        ((2, "nvme", "/x"), "offload 'nvme' needs stage 3, not 2; 'cpu' works with 2"),
        ((3, "nvme"), "nvme_path None belongs to offload 'nvme'"),
        ((3, "cpu", "/x"), "nvme_path '/x' belongs to offload 'nvme', which is 'cpu'"),
    ],
)
def test_offloads_that_a_stage_cannot_do_are_refused(arguments, message):
    with pytest.raises(ValueError, match="offload") as error:
        deepspeed.settings(*arguments)
    assert message in str(error.value)


def test_a_request_tells_slurms_options_from_the_trainings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--slurm", "slurm/one_node", "--slurm.nodes=2", *BASE, "--data.batch_size", "128", "--dry-run"]
    request = cluster_cli.read_request(words, frozenset({"--dry-run"}))
    assert (request.slurm.nodes, request.slurm.gpus_per_node, request.flags) == (2, 8, {"--dry-run"})
    assert request.fit == ("--config", str(find_config("digits/classification")), "--data.batch_size", "128")
    assert request.run == tmp_path / "runs" / "digits-classification"
