"""DeiT and PVT around the mirrors' attention: their published sizes, their freedom of convolutions, their cost."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from lightning_modules.backbone import BackboneConfig, build_dense
from mirrorla import HOSTS, HostConfig, MirrorAttention, create_backbone
from mirrorla.complexity import attention_layout, count_gmacs, count_parameters
from mirrorla.feature_maps import KINDS
from mirrorla.kernels import reference
from mirrorla.layers import to_map

# As published, millions of parameters: https://arxiv.org/abs/2012.12877, table 1; the PVTs with their spatial
# reduction, whose convolutions and norms ours have not.
PUBLISHED = {"mirrorla_deit_tiny": 5.7, "mirrorla_deit_small": 22.1, "mirrorla_deit_base": 86.6}


def deit(kind="mirror", **options):
    torch.manual_seed(0)
    host = HostConfig(**options)
    return create_backbone("mirrorla_deit_pico", num_classes=10, attention=kind, host=host)


def on_meta(name, **options):
    with torch.device("meta"):
        return create_backbone(name, **options)


# --- sizes and the published networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_deit_has_the_published_parameters_and_what_the_block_adds(name):
    plain = count_parameters(on_meta(name, attention="softmax", host=HostConfig(gate=False)))
    spec = HOSTS[name]
    with torch.device("meta"):
        theirs = count_parameters(timm.create_model(f"deit_{name.rsplit('_', 1)[1]}_patch16_224"))
    assert plain == theirs - spec.dim  # the class token's place in the table is part of the token here
    assert plain / 1e6 == pytest.approx(PUBLISHED[name], abs=0.06)
    gated = count_parameters(on_meta(name, attention="softmax"))
    assert gated == plain + spec.depth * (spec.dim**2 + 3 * spec.dim)  # gate's weight and bias, LayerNorm's two
    mirrors = count_parameters(on_meta(name))
    assert mirrors == gated + spec.depth * (spec.dim + 3 * spec.dim // 2)  # u; theta, gain and centre of each block


def timm_weights(theirs):
    """timm's DeiT under our names."""
    place = theirs["pos_embed"]
    side = math.isqrt(place.shape[1] - 1)
    ours = {
        "class_token": theirs["cls_token"] + place[:, :1],
        "stem.table": to_map(place[:, 1:], (side, side)),
    }
    names = {"patch_embed.": "stem.", ".attn.qkv.": ".attention.qkvg.", ".attn.proj.": ".attention.proj."}
    for name, value in theirs.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if name not in ("cls_token", "pos_embed"):
            ours[name] = value
    return ours


def test_the_softmax_host_without_gate_is_timms_deit():
    torch.manual_seed(0)
    theirs = timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=10).eval()
    host = HostConfig(gate=False, image_size=64)
    ours = create_backbone("mirrorla_deit_tiny", num_classes=10, attention="softmax", host=host).eval()
    ours.load_state_dict(timm_weights(theirs.state_dict()))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "depths", "millions"),
    [
        ("mirrorla_pvt_tiny", (2, 2, 2, 2), 12.2),
        ("mirrorla_pvt_small", (3, 4, 6, 3), 21.8),
        ("mirrorla_pvt_medium", (3, 4, 18, 3), 37.9),
        ("mirrorla_pvt_large", (3, 8, 27, 3), 51.4),
    ],
)
def test_pvts_follow_the_published_table(name, depths, millions):
    spec = HOSTS[name]
    assert (spec.depths, spec.dims, spec.heads) == (depths, (64, 128, 320, 512), (1, 2, 5, 8))
    assert spec.mlp_ratios == (8, 8, 4, 4)
    assert count_parameters(on_meta(name)) / 1e6 == pytest.approx(millions, abs=0.06)
    # Published PVTs: 2-d spatial reduction convolutions R x R of C to C channels and a norm, R = 8, 4, 2; a class token
    # and its place in the last stage; and neither gate nor depthwise term.
    plain = count_parameters(on_meta(name, attention="softmax", host=HostConfig(gate=False)))
    lepe = sum(depth * 26 * dim for depth, dim in zip(depths, spec.dims, strict=True))
    reduction = sum(
        depth * (r * r * dim * dim + 3 * dim) for depth, dim, r in zip(depths, spec.dims, (8, 4, 2), strict=False)
    )
    published = {"tiny": 13.2, "small": 24.5, "medium": 44.2, "large": 61.4}[name.rsplit("_", 1)[1]]
    assert (plain - lepe + reduction + 2 * 512) / 1e6 == pytest.approx(published, abs=0.1)


def test_cost_of_a_host_is_linear_in_the_pixels_unless_softmax():
    # The class token is one token at every size, so DeiT's ratio falls just short of 4.
    linear, softmax = on_meta("mirrorla_deit_pico"), on_meta("mirrorla_deit_pico", attention="softmax")
    assert 3.9 < count_gmacs(linear, 128) / count_gmacs(linear, 64) < 4
    assert count_gmacs(softmax, 128) / count_gmacs(softmax, 64) > 5


