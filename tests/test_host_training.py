"""Hosts as every other backbone: folded, exported, trained, compared, and refused where they do not fit."""

import pytest
import torch
from lightning.pytorch import Trainer

from datamodules.module import ClassificationDataModule
from datamodules.transforms import EvalTransform, TrainTransform
from lightning_modules import cli
from lightning_modules.backbone import BackboneConfig, build_dense
from lightning_modules.checkpoint_io import CommittedCheckpointIO
from lightning_modules.classification import ClassificationModule
from lightning_modules.export_formats import traced
from lightning_modules.export_network import folded, portable
from lightning_modules.model_card import ModelCard
from lightning_modules.optim import OptimConfig, parameter_groups
from mirrorla import HostConfig, MirrorConfig, create_backbone
from mirrorla.complexity import comparison_table, core_gmacs, count_gmacs, count_parameters
from mirrorla.diagnostics import mirror_metrics
from mirrorla.feature_maps import KINDS
from mirrorla.host_parts import PVTSpec
from mirrorla.hosts import PVT
from mirrorla.variants import MODELS


def deit(kind="mirror", **options):
    torch.manual_seed(0)
    host = HostConfig(**options)
    return create_backbone("mirrorla_deit_pico", num_classes=10, attention=kind, host=host)


def small(name, **options):
    """A host of few channels: a test of a PVT needs no 12 million random numbers."""
    torch.manual_seed(0)
    if name == "deit":
        return create_backbone("mirrorla_deit_pico", num_classes=10, **options).eval()
    return PVT(PVTSpec((1, 1, 1, 1), (16, 32, 48, 64), (1, 2, 3, 4)), num_classes=10, **options).eval()


def on_meta(name, **options):
    with torch.device("meta"):
        return create_backbone(name, **options)


@pytest.mark.parametrize("modulation", ["none", "ema", "instance"])
@pytest.mark.parametrize("name", ["deit", "pvt"])
def test_folding_a_host_keeps_its_outputs(name, modulation):
    model = small(name, mirror=MirrorConfig(modulation=modulation, init="uniform"))
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 32, 32))  # the running statistic moves
    model.eval()
    folded, images = model.fold(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)
    assert any("mirrors" in n for n, _ in folded.named_parameters()) == (modulation == "instance")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["deit", "pvt"])
