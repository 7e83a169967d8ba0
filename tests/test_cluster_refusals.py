"""Every trap that shows in a job's settings is refused with its mend, before anything is submitted."""

from itertools import pairwise
from pathlib import Path

import pytest

from cluster import training
from cluster.config import SlurmConfig
from cluster.deepspeed import TRAINERS_OWN, named_twice
from cluster.refusals import refusals
from mirrorla.config_files import find_config

BASE = ["--config", "digits/classification"]
GPUS = SlurmConfig(nodes=2, gpus_per_node=8, cpus_per_task=8)


def refused(*options, config=GPUS, folder=Path()):
    words = [*BASE, *options]
    files = [find_config(name) for flag, name in pairwise(words) if flag == "--config"]
    return refusals(training.read(files, words), config, folder)


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
    "logger": (
        ["--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger"],
        "TensorBoardLogger begins another curve at every start of the job; leave it out",
    ),
    "checkpoints": (
        ["--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint"],
        "ModelCheckpoint saves where a resume does not look, and torn where a signal comes; use --checkpoint.*",
    ),
    "averaging": (
        ["--trainer.callbacks", "lightning.pytorch.callbacks.EMAWeightAveraging"],
        "EMAWeightAveraging knows no divided weights, and a resume loses its count; use --model.ema_decay",
    ),
    "idle GPUs": (["--config", "trainer/cpu"], "trainer.accelerator cpu leaves the 8 GPUs of every node idle"),
    "weights": (["--model.backbone.pretrained", "gone.pt"], "model.backbone.pretrained gone.pt is not there; mend"),
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
    (reason,) = refused(*offload, config=cpus)
    assert reason == "offloading has nothing to move: slurm.gpus_per_node is 0; use --config deepspeed/zero3"
    assert (
        "needs GPUs, slurm.gpus_per_node is 0; use 32-true"
        in refused("--trainer.precision", "16-mixed", config=cpus)[0]
    )


def test_a_compiler_cache_on_a_shared_disk_is_refused():
    shared = SlurmConfig(environment={"TRITON_CACHE_DIR": "/home/me/cache"})
    assert "/home/me/cache is shared by the nodes, whose compilers would race there" in refused(config=shared)[0]
    assert refused(config=SlurmConfig(environment={"TRITON_CACHE_DIR": "/tmp/cache"})) == []


def test_callbacks_in_a_file_are_seen_too(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
    )
    (reason,) = refused("--config", str(tmp_path / "mine.yaml"))
    assert "use --checkpoint.*" in reason


def test_interpreted_kernels_are_refused():
    (reason,) = refused(config=SlurmConfig(environment={"TRITON_INTERPRET": "1"}))
    assert "wrong in bfloat16; leave it out" in reason
    assert refused(config=SlurmConfig(environment={"TRITON_INTERPRET": "0"})) == []


@pytest.mark.parametrize("key", TRAINERS_OWN)
def test_what_the_trainer_decides_is_refused_in_a_deepspeed_configuration(key):
    (reason,) = named_twice({key: 1, "zero_optimization": {"stage": 2}})
    assert f"DeepSpeed's {key} is decided by {TRAINERS_OWN[key]}; take it out" in reason
