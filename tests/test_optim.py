"""Parameter groups, learning-rate schedule and the plan of a training."""

import re

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.optim import (
    OptimConfig,
    build_optimizer,
    learning_rate,
    parameter_groups,
    plan_steps,
    warmup_length,
)
from mirrorla import MirrorConfig, create_backbone


@pytest.fixture(scope="module")
def pico():
    return create_backbone("mirrorla_pico", num_classes=10, mirror=MirrorConfig(power=1.0))


def names_of(model, parameters):
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {by_id[id(p)] for p in parameters}


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_norms_biases_and_mirrors_are_not_decayed(pico, layer_decay):
    groups = parameter_groups(pico, OptimConfig(layer_decay=layer_decay, weight_decay=0.05))
    undecayed = set().union(*(names_of(pico, g["params"]) for g in groups if g["weight_decay"] == 0))
    decayed = set().union(*(names_of(pico, g["params"]) for g in groups if g["weight_decay"] > 0))
    parameters = dict(pico.named_parameters())
    assert undecayed | decayed == set(parameters)
    assert not undecayed & decayed
    assert pico.no_weight_decay() <= undecayed
    assert any("mirrors" in name for name in undecayed)
    assert all(parameters[name].ndim > 1 for name in decayed)
    assert all(parameters[name].ndim == 1 for name in undecayed - pico.no_weight_decay())


def test_layer_decay_grows_from_stem_to_head(pico):
    config = OptimConfig(lr=1e-3, layer_decay=0.5)
    groups = parameter_groups(pico, config)
    lr_of = {name: g["lr"] for g in groups for name in names_of(pico, g["params"])}
    stem = next(lr for name, lr in lr_of.items() if name.startswith("stem"))
    head = max(lr for name, lr in lr_of.items() if name.startswith("head"))
    assert head == pytest.approx(1e-3)
    assert stem == min(lr_of.values()) < 1e-3 * 0.5**3
    assert len({g["name"] for g in groups}) == len(groups)


def test_peer_without_special_names_groups_like_timm():
    model = timm.create_model("test_vit", num_classes=10)
    groups = parameter_groups(model, OptimConfig())
    assert [(g["name"], g["weight_decay"]) for g in groups] == [("no_decay", 0.0), ("decay", 0.05)]


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1e-6), (5, (1e-6 + 1e-3) / 2), (10, 1e-3), (55 - 0.5, (1e-3 + 1e-5) / 2), (99, 1e-5), (500, 1e-5)],
    ids=["first", "half-warm", "peak", "half-way", "last", "beyond"],
)
def test_schedule_values(step, expected):
    config = OptimConfig(lr=1e-3, warmup_lr=1e-6, min_lr=1e-5)
    assert learning_rate(step, 100, 10, config) == pytest.approx(expected)


@given(st.integers(1, 2000), st.integers(0, 300), st.integers(0, 3000))
def test_schedule_stays_between_its_ends(total, warmup, step):
    config = OptimConfig(lr=1e-3, warmup_lr=1e-6, min_lr=1e-5)
    assert 1e-6 <= learning_rate(step, total, warmup, config) <= 1e-3


def test_constant_schedule_stays_at_the_peak():
    config = OptimConfig(lr=0.1, schedule="constant")
    assert {learning_rate(step, 10, 0, config) for step in range(20)} == {0.1}


