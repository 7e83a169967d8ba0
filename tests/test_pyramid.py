import logging
import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from mirrorla import HOSTS, VARIANTS, MirrorAttention, MirrorConfig, MirrorPyramid, align_mirrors, create_backbone
from mirrorla.complexity import attention_layout, count_gmacs, count_parameters, variant_table

# Published siblings of the same sizes: (parameters M, GMACs at 224).
SIBLINGS = {
    "mirrorla_xtiny": (8.0, 1.0),
    "mirrorla_tiny": (15.0, 2.7),
    "mirrorla_small": (26.0, 5.1),
    "mirrorla_base": (52.0, 12.0),
    "mirrorla_large": (95.0, 18.0),
}
# Ours, exactly; README says where and why they differ from the siblings' by more than 3 %.
OURS = {
    "mirrorla_pico": (0.9203, 0.2294),
    "mirrorla_xtiny": (6.1314, 0.6039),
    "mirrorla_tiny": (15.8836, 2.6935),
    "mirrorla_small": (25.6127, 4.7312),
    "mirrorla_base": (51.9315, 11.0717),
    "mirrorla_large": (95.3090, 16.7757),
}
BEYOND_3_PERCENT = {
    ("mirrorla_xtiny", "params"),
    ("mirrorla_xtiny", "gmacs"),
    ("mirrorla_tiny", "params"),
    ("mirrorla_small", "gmacs"),
    ("mirrorla_base", "gmacs"),
    ("mirrorla_large", "gmacs"),
}


def pico(**options):
    torch.manual_seed(0)
    return create_backbone("mirrorla_pico", num_classes=10, **options)


def on_meta(name, **options):
    with torch.device("meta"):
        return create_backbone(name, **options)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_gmacs_are_what_readme_says(name):
    model = on_meta(name)
    assert count_parameters(model) / 1e6 == pytest.approx(OURS[name][0], rel=1e-4)
    assert count_gmacs(model) == pytest.approx(OURS[name][1], rel=1e-3)


@pytest.mark.parametrize("name", SIBLINGS)
def test_parameters_and_gmacs_are_within_3_percent_of_the_siblings_or_listed(name):
    for ours, theirs, kind in zip(OURS[name], SIBLINGS[name], ("params", "gmacs"), strict=True):
        assert (abs(ours / theirs - 1) > 0.03) == ((name, kind) in BEYOND_3_PERCENT)


def test_pico_stays_under_a_million_parameters():
    assert count_parameters(pico()) < 1_000_000


def test_cost_of_the_whole_network_is_linear_in_the_pixels():
    model = on_meta("mirrorla_tiny")
    assert count_gmacs(model, 896) / count_gmacs(model, 448) == pytest.approx(4.0, rel=1e-3)
    hybrid = on_meta("mirrorla_tiny", attention=("mirror", "mirror", "softmax", "softmax"))
    assert count_gmacs(hybrid, 896) / count_gmacs(hybrid, 448) > 4.15


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (64, 35), (100, 32)])
def test_any_size_gives_maps_of_ceil_size_over_stride(height, width):
    model = pico().eval()
    images = torch.randn(2, 3, height, width)
    features = model.forward_features(images)
    for feature, channels, stride in zip(features, model.channels, model.strides, strict=True):
        assert feature.shape == (2, channels, math.ceil(height / stride), math.ceil(width / stride))
    assert model(images).shape == (2, 10)


def test_features_only_follows_the_timm_contract():
    model = timm.create_model("mirrorla_pico", features_only=True)
    maps = model(torch.randn(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == model.feature_info.channels() == [32, 48, 96, 128]
    assert [64 // m.shape[-1] for m in maps] == model.feature_info.reduction() == [4, 8, 16, 32]
    assert not any("head" in name for name, _ in model.named_parameters())
    some = timm.create_model("mirrorla_pico", features_only=True, out_indices=(1, 3)).eval()
    assert [m.shape[1] for m in some(torch.randn(1, 3, 32, 32))] == some.feature_info.channels() == [48, 128]


def test_dense_maps_pass_through_their_own_norm():
    model = timm.create_model("mirrorla_pico", features_only=True)
    for feature in model(torch.randn(1, 3, 64, 64)):
        torch.testing.assert_close(feature.mean(1), torch.zeros_like(feature.mean(1)), atol=1e-4, rtol=0)


def test_batchnorm_converts_to_syncbn():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(pico())
    assert not any(type(m) is nn.BatchNorm2d for m in converted.modules())


def test_timm_builds_classifiers_and_lists_the_variants():
    assert set(timm.list_models("mirrorla_*")) == {*VARIANTS, *HOSTS}
    assert timm.create_model("mirrorla_pico", num_classes=7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert pico().get_classifier().out_features == 10


def test_every_parameter_gets_a_gradient():
    model = pico(drop_path_rate=0.0)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_evaluation_of_an_image_does_not_depend_on_its_batch():
    model = pico().eval()
    images = torch.randn(4, 3, 40, 40)
    torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modulation", ["none", "ema", "instance"])
def test_folding_the_network_keeps_its_outputs(modulation, caplog):
    model = pico(mirror=MirrorConfig(modulation=modulation, init="uniform"))
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    model.eval()
    images = torch.randn(2, 3, 64, 64)
    with caplog.at_level(logging.WARNING):
        folded = model.fold()
    assert (folded(images) - model(images)).abs().max() < 1e-5
    said = any("follow the image" in record.message for record in caplog.records)
    assert said == (modulation == "instance")
    assert any("mirrors" in n for n, _ in folded.named_parameters()) == (modulation == "instance")


def test_aligned_start_points_every_block_mean_into_the_orthant():
    model = pico(mirror=MirrorConfig(init="aligned", modulation="none")).eval()
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    images = torch.randn(8, 3, 64, 64)
    align_mirrors(model, images)
    for key, value in model.named_buffers():
        assert torch.equal(value, buffers[key]), key
    seen = []
    hooks = [
        a.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0]))) for a in model.attentions()
    ]
    with torch.no_grad():
        model(images)
    assert len(seen) == len(hooks) == 5
    for module, x in seen:
        q, k, _, _ = module.project(x)  # static mirrors included
        mean = (q.mean((0, 1)) + k.mean((0, 1))) / 2
        pairs = mean.unflatten(-1, (-1, 2))
        torch.testing.assert_close(pairs[..., 0], pairs[..., 1], rtol=1e-3, atol=1e-4)
        assert (pairs > -1e-4).all()


