"""The configs of detection and segmentation: the published recipes, and that every kind trains a step as configured."""

import jsonargparse
import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from datamodules.base_module import PackedDataModule
from datamodules.detection import DetectionDataModule
from datamodules.pack import pack
from datamodules.segmentation import SegmentationDataModule
from datamodules.sources import SourceOptions, open_source
from lightning_modules.cli import main
from lightning_modules.optim import learning_rate, plan_steps, warmup_length
from mirrorla.config_files import find_config, packaged_configs

COCO = [name for name in packaged_configs() if name.startswith("coco/")]
ADE20K = [name for name in packaged_configs() if name.startswith("ade20k/")]
DIGITS = [name for name in packaged_configs() if name.startswith(("digits/detection", "digits/segmentation"))]


def settings(name):
    """The model's and the trainer's part of a config, parsed."""
    parser = LightningArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--seed_everything", type=int)
    parser.add_subclass_arguments(LightningModule, "model")
    for part in ("data", "trainer", "checkpoint"):
        parser.add_argument(f"--{part}", type=dict)
    return parser.parse_args([f"--config={find_config(name)}"])


def test_every_head_has_a_recipe_in_three_sizes():
    sizes = ("tiny", "small", "base")
    assert sorted(COCO) == sorted(f"coco/{kind}_{size}" for kind in ("retinanet", "mask_rcnn") for size in sizes)
    assert sorted(ADE20K) == sorted(f"ade20k/{kind}_{size}" for kind in ("semantic_fpn", "upernet") for size in sizes)


@pytest.mark.parametrize("name", COCO)
def test_coco_follows_the_published_schedule(name):
    config = settings(name)
    options = config.model.init_args
    plan = plan_steps(7330, config.data["init_args"]["batch_size"], 1, config.trainer["max_epochs"], None)
    optim = options.optim
    assert plan.total_steps == 12 * 7330 and plan.samples_per_step == 16
    rates = [
        learning_rate(step, plan.total_steps, warmup_length(optim, 7330), optim, 7330)
        for step in (0, 250, 500, 8 * 7330 - 1, 8 * 7330, 11 * 7330, plan.total_steps - 1)
    ]
    assert rates == pytest.approx([1e-7, 5.005e-5, 1e-4, 1e-4, 1e-5, 1e-6, 1e-6])
    assert optim.weight_decay == (1e-4 if "retinanet" in name else 0.05)
    assert options.detector.channels == 256 and options.detector.kind in name
    assert options.backbone.name == f"mirrorla_{name.rsplit('_', 1)[1]}"


@pytest.mark.parametrize("name", ADE20K)
def test_ade20k_follows_the_published_schedule(name):
    config = settings(name)
    options = config.model.init_args
    is_fpn = "semantic_fpn" in name
    total = 80_000 if is_fpn else 160_000
    assert config.trainer["max_steps"] == total and config.data["init_args"]["batch_size"] == 16
    peak, warmup = options.optim.lr, warmup_length(options.optim, 1263)
    assert (peak, options.optim.weight_decay, warmup) == ((1e-4, 1e-4, 0) if is_fpn else (6e-5, 0.01, 1500))
    half = (total - 1 - warmup) // 2 + warmup
    share = 0.5**0.9 if is_fpn else 0.5
    assert learning_rate(half, total, warmup, options.optim) == pytest.approx(peak * share, rel=1e-4)
    assert learning_rate(total - 1, total, warmup, options.optim) == 0
    assert options.head.kind in name and options.head.auxiliary_weight is None  # of each kind: 0 and .4


@pytest.fixture(scope="module", params=["detection", "segmentation"])
def scenes(request, tmp_path_factory):
    """A few scenes of digits for one task."""
    folder = tmp_path_factory.mktemp("scenes") / request.param
    pack(open_source("digits", SourceOptions(task=request.param, scenes=20)), str(folder))
    return request.param, folder


def test_digits_configs_train_evaluate_and_resume(scenes, tmp_path, capsys):
    task, folder = scenes
    for name in [name for name in DIGITS if task in name]:
        options = [f"--data.path={folder}", f"--run_dir={tmp_path / name}", "--data.batch_size=8"]
        small = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--config", "trainer/cpu"]
        options.append("--ckpt_path=last")
        for epochs in (1, 2):
            assert (
                main(["fit", "--config", name, *small, *options, f"--trainer.max_epochs={epochs}", "--ckpt_path=last"])
                == 0
            )
        out = capsys.readouterr()
        assert "box AP50 (EMA)" in out.out if task == "detection" else "mIoU (EMA)" in out.out
        assert "epoch 2/2  step 4" in out.err
        assert main(["validate", "--config", name, *small, *options]) == 0


def test_wrong_class_count_is_refused_in_one_line(scenes, tmp_path, capsys):
    task, folder = scenes
    options = [f"--data.path={folder}", f"--run_dir={tmp_path}", "--model.num_classes=7", "--config", "trainer/cpu"]
    assert main(["fit", "--config", f"digits/{task}", *options]) == 2
    found = 10 if task == "detection" else 11
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert lines == [
        f"mirrorla fit: error: model.num_classes 7 differs from the data's {found} classes; "
        f"use --model.num_classes {found} or other data"
    ]


def test_a_detector_starts_from_a_classifiers_checkpoint(digits, scenes, tmp_path, capsys):
    task, folder = scenes
    quick = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--config", "trainer/cpu"]
    classifier = ["fit", "--config", "digits/classification", f"--data.path={digits}", f"--run_dir={tmp_path / 'c'}"]
    assert main([*classifier, *quick]) == 0
    (checkpoint,) = (tmp_path / "c" / "checkpoints").glob("step_*")
    weights = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    options = [f"--data.path={folder}", "--data.batch_size=8", f"--run_dir={tmp_path / 'd'}"]
    pretrained = f"--model.backbone.pretrained={weights}"
    assert main(["fit", "--config", f"digits/{task}", *options, *quick, pretrained]) == 0
    err = capsys.readouterr().err
    assert "tensors loaded" in err and "missing (norms.0.bias" in err  # what a classifier lacks is named


@pytest.mark.parametrize("cls", [DetectionDataModule, SegmentationDataModule])
def test_every_shared_option_reaches_the_command_line(cls):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "data")
    config = parser.parse_args(["--data.path=x", "--data.batch_size=3", "--data.on_error=skip", "--data.cache_gib=2"])
    own = set(vars(config.data))
    base = jsonargparse.ArgumentParser(exit_on_error=False)
    base.add_class_arguments(PackedDataModule, "data", skip={"task"})
    shared = {action.dest.split(".")[1] for action in base._actions if action.dest.startswith("data.")}
    assert shared <= own
    assert parser.instantiate(config).data.batch_size == 3
    with pytest.raises(jsonargparse.ArgumentError, match="batch_sise"):
        parser.parse_args(["--data.path=x", "--data.batch_sise=3"])
