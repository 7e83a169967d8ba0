"""The peers of mirror attention in its block: same projections, gate and masks; what diagnostics see of them; names."""

import math

import pytest
import torch

from mirrorla import MirrorAttention, MirrorConfig
from mirrorla.diagnostics import features, mirror_metrics, probe_layers
from mirrorla.feature_maps import KINDS, PEERS, FeatureMap, check_kind, layout_of
from mirrorla.kernels.reference import apply_state, kv_state

LINEAR = [kind for kind in PEERS if kind != "softmax"]
NO_MIRRORS = MirrorConfig(modulation="none", cross_head=False, block_mirror=False)


def layer(kind, seed=0, **options):
    torch.manual_seed(seed)
    attention = MirrorAttention(24, 3, kind=kind, **options)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attention


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_relu_is_mirror_attention_without_mirrors_bit_for_bit(autocast):
    x, mask = torch.randn(2, 20, 24), torch.arange(20).expand(2, 20) < 17
    results = []
    for attention in (layer("relu"), layer("mirror", mirror=NO_MIRRORS)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = attention(x, (4, 5), mask=mask)
        out.float().square().sum().backward()
        results.append([out, *(p.grad for p in attention.parameters())])
        assert len(results[0]) == len(results[-1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", PEERS)
def test_every_kind_lives_in_the_same_block(kind):
    attention = layer(kind).eval()
    shared = {n for n, _ in layer("mirror", mirror=NO_MIRRORS).named_parameters()}
    own = {n for n, _ in attention.named_parameters()} - shared
    assert own == ({"map.power"} if kind == "polar" else set()) == attention.no_weight_decay()
    x = torch.randn(2, 20, 24)
    out = attention(x, (4, 5))
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in attention.parameters())
    order = torch.randperm(20)
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order], rtol=1e-4, atol=1e-5)
    mask = torch.arange(20).expand(2, 20) < 12
    torch.testing.assert_close(
        attention(x, (5, 4), mask=mask)[:, :12], attention(x[:, :12], (3, 4)), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(attention.fold()(x, (4, 5)), out)
    assert attention(x, context=x[:, :6]).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", PEERS)
def test_autocast_stays_close_to_fp32(kind, dtype):
    attention, x = layer(kind).eval(), torch.randn(2, 20, 24)
    exact = attention(x, (4, 5))
    with torch.autocast("cpu", dtype=dtype):
        out = attention(x, (4, 5))
    assert out.dtype == dtype
    assert (out - exact).norm() / exact.norm() < {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("kind", PEERS)
def test_the_compiled_layer_has_no_graph_break_and_the_same_gradients(kind):
    attention = layer(kind)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid in ((4, 5), (6, 7)):
        x = torch.randn(2, grid[0] * grid[1], 24)
        found, expected = compiled(x, grid), attention(x, grid)
        torch.testing.assert_close(found, expected)
        parameters = list(attention.parameters())
        grads = [torch.autograd.grad(out.square().sum(), parameters) for out in (found, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


class OneLayer(torch.nn.Module):
    """What diagnostics take for a network: tokens made of an image's pixels."""

    def __init__(self, kind):
        super().__init__()
        self.attention = layer(kind)

    def forward(self, images):
        side = images.shape[-1]
        return self.attention(images.repeat(1, 8, 1, 1).flatten(2).transpose(1, 2), (side, side))


@pytest.mark.parametrize("kind", LINEAR)
def test_diagnostics_look_at_the_features_the_layer_attends_with(kind):
    network, images = OneLayer(kind).eval(), torch.randn(2, 3, 4, 4)
    [(attention, probe)] = probe_layers(network, images)
    rope = attention.map.tables(probe.rope)
    parts = [apply_state(q, *kv_state(k, v, rope=rope)[:2], rope=rope) for q, k, v in features(attention, probe)]
    x = images.repeat(1, 8, 1, 1).flatten(2).transpose(1, 2)
    q, k, v, _ = attention.project(x)
    found = attention.map(q, k, v, probe.rope, probe.rope, None)
    torch.testing.assert_close(torch.cat(parts, -1), found, rtol=1e-4, atol=1e-5)
    metrics = mirror_metrics(network, images)
    assert all(math.isfinite(value) and value >= 0 for value in metrics.values())
    assert ("mirror/retained_energy/q/layer_0" in metrics) == (kind in ("relu", "focused"))
    assert {"attn/entropy/layer_0", "attn/erank_kv/layer_0", "attn/denominator_min/layer_0"} <= metrics.keys()
    assert not any("u_head_energy" in tag or "orthogonality" in tag for tag in metrics)
    assert metrics["attn/entropy/layer_0"] <= 1 + 1e-6 and metrics["attn/erank_kv/layer_0"] <= 8


def test_layouts_name_every_stage():
    assert layout_of("relu", 4) == ("relu",) * 4 and layout_of("elu", 1) == ("elu",)
    assert layout_of(["mirror", "mirror", "softmax", "softmax"], 4) == ("mirror", "mirror", "softmax", "softmax")
    assert set(KINDS) == {"mirror", *PEERS}
    assert all(issubclass(PEERS[kind], FeatureMap) for kind in LINEAR)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: check_kind("focussed"), "attention kind 'focussed' is unknown: did you mean 'focused'"),
        (lambda: check_kind("normaware"), "did you mean 'norm_aware'"),
        (lambda: check_kind("zz"), "'zz' is unknown: choose one of mirror, relu, elu, focused, polar, norm_aware, sof"),
        (lambda: layout_of(["mirror", "relu"], 4), r"attention \['mirror', 'relu'\] must name four stages"),
        (lambda: layout_of(["relu"] * 4, 1), "must name one stage, or be one kind for all"),
        (lambda: layout_of(["mirror", "mirror", "rely", "relu"], 4), "did you mean 'relu'"),
    ],
)
def test_errors_name_the_value_and_the_mend(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