def agrees_when_compiled(model, backend):
    torch._dynamo.reset()  # its cache limit counts every model of the test run
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    images = torch.randn(2, 3, 32, 32)
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(1)
        expected = model(images)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(images), expected, rtol=1e-3, atol=1e-3)
    compiled(images).sum().backward()


@pytest.mark.parametrize("modulation", ["none", "instance", "ema"])
def test_compiles_without_a_graph_break(modulation):
    spec = replace(VARIANTS["mirrorla_pico"], depths=(1, 0, 0, 0))
    agrees_when_compiled(MirrorPyramid(spec, mirror=MirrorConfig(modulation=modulation)), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("modulation", ["none", "instance", "ema"])
def test_the_whole_network_compiles_with_inductor(modulation):
    agrees_when_compiled(pico(mirror=MirrorConfig(modulation=modulation)), "inductor")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_trains_under_autocast(dtype):
    model = pico()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(torch.randn(2, 3, 64, 64)).square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_weight_decay_groups_of_timm_leave_the_mirrors_out():
    from timm.optim import param_groups_layer_decay

    model = pico()
    skipped = model.no_weight_decay()
    assert {n.rsplit(".", 1)[1] for n in skipped} == {"theta", "gain", "centre", "u"}
    groups = param_groups_layer_decay(model, 0.05, skipped, layer_decay=0.5)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert not any(id(model.get_parameter(n)) in decayed for n in skipped)
    assert id(model.get_parameter("stages.0.0.ffn.fc1.weight")) in decayed
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    order = ["stem.0.0.weight", "stages.0.0.scale1", "merges.0.0.weight", "stages.1.0.scale1", "head.fc.weight"]
    scales = [scale[id(model.get_parameter(n))] for n in order]
    assert scales == sorted(scales) and scales[0] < scales[1] < scales[3] < scales[4] == 1.0


def test_layout_names_what_is_not_linear():
    assert attention_layout(pico()) == "mirror x4 (linear)"
    hybrid = pico(attention=("mirror", "mirror", "softmax", "softmax"))
    assert attention_layout(hybrid) == "mirror, mirror, softmax, softmax (not linear)"
    assert [a.kind for a in hybrid.attentions()] == ["mirror", "mirror", "softmax", "softmax", "softmax"]
    assert attention_layout(pico(attention="relu")) == "relu x4 (linear)"
    table = variant_table(64).splitlines()
    assert len(table) == 1 + len(VARIANTS) + len(HOSTS) and all("linear" in row for row in table[1:])


def test_layer_scale_and_drop_path_follow_the_table():
    base = on_meta("mirrorla_base")
    rates = [m.drop_prob for m in base.modules() if type(m).__name__ == "DropPath"]
    assert rates == sorted(rates) and rates[0] == 0.0 and rates[-1] == pytest.approx(0.4)
    assert VARIANTS["mirrorla_base"].layer_scale == (1.0, 1.0, 1e-6, 1e-6)
    scales = [b.scale1[0].item() for s in create_small_scale().stages for b in s]
    assert scales == [1.0, 1.0, pytest.approx(1e-6), pytest.approx(1e-6)]


def create_small_scale():
    return MirrorPyramid(replace(VARIANTS["mirrorla_pico"], depths=(1, 1, 1, 1), layer_scale=(1.0, 1.0, 1e-6, 1e-6)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: create_backbone("mirorla_tiny"), "'mirorla_tiny' is unknown: did you mean 'mirrorla_tiny'"),
        (lambda: create_backbone("tiny"), "did you mean 'mirrorla_tiny'"),
        (lambda: create_backbone("zzzz"), "choose one of mirrorla_pico, mirrorla_xtiny"),
        (lambda: create_backbone("resnet18", mirror=MirrorConfig(power=2)), "'resnet18' has no mirrors"),
        (lambda: pico(attention=("mirror", "softmax")), "must name four stages"),
    ],
)
def test_errors_name_the_value_and_the_mend(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_a_peer_from_timm_fits_the_same_builder():
    assert create_backbone("resnet10t", num_classes=3)(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_mirror_attention_is_the_only_attention():
    assert all(isinstance(a, MirrorAttention) for a in pico().attentions()) and len(pico().attentions()) == 5