# --- DeiT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_deit_has_no_convolution_but_its_patches_and_learns_everywhere(kind):
    model = deit(kind)
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)] == ["stem.proj"]
    assert attention_layout(model) == f"{kind} ({'not linear' if kind == 'softmax' else 'linear'})"
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_without_positions_a_deit_cannot_tell_the_order_of_patches(kind):
    images = torch.randn(2, 3, 24, 16)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    patches = F.unfold(images, 4, stride=4)[..., order]
    shuffled = F.fold(patches, images.shape[2:], 4, stride=4)
    model = deit(kind, positions="none").eval()
    torch.testing.assert_close(
        model.forward_features(shuffled)[:, 1:], model.forward_features(images)[:, 1:][:, order], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(model(shuffled), model(images), rtol=1e-4, atol=1e-5)
    for positions in ("learned", "roped"):
        model = deit(kind, positions=positions, class_token=False).eval()
        with torch.no_grad():  # as far from its start as after a training
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 or "table" in name:
                    parameter.mul_(5)
        assert (model(shuffled) - model(images)).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["learned", "roped", "none"])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 30), (64, 64), (72, 40)])
def test_any_number_of_tokens(positions, height, width):
    model = deit("mirror", positions=positions).eval()
    images = torch.randn(2, 3, height, width)
    N = math.ceil(height / 4) * math.ceil(width / 4)
    assert model.forward_features(images).shape == (2, N + 1, 64)
    assert model(images).shape == (2, 10) and model(images).isfinite().all()


def test_patch_and_image_size_are_free_and_the_table_is_used_as_it_is_at_its_own_size():
    model = deit(patch_size=8, image_size=48)
    assert model.stem.table.shape == (1, 64, 6, 6)
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        model.stem.table.normal_()
    torch.testing.assert_close(model.stem(images), model.stem.proj(images) + model.stem.table)
    assert model.stem(torch.randn(1, 3, 96, 20)).shape == (1, 64, 12, 3)


def test_a_class_token_attends_but_has_no_say_in_the_statistics_and_no_place():
    model = deit(positions="roped").eval()
    layer = model.attentions()[0]
    with torch.no_grad():
        layer.mirrors.gain.fill_(3.0)
        layer.qkvg.weight.mul_(10)
    x = torch.randn(2, 13, 64)
    x[:, 0] *= 30  # would turn every mirror
    q, k, v, gate = layer.project(x)
    tables = layer.mirrors.token_tables(q[:, 1:], k[:, 1:], None, None)
    cos, sin = layer.rope((3, 4), x.device)
    rope = torch.cat((torch.ones(1, 16), cos)), torch.cat((torch.zeros(1, 16), sin))
    y = reference.mirror_linear_attention(q, k, v, mirror=tables, q_rope=rope, k_rope=rope).flatten(2)
    expected = layer.proj(layer.norm(y) * F.silu(gate))
    torch.testing.assert_close(layer(x, (3, 4), prefix=1), expected, rtol=1e-4, atol=1e-5)


def test_the_depthwise_term_skips_a_class_token():
    torch.manual_seed(0)
    layer = MirrorAttention(16, 2, kind="relu", gate=False).double()
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    without = MirrorAttention(16, 2, kind="relu", gate=False, lepe=False).double()
    without.load_state_dict({n: p for n, p in layer.state_dict().items() if not n.startswith("lepe")})
    term = F.linear(layer(x, (3, 4), prefix=1) - without(x, (3, 4), prefix=1), torch.linalg.inv(layer.proj.weight))
    values = layer.project(x)[2].flatten(2)
    torch.testing.assert_close(term[:, :1], torch.zeros_like(term[:, :1]), rtol=0, atol=1e-9)
    expected = layer.lepe(to_map(values[:, 1:], (3, 4))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(term[:, 1:], expected, rtol=1e-8, atol=1e-9)


# --- PVT --------------------------------------------------------------------------------------------------------------


def pvt(**options):
    torch.manual_seed(0)
    return create_backbone("mirrorla_pvt_tiny", num_classes=10, **options)


def test_a_pvt_gives_maps_of_any_size_and_learns_everywhere():
    model = pvt(attention=("mirror", "polar", "norm_aware", "softmax"))
    assert attention_layout(model) == "mirror, polar, norm_aware, softmax (not linear)"
    images = torch.randn(2, 3, 33, 47)
    for found, channels, stride in zip(model.forward_features(images), model.channels, model.strides, strict=True):
        assert found.shape == (2, channels, math.ceil(33 / stride), math.ceil(47 / stride))
    model(images).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_pvt_is_a_dense_backbone_by_both_ways():
    maps = timm.create_model("mirrorla_pvt_tiny", features_only=True)
    assert maps.feature_info.channels() == [64, 128, 320, 512] and maps.feature_info.reduction() == [4, 8, 16, 32]
    assert not any("head" in name for name, _ in maps.named_parameters())
    config = BackboneConfig("mirrorla_pvt_tiny", attention="elu")
    dense = build_dense(config, (4, 8, 16, 32), frozen_stages=2)
    assert {layer.kind for layer in dense.body.attentions()} == {"elu"}
    outputs = dense(torch.randn(1, 3, 64, 64))
    assert [(m.shape[1], 64 // m.shape[-1]) for m in outputs] == [(64, 4), (128, 8), (320, 16), (512, 32)]
    torch.stack([m.square().sum() for m in outputs]).sum().backward()
    without = {n.split(".")[1] + n.split(".")[2] for n, p in dense.named_parameters() if p.grad is None}
    assert without == {"stemproj", "stemnorm", "stemtable", "stages0", "stages1", "merges0"}
