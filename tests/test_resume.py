"""A stopped and continued training is the uninterrupted one: weights bit for bit, curves point for point."""

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.module import ClassificationDataModule
from datamodules.transforms import EvalTransform, TrainTransform
from lightning_modules import stop_signals
from lightning_modules.callbacks.checkpointing import CheckpointConfig
from lightning_modules.callbacks.figures import MonitoringConfig
from lightning_modules.checkpoint import list_checkpoints, load_plain
from lightning_modules.classification import BackboneConfig, ClassificationModule
from lightning_modules.mixing import MixConfig
from lightning_modules.optim import OptimConfig
from lightning_modules.run_directory import RunDirectory, newest, resolve_checkpoint
from lightning_modules.stop_signals import StopRequested
from lightning_modules.wiring import Wiring, build_callbacks, build_logger, build_plugins

# The averaged copy stays in evaluation mode on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")
MONITORING = MonitoringConfig(figures_every_n_validations=0, mirrors_every_n_validations=1, num_probes=4)


class SignalAt(Callback):
    """Send this process a real signal at a chosen moment."""

    def __init__(self, hook, count, number=signal.SIGTERM):
        self.hook, self.left, self.number = hook, count, number

    def _count(self, hook, trainer):
        if hook == self.hook and not trainer.sanity_checking:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)

    def setup(self, trainer, *args, **options):
        self._count("setup", trainer)

    def on_train_batch_end(self, trainer, *args):
        self._count("train_batch", trainer)

    def on_validation_batch_start(self, trainer, *args):
        self._count("validation_batch", trainer)

    def on_train_epoch_end(self, trainer, *args):
        self._count("epoch_end", trainer)


def fit(root: Path, data: Path, *callbacks: Callback, word: str | None = None, workers: int = 0, **options) -> Trainer:
    run = RunDirectory(root)
    run.prepare()
    torch.manual_seed(0)
    module = ClassificationModule(
        10,
        BackboneConfig("mirrorla_pico", drop_path_rate=0.2),
        OptimConfig(lr=1e-3, layer_decay=0.8, warmup_steps=2),
        MixConfig(mixup=0.8, cutmix=1.0),
        ema_decay=0.9,
    )
    datamodule = ClassificationDataModule(
        str(data),
        batch_size=16,
        eval_batch_size=64,
        num_workers=workers,
        train_transform=TrainTransform(image_size=32, auto_augment=None, random_erasing=0.5),
        eval_transform=EvalTransform(image_size=32, resize=None),
    )
    every_n_steps = options.pop("every_n_steps", 0)
    if word is not None:
        stop_signals.restore()  # a new process would not remember
    resume_from = resolve_checkpoint(word, run, training=True)
    wiring = Wiring("fit", run, resume_from, 0, "", CheckpointConfig(every_n_steps=every_n_steps), MONITORING)
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "limit_train_batches": 5,
            "limit_val_batches": 3,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "gradient_clip_val": 1.0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "default_root_dir": root,
            "logger": build_logger(wiring, None),
            "plugins": build_plugins(None),
            "callbacks": [*callbacks, *build_callbacks(wiring, module, None)],
            **options,
        }
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=None if resume_from is None else str(resume_from))
    return trainer


def final(root: Path) -> dict:
    return load_plain(newest(RunDirectory(root)))


def assert_same(first, second, path="checkpoint"):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{path}/{index}")
    else:
        assert first == second, path


def curve(root: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(root / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def assert_same_run(interrupted: Path, uninterrupted: Path):
    one, other = final(interrupted), final(uninterrupted)
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "ClassificationDataModule"):
        assert_same(one[key], other[key], key)
    for tag in ("train/loss", "val/top1", "val/loss", "train/grad_norm", "mirror/retained_energy/q/layer_0"):
        assert curve(interrupted, tag) == curve(uninterrupted, tag), tag


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, digits):
    root = tmp_path_factory.mktemp("uninterrupted")
    fit(root, digits)
    stop_signals.restore()
    return root


