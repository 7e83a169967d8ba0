import math

import pytest
import torch

from mirrorla import MirrorAttention, MirrorConfig
from mirrorla.kernels.reference import mirror_linear_attention

ALL_CONFIGS = [
    MirrorConfig(modulation=modulation, cross_head=cross, block_mirror=blocks, power=power, query_mirrors=count)
    for modulation in ("none", "instance", "ema")
    for cross in (False, True)
    for blocks in (False, True)
    for power, count in ((1.0, 1), (2.0, 1), (2.0, 2))
    if blocks or (modulation == "none" and count == 1)
]


def name(config):
    mirrors = f"cross{config.cross_head:d}-block{config.block_mirror:d}x{config.query_mirrors}"
    return f"{config.modulation}-{mirrors}-p{config.power:g}"


def layer(dim=24, num_heads=3, seed=0, **options):
    torch.manual_seed(seed)
    attention = MirrorAttention(dim, num_heads, **options)
    with torch.no_grad():  # away from every special start
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attention


def tokens(B=2, N=20, C=24, seed=1):
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=name)
def test_every_configuration_runs_forward_and_backward(config):
    attention = layer(mirror=config)
    out = attention(tokens(), (4, 5))
    assert out.shape == (2, 20, 24)
    out.square().sum().backward()
    for parameter_name, parameter in attention.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=name)
def test_folding_is_exact(config):
    attention = layer(mirror=config)
    if config.modulation == "ema":
        attention(tokens(seed=5), (4, 5))  # let the running statistic move
    attention.eval()
    folded = attention.fold()
    assert (folded(tokens(), (4, 5)) - attention(tokens(), (4, 5))).abs().max() < 1e-5
    left = {n for n, _ in folded.named_parameters() if n.startswith("mirrors.")}
    several, modulated = config.query_mirrors > 1, config.modulation != "none"
    stays = {"theta": several or config.modulation == "instance", "offset": several}
    stays |= dict.fromkeys(("gain", "centre"), modulated and (several or config.modulation == "instance"))
    assert left == {f"mirrors.{name}" for name, is_there in stays.items() if is_there}


def test_folding_leaves_the_original_alone():
    attention = layer(mirror=MirrorConfig(modulation="none"))
    before = {k: v.clone() for k, v in attention.state_dict().items()}
    attention.fold()
    assert attention.training
    for key, value in attention.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_neutral_start_is_plain_relu_linear_attention():
    torch.manual_seed(0)
    attention = MirrorAttention(24, 3, mirror=MirrorConfig(cross_head=False))
    attention.mirrors.theta.data.fill_(0.75 * math.pi)  # without the tie-breaking noise
    x = tokens()
    q, k, v, _ = attention.project(x)
    tables = attention.mirrors.token_tables(q, k, None, None)
    torch.testing.assert_close(
        mirror_linear_attention(q, k, v, mirror=tables), mirror_linear_attention(q, k, v), rtol=1e-5, atol=1e-6
    )
    # With positions, swapping the channels of every pair is turning the other way round.
    rope = attention.rope((4, 5), x.device)
    backwards = (rope[0], -rope[1])
    torch.testing.assert_close(
        mirror_linear_attention(q, k, v, mirror=tables, q_rope=rope, k_rope=rope),
        mirror_linear_attention(q, k, v, q_rope=backwards, k_rope=backwards),
        rtol=1e-5,
        atol=1e-6,
    )


def test_neutral_start_lies_near_the_neutral_angle_and_modulation_starts_off():
    mirrors = MirrorAttention(64, 2).mirrors
    assert (mirrors.theta - 0.75 * math.pi).abs().max() < 0.15
    rho = torch.rand(4, 2, 16)
    torch.testing.assert_close(mirrors.angles(rho), mirrors.theta.expand(4, -1, -1))


