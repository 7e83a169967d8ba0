"""The PyTorch twin of mirrored linear attention against the quadratic form and finite differences."""

import pytest
import torch

from mirrorla.kernels.reference import apply_state, feature_map, kv_state, mirror_linear_attention
from mirrorla.mirrors import block_mirror
from mirrorla.positions import rope_tables, rotate


def quadratic(q, k, v, mirror=None, q_rope=None, k_rope=None, mask=None, power=1.0, eps=1e-6):
    """The O(N·M) definition, written without sharing code for the state."""
    phi_q, phi_k = feature_map(q, mirror, power), feature_map(k, mirror, power)
    keep = torch.ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
    plain = torch.einsum("bnhd,bmhd->bhnm", phi_q, phi_k)
    roped = plain
    if q_rope is not None:
        roped = torch.einsum("bnhd,bmhd->bhnm", rotate(phi_q, *q_rope), rotate(phi_k, *k_rope))
    keep = keep[:, None, None, :].to(plain.dtype)
    count = keep.sum(-1, keepdim=True).clamp(min=1)
    weights = roped * keep / count / ((plain * keep / count).sum(-1, keepdim=True) + eps)
    return torch.einsum("bhnm,bmhe->bnhe", weights, v)


def read_through(mirror_of_queries, q, k, v, *, mirror, **options):
    """`quadratic` with a mirror of the queries' own: both are reflected beforehand, and nothing inside."""
    reflected_q = block_mirror(q, *(table.unsqueeze(1) for table in mirror_of_queries))
    reflected_k = k if mirror is None else block_mirror(k, *(table.unsqueeze(1) for table in mirror))
    return quadratic(reflected_q, reflected_k, v, **options)


