"""The operator against its twin: outputs, every gradient, compiled, under autocast, and what it refuses."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mirrorla.kernels import blocks, op, reference
from mirrorla.positions import rope_tables
from tests.op_cases import TOLERANCE, assert_close, case, results

ROOT = Path(__file__).resolve().parent.parent


OPTIONS = list(itertools.product(("images", "one", None), (True, False), (True, False)))


@pytest.mark.parametrize("block", [2**19, 48], ids=["whole", "blocks"])
@pytest.mark.parametrize("shares", [1, 3], ids=["one", "three"])
@pytest.mark.parametrize("power", [1.0, 2.0, 1.5], ids=lambda p: f"p{p:g}")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f64", "f32", "bf16"])
@pytest.mark.parametrize("mirror,rope,mask", OPTIONS)
def test_output_and_every_gradient_are_the_references(mirror, rope, mask, dtype, power, shares, block, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", block)
    tensors, options = case(dtype=dtype, mirror=mirror, rope=rope, mask=mask)
    options |= {"power": power, "eps": 1e-2}
    if shares > 1:
        options["query_mirrors"] = [case(dtype=dtype, seed=seed)[1]["mirror"] for seed in range(1, 1 + shares)]
    exact = results(reference.mirror_linear_attention, [x.double() for x in tensors], options)
    found = results(op.mirror_linear_attention, tensors, options)
    assert found["out"].is_contiguous() and found["out"].dtype == dtype
    assert_close(found, exact, TOLERANCE[dtype])


SHAPES = [(1, 1, 2, 1, 8, 2), (3, 16, 16, 1, 8, 8), (1, 33, 20, 4, 6, 3), (2, 5, 64, 2, 24, 40), (5, 64, 64, 8, 32, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("block", [2**19, 100], ids=["whole", "blocks"])
def test_every_shape_is_served(shape, block, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", block)
    tensors, options = case(*shape, mask=False)
    exact = results(reference.mirror_linear_attention, [x.double() for x in tensors], options)
    assert_close(results(op.mirror_linear_attention, tensors, options), exact, 2e-5)


def test_blocks_cover_every_token_once(monkeypatch):
    for B, N, H, d, limit in ((1, 1, 1, 2, 1), (5, 7, 2, 4, 100), (5, 7, 2, 4, 40), (3, 10, 1, 2, 6), (2, 0, 1, 2, 8)):
        monkeypatch.setattr(blocks, "CPU_BLOCK", limit)
        seen = torch.zeros(B, N)
        for images, tokens in blocks.blocks(torch.empty(B, N, H, d)):
            seen[images, tokens] += 1
            assert seen[images, tokens].numel() * H * d <= max(limit, H * d)
        assert (seen == 1).all()


@pytest.mark.parametrize("transposed", [False, True], ids=["odd", "last"])
def test_any_strides_are_read(transposed):
    tensors, options = case(mask=False)
    if transposed:
        strange = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
    else:
        strange = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in tensors]  # odd offset and odd strides
    assert_close(
        results(op.mirror_linear_attention, strange, options),
        results(op.mirror_linear_attention, tensors, options),
        2e-6,
    )


def test_halves_are_the_whole_with_their_gradients():
    tensors, options = case(dtype=torch.float64)

    def halves(q, k, v, mirror, q_rope, k_rope, mask):
        S, s, count = op.kv_state(k, v, mirror=mirror, rope=k_rope, mask=mask)
        assert torch.equal(count, mask.sum(1).double())
        return op.apply_state(q, S, s, mirror=mirror, rope=q_rope)

    expected = results(reference.mirror_linear_attention, tensors, options)
    assert_close(results(halves, tensors, options), expected, 1e-12)


def test_states_of_two_devices_add_up_by_their_counts():
    (_, k, v), _ = case()
    parts = [op.kv_state(k[:, part], v[:, part]) for part in (slice(0, 4), slice(4, 9))]
    whole = op.kv_state(k, v)
    total = sum(part[2] for part in parts)
    torch.testing.assert_close(
        sum(S * n[:, None, None, None] for S, _, n in parts) / total[:, None, None, None], whole[0]
    )
    torch.testing.assert_close(sum(s * n[:, None, None] for _, s, n in parts) / total[:, None, None], whole[1])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("mirror", ["images", None])
def test_masked_keys_do_not_matter_and_get_no_gradient_even_if_they_are_not_finite(bad, mirror):
    (q, k, v), options = case(mirror=mirror, rope=False)
    mask = options["mask"]
    mask[:, 0], mask[:, 5] = True, False
    spoilt = [q, *(x.masked_fill(~mask[:, :, None, None], bad) for x in (k, v))]
    found = results(op.mirror_linear_attention, spoilt, options)
    assert_close(found, results(op.mirror_linear_attention, (q, k, v), options), 1e-6)
    assert_close(results(reference.mirror_linear_attention, spoilt, options), found, 5e-6)
    assert not found["k"][~mask].any() and not found["v"][~mask].any()


def test_an_image_without_keys_and_tokens_without_features_give_zero():
    (q, k, v), options = case()
    options["mask"][0] = False
    q = torch.cat((q[:, :3], -q[:, 3:].abs()), dim=1)
    found = results(op.mirror_linear_attention, (q, k, v), {"mask": options["mask"]})
    assert not found["out"][0].any() and not found["out"][:, 3:].any() and found["out"][1, :3].any()
    assert all(x.isfinite().all() for x in found.values())


def test_large_values_of_many_tokens_stay_finite_in_half_precision():
    for dtype, scale in ((torch.bfloat16, 1e4), (torch.float16, 1e2)):
        (q, k, v), _ = case(1, 3000, 3000, 1, 16, 16, dtype=dtype, mirror=None, rope=False, mask=False)
        found = results(op.mirror_linear_attention, (q * scale, k * scale, v), {})
        exact = results(
            reference.mirror_linear_attention, [x.double() * s for x, s in ((q, scale), (k, scale), (v, 1))], {}
        )
        assert_close({"out": found["out"]}, {"out": exact["out"]}, 2**-8)
        assert all(x.isfinite().all() for x in found.values())


def leaves(dtype=torch.float64):
    (q, k, v), options = case(B=2, N=3, M=4, H=2, dk=4, dv=2, dtype=dtype)
    options["mask"][:, 0] = True
    return [x.detach().clone().requires_grad_() for x in (q, k, v, *options.pop("mirror"))], options | {"eps": 1e-1}


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("power", [1.0, 2.0], ids=["p1", "p2"])
def test_gradients_and_their_gradients_agree_with_finite_differences(check, power):
    inputs, options = leaves()

    def attend(q, k, v, cos, sin):
        return op.mirror_linear_attention(q, k, v, mirror=(cos, sin), power=power, **options)

    def state(k, v, cos, sin):
        return op.kv_state(k, v, mirror=(cos, sin), rope=options["k_rope"], mask=options["mask"], power=power)[:2]

    def read(q, S, s, cos, sin):
        return op.apply_state(q, S, s, mirror=(cos, sin), rope=options["q_rope"], power=power, eps=options["eps"])

    assert check(attend, inputs)
    assert check(state, inputs[1:])
    S, s, _ = op.kv_state(*(x.detach() for x in inputs[1:3]))
    assert check(read, [inputs[0], S.requires_grad_(), s.requires_grad_(), *inputs[3:]])


def test_second_derivatives_of_self_attention_to_one_tensor_are_the_references():
    x = case(N=6, M=6, dk=8, dv=8, dtype=torch.float64)[0][0].detach().requires_grad_()
    mirror = [t.requires_grad_() for t in case(dtype=torch.float64)[1]["mirror"]]
    seconds = []
    for attend in (op.mirror_linear_attention, reference.mirror_linear_attention):
        out = attend(x, x, x, mirror=tuple(mirror))
        first = torch.autograd.grad(out.square().sum(), [x, *mirror], create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *mirror]))
    for found, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


INTERPRETER = """
import sys, torch
from mirrorla.kernels import op, operators, reference
x = torch.randn(1, 20, 2, 16, generator=torch.Generator().manual_seed(0))
assert operators.uses_triton(x, 16, 16) and not operators.uses_triton(x.double(), 16, 16)
assert not operators.uses_triton(x, 4, 16), "narrow heads run as plain PyTorch"
angle = torch.rand(1, 2, 8)
found, wanted = [], []
for attend, values in ((op.mirror_linear_attention, found), (reference.mirror_linear_attention, wanted)):
    q, cos, sin = (t.clone().requires_grad_() for t in (x, angle.cos(), angle.sin()))
    out = attend(q, q, q, mirror=(cos, sin))
    values += [out, *torch.autograd.grad(out.square().sum(), (q, cos, sin))]