def test_uniform_start_covers_half_a_turn():
    theta = MirrorAttention(512, 2, mirror=MirrorConfig(init="uniform")).mirrors.theta
    assert theta.min() >= 0 and theta.max() <= math.pi and theta.std() > 0.5


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=name)
def test_a_padding_mask_changes_nothing_for_the_valid_tokens(config):
    attention = layer(mirror=config).eval()
    x = tokens(N=12)
    padded = torch.cat((x, 50 * torch.randn(2, 8, 24)), dim=1)  # two more rows of four
    mask = torch.arange(20).expand(2, 20) < 12
    expected = attention(x, (3, 4))
    torch.testing.assert_close(attention(padded, (5, 4), mask=mask)[:, :12], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mirror", "softmax"])
def test_a_mask_without_a_grid_equals_the_shorter_sequence(kind):
    attention = layer(kind=kind).eval()
    mask = torch.arange(20).expand(2, 20) < 13
    torch.testing.assert_close(
        attention(tokens(), mask=mask)[:, :13], attention(tokens()[:, :13]), rtol=1e-4, atol=1e-5
    )


def test_without_a_grid_the_layer_is_permutation_equivariant():
    attention = layer().eval()
    order = torch.randperm(20)
    torch.testing.assert_close(attention(tokens()[:, order]), attention(tokens())[:, order], rtol=1e-4, atol=1e-5)


def test_cross_attention_to_itself_is_self_attention_without_the_local_term():
    attention = layer().eval()
    x = tokens()
    torch.testing.assert_close(attention(x, context=x), attention(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        attention.lepe.weight.zero_(), attention.lepe.bias.zero_()
    torch.testing.assert_close(
        attention(x, (4, 5), context=x, context_grid=(4, 5)), attention(x, (4, 5)), rtol=1e-5, atol=1e-6
    )


def test_cross_attention_accepts_another_length_and_a_mask_of_the_context():
    attention = layer().eval()
    context, mask = tokens(N=9, seed=3), torch.arange(9).expand(2, 9) < 6
    out = attention(tokens(), (4, 5), context=context, context_grid=(3, 3), mask=mask)
    assert out.shape == (2, 20, 24)
    shorter = attention(tokens(), (4, 5), context=context[:, :6], context_grid=(2, 3))
    torch.testing.assert_close(out, shorter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("N", [1, 2])
def test_few_tokens_stay_finite_with_gradients(N):
    attention = layer()
    out = attention(tokens(N=N), (1, N))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_stays_close_to_fp32(dtype):
    attention = layer(mirror=MirrorConfig(modulation="none")).eval()
    exact = attention(tokens(), (4, 5))
    with torch.autocast("cpu", dtype=dtype):
        out = attention(tokens(), (4, 5))
    assert out.dtype == dtype
    assert (out - exact).norm() / exact.norm() < {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]


def test_gradcheck_of_the_whole_layer():
    torch.manual_seed(0)
    attention = MirrorAttention(8, 2).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in attention.named_parameters() if n.startswith(("mirrors.", "qkvg."))]
    leaves = [attention.get_parameter(n).detach().clone().requires_grad_() for n in names]

    def run(x, *values):
        return torch.func.functional_call(attention, dict(zip(names, values, strict=True)), (x, (2, 2)))

    assert torch.autograd.gradcheck(run, (x, *leaves))


def test_the_compiled_layer_has_no_graph_break_and_the_same_gradients():
    attention = layer()
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid in ((4, 5), (6, 7)):
        x = tokens(N=grid[0] * grid[1])
        found, expected = compiled(x, grid), attention(x, grid)
        torch.testing.assert_close(found, expected)
        parameters = list(attention.parameters())
        grads = [torch.autograd.grad(out.square().sum(), parameters) for out in (found, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_ema_remembers_in_training_and_is_static_in_evaluation():
    attention = layer(mirror=MirrorConfig(modulation="ema"))
    before = attention.mirrors.running_rho.clone()
    attention(tokens(), (4, 5))
    after = attention.mirrors.running_rho.clone()
    assert not torch.equal(before, after)
    attention.eval()
    # Static: one image's output does not depend on the others of the batch, nor does the statistic move.
    one = attention(tokens()[:1], (4, 5))
    torch.testing.assert_close(attention(tokens(), (4, 5))[:1], one, rtol=1e-5, atol=1e-6)
    assert torch.equal(attention.mirrors.running_rho, after)


def test_no_weight_decay_names_every_mirror_parameter():
    assert MirrorAttention(24, 3).no_weight_decay() == {
        "mirrors.theta",
        "mirrors.gain",
        "mirrors.centre",
        "mirrors.u",
    }


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MirrorAttention(30, 4), "dim 30 is not divisible by num_heads 4"),
        (lambda: MirrorAttention(15, 3), "head width dim/num_heads = 15/3 = 5 is odd"),
        (lambda: MirrorAttention(16, 2, kind="sofmax"), "'sofmax' is unknown"),
        (lambda: MirrorConfig(modulation="batch"), "'batch' is unknown: choose one of none, instance, ema"),
        (lambda: MirrorConfig(init="random"), "'random' is unknown"),
        (
            lambda: MirrorConfig(query_mirrors=0),
            "query_mirrors 0 must be 1 or more, and 1 without mirror.block_mirror",
        ),
        (lambda: MirrorConfig(modulation="none", block_mirror=False, query_mirrors=2), "query_mirrors 2 must be 1"),
        (
            lambda: MirrorAttention(24, 3, mirror=MirrorConfig(query_mirrors=3)),
            "query_mirrors 3 does not divide the head width 8: give a divisor",
        ),
        (lambda: MirrorConfig(power=0.5), "power 0.5 is below 1"),
        (lambda: MirrorConfig(power=float("nan")), "power nan"),
        (lambda: MirrorConfig(block_mirror=False), 'set modulation to "none"'),
        (lambda: layer()(tokens(), (4, 4)), "grid 4x4 has 16 cells for 20 tokens"),
        (lambda: layer()(tokens(C=23)), r"x must be \(B, N, 24\), got \(2, 20, 23\)"),
        (lambda: layer()(tokens(), mask=torch.ones(2, 20)), "mask must be bool"),
        (lambda: layer()(tokens(), context=tokens(N=9), mask=torch.ones(2, 20).bool()), r"mask must be bool \(2, 9\)"),
    ],
)
def test_errors_name_the_value_and_the_mend(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