def inputs(B=2, N=7, M=9, H=3, dk=8, dv=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, n, H, dk, dtype=dtype, generator=generator) for n in (N, M))
    v = torch.randn(B, M, H, dv, dtype=dtype, generator=generator)
    angle = torch.rand(B, H, dk // 2, dtype=dtype, generator=generator) * 3
    return q, k, v, (torch.cos(2 * angle), torch.sin(2 * angle))


@pytest.mark.parametrize("power", [1.0, 2.5], ids=["p1", "p2.5"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("roped", [False, True], ids=["plain", "roped"])
@pytest.mark.parametrize("mirrored", [False, True], ids=["relu", "mirror"])
@pytest.mark.parametrize("shares", [1, 3], ids=["one", "three"])
@pytest.mark.parametrize("N,M", [(1, 1), (7, 9), (12, 4)], ids=lambda n: f"N{n}")
def test_linear_form_equals_the_quadratic_form(N, M, shares, mirrored, roped, masked, power):
    q, k, v, mirror = inputs(N=N, M=M)
    options = {
        "mirror": mirror if mirrored else None,
        "q_rope": rope_tables(1, N, 8) if roped else None,
        "k_rope": rope_tables(1, M, 8) if roped else None,
        "mask": (torch.arange(M) < max(1, M - 2)).expand(2, M) if masked else None,
        "power": power,
    }
    expected = quadratic(q, k, v, **options)
    if shares > 1:
        options["query_mirrors"] = [inputs(seed=seed)[3] for seed in range(1, 1 + shares)]
        parts = [
            read_through(
                one, q, k, part, **{name: options[name] for name in ("mirror", "q_rope", "k_rope", "mask", "power")}
            )
            for one, part in zip(options["query_mirrors"], v.chunk(shares, -1), strict=True)
        ]
        expected = torch.cat(parts, -1)
    found = mirror_linear_attention(q, k, v, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_what_one_mirror_cuts_off_a_query_the_one_at_a_right_angle_keeps():
    q, _, _, (cos, sin) = inputs()
    angle = torch.atan2(sin, cos) / 2 + torch.pi / 2
    both = feature_map(q, (cos, sin)).square() + feature_map(q, (torch.cos(2 * angle), torch.sin(2 * angle))).square()
    torch.testing.assert_close(both.sum(-1), q.square().sum(-1))


def test_gradients_agree_with_finite_differences():
    q, k, v, (cos, sin) = inputs(B=1, N=3, M=4, H=2, dk=4, dv=2)
    rope_q, rope_k = rope_tables(1, 3, 4), rope_tables(2, 2, 4)

    def attend(q, k, v, cos, sin):
        return mirror_linear_attention(q, k, v, mirror=(cos, sin), q_rope=rope_q, k_rope=rope_k, eps=1e-3)

    leaves = [x.requires_grad_() for x in (q, k, v, cos, sin)]
    assert torch.autograd.gradcheck(attend, leaves)


def test_masked_keys_do_not_matter_even_if_they_are_not_finite():
    q, k, v, mirror = inputs()
    mask = (torch.arange(9) < 6).expand(2, 9)
    v_bad = v.clone()
    v_bad[:, 6:] = float("inf")
    out = mirror_linear_attention(q, k, v_bad, mirror=mirror, mask=mask)
    torch.testing.assert_close(out, mirror_linear_attention(q, k[:, :6], v[:, :6], mirror=mirror))


def test_states_of_two_halves_add_up_by_their_counts():
    _, k, v, _ = inputs()
    whole, key_mean, count = kv_state(k, v)
    parts = [kv_state(k[:, part], v[:, part]) for part in (slice(0, 4), slice(4, 9))]
    total = sum(part[2] for part in parts)
    torch.testing.assert_close(sum(p[0] * p[2][:, None, None, None] for p in parts) / total[:, None, None, None], whole)
    torch.testing.assert_close(sum(p[1] * p[2][:, None, None] for p in parts) / total[:, None, None], key_mean)
    torch.testing.assert_close(total, count)


def test_an_all_zero_map_gives_zero_and_finite_gradients():
    q, k, v, _ = inputs()
    q, k = -q.abs(), -k.abs()
    q.requires_grad_(), k.requires_grad_()
    out = mirror_linear_attention(q, k, v)
    assert out.abs().max() == 0.0
    out.sum().backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_67200_tokens_stay_finite_in_half_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 67_200, 2, 16, generator=generator) * 30 for _ in range(3))
    out = mirror_linear_attention(q.to(dtype), k.to(dtype), v.to(dtype))
    assert out.dtype == dtype and out.isfinite().all()
    state, key_mean, _ = kv_state(k.to(dtype), v.to(dtype))
    assert state.dtype == key_mean.dtype == torch.float32
    exact = mirror_linear_attention(*(x.to(dtype).double() for x in (q, k, v)))
    error = (out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < {torch.bfloat16: 1.8e-3, torch.float16: 2.5e-4}[dtype]  # little above rounding the output


def test_no_half_precision_sum_under_autocast():
    q, k, v, _ = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mirror_linear_attention(q, k, v)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, quadratic(q, k, v), rtol=1e-4, atol=1e-5)


def test_apply_state_reads_what_kv_state_wrote():
    q, k, v, mirror = inputs()
    state, key_mean, _ = kv_state(k, v, mirror=mirror)
    torch.testing.assert_close(apply_state(q, state, key_mean, mirror=mirror), quadratic(q, k, v, mirror))


def test_rotation_depends_on_relative_positions_only():
    cos, sin = rope_tables(6, 5, 8)
    q, k = (torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))

    def product(a, b):
        return (rotate(q, cos[a : a + 1], sin[a : a + 1]) * rotate(k, cos[b : b + 1], sin[b : b + 1])).sum()

    row, column = 5, 1  # one row is five tokens further
    torch.testing.assert_close(product(0, row + column), product(7, 7 + row + column), rtol=1e-5, atol=1e-5)
    assert (product(0, row) - product(0, column)).abs() > 1e-3