@pytest.mark.parametrize(
    ("hook", "count", "step"),
    [
        ("train_batch", 3, 3),
        ("train_batch", 5, 5),
        ("validation_batch", 2, 5),
        ("epoch_end", 1, 5),
        ("validation_batch", 4, 10),
    ],
    ids=["mid-epoch", "last-batch", "mid-validation", "epoch-end", "mid-last-validation"],
)
def test_resume_gives_the_uninterrupted_run(tmp_path, digits, uninterrupted, hook, count, step):
    with pytest.raises(StopRequested, match="SIGTERM") as stopped:
        fit(tmp_path, digits, SignalAt(hook, count))
    assert (stopped.value.step, stopped.value.exit_code) == (step, 143)
    assert newest(RunDirectory(tmp_path)).name == f"step_{step:08d}"
    fit(tmp_path, digits, word="last")
    assert_same_run(tmp_path, uninterrupted)


def test_signal_during_the_set_up_leaves_nothing_behind(tmp_path, digits):
    stop_signals.install()
    with pytest.raises(StopRequested, match="stopped by SIGINT after step 0"):
        fit(tmp_path, digits, SignalAt("setup", 1, signal.SIGINT))
    assert newest(RunDirectory(tmp_path)) is None


def test_resume_after_two_stops_with_workers(tmp_path, digits, uninterrupted):
    for count in (2, 2):
        stop_signals.restore()
        with pytest.raises(StopRequested):
            fit(tmp_path, digits, SignalAt("train_batch", count), word="last", workers=1)
    fit(tmp_path, digits, word="last", workers=1)
    assert_same_run(tmp_path, uninterrupted)


def test_crash_between_checkpoints_repeats_no_step_in_the_curve(tmp_path, digits, uninterrupted):
    class Crash(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 5:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, digits, Crash(), every_n_steps=3)
    assert newest(RunDirectory(tmp_path)).name == "step_00000003"
    fit(tmp_path, digits, word="last")
    assert_same_run(tmp_path, uninterrupted)


def test_accumulation_stops_only_between_windows(tmp_path, digits):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole, digits, accumulate_grad_batches=2)
    with pytest.raises(StopRequested) as stopped:
        fit(parts, digits, SignalAt("train_batch", 3), accumulate_grad_batches=2)
    assert stopped.value.step == 2
    fit(parts, digits, word="last", accumulate_grad_batches=2)
    assert_same_run(parts, whole)
    assert final(whole)["global_step"] == 6


def test_longer_training_goes_on_from_the_end(tmp_path, digits):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"max_epochs": -1, "limit_val_batches": 0}
    fit(whole, digits, max_steps=7, **options)
    fit(parts, digits, max_steps=3, **options)
    assert newest(RunDirectory(parts)).name == "step_00000003"
    fit(parts, digits, word="last", max_steps=7, **options)
    assert final(parts)["global_step"] == final(whole)["global_step"] == 7
    assert final(parts)["ClassificationDataModule"] == final(whole)["ClassificationDataModule"]


def test_validation_inside_an_epoch_survives_a_stop_in_it(tmp_path, digits):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"max_epochs": 1, "limit_train_batches": 6, "val_check_interval": 3}
    fit(whole, digits, **options)
    with pytest.raises(StopRequested):
        fit(parts, digits, SignalAt("validation_batch", 2), **options)
    fit(parts, digits, word="last", **options)
    assert_same_run(parts, whole)


def test_earlier_checkpoint_sets_later_ones_aside(tmp_path, digits):
    fit(tmp_path, digits, every_n_steps=2, max_epochs=1)
    first = list_checkpoints(tmp_path / "checkpoints")[0]
    assert first.name == "step_00000004"
    with pytest.raises(StopRequested):
        fit(tmp_path, digits, SignalAt("train_batch", 1), word=str(first), max_epochs=2)
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000004", "step_00000005"]
    assert (tmp_path / "checkpoints" / "step_00000005.superseded").is_dir()
