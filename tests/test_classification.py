"""The classification module: loss, accumulation, averaging, alignment, checkpoints of other models."""

import re

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from datamodules.module import ClassificationDataModule
from datamodules.transforms import EvalTransform, TrainTransform
from lightning_modules.backbone import BackboneConfig
from lightning_modules.callbacks.step_seed import StepSeed, step_seed
from lightning_modules.checkpoint_io import CommittedCheckpointIO
from lightning_modules.classification import ClassificationModule
from lightning_modules.mixing import MixConfig
from lightning_modules.model_card import ModelCard
from lightning_modules.optim import OptimConfig
from lightning_modules.training import accumulation_scale
from mirrorla import MirrorConfig

# The averaged copy stays in evaluation mode on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")
SGD_LIKE = OptimConfig(lr=1e-3, schedule="constant", weight_decay=0.0)


@pytest.fixture
def data(digits):
    return ClassificationDataModule(
        str(digits),
        batch_size=16,
        num_workers=0,
        train_transform=TrainTransform(image_size=32, auto_augment=None, hflip=0, random_erasing=0, crop=False),
        eval_transform=EvalTransform(image_size=32, resize=None),
    )


def trainer(tmp_path, *callbacks, **options):
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "default_root_dir": tmp_path,
            "callbacks": list(callbacks),
            "log_every_n_steps": 1,
            "plugins": [CommittedCheckpointIO()],
            **options,
        }
    )


def module(name="test_convnext", num_classes=10, **options):
    torch.manual_seed(0)
    return ClassificationModule(num_classes, BackboneConfig(name), **{"optim": SGD_LIKE, **options})


class Losses(Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)


@pytest.mark.parametrize(
    ("batches", "accumulate", "scales"),
    [(5, 2, [1, 1, 1, 1, 2]), (4, 2, [1] * 4), (5, 1, [1] * 5), (2, 4, [2, 2]), (7, 3, [1] * 6 + [3])],
)
def test_partial_window_is_a_mean_over_its_own_batches(batches, accumulate, scales):
    assert [accumulation_scale(i, batches, accumulate) for i in range(batches)] == scales


def test_partial_window_steps_like_a_window_of_its_length(tmp_path, data):
    """The last of 3 batches, alone in its window of 2, must move the weights as it does without accumulation."""
    gradients = {}

    class Gradient(Callback):
        def __init__(self, name):
            self.name = name

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients[self.name] = pl_module.backbone.head.fc.weight.grad.clone()

    frozen = OptimConfig(lr=1e-30, schedule="constant", weight_decay=0.0)  # the weights stay where they are
    for name, accumulate in (("plain", 1), ("window", 2)):
        fit = trainer(
            tmp_path, Gradient(name), StepSeed(0), max_epochs=1, max_steps=-1, limit_train_batches=3,
            accumulate_grad_batches=accumulate,
        )  # fmt: skip
        fit.fit(module(optim=frozen), datamodule=data)
    torch.testing.assert_close(gradients["window"], gradients["plain"], rtol=1e-4, atol=1e-7)


def test_loss_is_the_weighted_mean(tmp_path, data):
    net = module(label_smoothing=0.1)
    fit = trainer(tmp_path, losses := Losses(), max_steps=1)
    with torch.no_grad():
        weights = {name: value.clone() for name, value in net.state_dict().items()}
    fit.fit(net, datamodule=data)
    batch = losses.batches[0]
    net.load_state_dict(weights)
    per_sample = torch.nn.functional.cross_entropy(
        net.backbone(batch["image"]), batch["label"], label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close(fit.callback_metrics["train/loss"], (batch["weight"] * per_sample).mean().detach())


def test_evaluation_uses_the_average(tmp_path, data):
    net = module(ema_decay=0.99)
    fit = trainer(tmp_path, max_steps=3, max_epochs=1, limit_train_batches=3)
    fit.fit(net, datamodule=data)
    assert net.evaluated is net.ema.module
    batch = data.probe_batch(16)
    assert not torch.equal(net(batch["image"]), net.backbone.eval()(batch["image"]))
    names = set(net.state_dict())
    assert {name.replace("backbone.", "ema.module.", 1) for name in names if name.startswith("backbone.")} <= names


def test_class_count_of_other_data_is_refused(tmp_path, data):
    message = "model.num_classes 12 differs from the data's 10 classes; use --model.num_classes 10 or other data"
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(tmp_path).fit(module(num_classes=12), datamodule=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "test_vit"}, "the checkpoint's backbone is 'test_convnext' but the configuration builds 'test_vit'"),
        ({"ema_decay": 0.9}, "has_ema is False but the configuration builds True; change --model.ema_decay, or give"),
    ],
    ids=["variant", "ema"],
)  # fmt: skip
def test_checkpoint_of_another_model_is_refused(tmp_path, data, options, message):
    fit = trainer(tmp_path)
    fit.fit(module(), datamodule=data)
    fit.save_checkpoint(tmp_path / "step_00000002")
    other = module(**options)
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(tmp_path).validate(other, datamodule=data, ckpt_path=tmp_path / "step_00000002", verbose=False)