@pytest.mark.parametrize(
    ("limits", "steps"),
    [((10, -1), 40), ((10, 25), 25), ((-1, 7), 7), ((None, 7), 7), ((2, 100), 8)],
    ids=["epochs", "steps-first", "steps-only", "no-epochs", "epochs-first"],
)
def test_plan_counts_partial_windows(limits, steps):
    plan = plan_steps(7, 64, 2, *limits)  # 7 batches, 2 per step: windows of 2, 2, 2 and 1
    assert (plan.steps_per_epoch, plan.total_steps, plan.samples_per_step) == (4, steps, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 64, 1, None, None), "the training has no end: give trainer.max_epochs or trainer.max_steps"),
        ((0, 64, 1, 10, None), "an epoch has 0 batches; lower data.batch_size (now 64)"),
    ],
    ids=["endless", "empty"],
)
def test_plan_refuses(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_steps(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "optim.lr 0.0 must be above 0"),
        ({"weight_decay": -1.0}, "optim.weight_decay -1.0 must be 0 or above"),
        ({"layer_decay": 1.5}, "optim.layer_decay 1.5 must lie in (0, 1]"),
        ({"warmup_steps": 3, "warmup_epochs": 2.0}, "optim.warmup_steps 3 and optim.warmup_epochs 2.0 are both set"),
        ({"warmup_steps": -3}, "optim warm-up -3 must be 0 or above"),
        ({"reference_batch": 0}, "optim.reference_batch 0 must be 1 or above"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimConfig(**options)


def test_optimizer_follows_the_schedule_with_batch_scaling_and_warmup_in_epochs(pico):
    plan = plan_steps(10, 64, 1, 5, None)
    config = OptimConfig(lr=1e-3, warmup_epochs=0.5, warmup_lr=0.0, reference_batch=32, min_lr=0.0)
    assert warmup_length(config, plan.steps_per_epoch) == 5
    optimizer, scheduler = build_optimizer(pico, config, plan)
    rates = []
    for _ in range(plan.total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 0
    assert rates[5] == pytest.approx(2e-3)  # 64 samples a step, twice the reference
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert max(rates) == rates[5]


def test_optimizer_state_loads_as_plain_values(pico, tmp_path):
    optimizer, scheduler = build_optimizer(pico, OptimConfig(layer_decay=0.8), plan_steps(10, 64, 1, 5, None))
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["optimizer"]["param_groups"][0]["name"] == optimizer.param_groups[0]["name"]


class Headed(torch.nn.Module):
    """A backbone with a head, as a detector has."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4))


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_backbone_below_a_head_has_its_own_rate(pico, layer_decay):
    model, config = Headed(pico), OptimConfig(lr=1e-3, backbone_scale=0.1, layer_decay=layer_decay)
    groups = parameter_groups(model, config, model.backbone)
    lr_of = {name: g["lr"] for g in groups for name in names_of(model, g["params"])}
    assert lr_of.keys() == dict(model.named_parameters()).keys()
    assert {lr for name, lr in lr_of.items() if name.startswith("head.")} == {1e-3}
    below = [lr for name, lr in lr_of.items() if name.startswith("backbone.")]
    assert max(below) == pytest.approx(1e-4) and (min(below) < 1e-5) == (layer_decay < 1)
    undecayed = set().union(*(names_of(model, g["params"]) for g in groups if g["weight_decay"] == 0))
    assert {f"backbone.{name}" for name in pico.no_weight_decay()} <= undecayed
    assert {"head.0.bias", "head.1.weight", "head.1.bias"} <= undecayed and "head.0.weight" not in undecayed
    assert len({g["name"] for g in groups}) == len(groups)


def test_backbone_scale_without_a_head_is_refused(pico):
    message = "optim.backbone_scale 0.1 is for detectors and segmenters; a classifier has optim.layer_decay"
    with pytest.raises(ValueError, match=message):
        parameter_groups(pico, OptimConfig(backbone_scale=0.1))


def test_steps_fall_at_their_epochs():
    config = OptimConfig(lr=1e-2, schedule="steps", milestones=(8, 11), gamma=0.1, warmup_lr=0.0)
    rates = [learning_rate(step, 120, 5, config, steps_per_epoch=10) for step in (0, 5, 79, 80, 109, 110, 500)]
    assert rates == pytest.approx([0, 1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])


@pytest.mark.parametrize(("power", "half"), [(1.0, 0.5), (0.9, 0.5**0.9)], ids=["line", "poly"])
def test_poly_falls_to_its_floor(power, half):
    config = OptimConfig(lr=1.0, schedule="poly", power=power, min_lr=0.0)
    assert [learning_rate(step, 101, 0, config) for step in (0, 50, 100)] == pytest.approx([1.0, half, 0.0])


def test_optimizer_steps_at_the_milestones_of_its_plan(pico):
    config = OptimConfig(lr=1e-2, schedule="steps", milestones=(0.5, 1.0))
    optimizer, scheduler = build_optimizer(pico, config, plan_steps(10, 64, 1, 2, None))
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-2] * 5 + [1e-3] * 5 + [1e-4] * 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone_scale": 0.0}, "optim.backbone_scale 0.0 must be above 0"),
        ({"power": 0.0}, "optim.power 0.0 and optim.gamma 0.1 must be above 0"),
        ({"schedule": "steps"}, "optim.milestones [] with optim.schedule 'steps'"),
        ({"milestones": (8, 11)}, "optim.milestones [8, 11] with optim.schedule 'cosine'"),
        ({"schedule": "steps", "milestones": (11, 8)}, '"steps" needs ascending epochs, for example [8, 11]'),
    ],
    ids=["backbone", "power", "none", "cosine", "order"],
)
def test_schedules_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimConfig(**options)
