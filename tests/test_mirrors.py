import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrorla.mirrors import (
    NEUTRAL_ANGLE,
    aligned_angle,
    angle_modulation,
    block_mirror,
    cross_head_mirror,
    reflect_rows,
    relative_variance,
    token_moments,
)

HEADS = st.integers(1, 4)
BLOCKS = st.integers(1, 9)
SEEDS = st.integers(0, 2**31)


def tables(angle):
    return torch.cos(2 * angle), torch.sin(2 * angle)


def draw(seed, *shape, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


@given(SEEDS, HEADS, BLOCKS)
@settings(deadline=None)
def test_block_mirror_is_an_isometry_an_involution_and_keeps_inner_products(seed, H, J):
    angle = draw(seed, H, J) * math.pi
    q, k = draw(seed + 1, 2, 5, H, 2 * J), draw(seed + 2, 2, 5, H, 2 * J)
    mirrored_q, mirrored_k = block_mirror(q, *tables(angle)), block_mirror(k, *tables(angle))
    torch.testing.assert_close(mirrored_q.norm(dim=-1), q.norm(dim=-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block_mirror(mirrored_q, *tables(angle)), q, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((mirrored_q * mirrored_k).sum(-1), (q * k).sum(-1), rtol=1e-11, atol=1e-11)


@given(SEEDS, HEADS, BLOCKS)
@settings(deadline=None)
def test_cross_head_mirror_is_an_involution_and_keeps_the_sum_over_heads(seed, H, J):
    C = 2 * H * J
    u, q, k = draw(seed, C), draw(seed + 1, 3, C), draw(seed + 2, 3, C)
    torch.testing.assert_close(cross_head_mirror(cross_head_mirror(q, u), u), q, rtol=1e-11, atol=1e-11)
    products = (cross_head_mirror(q, u) * cross_head_mirror(k, u)).sum(-1)
    torch.testing.assert_close(products, (q * k).sum(-1), rtol=1e-10, atol=1e-10)


def test_block_mirror_is_the_householder_matrix():
    angle = torch.tensor([0.3, 1.9], dtype=torch.float64)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for block, t in enumerate(angle):
        n = torch.stack((t.cos(), t.sin()))
        expected[2 * block : 2 * block + 2, 2 * block : 2 * block + 2] = torch.eye(2) - 2 * torch.outer(n, n)
    x = draw(0, 7, 4)
    torch.testing.assert_close(block_mirror(x, *tables(angle)), x @ expected, rtol=1e-13, atol=1e-13)


def test_cross_head_mirror_is_the_householder_matrix_and_a_zero_normal_does_nothing():
    u, x = draw(0, 6), draw(1, 5, 6)
    matrix = torch.eye(6, dtype=torch.float64) - 2 * torch.outer(u, u) / u.dot(u)
    torch.testing.assert_close(cross_head_mirror(x, u), x @ matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cross_head_mirror(x, torch.zeros_like(u)), x)


def test_neutral_angle_swaps_the_two_channels():
    x = draw(0, 3, 6)
    swapped = x.unflatten(-1, (3, 2)).flip(-1).flatten(-2)
    angle = torch.full((3,), NEUTRAL_ANGLE, dtype=torch.float64)
    torch.testing.assert_close(block_mirror(x, *tables(angle)), swapped, rtol=1e-14, atol=1e-14)


def test_reflecting_the_rows_equals_reflecting_the_features():
    H, J, C_in = 3, 4, 10
    weight, x, u = draw(0, 2 * H * J, C_in), draw(1, 5, C_in), draw(2, 2 * H * J)
    angle = draw(3, H, J)
    features = cross_head_mirror(x @ weight.T, u).unflatten(-1, (H, 2 * J))
    expected = block_mirror(features, *tables(angle)).flatten(-2)
    torch.testing.assert_close(x @ reflect_rows(weight, u, *tables(angle)).T, expected, rtol=1e-11, atol=1e-11)


def test_aligned_angle_sends_the_mean_onto_the_diagonal():
    mean = draw(0, 50, 8)
    mirrored = block_mirror(mean, *tables(aligned_angle(mean))).unflatten(-1, (4, 2))
    torch.testing.assert_close(mirrored[..., 0], mirrored[..., 1], rtol=1e-12, atol=1e-12)
    assert (mirrored > 0).all()


@given(SEEDS, st.floats(1e-3, 1e3), st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None)
def test_relative_variance_is_bounded_and_does_not_depend_on_scale(seed, scale, N, M):
    q, k = draw(seed, 2, N, 3, 8) + 0.5, draw(seed + 1, 2, M, 3, 8) - 0.2
    rho = relative_variance(q, k)
    assert rho.shape == (2, 3, 4)
    assert ((rho >= 0) & (rho <= 1)).all()
    # The denominator is the block's energy E|x|^2 / 2, times scale^2, plus 1e-6: the only thing that scale changes.
    energy = torch.cat((q, k), dim=1).square().unflatten(-1, (4, 2)).sum(-1).mean(1) / 2
    change = (relative_variance(q * scale, k * scale) - rho).abs()
    assert (change <= 1e-6 * (1 + scale**-2) / energy + 1e-9).all()


def test_relative_variance_pools_queries_and_keys_as_one_set():
    q, k = draw(0, 2, 6, 3, 4), draw(1, 2, 9, 3, 4)
    both = torch.cat((q, k), dim=1)
    mean = both.mean(1)
    spread = (both - mean.unsqueeze(1)).square().unflatten(-1, (2, 2)).sum(-1).mean(1) / 2
    centre = mean.unflatten(-1, (2, 2)).square().sum(-1) / 2
    torch.testing.assert_close(relative_variance(q, k), spread / (spread + centre + 1e-6), rtol=1e-12, atol=1e-12)


def test_relative_variance_of_one_token_is_finite_and_zero():
    q = draw(0, 2, 1, 3, 4)
    torch.testing.assert_close(relative_variance(q, q), torch.zeros(2, 3, 2, dtype=torch.float64))
    assert relative_variance(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)).item() == 0.0


def test_relative_variance_ignores_masked_tokens():
    q, k = draw(0, 2, 6, 3, 4), draw(1, 2, 9, 3, 4)
    q_padded = torch.cat((q, torch.full((2, 3, 3, 4), 1e3, dtype=torch.float64)), dim=1)
    mask = torch.arange(9).expand(2, 9) < 6
    torch.testing.assert_close(relative_variance(q_padded, k, mask, None), relative_variance(q, k))


def test_moments_of_a_fully_masked_row_are_finite():
    mean, variance, count = token_moments(draw(0, 1, 4, 1, 2), torch.zeros(1, 4, dtype=torch.bool))
    assert mean.abs().max() == variance.abs().max() == count.item() == 0.0


def test_moments_have_the_derivatives_of_their_definition():
    x = draw(0, 2, 6, 3, 4).requires_grad_()
    weights = draw(1, 2, 3, 4), draw(2, 2, 3, 4)

    def plain(x):
        mean = x.mean(1)
        return mean, (x - mean.unsqueeze(1)).square().mean(1)

    found, expected = (
        torch.autograd.grad(function(x)[:2], x, weights, create_graph=True)[0] for function in (token_moments, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda x: token_moments(x)[:2], x)


@pytest.mark.parametrize("gain", [0.0, 1.0, 1e6])
def test_modulation_is_bounded_and_off_at_zero_gain(gain):
    rho = torch.rand(5, 2, 3)
    delta = angle_modulation(rho, torch.full((2, 3), gain), torch.full((2, 3), 0.5), math.pi / 8)
    assert delta.abs().max() <= math.pi / 8 + 1e-7
    assert gain != 0.0 or delta.abs().max() == 0.0
