"""The plan: arithmetic by hand, every trap that shows in a configuration refused with its mend, no torch on the way."""

import inspect
import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cluster import plan, training
from cluster.config import SlurmConfig
from cluster.refusals import refusals
from cluster.settings import merge, slurm_section
from datamodules.base_module import PackedDataModule
from lightning_modules import cli
from lightning_modules.dry_fit import build_data, build_model, parse, refuse_options
from lightning_modules.forecast import activation_bytes, activations_of, weigh
from lightning_modules.job_request import read_request
from lightning_modules.probes import probe_of
from mirrorla.config_files import find_config, packaged_configs

SCRIPT = str(Path(sys.executable).parent / "mirrorla")
BASE = ["--config", "digits/classification"]
TASKS = [name for name in packaged_configs() if name.split("/")[0] in ("digits", "imagenet", "coco", "ade20k")]
QUICK = ("digits/classification", "digits/detection_retinanet", "digits/segmentation_upernet")
FOREIGN = ["--data", "lightning.pytorch.demos.boring_classes.BoringDataModule"]
GPUS = SlurmConfig(nodes=2, gpus_per_node=8, cpus_per_task=8)


def described(*options):
    files = [find_config(name) for flag, name in pairwise(options) if flag == "--config"]
    return training.read(files, options)