def test_checkpoint_without_card_is_refused():
    with pytest.raises(ValueError, match=r"holds no mirrorla model card, .* use --model.backbone.pretrained FILE"):
        ModelCard.from_checkpoint({"global_step": 1})
    with pytest.raises(ValueError, match="model card lacks attention, has_ema, mirror, num_classes, task: it is"):
        ModelCard.from_checkpoint({"mirrorla": {"backbone": "x", "later": 1}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"model.label_smoothing 1.0 must lie in \[0, 1\)"),
        ({"num_classes": 1}, "model.num_classes 1 must be 2 or above"),
    ],
    ids=["smoothing", "classes"],
)
def test_options_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_card_from_before_an_option_of_the_mirrors_means_its_default():
    written = ModelCard.of("classification", BackboneConfig("mirrorla_pico"), 4, False, []).to_dict()
    assert written["mirror"].pop("query_mirrors") == 1
    expected = ModelCard.of("classification", BackboneConfig("mirrorla_pico"), 4, False, [])
    assert expected.matched({ModelCard.KEY: written}) == expected
    with pytest.raises(ValueError, match="checkpoint's mirror is 'x' but the configuration builds"):
        expected.matched({ModelCard.KEY: {**written, "mirror": "x"}})
    several = BackboneConfig("mirrorla_pico", mirror=MirrorConfig(query_mirrors=2))
    with pytest.raises(ValueError, match=r"checkpoint's mirror is .*change --model.backbone.mirror"):
        ModelCard.of("classification", several, 4, False, []).matched({ModelCard.KEY: written})


def test_schedule_without_datamodule_is_refused(tmp_path, data):
    data.prepare_data()
    data.setup("fit")
    with pytest.raises(ValueError, match="the schedule needs a datamodule with batches_per_epoch and batch_size"):
        trainer(tmp_path, limit_val_batches=0).fit(module(), data.train_dataloader(), data.val_dataloader())


def test_aligned_mirrors_start_on_the_data(tmp_path, data):
    torch.manual_seed(0)
    net = ClassificationModule(
        10, BackboneConfig("mirrorla_pico", mirror=MirrorConfig(init="aligned")), SGD_LIKE, ema_decay=0.9
    )
    before = {name: value.clone() for name, value in net.backbone.named_parameters()}
    net.trainer = trainer(tmp_path)
    data.prepare_data()
    data.setup("fit")
    net.trainer.datamodule = data
    net.setup("fit")
    moved = {name for name, value in net.backbone.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert all("mirrors" in name for name in moved)
    for name, value in net.backbone.state_dict().items():
        assert torch.equal(value, net.ema.module.state_dict()[name])


@pytest.mark.parametrize("switch", ["channels_last", "compile"])
def test_switches_change_the_speed_and_not_the_result(tmp_path, data, switch):
    results = []
    with torch.compiler.set_stance("force_eager"):  # the wiring is under test, not the compiler
        for value in (False, True):
            fit = trainer(tmp_path, StepSeed(0), max_steps=2)
            fit.fit(module(ema_decay=0.9, **{switch: value}), datamodule=data)
            results.append(fit.callback_metrics["train/loss"])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_compiled_network_keeps_its_parameter_names(tmp_path, data):
    plain, compiled = module(), module(compile=True)
    compiled.trainer = trainer(tmp_path)
    compiled.setup("fit")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert compiled.backbone._compiled_call_impl is not None


def test_mixing_and_drop_path_repeat_for_the_same_step(tmp_path, data):
    results = []
    for noise in (1, 2):
        net = ClassificationModule(
            10, BackboneConfig("mirrorla_pico", drop_path_rate=0.5), SGD_LIKE, MixConfig(mixup=0.8, cutmix=1.0)
        )
        net.load_state_dict(results[0][1] if results else net.state_dict())
        start = {name: value.clone() for name, value in net.state_dict().items()}
        torch.manual_seed(noise)  # what happened before must not matter
        fit = trainer(tmp_path, StepSeed(5))
        fit.fit(net, datamodule=data)
        results.append((fit.callback_metrics["train/loss"], start))
    assert torch.equal(results[0][0], results[1][0])


def test_step_seeds_differ_everywhere():
    seeds = {step_seed(s, e, b, r) for s in range(3) for e in range(3) for b in range(3) for r in range(3)}
    assert len(seeds) == 81
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_description_says_what_is_trained():
    net = ClassificationModule(10, BackboneConfig("mirrorla_pico"), ema_decay=0.99)
    assert re.fullmatch(
        r"mirrorla_pico, 0\.\d\d M parameters, 10 classes, attention mirror mirror mirror mirror, EMA 0.99",
        net.describe(),
    )