assert "mirrorla.kernels.forward" in sys.modules and "mirrorla.kernels.backward" in sys.modules
for a, b in zip(found, wanted):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
"""


def test_the_interpreter_runs_the_kernels_through_the_same_operator():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETER], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


(Q, K, V), OPTIONS_OF_ERRORS = case(mask=False)
COS, SIN = OPTIONS_OF_ERRORS["mirror"]
ROPE = OPTIONS_OF_ERRORS["q_rope"]


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ((Q[0], K, V), {}, r"q must be \(B, N, H, dk\), got \(7, 3, 8\)"),
        ((Q, K[0], V), {}, r"k must be \(B, M, H, dk\), got \(9, 3, 8\)"),
        ((Q, K, V[0]), {}, r"v must be \(B, M, H, dv\), got \(9, 3, 6\)"),
        ((Q, K[:1], V[:1]), {}, r"k must be \(2, M, 3, 8\), as q has images, heads and channels; got \(1, 9, 3, 8\)"),
        ((Q, K[:, :, :2], V[:, :, :2]), {}, r"k must be \(2, M, 3, 8\).* got \(2, 9, 2, 8\)"),
        ((Q, K[..., :6], V), {}, r"k must be \(2, M, 3, 8\).* got \(2, 9, 3, 6\)"),
        ((Q, K, V[:, :8]), {}, r"v must be \(2, 9, 3, dv\), as k has images, keys and heads; got \(2, 8, 3, 6\)"),
        ((Q[..., :7], K[..., :7], V), {}, r"q \(2, 7, 3, 7\) has 7 channels: maps act on pairs, choose an even number"),
        ((Q[..., :0], K[..., :0], V), {}, r"q \(2, 7, 3, 0\) has 0 channels"),
        ((Q.long(), K, V), {}, r"q must hold floating-point numbers, got int64 \(2, 7, 3, 8\)"),
        ((Q, K.double(), V.double()), {}, "k is float64 and q is float32: cast them to one dtype, or use torch.auto"),
        ((Q, K, V.bfloat16()), {}, "v is bfloat16 and k is float32: cast them to one dtype"),
        ((Q, K, V.to("meta")), {}, "v is on meta and k on cpu: move them to one device"),
        ((Q, K.to("meta"), V.to("meta")), {}, "k is on meta and q on cpu"),
        ((Q, K, V), {"eps": -1e-6}, "eps -1e-06 must be 0 or more, for example 1e-6"),
        ((Q, K, V), {"eps": float("nan")}, "eps nan must be 0 or more"),
        ((Q, K, V), {"query_mirrors": [(COS, SIN)] * 4}, "query_mirrors are 4, no divisor of the 6 channels of v"),
        ((Q, K, V), {"query_mirrors": []}, "query_mirrors are 0, no divisor of the 6 channels of v"),
        ((Q, K, V), {"query_mirrors": [(COS[:, :2], SIN)]}, r"mirror tables must be \(2 or 1, 3, 4\) for q"),
        ((Q, K, V), {"power": 0.5}, "power 0.5 is below 1: choose 1"),
        ((Q, K, V), {"mirror": (COS[:, :2], SIN)}, r"mirror tables must be \(2 or 1, 3, 4\) for q .*, got \(2, 2, 4\)"),
        ((Q, K, V), {"mirror": (COS, SIN.to("meta"))}, r"a table of shape \(2, 3, 4\) is on meta and q on cpu"),
        ((Q, K, V), {"q_rope": ROPE}, "k_rope is missing: positions need the tables of both queries and keys"),
        ((Q, K, V), {"k_rope": rope_tables(1, 9, 8)}, "q_rope is missing"),
        ((Q, K, V), {"q_rope": ROPE, "k_rope": ROPE}, r"k_rope tables must be \(9, 4\) for k .*, got \(7, 4\)"),
        (
            (Q, K, V),
            {"q_rope": (ROPE[0].clone().requires_grad_(), ROPE[1]), "k_rope": rope_tables(1, 9, 8)},
            r"q_rope tables \(7, 4\) require a gradient, which they have none: detach them",
        ),
        ((Q, K, V), {"mask": torch.ones(2, 7).bool()}, r"mask must be bool \(2, 9\) on cpu, .* bool \(2, 7\)"),
        ((Q, K, V), {"mask": torch.ones(2, 9)}, r"mask must be bool \(2, 9\) .*; got float32 \(2, 9\) on cpu"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_in_one_line(tensors, options, message):
    with pytest.raises(ValueError, match=message) as error:
        op.mirror_linear_attention(*tensors, **options)
    assert "\n" not in str(error.value)


def test_states_that_do_not_fit_are_named_in_one_line():
    S, s, _ = op.kv_state(K, V)
    for state, mean, message in (
        (S[0], s, r"S must be \(2, 3, 8, dv\) for queries \(2, 7, 3, 8\), got \(3, 8, 6\)"),
        (S, s[..., :4], r"s must be \(2, 3, 8\) for queries .*, got \(2, 3, 4\)"),
        (S.double(), s, "S must be float32 on cpu, got float64 on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            op.apply_state(Q, state, mean)