@pytest.mark.parametrize("verb", ["plan", "submit", "rehearse", "logs", "cancel"])
def test_help_is_quick_and_needs_no_torch(verb):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([SCRIPT, verb, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert done.stdout.startswith(f"usage: mirrorla {verb}")
    assert min(seconds) < 0.3


def test_a_login_node_without_torch_can_submit_and_keeps_the_configuration_as_it_is_now(tmp_path):
    run, config = tmp_path / "run", tmp_path / "mine.yaml"
    config.write_text("slurm:\n  nodes: 3\ntrainer:\n  max_epochs: 2 # few\n")
    options = ["submit", "--dry-run", *BASE, "--config", str(config), "--slurm.partition", "gpu", f"--run_dir={run}"]
    program = "import sys; sys.modules |= dict.fromkeys(['torch', 'lightning']); "
    program += "from lightning_modules.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "options not checked: there is no torch here; fit will check them on the nodes\n" in done.stderr
    script = (run / "job" / "job.sh").read_text()
    assert script == done.stdout
    assert "#SBATCH --nodes=3\n" in script and "#SBATCH --partition=gpu\n" in script
    assert (run / "job" / "01-mine.yaml").read_text() == "\n\ntrainer:\n  max_epochs: 2 # few\n"
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


TYPOS = {
    "key": (["--trainer.max_epoch", "3"], "unknown key trainer.max_epoch (command line); nearest: trainer.max_epochs"),
    "type": (["--model.optim.lr", "x"], "model.optim.lr: expected float, got 'x'"),
    "choice": (["--model.optim.schedule", "cosin"], "model.optim.schedule: expected one of 'cosine', 'constant'"),
    "name": (["--model.backbone.name", "mirrorla_tinny"], "did you mean 'mirrorla_tiny'?"),
    "strategy": (["--trainer.strategy", "dpp"], "trainer.strategy 'dpp' is not known; nearest: ddp"),
    "accelerator": (["--trainer.accelerator", "gppu"], "trainer.accelerator 'gppu' is not known; nearest: gpu"),
    "class option": (
        ["--config", "deepspeed/zero2", "--trainer.strategy.init_args.stagee", "2", "--model.ema_decay", "null"],
        "'stagee' is not accepted",
    ),
    "block in part": (
        ["--config", "deepspeed/zero2", "--trainer.strategy.config.zero_optimization.stage", "1"],
        "trainer.strategy.config.zero_optimization {'stage': '1'} has no stage 1, 2 or 3; an option that reaches into",
    ),
    "class": (
        ["--trainer.callbacks", "lightning.pytorch.callbacks.EarlyStoping"],
        "has no attribute 'EarlyStoping'",
    ),
    "model's value": (["--model.num_classes", "0"], "model.num_classes 0 must be 2 or above"),
    "transform's value": (["--data.train_transform.image_size", "-3"], "data.train_transform.image_size is -3"),
    "Trainer's value": (["--trainer.val_check_interval", "1.5"], "trainer: You have passed invalid value 1.5"),
    "checkpoint's value": (["--checkpoint.keep_last", "0"], "checkpoint.keep_last 0 must be 2 or above"),
    "guard's value": (["--guard.silence_s", "0"], "guard.silence_s 0"),
}


@pytest.mark.parametrize("verb", ["plan", "submit"])
@pytest.mark.parametrize("name", TYPOS)
def test_a_typo_is_refused_before_it_waits_in_a_queue(verb, name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, message = TYPOS[name]
    assert cli.main([verb, *BASE, "--data.path", "d", *words, *(["--dry-run"] if verb == "submit" else [])]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_typo_in_a_file_is_found_at_its_line_there(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "mine.yaml"
    config.write_text("slurm:\n  nodes: 1\nmodel:\n  init_args:\n    optim:\n      lrr: 1\n")
    assert cli.main(["submit", "--dry-run", *BASE, "--config", str(config)]) == 2
    assert f"unknown key model.optim.lrr ({config}:6); nearest: model.optim.lr\n" in capsys.readouterr().err


def test_without_slurm_submit_says_where_to_go(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["submit", *BASE, f"--run_dir={tmp_path / 'run'}"]) == 2
    assert "there is no sbatch here: submit on a login node" in capsys.readouterr().err


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
    assert activation_bytes(network, lambda: network(images)) == 4 * 3 * (12 + 5)


def test_arithmetic_is_that_of_the_data_module(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"splits": {"train": {"samples": 1438}}}))
    options = ["--data.path", str(tmp_path), "--trainer.accumulate_grad_batches", "4"]
    settings = described(*BASE, *options)
    samples = plan.samples_in(settings, Path())
    rows = dict(plan.arithmetic(settings, SlurmConfig(nodes=3, gpus_per_node=4), samples))
    assert rows["batch"] == "64 samples, 5 or 6, weighted a process; even: 60 or 72, 4 batches a step"
    assert rows["epoch"] == "1438 samples, 22 batches, 6 steps; 90 steps in all, 15 epochs"
    settings = described(*BASE, *options, "--trainer.max_steps", "33")
    assert plan.total_steps(settings, samples) == 33
    _, *_, (label, duration) = plan.forecast(settings, GPUS, plan.Sizes(9, 9, (32, 32), 0.1, "x"), samples)[0]
    assert (label, duration) == ("duration", f"{33 * 4 * 64 / 1.6 / 3600:.1f} h at best, 1 start of this job")


@pytest.mark.parametrize("slurm", [name for name in packaged_configs() if name.startswith("slurm/")])
@pytest.mark.parametrize("task", TASKS)
def test_every_packaged_training_has_a_plan_on_every_packaged_request(task, slurm):
    """Whatever is refused is mended by what the refusal says; what then comes out are lines without a hole."""
    config, folder = merge([(slurm, slurm_section(find_config(slurm)))]), find_config("slurm/debug").parent
    options = ["--config", task, "--data.sources", "digits", "--data.num_workers", "4"]
    for reason in refusals(described(*options), config, folder):
        assert "leaves some of" in reason, reason
        options += ["--data.batch_size", reason.rpartition(" ")[2]]
    settings = described(*options)
    assert refusals(settings, config, folder) == []
    sizes = plan.Sizes(30_000_000, 100_000_000, (512, 512), 10.0, "a device")
    rows, refused = plan.forecast(settings, config, sizes, 100_000)
    labels = [label for label, _ in [*plan.arithmetic(settings, config, 100_000), *rows]]
    assert labels[:4] == ["processes", "strategy", "batch", "epoch"]
    assert labels[4:] == ["time", "memory", "checkpoint", "speed", "duration"]
    assert not any(word in text for _, text in rows for word in ("None", "nan", "unknown", "not measured"))
    assert refused == []
    unknown, _ = plan.forecast(settings, config, plan.Sizes(9, why_not="a reason"), None)
    assert "activations, which are unknown (a reason)" in dict(unknown)["memory"]
    assert dict(unknown)["speed"] == "a reason"


@pytest.mark.parametrize(
    "task", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in TASKS]
)
def test_every_packaged_training_is_weighed(task):
    """Parsed, built and sent through, as `plan` does it."""
    options = parse(["--config", str(find_config(task)), "--data.sources", "digits"])
    refuse_options(options)
    sizes = weigh(options, calibrate=False)
    assert sizes.parameters == sum(parameter.numel() for parameter in build_model(options.model).parameters())
    is_host = "deit" in str(options.model)  # a plain transformer of 64 channels, about half a pyramid
    assert is_host or sizes.parameters > 500_000
    assert sizes.activation_bytes > 500_000 and min(sizes.size) >= 32


@pytest.mark.parametrize("task", ["digits/detection", "digits/segmentation"])
def test_small_images_stand_for_large_ones(task):
    options = parse(["--config", str(find_config(task))])
    transform = build_data(options.data).train_transform
    probe = probe_of(build_model(options.model), transform)
    assert probe.is_linear
    large, cpu = replace(probe, size=(384, 512)), torch.device("cpu")
    torch.manual_seed(0)
    measured = activation_bytes(large.network.train(), lambda: large.step(2, large.size, cpu)) // 2
    assert activations_of(large) == pytest.approx(measured, rel=0.05)


def test_a_model_of_somebody_elses_is_weighed_without_its_activations():
    options = parse(["--model", "lightning.pytorch.demos.boring_classes.BoringModel", *FOREIGN])
    sizes = weigh(options, calibrate=True)
    assert (sizes.parameters, sizes.activation_bytes, sizes.samples_per_s) == (66, None, None)
    assert sizes.why_not.endswith("are not a pair of this project's")


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
        "2: 1 node x 2 on CPUs; 8 cores and 0 workers each",
        "64 samples, 32 a process",
        "CPU threads, float32, samples of 32 x 32 pixels",
        "optimizer 5 MiB",
    ):
        assert words in told
    assert list(tmp_path.iterdir()) == []


def test_a_request_tells_slurms_options_from_the_trainings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--slurm", "slurm/one_node", "--slurm.nodes=2", *BASE, "--data.batch_size", "128", "--dry-run"]
    request = read_request(words, frozenset({"--dry-run"}))
    assert (request.slurm.nodes, request.slurm.gpus_per_node, request.flags) == (2, 8, {"--dry-run"})
    assert request.fit == ("--config", str(find_config("digits/classification")), "--data.batch_size", "128")
    assert request.run == tmp_path / "runs" / "digits-classification"