def test_a_host_is_exported_as_it_is(name, kind):
    host = HostConfig(positions="roped" if kind in ("mirror", "polar", "softmax") else "learned")
    model = small(name, attention=kind, host=host)
    images = torch.randn(2, 3, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(portable(folded(model))(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit", "pvt"])
def test_an_exported_host_takes_any_size(name):
    model = small(name, attention="polar")
    program = traced(folded(model)).module()
    for size in ((2, 3, 64, 64), (1, 3, 100, 37)):
        images = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mirrorla_deit_tiny", "mirrorla_pvt_tiny"])
def test_tables_tokens_mirrors_and_powers_do_not_decay_and_depth_scales_the_rate(name):
    kind = "polar" if "deit" in name else ("mirror", "mirror", "polar", "polar")
    model = on_meta(name, attention=kind)
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5))
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    names = [n for n, p in model.named_parameters() if id(p) in decayed]
    assert names and not any(word in n for n in names for word in ("table", "class_token", "mirrors", "map.", "norm"))
    assert {n for n, _ in model.named_parameters() if "table" in n or "map." in n} <= model.no_weight_decay()
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    blocks = ["blocks.0", "blocks.1"] if "deit" in name else ["stages.0.0", "stages.0.1", "merges.0", "stages.1.0"]
    first = {
        part: next(scale[id(p)] for n, p in model.named_parameters() if n.startswith(part + ".")) for part in blocks
    }
    order = [scale[id(model.stem.proj.weight)], *first.values(), scale[id(model.head.weight)]]
    assert order == sorted(order) and order[0] < order[1] < order[-1] == 1.0


def data(digits):
    return ClassificationDataModule(
        str(digits),
        batch_size=16,
        num_workers=0,
        train_transform=TrainTransform(image_size=16, auto_augment=None, hflip=0, random_erasing=0, crop=False),
        eval_transform=EvalTransform(image_size=16, resize=None),
    )


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize("kind", ["mirror", "polar"])
def test_a_host_trains_in_the_classification_module(kind, digits, tmp_path):
    torch.manual_seed(0)
    module = ClassificationModule(
        10,
        BackboneConfig("mirrorla_deit_pico", attention=kind),
        OptimConfig(lr=1e-3, layer_decay=0.9),
        ema_decay=0.5,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        plugins=[CommittedCheckpointIO()],
    )
    before = module.backbone.head.weight.detach().clone()
    trainer.fit(module, datamodule=data(digits))
    assert not torch.equal(module.backbone.head.weight, before)
    assert not torch.equal(module.evaluated.head.weight, module.backbone.head.weight)
    assert f"attention {kind}" in module.describe()
    card = ModelCard.from_checkpoint({ModelCard.KEY: module.card.to_dict()})
    assert card.attention == [kind]
    other = BackboneConfig("mirrorla_deit_pico", attention=kind, host=HostConfig(positions="roped"))
    with pytest.raises(ValueError, match=r"checkpoint's host is .*change --model.backbone.host"):
        ModelCard.of("classification", other, 10, True, []).matched({ModelCard.KEY: module.card.to_dict()})
    metrics = mirror_metrics(module.evaluated, torch.randn(2, 3, 16, 16))
    assert {tag.rsplit("_", 1)[1] for tag in metrics} == {"0", "1"}


def test_the_comparison_counts_what_the_models_count():
    names = ["mirrorla_deit_pico", "mirrorla_pico"]
    rows = [line.split() for line in comparison_table(64, names).splitlines()[1:]]
    assert [row[:2] for row in rows] == [[name, kind] for name in names for kind in KINDS]
    for name, kind, millions, gmacs, core, _ in rows:
        assert 0 < float(core) < float(gmacs)
        if kind in ("relu", "focused", "norm_aware"):  # as mirror and polar
            continue
        model = on_meta(name, attention=kind)
        assert float(millions) == pytest.approx(count_parameters(model) / 1e6, abs=6e-4)
        assert float(gmacs) == pytest.approx(count_gmacs(model, 64), abs=6e-4)


def test_two_signs_cost_twice_the_core_and_softmax_grows_with_the_tokens():
    N, H, d = 256, 3, 64
    linear = 2 * N * H * d * (d + 1) / 1e9  # the state with its mean of keys, and reading both
    for kind in ("mirror", "relu", "elu", "focused"):
        assert core_gmacs(kind, (N, H, d)) == pytest.approx(linear, rel=1 / d)
    assert core_gmacs("norm_aware", (N, H, d)) == pytest.approx(2 * linear, rel=1 / d)
    assert core_gmacs("polar", (N, H, d)) == pytest.approx(2 * linear, rel=2 / d)
    assert core_gmacs("softmax", (N, H, d)) == pytest.approx(2 * N * N * H * d / 1e9)


def test_models_takes_a_size_and_refuses_the_rest(capsys, monkeypatch):
    monkeypatch.setattr("mirrorla.complexity.MODELS", ("mirrorla_deit_pico",))
    assert cli.main(["models", "--size", "32"]) == 0
    assert "GMACs 32²" in capsys.readouterr().out
    for words, message in (
        (["--comapre"], "unrecognized arguments: --comapre; did you mean '--compare'?"),
        (["--size", "8"], "--size 8 must be 32 pixels or more"),
        (["--size", "big"], "argument --size: invalid int value: 'big'"),
    ):
        assert cli.main(["models", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_models_compares_every_model_with_every_kind(capsys):
    assert cli.main(["models", "--compare"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(MODELS) * len(KINDS)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: create_backbone("mirrorla_deit_tini"), "'mirrorla_deit_tini' is unknown: did you mean 'mirrorla_dei"),
        (lambda: create_backbone("deit_pico"), "'deit_pico' is unknown: did you mean 'mirrorla_deit_pico'"),
        (lambda: deit("poler"), "attention kind 'poler' is unknown: did you mean 'polar'"),
        (lambda: deit(["relu"] * 4), "must name one stage, or be one kind for all"),
        (lambda: HostConfig(positions="rope"), "host.positions 'rope' is unknown: choose one of learned, roped, none"),
        (lambda: HostConfig(patch_size=0), "host.patch_size 0 must be 1 pixel or more"),
        (
            lambda: create_backbone("mirrorla_pvt_tiny", host=HostConfig(patch_size=4)),
            "host.patch_size 4 is an option of DeiT hosts",
        ),
        (
            lambda: create_backbone("mirrorla_pvt_tiny", host=HostConfig(class_token=True)),
            "host.class_token true is an option of DeiT hosts",
        ),
        (lambda: create_backbone("mirrorla_pico", host=HostConfig(gate=False)), "'mirrorla_pico' is no host: leave"),
        (lambda: create_backbone("resnet10t", attention="relu"), "'resnet10t' has no mirrors: leave"),
        (lambda: BackboneConfig(attention="sofmax"), "'sofmax' is unknown: did you mean 'softmax'"),
        (lambda: BackboneConfig(attention=["mirror", "elo", "elu", "elu"]), "'elo' is unknown: did you mean 'elu'"),
        (
            lambda: build_dense(BackboneConfig("mirrorla_deit_pico"), (4, 8, 16, 32), 0),
            "'mirrorla_deit_pico' gives no feature maps",
        ),
    ],
)
def test_errors_name_the_value_and_the_mend(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("attention", ["sofmax", "[mirror,mirror,mirror,sofmax]"])
def test_the_command_line_refuses_an_unknown_kind_in_one_line(attention, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", "--config", "digits/classification", "--model.backbone.attention", attention]) == 2
    error = capsys.readouterr().err
    assert "attention kind 'sofmax' is unknown: did you mean 'softmax'?" in error and error.count("\n") == 1
